"""A quantised bundle against fp32 in one engine: transformers on equal inputs along fp32's trajectories, then images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from tpx_export.quantise.prompts import images_per_batch
from tpx_export.quantise.report import DepthReport
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import Arrays, Engine, Session
from tpx_runtime.evaluation.similarity import psnr_db
from tpx_runtime.generator import Generator
from tpx_runtime.verify import relative_error

SEED = 20260601  # of the first image; calibration has other seeds


@dataclass
class ComparisonTotals:
    """Totals over all calls: the error of each call, and the number of equal routes among all `routes`."""

    errors: list[float] = field(default_factory=list)
    equal_routes: int = 0
    routes: int = 0

    @property
    def agreement(self) -> float | None:
        return self.equal_routes / self.routes if self.routes else None


class _PairedSession:
    """An fp32 session that also runs each call in the quantised session and compares the outputs."""

    def __init__(self, fp32: Session, quantised: Session, prediction: str, totals: ComparisonTotals) -> None:
        self._fp32, self._quantised, self._prediction, self._totals = fp32, quantised, prediction, totals

    def run(self, inputs: Arrays) -> Arrays:
        expected, found = self._fp32.run(inputs), self._quantised.run(inputs)
        name = self._prediction
        self._totals.errors.append(relative_error(found.get(name), expected[name]))
        if "routes" in expected:
            self._totals.equal_routes += int((expected["routes"] == found["routes"]).sum())
            self._totals.routes += expected["routes"].size
        return expected


class PairedEngine:
    """Has the interface of an engine, opens the graphs of `fp32`, and runs each transformer together with `quantised`'s."""

    device_loops = None  # outputs must return to the host after each call to be compared

    def __init__(self, engine: Engine, fp32: Bundle, quantised: Bundle, totals: ComparisonTotals) -> None:
        self.name, self.variant = engine.name, engine.variant
        self._engine, self._fp32, self._quantised, self._totals = engine, fp32, quantised, totals

    def open(self, path: Path) -> Session:
        session = self._engine.open(path)
        model = self._fp32.manifest.model
        if path not in [self._fp32.transformer(depth, self.variant) for depth in model.depths]:
            return session
        quantised = self._engine.open(self._quantised.root / path.relative_to(self._fp32.root))
        return _PairedSession(session, quantised, model.prediction, self._totals)


def compare_with_fp32(
    quantised: Bundle, fp32: Bundle, engine: Engine, depth: int, subjects: Sequence[str | int]
) -> DepthReport:
    """Generate an image of each subject in both precisions with the bundle's default settings. Raises EngineFailed."""
    totals = ComparisonTotals()
    paired = PairedEngine(engine, fp32, quantised, totals)
    expected = generate_images(Generator(fp32, paired), subjects, depth=depth)
    found = generate_images(Generator(quantised, engine), subjects, depth=depth)
    psnrs = [psnr_db(*pair) for pair in zip(found, expected, strict=True)]
    return DepthReport(
        engine=engine.name,
        depth=depth,
        calls=len(totals.errors),
        error_median=median(totals.errors),
        error_worst=max(totals.errors),
        agreement=totals.agreement,
        images=len(psnrs),
        psnr_median_db=float(np.median(psnrs)),
        psnr_worst_db=min(psnrs),
    )


def generate_images(
    generator: Generator, subjects: Sequence[str | int], **settings: Any
) -> list[Image.Image]:
    """One image of each prompt or class, with consecutive seeds from SEED."""
    jobs = []
    for number, subject in enumerate(subjects):
        condition = {"prompt": subject} if isinstance(subject, str) else {"class_id": subject}
        jobs += generator.plan(seed=SEED + number, **condition, **settings)
    return generator.generate(jobs, images_per_batch(generator.manifest.model))
