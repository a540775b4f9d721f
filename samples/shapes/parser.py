"""The scene parser: pictures -> scenes, so that `satisfies(scene, prompt)` can judge what a model drew.

A small network (trained by train_parser.py on renders alone; it never sees a generator) says of each cell of
a CELLS x CELLS grid how likely an object's projected centre lies there, which shape and colour that object
has, and where in the world it stands. Needs numpy and onnxruntime, not torch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

from samples.shapes.world import COLOURS, MAX_OBJECTS, SHAPES, Scene, Thing

WEIGHTS = Path(__file__).with_name("parser.onnx")
RECORD = Path(__file__).with_name("parser.json")  # accuracy on fresh renders, and the command that made both
SIDE_PX, CELLS = 128, 32
THRESHOLD = 0.4  # a peak of the heat map below this is no object
Floats = npt.NDArray[np.float32]


def peaks(heat: Floats) -> list[list[tuple[int, int]]]:
    """Heat maps [B, S, S] in 0..1 -> of each the (row, column) of 3x3 maxima above THRESHOLD, hottest first.

    A scene holds at most MAX_OBJECTS; one peak more is returned, so that a picture with too many shows it.
    """
    padded = np.pad(heat, ((0, 0), (1, 1), (1, 1)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).max(axis=(-1, -2))
    top = (heat >= around) & (heat > THRESHOLD)
    found = []
    for picture, hot in zip(heat, top, strict=True):
        cells = [(int(row), int(column)) for row, column in np.argwhere(hot)]
        found.append(sorted(cells, key=lambda cell: -picture[cell])[: MAX_OBJECTS + 1])
    return found


def decode(heat: Floats, shape: Floats, colour: Floats, place: Floats) -> list[Scene]:
    """The network's answers -> scenes, each thing read off at a peak of the heat map; yaw is left at 0.

    heat [B, S, S] in 0..1; shape [B, 4, S, S] and colour [B, 8, S, S] scores; place [B, 4, S, S]: x, y, z and
    size in world units.
    """
    shapes, colours = shape.argmax(axis=1), colour.argmax(axis=1)
    hues = tuple(COLOURS)

    def thing(*cell: int) -> Thing:
        b, row, column = cell
        x, y, z, size = map(float, place[b, :, row, column])
        return Thing(SHAPES[shapes[cell]], hues[colours[cell]], x, y, z, size)

    return [tuple(thing(b, *cell) for cell in cells) for b, cells in enumerate(peaks(heat))]


class Parser:
    """The network of one ONNX file, ready to read pictures."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> "Parser":
        return cls(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]))

    def parse(
        self, images: npt.NDArray[np.uint8] | Sequence[Image.Image], batch_size: int = 32
    ) -> list[Scene]:
        """Pictures, uint8 [B, 128, 128, 3] or PIL images (resized to that), -> what each of them shows."""
        pixels = images if isinstance(images, np.ndarray) else _stack(images)
        if pixels.shape[1:] != (SIDE_PX, SIDE_PX, 3) or pixels.dtype != np.uint8:
            wanted = f"uint8 [B, {SIDE_PX}, {SIDE_PX}, 3]"
            raise ValueError(f"expected pictures {wanted}, got {pixels.dtype} {list(pixels.shape)}")
        scenes: list[Scene] = []
        for start in range(0, len(pixels), batch_size):
            scenes += decode(*self._session.run(None, {"image": pixels[start : start + batch_size]}))
        return scenes


def _stack(images: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
    side = (SIDE_PX, SIDE_PX)  # resize copies a picture that has this size already
    pixels = [np.asarray(image.convert("RGB").resize(side, Image.Resampling.BICUBIC)) for image in images]
    return np.stack(pixels) if pixels else np.empty((0, *side, 3), np.uint8)
