"""The resumable training loop of every stage: learning-rate schedule, EMA, checkpoints and a loss log."""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpx_export.tensor_files import write_torch
from tpx_export.training.state import load_saved
from tpx_runtime.errors import BadInput
from tpx_runtime.files import make_folder
from tpx_runtime.interrupts import deferred_interrupts
from tpx_runtime.records import require_same_settings


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of one step, so that a resumed run draws the same numbers as an uninterrupted one."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def warmup_cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor in 0..1."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def atomic_save(value: object, path: Path) -> None:
    """`write_torch` that creates the folder of the file too. Raises BadInput."""
    make_folder(path.parent)
    write_torch(value, path)


def digest(tensors: Iterable[Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 of the values of the tensors, in order."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]


def fit(
    name: str,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    state: Path,
    settings: Mapping[str, Any],
    ema_decay: float = 0.999,
    max_grad_norm: float = 1.0,
    log_every: int = 50,
    save_every_s: float = 120.0,
    show: Callable[[nn.Module, int], None] | None = None,
    show_every: int = 1000,
) -> nn.Module:
    """Minimise `loss_at(step)` over `module`'s trainable parameters; returns the EMA copy of the module.

    The state of the run is saved in the file `state` and resumed from it; a finished run returns at once. `settings` are
    the values on which `loss_at` depends. Raises BadInput if `state` is of a run with other settings, steps, rates or
    initial weights, and if the loss is not finite; the last saved state is then kept.
    The loss log beside `state` (.csv) has lines of the step and the mean loss of the last `log_every` steps; a resumed run
    may write a step twice. `show(ema, step)` is called every `show_every` steps. Ctrl-C saves the state first.
    """
    run = _Run(module, optimizers, {"steps": steps, "ema decay": ema_decay, **settings}, state)
    if (first := run.step) >= steps:
        return run.ema
    loss_log = _LossLog(name, first, steps, state.with_suffix(".csv"))
    last_save = time.monotonic()
    try:
        while run.step < steps:
            loss = run.train_step(loss_at, warmup_cosine(run.step, steps), ema_decay, max_grad_norm)
            if not math.isfinite(loss):
                raise BadInput(
                    f"expected a finite loss of {name}, found {loss} at step {run.step - 1}; "
                    "lower the learning rate, with another --out"
                )
            loss_log.add(loss, run.step, log_every)
            if show and run.step % show_every == 0:
                show(run.ema, run.step)
            if time.monotonic() - last_save > save_every_s:
                run.save()
                last_save = time.monotonic()
    except KeyboardInterrupt:
        run.save()
        raise
    run.save()
    return run.ema


class _Run:
    """The training state, saved in the file `state`. `step` is the number of completed steps."""

    def __init__(
        self,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        settings: dict[str, Any],
        state: Path,
    ) -> None:
        self._module, self._optimizers, self._state = module, optimizers, state
        self.ema = copy.deepcopy(module).requires_grad_(False)
        self._trainable = [
            (average, p)
            for average, p in zip(self.ema.parameters(), module.parameters(), strict=True)
            if p.requires_grad
        ]
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        weights = digest(module.state_dict().values())
        self._settings = {"rates": self._rates, "first weights": weights, **settings}
        self.step = 0
        state.parent.mkdir(parents=True, exist_ok=True)
        if state.exists():
            self._resume()

    def _resume(self) -> None:
        saved = load_saved(self._state)
        try:
            require_same_settings(dict(saved["settings"]), self._settings, self._state)
            self._module.load_state_dict(saved["module"])
            self.ema.load_state_dict(saved["ema"])
            for optimizer, values in zip(self._optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.step = int(saved["step"])
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError):
            raise BadInput(
                f"expected the state of this run in {self._state}, found something else; delete it to start again"
            ) from None

    def save(self) -> None:
        state = {
            "module": self._module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self.step,
            "settings": self._settings,
        }
        atomic_save(state, self._state)

    def train_step(
        self, loss_at: Callable[[int], Tensor], lr_factor: float, ema_decay: float, max_grad_norm: float
    ) -> float:
        """Take one step with the learning rates times `lr_factor`; return the loss before the update. Ctrl-C does not
        interrupt the update: KeyboardInterrupt is raised after it.
        """
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_factor
        loss = loss_at(self.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self._trainable], max_grad_norm)
        # A short average at first, so that the random initial weights are soon forgotten.
        decay = min(ema_decay, (self.step + 1) / (self.step + 10))
        with deferred_interrupts() as interrupted:
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for average, p in self._trainable:
                    average.lerp_(p, 1 - decay)
            self.step += 1
        if interrupted.is_set():
            raise KeyboardInterrupt
        return loss.item()


class _LossLog:
    """Prints the mean of the last losses and appends it to the file `path`."""

    def __init__(self, name: str, first: int, steps: int, path: Path) -> None:
        self._name, self._first, self._steps, self._path = name, first, steps, path
        self._losses: list[float] = []
        self._began = time.monotonic()

    def add(self, loss: float, step: int, log_every: int) -> None:
        """Add the loss of the `step`th step; every `log_every` steps, write a line."""
        self._losses.append(loss)
        if step % log_every:
            return
        steps_per_s = (step - self._first) / (time.monotonic() - self._began)
        recent = self._losses[-log_every:]  # fewer than `log_every` in a resumed run
        mean, left = sum(recent) / len(recent), (self._steps - step) / steps_per_s / 60
        line = (
            f"{self._name} {step}/{self._steps}  loss {mean:.4f}  {steps_per_s:.2f} steps/s  {left:.0f} min"
        )
        print(line, flush=True)
        with self._path.open("a") as loss_log:
            loss_log.write(f"{step},{mean:.5f}\n")
