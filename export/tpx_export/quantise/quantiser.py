"""What an export does differently at precision int8 and int8-weights, part by part, and what it reports afterwards."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tpx_export.description import manifest
from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import QUANTISED
from tpx_export.quantise.calibration import Told, activations
from tpx_export.quantise.grid import CLIPPING, Magnitudes
from tpx_export.quantise.layers import block_linears, encoder_linears, modulations
from tpx_export.quantise.linear import replace as replace_layers
from tpx_export.quantise.measure import against_fp32
from tpx_export.quantise.prompts import subjects_of
from tpx_export.quantise.report import Report, fastest
from tpx_export.quantise.score import score
from tpx_export.quantise.speed import engines_at_hand, speed
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import resolve
from tpx_runtime.errors import BadInput
from tpx_runtime.prompts import read_prompt_lines

Tasks = Callable[[str], AbstractContextManager[None]]
ALL_PROMPTS = 92  # of each kind of ShapesEval


@dataclass(frozen=True)
class Int8Options:
    """`calibration`: a file of prompts, one a line, None for the model's own (prompts.py). `accept_loss`: keep the bundle
    whatever it costs. `score_prompts`: how many of each kind of ShapesEval are drawn, or of each shape for a model of
    classes, 0 for none. `clipping`: a key of grid.CLIPPING.
    """

    calibration: Path | None = None
    accept_loss: bool = False
    score_prompts: int = ALL_PROMPTS
    clipping: str = "mse"

    def check(self, precision: str | None) -> None:
        """Check what can be checked without the model; `precision` None is that of its stored weights. Raises BadInput."""
        if precision not in QUANTISED:
            found = precision or "no --precision"
            raise BadInput(
                f"expected int8's options with {' or '.join(QUANTISED)}, found {found}; leave them out"
            )
        if self.clipping not in CLIPPING:
            raise BadInput(f"expected clipping of {', '.join(CLIPPING)}, found {self.clipping!r}")
        if not 0 <= self.score_prompts <= ALL_PROMPTS:
            raise BadInput(
                f"expected 0 to {ALL_PROMPTS} prompts of each kind of ShapesEval, found {self.score_prompts}"
            )
        if self.calibration and precision == "int8-weights":
            raise BadInput(
                f"expected no prompts to calibrate with for int8-weights, found {self.calibration}; leave it out, "
                "weights alone need none"
            )
        if self.calibration:
            read_prompt_lines(self.calibration)


class Quantiser:
    """Quantises the parts of one export, each while it is in memory."""

    def __init__(self, pipeline: Pipeline, precision: str, options: Int8Options) -> None:
        """Raises BadInput for prompts of `options`, which are checked by now, that the model cannot read."""
        self.weights_alone = precision == "int8-weights"
        self.precision, self.options, self.layers = precision, options, 0
        self._pipeline = pipeline
        self._subjects = subjects_of(pipeline, options.calibration)
        self._told = Told(self._subjects.calibrating)

    def tasks(self, depths: Sequence[int]) -> int:
        """How many tasks int8 adds to an export."""
        calibrating = 0 if self.weights_alone else len(depths)
        fp32 = 1 + len(depths) + 1  # conditions, depths, and the rest of that bundle
        return calibrating + fp32 + len(engines_at_hand()) + len(depths) + 1

    def hear(self, part: TextPart, encoder: nn.Module) -> None:
        """Encode the prompts of calibration with a text encoder that is still in its own precision."""
        if not self.weights_alone:
            self._told.hear(part, encoder)

    def text_encoder(self, encoder: nn.Module) -> None:
        """Quantise an encoder in float32 in place."""
        layers = encoder_linears(encoder)
        replace_layers(encoder, layers)
        self.layers += len(layers)

    def transformer(self, module: nn.Module, depths: Sequence[int], tasks: Tasks) -> None:
        """Calibrate, where activations are quantised too, and quantise a transformer in float32 in place."""
        layers, steps = block_linears(module), None
        if self.weights_alone:
            layers |= modulations(module)
        else:
            seen = {name: Magnitudes() for name in layers}
            told = self._told.rows(self._pipeline)
            for depth in depths:
                with tasks(f"calibration depth {depth}"):
                    activations(module, layers, seen, self._pipeline, told, depth)
            steps = {name: magnitudes.step(self.options.clipping) for name, magnitudes in seen.items()}
        replace_layers(module, layers, steps)
        self.layers += len(layers)

    def report(self, int8: Bundle, fp32: Bundle, tasks: Tasks) -> Report:
        """Measure the bundle against that of the same model in fp32. Raises EngineFailed, EngineUnavailable."""
        engine, speeds, depths = resolve("onnxruntime"), [], []
        for one in engines_at_hand():
            with tasks(f"speed {one.name}"):
                speeds.append(speed(int8, fp32, one))
        for depth in int8.manifest.model.depths:
            with tasks(f"pictures depth {depth}"):
                depths.append(against_fp32(int8, fp32, engine, depth, self._subjects.shown))
        with tasks("score"):  # on the engines whose speed is judged too
            best_fp32, best_int8 = (resolve(one.engine) for one in fastest(speeds))
            judged = score(int8, best_int8, fp32, best_fp32, self.options.score_prompts)
        folders = ["transformer"]
        if self.weights_alone:
            folders += [part.spec.folder for part in self._pipeline.text]
        return Report(
            precision=self.precision,
            layers=self.layers,
            trajectories=0 if self.weights_alone else len(self._subjects.calibrating) * len(depths),
            clipping=self.options.clipping,
            depths=tuple(depths),
            speeds=tuple(speeds),
            score=judged,
            sizes={name: (fp32.weight_bytes(name), int8.weight_bytes(name)) for name in folders},
        )


@contextmanager
def fp32_beside(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `folder` for the same bundle in fp32; removes it, and what engines keep beside both."""
    fp32 = folder.with_suffix(".fp32")
    try:
        yield fp32
    finally:
        for leftover in (fp32, *(path.with_name(f"{path.name}.engines") for path in (fp32, folder))):
            shutil.rmtree(leftover, ignore_errors=True)


def complete(fp32: Path, int8: Bundle, pipeline: Pipeline) -> Bundle:
    """The bundle at `fp32`, with the files that it lacks taken from `int8`. Raises OSError."""
    for name in int8.manifest.files:
        if not (fp32 / name).exists():
            (fp32 / name).parent.mkdir(parents=True, exist_ok=True)
            _link(int8.root / name, fp32 / name)
    return Bundle(fp32, manifest(pipeline, int8.manifest.model.depths, "fp32", fp32))


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the disk has no such thing."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
