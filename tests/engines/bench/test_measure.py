"""Rounds, failures, different images, continued runs and the report, with real worker processes and no engine."""

import json
import os
import tempfile
from collections.abc import Callable
from ctypes import c_void_p
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tpx_engines.bench import measure
from tpx_engines.bench.configurations import GPU_REFERENCE, REFERENCE, Configuration
from tpx_engines.bench.machine import describe
from tpx_engines.bench.measure import Plan, run
from tpx_engines.bench.memory import gpu_bytes
from tpx_engines.bench.process import MeasurementFailed, WorkerProcess
from tpx_engines.bench.record import Record
from tpx_engines.bench.report import as_text
from tpx_engines.bench.request import Request
from tpx_engines.bench.runner import Runner, Timing, Workload
from tpx_engines.bench.summary import rows
from tpx_engines.bench.worker import Worker
from tpx_runtime.engine.gpu import Gpu
from tpx_runtime.errors import BadInput

Configure = Callable[..., Configuration]
Planner = Callable[..., Plan]
Recorder = Callable[..., Record]
Started = Callable[[], list[int]]


def test_every_unit_is_sampled_once_per_round(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    results, progress = record(), list[int]()
    bench_plan = plan(configuration("right"), configuration("slow", step_s=0.01))
    units = bench_plan.units(results)
    run(bench_plan, results, lambda label, done: progress.append(done))
    for entry in results.data["configurations"].values():
        assert {unit: len(samples) for unit, samples in entry["samples"].items()} == {
            "cold": 2,
            "draw 1": 2,
            "draw 2": 2,
        }
    assert sum(progress) == units == 2 * (1 + 3 * 2)
    assert len(set(started())) == 2 * (1 + 2)
    fast, slow = rows(results.data)
    assert slow.step_ms is not None and slow.step_ms >= 10
    assert slow.image_s is not None and slow.image_s >= 0.03
    assert fast.cold_s is not None and fast.image_s is not None and fast.cold_s > 10 * fast.image_s
    assert fast.peak_mb is not None and 10 < fast.peak_mb < 1000


def test_a_sample_is_the_mean_of_the_batches_that_fit_its_time() -> None:
    durations = iter((0.25, 0.125, 0.0625, 0.25, 9.0))

    class FakeRunner:
        def draw(self, images: int) -> tuple[list[object], Timing]:
            assert images == 4
            return [], Timing(seconds := next(durations), seconds / 2)

    worker = Worker()
    worker._runner = FakeRunner()  # type: ignore[assignment]
    answer = worker.draw(images=4, seconds=0.5)
    assert (answer["seconds"], answer["step_seconds"]) == (0.6875 / 4, 0.34375 / 4)
    assert worker.draw(images=4, seconds=0.5)["seconds"] == 9.0


def test_drawing_passes_every_setting_on_and_times_the_call_and_its_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls = [0.0], dict[str, Any]()

    class SpyGenerator:
        def plan(self, prompt: str, **settings: Any) -> list[str]:
            calls.update(settings, prompt=prompt)
            return ["job"] * settings["num_images"]

        def clear_conditions(self) -> None:
            clock[0] += 100.0  # not part of the measurement

        def generate(self, jobs: list[str], batch_size: int, callback: Callable[..., None]) -> list[str]:
            calls["batch_size"] = batch_size
            for step in range(calls["steps"]):
                clock[0] += 2.0
                callback(step + 1, calls["steps"], None)
            clock[0] += 1.0  # decoding
            return jobs

    workload = Workload(Path("b"), 3, "a cube", None, 5, 4, 2.5, "heun", cache_interval=2)
    monkeypatch.setattr("tpx_engines.bench.runner.time.perf_counter", lambda: clock[0])
    runner = Runner(SpyGenerator(), workload)  # type: ignore[arg-type]
    assert runner.draw(3) == (["job"] * 3, Timing(seconds=9.0, step_seconds=2.0))
    assert calls == {
        "prompt": "a cube", "class_id": None, "seed": 5, "steps": 4, "guidance": 2.5, "sampler": "heun", "depth": 3,
        "guidance_interval": (0.0, 1.0), "cache_interval": 2, "num_images": 3, "batch_size": 3,
    }  # fmt: skip
    assert runner.draw(1, steps=1)[1] == Timing(seconds=3.0, step_seconds=2.0)


def test_images_are_compared_with_eager_pytorch_or_the_first_engine_that_computes_the_same(
    configuration: Configure,
) -> None:
    request: Any = SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(precision="fp32")))
    engines = [
        replace(configuration("right"), name="on a GPU", device="cuda"),
        replace(configuration("right"), name="in another precision", precision="bf16"),
        replace(configuration("right"), name="not usable", problem="no package"),
        replace(configuration("right"), name="comparable"),
        replace(configuration("right"), name="also comparable"),
    ]
    eager = replace(configuration("right"), name=REFERENCE)
    assert Request._reference(request, [*engines, eager]) == REFERENCE
    assert Request._reference(request, engines) == "comparable"
    assert Request._reference(request, engines[:3]) is None


