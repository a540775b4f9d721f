"""The options of tpx-bench, validated and turned into a workload, configurations and a record before anything runs."""

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tpx_runtime.bundle import Bundle, hash_file
from tpx_runtime.engine import ENGINES
from tpx_runtime.environment import (
    CUDA_GRAPHS_VARIABLE,
    DEVICE_LOOP_VARIABLE,
    THREADS_VARIABLE,
    check_environment,
)
from tpx_runtime.errors import BadInput, EngineUnavailable, TpxError
from tpx_runtime.generator import Generator
from tpx_runtime.manifest import Manifest

from . import PROMPT, configurations
from .configurations import REFERENCE, Configuration
from .flops import transformer_flops
from .machine import THREAD_VARIABLES, describe
from .measure import Plan
from .record import Record
from .runner import Workload

CHECKPOINTS = (".safetensors", ".pt")  # tpx_export.checkpoint.SUFFIXES, whose import would need torch
_SAMPLERS = {"velocity": "euler", "epsilon": "ddim"}  # samplers that call the model once per step
_VARIABLES = (CUDA_GRAPHS_VARIABLE, DEVICE_LOOP_VARIABLE)  # that the measured processes inherit


@dataclass(frozen=True)
class Request:
    """The options of tpx-bench. Empty `engines` or `baselines` means all, empty `depths` the bundle's default depth."""

    bundle: Bundle
    ckpt: Path | None
    also: tuple[Path, ...]
    engines: tuple[str, ...]
    baselines: tuple[str, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    cache_intervals: tuple[int, ...]
    prompt: str | None
    steps: int
    rounds: int
    json: Path | None

    def prepare(self) -> tuple[Plan, Record]:
        """The plan of what to measure, and the record for its results.

        Raises BadInput, BundleInvalid, CheckpointInvalid, and EngineUnavailable for a checkpoint without PyTorch.
        """
        depths = tuple(sorted(set(self.depths))) or (self.bundle.manifest.defaults.depth,)
        self._check()
        workload = self._work(depths)
        others = [_open_same_model(path, self.bundle, depths) for path in self.also]
        _require_distinct(others)
        chosen = self._configurations(depths, others)
        record = Record.begin(self.json, self._settings(workload, others))
        rows = 1 if workload.guidance == 1 else 2
        record.data["flops"].update({str(depth): _flops(self.bundle, depth, rows) for depth in depths})
        return Plan(workload, tuple(chosen), self._reference(chosen), self.rounds, self.batches), record

    def _check(self) -> None:
        if self.baselines and self.ckpt is None:
            raise BadInput("expected --ckpt with --baseline, found none; pass the bundle's checkpoint")
        for name in (THREADS_VARIABLE, *THREAD_VARIABLES):
            if os.environ.get(name):
                raise BadInput(
                    "expected no limit on the number of threads, which not all engines would keep, "
                    f"found {name} set; unset it"
                )
        check_environment()
        if self.ckpt is None:
            return
        if not self.ckpt.is_file():
            raise BadInput(f"expected a checkpoint in --ckpt, found no file {self.ckpt}; check the path")
        if self.ckpt.suffix not in CHECKPOINTS:
            raise BadInput(
                f"expected a checkpoint ending in {' or '.join(CHECKPOINTS)} in --ckpt, found {self.ckpt.name}"
            )

    def _work(self, depths: tuple[int, ...]) -> Workload:
        """The workload at the first depth; the settings are validated for every depth."""
        manifest = self.bundle.manifest
        classes = bool(manifest.model.classes)
        workload = Workload(
            bundle=self.bundle.root.resolve(),
            depth=depths[0],
            prompt=PROMPT if self.prompt is None and not classes else self.prompt,
            class_id=0 if classes else None,
            seed=0,
            steps=self.steps,
            guidance=manifest.defaults.guidance,
            sampler=_SAMPLERS[manifest.model.prediction],
            ckpt=self.ckpt.resolve() if self.ckpt else None,
        )
        checker = Generator(self.bundle, next(iter(ENGINES.values())))  # opens no graph
        for depth, cache_interval in product(depths, self.cache_intervals):
            checker.plan(
                workload.prompt,
                class_id=workload.class_id,
                steps=workload.steps,
                guidance=workload.guidance,
                cache_interval=cache_interval,
                sampler=workload.sampler,
                depth=depth,
            )
        return workload

    def _configurations(self, depths: tuple[int, ...], others: list[Bundle]) -> list[Configuration]:
        chosen = configurations.baselines(self.baselines, depths) if self.ckpt else []
        kinds = self.engines, depths, self.cache_intervals
        chosen += configurations.engines(*kinds, self.bundle.manifest.precision)
        if self.ckpt:
            _require_fits(self.ckpt, self.bundle.manifest)
        for other in others:
            chosen += configurations.engines(*kinds, other.manifest.precision, other.root.resolve())
        return chosen

    def _settings(self, workload: Workload, others: list[Bundle]) -> dict[str, Any]:
        """Everything that must be equal for two runs to share a record."""
        fields = ("prompt", "class_id", "seed", "steps", "guidance", "sampler")
        return {
            "bundle": self.bundle.manifest.name,
            "bundle_sha256": self.bundle.hash,
            "precision": self.bundle.manifest.precision,
            "also": {other.manifest.precision: other.hash for other in others},
            "image_size_px": list(self.bundle.manifest.model.image_size_px),
            "ckpt_sha256": hash_file(self.ckpt) if self.ckpt else None,
            **{name: getattr(workload, name) for name in fields},
            "machine": describe(),
            **{name: value for name in _VARIABLES if (value := os.environ.get(name))},
        }

    def _reference(self, chosen: list[Configuration]) -> str | None:
        """Name of the reference for all images: eager PyTorch, else the first on the CPU in the bundle's precision."""
        if any(one.name == REFERENCE for one in chosen):
            return REFERENCE
        precision = self.bundle.manifest.precision
        runnable = (
            one for one in chosen if (one.problem, one.device, one.precision) == (None, "cpu", precision)
        )
        return next((one.name for one in runnable), None)


def _require_fits(ckpt: Path, manifest: Manifest) -> None:
    """Raise BadInput if the checkpoint is not of the bundle's model, EngineUnavailable without PyTorch."""
    try:
        from .baselines import require_fits
    except ImportError:
        raise EngineUnavailable(
            "expected PyTorch for --ckpt, found none; pip install 'tpx[export]', or leave --ckpt out"
        ) from None
    require_fits(ckpt, manifest)


def _open_same_model(path: Path, bundle: Bundle, depths: tuple[int, ...]) -> Bundle:
    """Open the bundle at `path`. Raises BadInput unless it is `bundle`'s model in another precision, with all `depths`."""
    other = Bundle.open(path)
    wanted, found = bundle.manifest, other.manifest
    same = (found.name, found.precision != wanted.precision, set(depths) <= set(found.model.depths))
    if same != (wanted.name, True, True):
        raise BadInput(
            f"expected in --also {wanted.name} in another precision than {wanted.precision} with depth "
            f"{', '.join(map(str, depths))}, found {found.name} in {found.precision} with depth "
            f"{', '.join(map(str, found.model.depths))}; export it with `tpx-export --precision`"
        )
    return other


def _require_distinct(bundles: list[Bundle]) -> None:
    """Raise BadInput for two bundles of the same precision, whose rows would have the same name."""
    precisions = [bundle.manifest.precision for bundle in bundles]
    for precision in precisions:
        if precisions.count(precision) > 1:
            raise BadInput(
                f"expected --also of different precisions, found {precision} twice; measure one of them"
            )


def _flops(bundle: Bundle, depth: int, rows: int) -> int | str:
    """Operations of one step at batch 1, or the reason why they could not be counted."""
    try:
        return transformer_flops(bundle, depth, rows)
    except TpxError as error:
        return str(error)
