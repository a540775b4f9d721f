"""The additional tasks of an export in quantised precision: quantisation part by part, and the report."""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from tpx_export.description import build_manifest
from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import CALIBRATED_PRECISIONS, QUANTISED_PRECISIONS, WEIGHT_BITS
from tpx_export.quantise.calibration import (
    CalibrationInputs,
    HistogramAndGram,
    Recorder,
    collect_activations,
)
from tpx_export.quantise.gptq import Gram
from tpx_export.quantise.layers import Layers, block_linears, encoder_linears, modulations
from tpx_export.quantise.linear import replace_layers
from tpx_export.quantise.measure import compare_with_fp32
from tpx_export.quantise.prompts import PromptFile, choose_subjects
from tpx_export.quantise.report import Report, fastest
from tpx_export.quantise.score import score
from tpx_export.quantise.speed import available_engines, speed
from tpx_runtime.bundle import Bundle, describe_files
from tpx_runtime.engine import resolve
from tpx_runtime.errors import BadInput

Tasks = Callable[[str], AbstractContextManager[None]]
R = TypeVar("R", bound=Recorder)
MAX_SCORE_PROMPTS = 92  # of each kind of ShapesEval


@dataclass(frozen=True)
class QuantisationOptions:
    """Options of the quantised precisions.

    `calibration` is a file of prompts, None for the default ones (prompts.py). With `accept_loss` the bundle is kept even if
    it loses too much or gains nothing. `score_prompts` is the number of images per kind of ShapesEval, or per shape for the
    class-conditional sample model; 0 for no score.
    """

    calibration: PromptFile | None = None
    accept_loss: bool = False
    score_prompts: int = MAX_SCORE_PROMPTS

    def check(self, precision: str | None) -> None:
        """Check what can be checked without the model; `precision` None is the pipeline's. Raises BadInput."""
        if precision not in QUANTISED_PRECISIONS:
            found = precision or "no --precision"
            raise BadInput(
                "expected --calibration, --score-prompts and --accept-loss only with precision "
                f"{', '.join(QUANTISED_PRECISIONS)}, found {found}; leave them out"
            )
        if not 0 <= self.score_prompts <= MAX_SCORE_PROMPTS:
            raise BadInput(
                f"expected 0 to {MAX_SCORE_PROMPTS} prompts of each kind of ShapesEval, found {self.score_prompts}"
            )
        if self.calibration and precision not in CALIBRATED_PRECISIONS:
            raise BadInput(
                f"expected no calibration prompts for {precision}, found {self.calibration.path}; leave it out, "
                "this precision needs none"
            )
        if self.calibration:
            _ = self.calibration.lines


class Quantiser:
    """Quantises the parts of one export, each while it is in memory, and reports the result."""

    def __init__(self, pipeline: Pipeline, precision: str, options: QuantisationOptions) -> None:
        """`options` must have been checked. Raises BadInput for calibration prompts that the model cannot read."""
        self.weights_only, self._bits = precision in WEIGHT_BITS, WEIGHT_BITS.get(precision, 8)
        self._calibrated = precision in CALIBRATED_PRECISIONS
        self.precision, self.options, self.layers = precision, options, 0
        self._pipeline = pipeline
        self._subjects = choose_subjects(pipeline, options.calibration)
        self._inputs = CalibrationInputs(self._subjects.calibration)

    def task_count(self, depths: Sequence[int]) -> int:
        """How many tasks quantisation adds to an export."""
        each_depth = self._calibrated + self.weights_only  # calibration, float16 graphs for GPUs
        rounding = self._calibrated
        fp32 = 1 + len(depths) + 1  # conditions, depths, and the rest of the fp32 bundle
        return each_depth * len(depths) + rounding + fp32 + len(available_engines()) + len(depths) + 1

    def add_text_encoder(self, part: TextPart, encoder: nn.Module) -> None:
        """Encode the calibration prompts with a text encoder in its stored precision."""
        if self._calibrated:
            self._inputs.add_text_encoder(part, encoder)

    def quantise_text_encoder(self, encoder: nn.Module) -> None:
        """Quantise the weights of a float32 text encoder in place, to int8 in every precision."""
        layers = encoder_linears(encoder)
        replace_layers(encoder, layers)
        self.layers += len(layers)

    def quantise_transformer(self, module: nn.Module, depths: Sequence[int], tasks: Tasks) -> None:
        """Quantise a float32 transformer in place, after the calibration that the precision needs."""
        layers = block_linears(module) | (modulations(module) if self.weights_only else {})
        if not self._calibrated:
            replace_layers(module, layers, bits=self._bits)
        elif self.weights_only:
            grams = self._record(Gram, module, layers, depths, tasks)
            with tasks("rounding"):
                replace_layers(module, layers, bits=self._bits, grams=grams)
        else:
            records = self._record(HistogramAndGram, module, layers, depths, tasks)
            with tasks("rounding"):
                steps = {name: record.histogram.step_size() for name, record in records.items()}
                grams = {name: record.gram for name, record in records.items()}
                replace_layers(module, layers, steps, grams=grams)
        self.layers += len(layers)

    def _record(
        self, kind: Callable[[], R], module: nn.Module, layers: Layers, depths: Sequence[int], tasks: Tasks
    ) -> dict[str, R]:
        """A record of the inputs of each of `layers`, over the calibration trajectories."""
        records, conditioning = {name: kind() for name in layers}, self._inputs.rows(self._pipeline)
        for depth in depths:
            with tasks(f"calibration depth {depth}"):
                collect_activations(module, layers, records, self._pipeline, conditioning, depth)
        return records

    def report(self, quantised: Bundle, fp32: Bundle, tasks: Tasks) -> Report:
        """Compare the bundle with that of the same model in fp32. Raises EngineFailed, EngineUnavailable."""
        speeds, depths = [], []
        for engine in available_engines():
            with tasks(f"speed {engine.name}"):
                speeds.append(speed(quantised, fp32, engine))
        onnxruntime = resolve("onnxruntime")
        for depth in quantised.manifest.model.depths:
            with tasks(f"images depth {depth}"):
                depths.append(
                    compare_with_fp32(quantised, fp32, onnxruntime, depth, self._subjects.comparison)
                )
        with tasks("score"):  # on the engines whose speeds are compared
            fastest_fp32, fastest_quantised = (resolve(report.engine) for report in fastest(speeds))
            score_report = score(quantised, fastest_quantised, fp32, fastest_fp32, self.options.score_prompts)
        folders = ["transformer"]
        if self.weights_only:
            folders += [part.spec.folder for part in self._pipeline.text]
        return Report(
            precision=self.precision,
            layers=self.layers,
            trajectories=len(self._subjects.calibration) * len(depths) if self._calibrated else 0,
            depths=tuple(depths),
            speeds=tuple(speeds),
            score=score_report,
            sizes={name: (fp32.folder_bytes(name), quantised.folder_bytes(name)) for name in folders},
        )


def complete_fp32_bundle(fp32: Path, quantised: Bundle, pipeline: Pipeline) -> Bundle:
    """The bundle at `fp32`, its missing files taken from `quantised`. Raises OSError."""
    for name in quantised.manifest.files:
        # Of the transformer all was written in fp32; what is missing there is the fused variant, which would be quantised.
        if name.startswith("transformer/") or (fp32 / name).exists():
            continue
        (fp32 / name).parent.mkdir(parents=True, exist_ok=True)
        _link(quantised.root / name, fp32 / name)
    files = describe_files(fp32)
    return Bundle(fp32, build_manifest(pipeline, quantised.manifest.model.depths, "fp32", files))


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy if the file system does not support hard links."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
