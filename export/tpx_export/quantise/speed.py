"""Milliseconds of a transformer call in int8 and in fp32, on every engine at hand that reads a bundle as it is."""

import time
from statistics import median

import numpy as np

from tpx_export.quantise.report import SpeedReport
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import ENGINES, Arrays, Engine, Session
from tpx_runtime.verify import load_golden

_WARM, _ROUNDS, _LEAST_ROUNDS, _SECONDS = 3, 41, 5, 20.0


def engines_at_hand() -> list[Engine]:
    """Engines that run here without tpx-build: a bundle in the making has no engines built for it."""
    return [one for one in ENGINES.values() if one.prebuilt != "required" and one.problem() is None]


def speed(int8: Bundle, fp32: Bundle, engine: Engine) -> SpeedReport:
    """Time both bundles in turn, at the default depth, with the rows of one picture. Raises EngineFailed."""
    depth, rows = int8.manifest.defaults.depth, 1 if int8.manifest.defaults.guidance == 1 else 2
    first, second = (engine.open(bundle.transformer(depth, engine.variant)) for bundle in (fp32, int8))
    return SpeedReport(engine.name, depth, rows, *interleaved(first, second, _inputs(int8, rows)))


def interleaved(first: Session, second: Session, inputs: Arrays) -> tuple[float, float]:
    """Median milliseconds of both. Their order alternates, so that a slow moment of the machine affects both."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(_WARM):
        first.run(inputs)
        second.run(inputs)
    began = time.perf_counter()
    for number in range(_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS:
            break
        for which in (0, 1) if number % 2 else (1, 0):
            session, start = (first, second)[which], time.perf_counter()
            session.run(inputs)
            took[which].append(1e3 * (time.perf_counter() - start))
    return median(took[0]), median(took[1])


def _inputs(bundle: Bundle, rows: int) -> Arrays:
    """The golden tensors' inputs of a transformer, repeated or cut to `rows` rows."""
    golden = load_golden(bundle)
    return {
        name: np.resize(golden[name], (rows, *golden[name].shape[1:]))
        for name in bundle.manifest.model.transformer_inputs
    }
