"""Interleaved rounds: every configuration is asked for one unit in turn, so that a slow minute of the machine slows all."""

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
from .process import Unmeasured, WorkerProcess
from .record import COLD, Record, draw_unit, picture
from .subject import Work

Advance = Callable[[str, int], None]  # (what comes next, units that are done since)
PEAKS = ("fp32", "bf16")


@dataclass(frozen=True)
class Plan:
    """What is asked for. `work` is that of every configuration but for its depth; `reference` draws what all are held to."""

    work: Work
    configurations: tuple[Configuration, ...]
    reference: str | None
    rounds: int
    batches: tuple[int, ...]
    sample_s: float = 0.5  # of a sample: one small batch alone finds the caches full of others' weights

    def units(self, record: Record) -> int:
        """How many are yet to measure: one for each start, and every sample."""
        todo = [c for c in self.configurations if c.problem is None]
        missing = [sum(record.missing(c, self.rounds, self.batches).values()) for c in todo]
        return sum(many + 1 for many in missing if many)


def run(plan: Plan, record: Record, advance: Advance = lambda label, done: None) -> None:
    """Measure what the record lacks, and record it. However it ends, no process and no temporary file is left."""
    for configuration in plan.configurations:
        record.entry(configuration)["problem"] = configuration.problem
    record.save()
    able = [c for c in plan.configurations if c.problem is None]
    todo = [c for c in able if not record.finished(c, plan.rounds, plan.batches)]
    todo.sort(key=lambda c: c.name != plan.reference)  # stable: the references first
    if todo:
        record.facts["runs"] += 1
        with (
            TemporaryDirectory(prefix="tpx-bench-", ignore_cleanup_errors=True) as folder,
            ExitStack() as stack,
        ):
            _Run(plan, record, advance, Path(folder), stack).measure(todo)


class _Run:
    """The workers of one run. `folder` takes all their temporary files, `stack` their ends."""

    def __init__(self, plan: Plan, record: Record, advance: Advance, folder: Path, stack: ExitStack) -> None:
        self._plan, self._record, self._advance = plan, record, advance
        self._folder, self._stack = folder, stack
        self._workers: dict[str, WorkerProcess] = {}
        self._peaks: WorkerProcess | None = None
        self._works: dict[str, Work] = {}

    def measure(self, todo: Sequence[Configuration]) -> None:
        self._export([c for c in todo if c.exported])
        for configuration in todo:
            self._guard(configuration, 1, self._start)
        for number in range(self._plan.rounds):
            self._measure_peaks(number)
            turn = number % len(todo)
            # Rotated, so that no configuration always follows the same one.
            for configuration in (*todo[turn:], *todo[:turn]):
                self._round(configuration, number)

    def _round(self, configuration: Configuration, number: int) -> None:
        """One sample of each unit that lacks one in this round."""
        left = self._plan.rounds - number
        missing = self._record.missing(configuration, self._plan.rounds, self._plan.batches)
        for images in self._plan.batches:
            if missing[draw_unit(images)] >= left:
                self._guard(configuration, 1, partial(self._draw, images=images, number=number))
        if missing[COLD] and (missing[COLD] >= left or configuration.compiles):
            self._guard(configuration, 1, partial(self._cold, number=number))

    def _guard(self, configuration: Configuration, units: int, unit: Callable[[Configuration], None]) -> None:
        """Do it, unless the configuration failed before; if it fails now, its reason is recorded and its worker stopped."""
        if self._record.entry(configuration)["problem"]:
            return
        self._advance(configuration.key, 0)
        try:
            unit(configuration)
        except Unmeasured as error:
            self._record.entry(configuration)["problem"] = str(error)
            self._record.save()
            if worker := self._workers.pop(configuration.key, None):
                worker.stop()
        self._advance(configuration.key, units)

    def _export(self, exported: Sequence[Configuration]) -> None:
        """The naive export, once for all that run it; where it fails they all do."""
        if not exported:
            return
        self._advance("naive export", 0)
        folder, ckpt = self._folder / "naive", self._plan.work.ckpt
        folder.mkdir()
        arguments = {"ckpt": str(ckpt), "depths": sorted({c.depth for c in exported}), "out": str(folder)}
        try:
            with WorkerProcess(self._folder) as worker:
                worker.ask("call", function="tpx_engines.bench.naive:export", arguments=arguments)
        except Unmeasured as error:
            for configuration in exported:
                self._record.entry(configuration)["problem"] = str(error)

    def _start(self, configuration: Configuration) -> None:
        """The process that is asked in all rounds, its picture, and two steps of every batch size."""
        work = replace(self._plan.work, depth=configuration.depth)
        if configuration.exported:
            work = replace(work, prepared=self._folder / "naive")
        worker = self._stack.enter_context(WorkerProcess(self._folder))
        self._workers[configuration.key] = worker
        answer = _start(worker, configuration, work)
        self._compare(configuration, answer["png"])
        for images in self._plan.batches:
            worker.ask("warm", images=images)
        entry = self._record.entry(configuration)
        entry["notes"] = answer["notes"]
        self._works[configuration.key] = replace(work, tuned=answer["notes"].get("setting", ""))
        self._remember_memory(configuration, answer)
        self._record.save()

    def _compare(self, configuration: Configuration, png: str) -> None:
        """With the reference of its depth, which the first configuration of the reference's name draws."""
        references, depth = self._record.facts["references"], str(configuration.depth)
        if configuration.name == self._plan.reference:
            references.setdefault(depth, {"by": configuration.name, "png": png})
        if depth in references:
            decibels = psnr_db(picture(png), picture(references[depth]["png"]))
            self._record.entry(configuration)["psnr_db"] = "same" if math.isinf(decibels) else decibels

    def _draw(self, configuration: Configuration, images: int, number: int) -> None:
        answer = self._workers[configuration.key].ask("draw", images=images, seconds=self._plan.sample_s)
        self._remember_memory(configuration, answer)
        sample = {name: answer[name] for name in ("seconds", "step_seconds")}
        self._record.add(configuration, draw_unit(images), number, sample)

    def _cold(self, configuration: Configuration, number: int) -> None:
        """A process of its own, from its start to its first picture."""
        with WorkerProcess(self._folder) as worker:
            _start(worker, configuration, self._works[configuration.key])
            seconds = worker.answered - worker.began
        self._record.add(configuration, COLD, number, {"seconds": seconds})

    def _remember_memory(self, configuration: Configuration, answer: dict[str, Any]) -> None:
        entry = self._record.entry(configuration)
        entry["peak_bytes"] = max(entry["peak_bytes"], answer["peak_bytes"])

    def _measure_peaks(self, number: int) -> None:
        """One sample of each precision, in the same rounds as all else."""
        peaks = self._record.facts["peaks"]
        for precision in PEAKS:
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
            except Unmeasured:
                continue
            known["flops"].append(answer["flops"])
            known["by"] = answer["by"]
        self._record.save()


def _start(worker: WorkerProcess, configuration: Configuration, work: Work) -> dict[str, Any]:
    return worker.ask("start", maker=configuration.maker, work=work.to_json(), options=configuration.options)