def test_warming_up_draws_three_times_because_the_third_call_captures_cuda_graphs() -> None:
    calls: list[tuple[int, int | None]] = []

    class FakeRunner:
        def draw(self, images: int, steps: int | None = None) -> None:
            calls.append((images, steps))

    worker = Worker()
    worker._runner = FakeRunner()  # type: ignore[assignment]
    worker.warm(images=4)
    assert calls == [(4, 2)] * 3


def test_a_different_image_is_reported_with_its_psnr(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    results = record()
    first = configuration("right")
    same_runner = Configuration("again", 2, first.factory, first.options)
    run(plan(first, same_runner, configuration("wrong"), rounds=1, batches=(1,)), results)
    right, same, wrong = rows(results.data)
    assert right.same and same.same and not wrong.same
    assert wrong.psnr_db == pytest.approx(14.15, abs=0.01)  # 20 log10(255 / 50)
    text = as_text(results.data)
    assert [line.split(" |")[0] for line in text.splitlines() if "| 14.2, different image |" in line] == [
        "| wrong"
    ]
    assert "Different image than right (PSNR below 35 dB): wrong. " in text


def test_images_of_35_db_or_more_count_as_the_same(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    results = record()
    run(plan(configuration("right"), configuration("wrong"), rounds=1, batches=(1,)), results)
    (entry,) = [entry for entry in results.data["configurations"].values() if entry["name"] == "wrong"]
    for decibels, differs in ((35.0, False), (34.99, True)):
        entry["psnr_db"] = decibels
        assert rows(results.data)[1].differs is differs
        assert ("ifferent image" in as_text(results.data)) is differs


def test_what_ran_on_a_gpu_has_its_own_table_and_memory(
    configuration: Configure, plan: Planner, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = iter((0, 300e6, 425e6))  # before the first worker; before and after the second
    monkeypatch.setattr("tpx_engines.bench.measure.gpu_bytes", lambda: int(next(used)))
    results = record()
    on_gpu = configuration("wrong", device="gpu")
    run(plan(configuration("right"), on_gpu, rounds=1, batches=(1,)), results)
    text = as_text(results.data)
    assert [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ")] == [
        "| configuration",
        "| right",
        "| on the GPU",
        "| wrong",
    ]
    (heading, cells) = (
        [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if line.startswith(("| on the GPU", "| wrong"))
    )
    assert cells[heading.index("GPU MB")] == "125"
    assert "of GEMM peak" not in heading and "speed-up over right" in heading
    assert "Peak MB is the system's memory." in text
    for entry in results.data["configurations"].values():
        entry["device"] = "cpu"
    assert "GPU MB" not in as_text(results.data)


def test_speed_ups_on_a_gpu_are_over_pytorch_on_it(record: Recorder, configuration: Configure) -> None:
    results = record()
    results.data["references"]["2"] = {"by": REFERENCE, "png": ""}
    seconds = {REFERENCE: 8.0, "TPX": 2.0, GPU_REFERENCE: 1.0, "TPX, GPU": 0.25}
    for name, image_s in seconds.items():
        measured = replace(configuration("right", device="gpu" if name.endswith("GPU") else "cpu"), name=name)
        results.add(measured, "draw 1", 0, {"seconds": image_s, "step_seconds": image_s / 3})
        results.entry(measured)["psnr_db"] = 60.0
    assert [row.speed_up for row in rows(results.data)] == [1.0, 4.0, 1.0, 4.0]
    text = as_text(results.data)
    assert "speed-up over eager fp32 |" in text and "speed-up over eager fp32, GPU |" in text
    del results.data["configurations"][f"{GPU_REFERENCE} depth 2"]
    assert [row.speed_up for row in rows(results.data)] == [1.0, 4.0, 32.0]
    assert "speed-up over eager fp32, GPU" not in as_text(results.data)


def test_the_report_names_the_gpu(record: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ", 8 GiB, no NVIDIA GPU, Linux." in as_text(record().data)
    monkeypatch.setattr("tpx_engines.bench.machine.local_gpu", lambda: Gpu(90, "NVIDIA H100", "580"))
    assert describe()["gpu"] == "NVIDIA H100"
    data = record().data
    data["settings"]["machine"]["gpu"] = "NVIDIA H100"
    assert ", 8 GiB, NVIDIA H100, Linux." in as_text(data)


class FakeManagement:
    """NVML with two GPUs."""

    used = (3 << 30, 1 << 20)

    def __init__(self, error: int = 0) -> None:
        self.error, self.started = error, 0

    def nvmlInit_v2(self) -> int:
        self.started += not self.error
        return self.error

    def nvmlShutdown(self) -> int:
        self.started -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.used)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: int, device: Any) -> int:
        device._obj.value = number + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: c_void_p, memory: Any) -> int:
        memory._obj.used = self.used[(device.value or 0) - 1]
        return 0


def test_gpu_memory_is_summed_over_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for library, expected in ((FakeManagement(), (3 << 30) + (1 << 20)), (FakeManagement(9), 0), (None, 0)):
        monkeypatch.setattr("tpx_engines.bench.memory.load_library", lambda name, found=library: found)
        assert gpu_bytes() == expected
        assert library is None or library.started == 0


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("unavailable", "expected a GPU, found none; buy one"),
        ("broken", "RuntimeError: deep inside a framework"),
        ("killed", "expected an answer from the worker process, found signal SIGKILL"),
        ("missing", "AttributeError: "),
        ("full", f"expected room in {tempfile.gettempdir()}{os.sep}tpx-bench-"),
    ],
)
def test_a_failing_configuration_is_listed_with_its_reason(
    configuration: Configure, plan: Planner, record: Recorder, factory: str, reason: str
) -> None:
    results = record()
    run(plan(configuration("right"), configuration(factory), rounds=1, batches=(1,)), results)
    text = as_text(results.data)
    assert f"Not measured:\n\n- {factory}: {reason}" in text
    assert "| right | " in text
    assert f"| {factory} | " not in text


