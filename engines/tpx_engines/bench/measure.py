"""Measures in interleaved rounds: configurations take turns, so that a slow period of the machine affects all of them."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tpx_runtime.evaluation.similarity import psnr_db

from .configurations import Configuration
from .memory import gpu_bytes
from .process import MeasurementFailed, WorkerProcess
from .record import COLD, Record, batch_unit, decode_png
from .runner import Workload

Advance = Callable[[str, int], None]  # (label of the current work, number of newly finished units)
PEAKS = ("fp32", "bf16")


@dataclass(frozen=True)
class Plan:
    """What to measure. Configurations share `workload` except for its depth; all images are compared with `reference`'s."""

    workload: Workload
    configurations: tuple[Configuration, ...]
    reference: str | None
    rounds: int
    batches: tuple[int, ...]
    # Minimum seconds of a sample: a single small batch would start with caches full of other configurations' weights.
    sample_s: float = 0.5

    def units(self, record: Record) -> int:
        """Number of units still to measure: one per start and one per sample."""
        todo = [c for c in self.configurations if c.problem is None]
        missing = [sum(record.missing(c, self.rounds, self.batches).values()) for c in todo]
        return sum(count + 1 for count in missing if count)


def run(plan: Plan, record: Record, advance: Advance = lambda label, done: None) -> None:
    """Measure and record what the record lacks. In any case, no process and no temporary file remains."""
    for configuration in plan.configurations:
        record.entry(configuration)["problem"] = configuration.problem
    record.save()
    runnable = [c for c in plan.configurations if c.problem is None]
    todo = [c for c in runnable if not record.finished(c, plan.rounds, plan.batches)]
    todo.sort(key=lambda c: c.name != plan.reference)  # stable sort: references first
    if todo:
        record.data["runs"] += 1
        with (
            TemporaryDirectory(prefix="tpx-bench-", ignore_cleanup_errors=True) as folder,
            ExitStack() as stack,
        ):
            _Run(plan, record, advance, Path(folder), stack).measure(todo)


