"""Milliseconds of a transformer call, quantised and in fp32, in every installed engine that needs no tpx-build."""

import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from tpx_export.quantise.report import SpeedReport
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import ENGINES, Arrays, Engine, Session
from tpx_runtime.verify import load_golden

_WARMUP_ROUNDS, _ROUNDS, _MIN_ROUNDS, _MAX_SECONDS = 3, 41, 5, 20.0


def available_engines() -> list[Engine]:
    """Engines that run on this machine and do not need tpx-build, which has not run for a new bundle."""
    return [
        engine for engine in ENGINES.values() if engine.prebuilt != "required" and engine.problem() is None
    ]


def speed(quantised: Bundle, fp32: Bundle, engine: Engine) -> SpeedReport:
    """Time both bundles in turn at the default depth, with the rows of one image. Raises EngineFailed."""
    depth, rows = quantised.manifest.defaults.depth, 1 if quantised.manifest.defaults.guidance == 1 else 2
    sessions = tuple(engine.open(bundle.transformer(depth, engine.variant)) for bundle in (fp32, quantised))
    fp32_ms, quantised_ms = time_interleaved(sessions, _inputs(quantised, rows))
    return SpeedReport(engine.name, depth, rows, fp32_ms, quantised_ms)


def time_interleaved(sessions: Sequence[Session], inputs: Arrays) -> list[float]:
    """Median milliseconds of each session. Their order alternates, so that a slow moment of the machine affects all."""
    milliseconds: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    for _ in range(_WARMUP_ROUNDS):
        for session in sessions:
            session.run(inputs)
        if time.perf_counter() - start > _MAX_SECONDS:  # a large model warms up in one round
            break
    start = time.perf_counter()
    indices = range(len(sessions))
    for number in range(_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() - start > _MAX_SECONDS:
            break
        for index in indices if number % 2 else reversed(indices):
            call_start = time.perf_counter()
            sessions[index].run(inputs)
            milliseconds[index].append(1e3 * (time.perf_counter() - call_start))
    return [median(times) for times in milliseconds]


def _inputs(bundle: Bundle, rows: int) -> Arrays:
    """The golden inputs of a transformer, repeated or truncated to `rows` rows."""
    golden = load_golden(bundle)
    return {
        name: np.resize(golden[name], (rows, *golden[name].shape[1:]))
        for name in bundle.manifest.model.transformer_inputs
    }