def test_a_configuration_with_a_known_problem_is_listed_and_not_started(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    results = record()
    run(plan(configuration("right", problem="expected a GPU, found none"), rounds=1), results)
    assert started() == []
    assert "- right: expected a GPU, found none" in as_text(results.data)


def test_a_finished_configuration_is_not_measured_again(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    both = (configuration("right"), configuration("wrong"))
    run(plan(both[0], rounds=1, batches=(1,)), record())
    before = len(started())
    run(plan(both[0], rounds=1, batches=(1,)), record())
    assert len(started()) == before
    run(plan(*both, rounds=1, batches=(1,)), record())
    # Only the other configuration, warm and cold.
    assert len(started()) == before + 2
    # Compared with the image of the first run.
    assert rows(record().data)[1].psnr_db == pytest.approx(14.15, abs=0.01)
    assert [row.speed_up for row in rows(record().data)] == [1.0, None]
    text = as_text(record().data)
    assert "No speed-up for wrong: measured in another run than right, " in text


def test_rounds_added_for_all_configurations_are_measured_together(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    first, second = configuration("right"), configuration("slow", step_s=0.01)
    run(plan(first, rounds=1, batches=(1,)), record())
    run(plan(first, second, rounds=3, batches=(1,)), record())
    stamps = [
        [(sample["run"], sample["round"]) for sample in record().entry(measured)["samples"]["draw 1"]]
        for measured in (first, second)
    ]
    assert stamps == [[(1, 0), (2, 1), (2, 2)], [(2, 0), (2, 1), (2, 2)]]
    slow = rows(record().data)[1]
    assert slow.speed_up is not None and slow.speed_up < 1
    assert "No speed-up for" not in as_text(record().data)


def test_more_rounds_measure_only_what_is_missing(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    right = configuration("right")
    run(plan(right, rounds=1), record())
    (first,) = record().entry(right)["samples"]["draw 1"]
    run(plan(right, rounds=3), record())
    samples = record().entry(right)["samples"]
    assert samples["draw 1"][0] == first
    assert {unit: len(unit_samples) for unit, unit_samples in samples.items()} == {
        "cold": 3,
        "draw 1": 3,
        "draw 2": 3,
    }


def test_another_package_version_is_measured_again(
    configuration: Configure, plan: Planner, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = configuration("right", packages=("engine",))
    monkeypatch.setattr("tpx_engines.bench.configurations.version", lambda package: "1.0")
    run(plan(right, rounds=1), record())
    assert record().finished(right, 1, (1, 2))
    monkeypatch.setattr("tpx_engines.bench.configurations.version", lambda package: "1.1")
    assert not record().finished(right, 1, (1, 2))


def test_rejects_results_of_other_settings_and_keeps_their_file(record: Recorder, tmp_path: Path) -> None:
    record()
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(
        BadInput, match=r"expected the settings .* \(steps 3\), found steps 4; use those, or another --json"
    ):
        record(steps=4)
    assert (tmp_path / "bench.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "tpx-bench", "version": 1}', "\x00"])
def test_rejects_and_keeps_a_file_that_has_no_results(record: Recorder, tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(BadInput, match="expected results of tpx-bench"):
        record()
    assert (tmp_path / "bench.json").read_text() == content


def test_the_report_needs_only_the_results_file(
    configuration: Configure, plan: Planner, record: Recorder, tmp_path: Path
) -> None:
    results = record()
    results.data["flops"]["2"] = 3_000_000
    results.data["peaks"]["fp32"] = {"flops": [1e9, 2e9], "by": "a library"}
    slow = configuration("slow", step_s=0.01)
    cached = replace(slow, name="cached", options={**slow.options, "cache_interval": 2})
    run(plan(configuration("right"), slow, cached, rounds=1), results)
    text = as_text(json.loads((tmp_path / "bench.json").read_text()))
    assert text == as_text(results.data)
    assert "fp32 2 GFLOP/s (a library)" in text
    (row,) = [row for row in rows(results.data) if row.name == "slow"]
    assert row.step_ms is not None
    assert row.peak_share == pytest.approx(3e6 / (row.step_ms / 1e3) / 2e9)
    assert [row.peak_share for row in rows(results.data) if row.name == "cached"] == [None]


def test_a_compiled_configuration_has_one_cold_start_and_reports_its_setting(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    results = record()
    run(plan(configuration("compiled", compiles=True), rounds=3, batches=(1,)), results)
    assert len(started()) == 2
    text = as_text(results.data)
    assert (
        "- compiled: freezing was the fastest (default 5.00 ms, freezing 4.00 ms); compiled in 12 s" in text
    )


def test_speed_up_compares_within_a_round(record: Recorder, configuration: Configure) -> None:
    results, first, second = record(), configuration("right"), configuration("slow")
    results.data["references"]["2"] = {"by": "right", "png": ""}
    # Something slowed both in the second round.
    seconds_by_round = ((1.0, 0.5), (9.0, 4.5), (2.0, 1.0))
    for number, (reference_s, second_s) in enumerate(seconds_by_round):
        results.add(first, "draw 1", number, {"seconds": reference_s, "step_seconds": reference_s / 3})
        results.add(second, "draw 1", number, {"seconds": second_s, "step_seconds": second_s / 3})
    assert [row.speed_up for row in rows(results.data)] == [1.0, 2.0]
    assert [row.image_s for row in rows(results.data)] == [2.0, 1.0]


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(22, "Invalid argument")])
def test_a_process_that_has_ended_is_a_failed_measurement(error: OSError, tmp_path: Path) -> None:
    """The second error is that of a pipe without a reader on Windows."""

    def fail(text: str) -> None:
        raise error

    with WorkerProcess(tmp_path) as worker:
        worker._process.kill()
        worker._process.wait()
        worker._process.stdin.write = fail  # type: ignore[union-attr, method-assign]
        with pytest.raises(MeasurementFailed, match="found signal SIGKILL"):
            worker.ask("anything")


def test_only_the_peaks_of_configurations_that_can_run_are_measured(
    configuration: Configure, plan: Planner, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PEAKS", ("fp32", "bf16"))
    failed = [
        replace(configuration("right"), name="known", precision="bf16", problem="no bf16"),
        replace(configuration("unavailable"), precision="bf16"),
    ]
    results = record()
    run(plan(configuration("right"), *failed, rounds=1, batches=(1,)), results)
    assert results.data["peaks"].keys() == {"fp32"}
    assert results.data["peaks"]["fp32"]["flops"][0] > 1e8
