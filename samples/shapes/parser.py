"""The scene parser: images -> scenes, so that `satisfies(scene, prompt)` can judge the images of a model.

A small network predicts for each cell of a CELLS x CELLS grid the probability that an object's projected centre lies
in it, and that object's shape, colour and position in the world. train_parser.py trains it on renders only, never on
images of a model. Needs numpy and onnxruntime, not torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from samples.shapes.world import COLOURS, MAX_OBJECTS, SHAPES, SIDE_PX, Scene, SceneObject
from tpx_runtime.errors import EngineUnavailable

if TYPE_CHECKING:
    import onnxruntime as ort

WEIGHTS = Path(__file__).with_name("parser.onnx")
RECORD = Path(__file__).with_name("parser.json")  # accuracy on fresh renders, and the command that made both
CELLS = 32
THRESHOLD = 0.4  # lower peaks of the heat map are ignored
Floats = npt.NDArray[np.float32]


def peaks(heat: Floats) -> list[list[tuple[int, int]]]:
    """Heat maps [B, S, S] in 0..1 -> for each, the (row, column) of its 3x3 maxima above THRESHOLD, highest first.

    At most MAX_OBJECTS + 1 are returned, so that an image with too many objects is recognised as such.
    """
    padded = np.pad(heat, ((0, 0), (1, 1), (1, 1)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).max(axis=(-1, -2))
    top = (heat >= around) & (heat > THRESHOLD)
    cells_by_image = []
    for heat_map, hot in zip(heat, top, strict=True):
        cells = [(int(row), int(column)) for row, column in np.argwhere(hot)]
        cells_by_image.append(sorted(cells, key=lambda cell: -heat_map[cell])[: MAX_OBJECTS + 1])
    return cells_by_image


def decode(heat: Floats, shape: Floats, colour: Floats, place: Floats) -> list[Scene]:
    """The network's outputs -> scenes, with one object for each peak of the heat map; yaw is always 0.

    heat [B, S, S] in 0..1; shape [B, 4, S, S] and colour [B, 8, S, S] logits; place [B, 4, S, S]: x, y, z and
    size in world units.
    """
    shapes, colours = shape.argmax(axis=1), colour.argmax(axis=1)
    colour_names = tuple(COLOURS)

    def object_at(*cell: int) -> SceneObject:
        b, row, column = cell
        x, y, z, size = map(float, place[b, :, row, column])
        return SceneObject(SHAPES[shapes[cell]], colour_names[colours[cell]], x, y, z, size)

    return [tuple(object_at(b, *cell) for cell in cells) for b, cells in enumerate(peaks(heat))]


class Parser:
    """Runs the parser network, an ONNX file."""

    def __init__(self, session: "ort.InferenceSession") -> None:
        self._session = session

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> "Parser":
        """Read the network of an ONNX file. Raises EngineUnavailable without ONNX Runtime."""
        try:
            import onnxruntime as ort
        except ModuleNotFoundError:
            raise EngineUnavailable(
                "expected onnxruntime, which runs the judge of ShapesEval, found none; pip install 'tpx[cpu]'"
            ) from None
        return cls(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]))

    def parse(
        self, images: npt.NDArray[np.uint8] | Sequence[Image.Image], batch_size: int = 32
    ) -> list[Scene]:
        """Images, uint8 [B, 128, 128, 3] or PIL images (resized to 128 x 128), -> the scene in each of them."""
        pixels = images if isinstance(images, np.ndarray) else _to_pixels(images)
        if pixels.shape[1:] != (SIDE_PX, SIDE_PX, 3) or pixels.dtype != np.uint8:
            required = f"uint8 [B, {SIDE_PX}, {SIDE_PX}, 3]"
            raise ValueError(f"expected images {required}, found {pixels.dtype} {list(pixels.shape)}")
        scenes: list[Scene] = []
        for start in range(0, len(pixels), batch_size):
            scenes += decode(*self._session.run(None, {"image": pixels[start : start + batch_size]}))
        return scenes


def _to_pixels(images: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
    side = (SIDE_PX, SIDE_PX)  # images of this size are only copied
    pixels = [np.asarray(image.convert("RGB").resize(side, Image.Resampling.BICUBIC)) for image in images]
    return np.stack(pixels) if pixels else np.empty((0, *side, 3), np.uint8)
