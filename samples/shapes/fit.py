"""One resumable training loop for every stage: schedule, EMA, checkpoints, and a line a person can follow."""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpx_runtime.errors import BadInput
from tpx_runtime.files import atomic_file
from tpx_runtime.interrupts import deferred_interrupts
from tpx_runtime.records import require_same_settings


def seeded(seed: int, step: int) -> torch.Generator:
    """The random stream of one step: a resumed run draws what the unbroken run would have drawn."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def warmup_cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor in 0..1."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_whole(value: object, path: Path) -> None:
    """torch.save that a kill cannot leave half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        torch.save(value, part)


def digest(tensors: Iterable[Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 of the values of tensors, in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


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
    clip: float = 1.0,
    every: int = 50,
    save_s: float = 120.0,
    show: Callable[[nn.Module, int], None] | None = None,
    show_every: int = 1000,
) -> nn.Module:
    """Minimise `loss_at(step)` over `module`'s trainable parameters; returns the EMA copy of the module.

    The run's whole state lies in `state` and is taken up from there; a finished run returns at once. `settings` is what
    `loss_at` depends on: the state of a run with others, other steps, rates or first weights is refused with BadInput, and
    a loss that is not finite ends it with BadInput, the last saved state kept.
    Beside it lies the curve, step and mean loss of the last `every` steps a line; a resumed run may write a step twice.
    `show(ema, step)` draws progress. Interrupting (Ctrl-C) saves first.
    """
    run = _Run(module, optimizers, {"steps": steps, "ema decay": ema_decay, **settings}, state)
    if (first := run.step) >= steps:
        return run.ema
    curve = _Curve(name, first, steps, state.with_suffix(".csv"))
    last_save = time.monotonic()
    try:
        while run.step < steps:
            loss = run.take(loss_at, warmup_cosine(run.step, steps), ema_decay, clip)
            if not math.isfinite(loss):
                raise BadInput(
                    f"expected a finite loss of {name}, found {loss} at step {run.step - 1}; "
                    "lower the learning rate, with another --out"
                )
            curve.add(loss, run.step, every)
            if show and run.step % show_every == 0:
                show(run.ema, run.step)
            if time.monotonic() - last_save > save_s:
                run.save()
                last_save = time.monotonic()
    except KeyboardInterrupt:
        run.save()
        raise
    run.save()
    return run.ema


class _Run:
    """What changes from step to step, as it lies in the file `state`. `step` is the number of whole steps taken."""

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
        saved = torch.load(self._state, weights_only=True, map_location="cpu")
        require_same_settings(saved.get("settings", {}), self._settings, self._state)
        self._module.load_state_dict(saved["module"])
        self.ema.load_state_dict(saved["ema"])
        for optimizer, values in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step = saved["step"]

    def save(self) -> None:
        whole = {
            "module": self._module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self.step,
            "settings": self._settings,
        }
        save_whole(whole, self._state)

    def take(self, loss_at: Callable[[int], Tensor], factor: float, ema_decay: float, clip: float) -> float:
        """One step at `factor` of the learning rates; returns the loss before it. Ctrl-C does not break its update:
        KeyboardInterrupt is raised after it.
        """
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = loss_at(self.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self._trainable], clip)
        # Short at first: the random start is soon forgotten.
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


class _Curve:
    """The mean of the last losses, printed and appended to the file `path`."""

    def __init__(self, name: str, first: int, steps: int, path: Path) -> None:
        self._name, self._first, self._steps, self._path = name, first, steps, path
        self._losses: list[float] = []
        self._began = time.monotonic()

    def add(self, loss: float, step: int, every: int) -> None:
        """The loss before the `step`th step; each `every` steps a line."""
        self._losses.append(loss)
        if step % every:
            return
        rate = (step - self._first) / (time.monotonic() - self._began)
        recent = self._losses[-every:]  # fewer than `every` after a resumption
        mean, left = sum(recent) / len(recent), (self._steps - step) / rate / 60
        line = f"{self._name} {step}/{self._steps}  loss {mean:.4f}  {rate:.2f} steps/s  {left:.0f} min"
        print(line, flush=True)
        with self._path.open("a") as curve:
            curve.write(f"{step},{mean:.5f}\n")
