"""Fixtures for benchmark plans whose configurations need no engine, but run in real worker processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpx_engines.bench.configurations import Configuration
from tpx_engines.bench.machine import THREAD_VARIABLES
from tpx_engines.bench.measure import Plan
from tpx_engines.bench.record import Record
from tpx_engines.bench.runner import Workload

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {
    "bundle": "paper",
    "bundle_sha256": "0" * 64,
    "precision": "fp32",
    "image_size_px": [8, 12],
    "ckpt_sha256": None,
    "prompt": "a cube",
    "class_id": None,
    "seed": 0,
    "steps": 3,
    "guidance": 3.0,
    "sampler": "euler",
    "machine": {
        "processor": "a processor",
        "cores": 2,
        "memory_gib": 8,
        "gpu": None,
        "system": "Linux",
        "python": "3.11",
    },
}


@pytest.fixture(autouse=True)
def every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the limits on threads that are set on this machine, because tpx-bench rejects them."""
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let worker processes import bench_factories."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def configuration(tmp_path: Path) -> Callable[..., Configuration]:
    """Makes a configuration with the name of its factory."""

    def make(factory: str, **options: Any) -> Configuration:
        fields = {
            name: options.pop(name)
            for name in ("compiles", "problem", "packages", "device")
            if name in options
        }
        log = {"log": str(tmp_path / "log"), **options}
        return Configuration(factory, depth=2, factory=f"bench_factories:{factory}", options=log, **fields)

    return make


@pytest.fixture
def started(tmp_path: Path) -> Callable[[], list[int]]:
    """Process ids of the runners created so far."""
    log = tmp_path / "log"
    return lambda: [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def make(*configurations: Configuration, rounds: int = 2, batches: tuple[int, ...] = (1, 2)) -> Plan:
        workload = Workload(tmp_path, 2, "a cube", None, seed=0, steps=3, guidance=3.0, sampler="euler")
        return Plan(workload, configurations, configurations[0].name, rounds, batches, sample_s=0)

    return make


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Record]:
    """Opens the record in this test's results file, a new one or the existing one."""
    return lambda **changes: Record.begin(tmp_path / "bench.json", {**SETTINGS, **changes})


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the peak measurement: torch takes seconds to import, and it has its own test."""
    monkeypatch.setattr("tpx_engines.bench.measure.PEAKS", ())