class _Run:
    """The workers of one run. `folder` holds their temporary files, `stack` stops them."""

    def __init__(self, plan: Plan, record: Record, advance: Advance, folder: Path, stack: ExitStack) -> None:
        self._plan, self._record, self._advance = plan, record, advance
        self._folder, self._stack = folder, stack
        self._workers: dict[str, WorkerProcess] = {}
        self._peaks: WorkerProcess | None = None
        self._workloads: dict[str, Workload] = {}

    def measure(self, todo: Sequence[Configuration]) -> None:
        self._export([c for c in todo if c.exported])
        for configuration in todo:
            self._attempt(configuration, self._start_worker)
        for number in range(self._plan.rounds):
            self._measure_peaks(number)
            offset = number % len(todo)
            # Rotated, so that no configuration always follows the same one.
            for configuration in (*todo[offset:], *todo[:offset]):
                self._round(configuration, number)

    def _round(self, configuration: Configuration, number: int) -> None:
        """Take one sample of each unit that still lacks one in this round."""
        left = self._plan.rounds - number
        missing = self._record.missing(configuration, self._plan.rounds, self._plan.batches)
        for images in self._plan.batches:
            if missing[batch_unit(images)] >= left:
                self._attempt(configuration, partial(self._measure_batch, images=images, number=number))
        if missing[COLD] and (missing[COLD] >= left or configuration.compiles):
            self._attempt(configuration, partial(self._measure_cold_start, number=number))

    def _attempt(self, configuration: Configuration, unit: Callable[[Configuration], None]) -> None:
        """Run `unit` unless the configuration has already failed. If it fails, record the reason and stop the worker."""
        if self._record.entry(configuration)["problem"]:
            return
        self._advance(configuration.key, 0)
        try:
            unit(configuration)
        except MeasurementFailed as error:
            self._record.entry(configuration)["problem"] = str(error)
            self._record.save()
            if worker := self._workers.pop(configuration.key, None):
                worker.stop()
        self._advance(configuration.key, 1)

    def _export(self, exported: Sequence[Configuration]) -> None:
        """Run the naive export once for all configurations that need it; if it fails, they all fail."""
        if not exported:
            return
        self._advance("naive export", 0)
        folder, ckpt = self._folder / "naive", self._plan.workload.ckpt
        folder.mkdir()
        arguments = {"ckpt": str(ckpt), "depths": sorted({c.depth for c in exported}), "out": str(folder)}
        try:
            with WorkerProcess(self._folder) as worker:
                worker.ask("call", function="tpx_engines.bench.naive:export", arguments=arguments)
        except MeasurementFailed as error:
            for configuration in exported:
                self._record.entry(configuration)["problem"] = str(error)

    def _start_worker(self, configuration: Configuration) -> None:
        """Start the worker for all rounds, compare its first image, and warm up every batch size."""
        workload = replace(self._plan.workload, depth=configuration.depth)
        if configuration.exported:
            workload = replace(workload, export_folder=self._folder / "naive")
        gpu_before = gpu_bytes()
        worker = self._stack.enter_context(WorkerProcess(self._folder))
        self._workers[configuration.key] = worker
        answer = _send_start(worker, configuration, workload)
        self._compare(configuration, answer["png"])
        for images in self._plan.batches:
            worker.ask("warm", images=images)
        entry = self._record.entry(configuration)
        entry["notes"] = answer["notes"]
        # No other worker is busy now, and engines keep what they have allocated.
        if configuration.device == "gpu":
            entry["gpu_bytes"] = max(0, gpu_bytes() - gpu_before)
        self._workloads[configuration.key] = replace(
            workload, compile_setting=answer["notes"].get("setting", "")
        )
        self._update_peak_memory(configuration, answer)
        self._record.save()

    def _compare(self, configuration: Configuration, png: str) -> None:
        """Compare an image with the reference of its depth, which is the first image of the reference configuration."""
        references, depth = self._record.data["references"], str(configuration.depth)
        if configuration.name == self._plan.reference:
            references.setdefault(depth, {"by": configuration.name, "png": png})
        if depth in references:
            decibels = psnr_db(decode_png(png), decode_png(references[depth]["png"]))
            self._record.entry(configuration)["psnr_db"] = "same" if math.isinf(decibels) else decibels

    def _measure_batch(self, configuration: Configuration, images: int, number: int) -> None:
        answer = self._workers[configuration.key].ask("draw", images=images, seconds=self._plan.sample_s)
        self._update_peak_memory(configuration, answer)
        sample = {name: answer[name] for name in ("seconds", "step_seconds")}
        self._record.add(configuration, batch_unit(images), number, sample)

    def _measure_cold_start(self, configuration: Configuration, number: int) -> None:
        """Measure the time from the start of a new process to its first image."""
        with WorkerProcess(self._folder) as worker:
            _send_start(worker, configuration, self._workloads[configuration.key])
            seconds = worker.answered - worker.began
        self._record.add(configuration, COLD, number, {"seconds": seconds})

    def _update_peak_memory(self, configuration: Configuration, answer: dict[str, Any]) -> None:
        entry = self._record.entry(configuration)
        entry["peak_bytes"] = max(entry["peak_bytes"], answer["peak_bytes"])

    def _measure_peaks(self, number: int) -> None:
        """Take one sample of the peak of each precision in this round, of those that run here: others may take minutes."""
        measured = {c.precision for c in self._plan.configurations if not self._record.entry(c)["problem"]}
        peaks = self._record.data["peaks"]
        for precision in PEAKS:
            if precision not in measured:
                continue
            known = peaks.setdefault(precision, {"flops": [], "by": ""})
            if len(known["flops"]) > number:
                continue
            self._advance(f"peak {precision}", 0)
            if self._peaks is None:
                self._peaks = self._stack.enter_context(WorkerProcess(self._folder))
            try:
                answer = self._peaks.ask(
                    "call", function="tpx_engines.bench.peak:gemm", arguments={"precision": precision}
                )
            except MeasurementFailed:
                continue
            known["flops"].append(answer["flops"])
            known["by"] = answer["by"]
        self._record.save()


def _send_start(worker: WorkerProcess, configuration: Configuration, workload: Workload) -> dict[str, Any]:
    return worker.ask(
        "start", factory=configuration.factory, workload=workload.to_json(), options=configuration.options
    )
