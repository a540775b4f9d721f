"""int8 against fp32 in one engine: both transformers on the same inputs along fp32's trajectories, then both pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
from PIL import Image

from tpx_export.quantise.prompts import drawn_together
from tpx_export.quantise.report import DepthReport
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import Arrays, Engine, Session
from tpx_runtime.evaluation.similarity import psnr_db
from tpx_runtime.generator import Generator
from tpx_runtime.verify import relative_error

SEED = 20260601  # of the first picture: not among calibration's


@dataclass
class Tally:
    """Totals of all calls so far: the error of each, and how many routes were the same, of how many."""

    errors: list[float] = field(default_factory=list)
    same: int = 0
    routes: int = 0

    @property
    def agreement(self) -> float | None:
        return self.same / self.routes if self.routes else None


class _Pair:
    """An fp32 session that also runs each call in int8 and compares the two."""

    def __init__(self, fp32: Session, int8: Session, prediction: str, tally: Tally) -> None:
        self._fp32, self._int8, self._prediction, self._tally = fp32, int8, prediction, tally

    def run(self, inputs: Arrays) -> Arrays:
        expected, found = self._fp32.run(inputs), self._int8.run(inputs)
        name = self._prediction
        self._tally.errors.append(relative_error(found.get(name), expected[name]))
        if "routes" in expected:
            self._tally.same += int((expected["routes"] == found["routes"]).sum())
            self._tally.routes += expected["routes"].size
        return expected


class PairedEngine:
    """Looks like an engine to the runtime: it opens the graphs of `fp32`, each transformer together with `int8`'s."""

    uses_device_loop = False  # each call returns to the host, which compares

    def __init__(self, engine: Engine, fp32: Bundle, int8: Bundle, tally: Tally) -> None:
        self.name, self.variant, self.precision = engine.name, engine.variant, engine.precision
        self._engine, self._fp32, self._int8, self._tally = engine, fp32, int8, tally

    def open(self, path: Path) -> Session:
        session = self._engine.open(path)
        model = self._fp32.manifest.model
        if path not in [self._fp32.transformer(depth, self.variant) for depth in model.depths]:
            return session
        other = self._engine.open(self._int8.root / path.relative_to(self._fp32.root))
        return _Pair(session, other, model.prediction, self._tally)


def against_fp32(
    int8: Bundle, fp32: Bundle, engine: Engine, depth: int, subjects: Sequence[str | int]
) -> DepthReport:
    """One picture of every subject in both precisions, at the bundle's own settings. Raises EngineFailed."""
    tally = Tally()
    paired = cast(Engine, PairedEngine(engine, fp32, int8, tally))
    expected = pictures(Generator(fp32, paired), subjects, depth=depth)
    found = pictures(Generator(int8, engine), subjects, depth=depth)
    psnrs = [psnr_db(*pair) for pair in zip(found, expected, strict=True)]
    return DepthReport(
        engine=engine.name,
        depth=depth,
        calls=len(tally.errors),
        error_median=median(tally.errors),
        error_worst=max(tally.errors),
        agreement=tally.agreement,
        pictures=len(psnrs),
        psnr_median_db=float(np.median(psnrs)),
        psnr_worst_db=min(psnrs),
    )


def pictures(generator: Generator, subjects: Sequence[str | int], **settings: Any) -> list[Image.Image]:
    """One picture of each prompt or class, with seeds that count up from SEED."""
    jobs = []
    for number, subject in enumerate(subjects):
        what = {"prompt": subject} if isinstance(subject, str) else {"class_id": subject}
        jobs += generator.plan(seed=SEED + number, **what, **settings)
    return generator.generate(jobs, drawn_together(generator.manifest.model))
