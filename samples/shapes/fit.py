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

from tpx_export.training.interrupts import interrupts
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.record import require_same
from tpx_runtime.files import whole_file


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
    with whole_file(path) as part:
        torch.save(value, part)


def digest(tensors: Iterable[Tensor]) -> str:
    """16 hex digits that stand for the values of tensors, in their order."""
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
    ema = copy.deepcopy(module).requires_grad_(False)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    told = {
        "steps": steps,
        "rates": rates,
        "ema decay": ema_decay,
        "first weights": digest(module.state_dict().values()),
        **settings,
    }
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location="cpu")
        require_same(saved.get("settings", {}), told, state)
        module.load_state_dict(saved["module"])
        ema.load_state_dict(saved["ema"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        first = saved["step"]

    def save(step: int) -> None:
        values = [optimizer.state_dict() for optimizer in optimizers]
        whole = {
            "module": module.state_dict(),
            "ema": ema.state_dict(),
            "optimizers": values,
            "step": step,
            "settings": told,
        }
        save_whole(whole, state)

    state.parent.mkdir(parents=True, exist_ok=True)
    trainable = [p for p in module.parameters() if p.requires_grad]
    pairs = [(e, p) for e, p in zip(ema.parameters(), module.parameters(), strict=True) if p.requires_grad]
    losses: list[float] = []
    began = last_save = time.monotonic()
    taken = first  # whole steps; one that is interrupted is taken again
    try:
        for step in range(first, steps):
            factor = warmup_cosine(step, steps)
            for optimizer, base in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = rate * factor
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, clip)
            decay = min(ema_decay, (step + 1) / (step + 10))
            with interrupts() as pressed:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for e, p in pairs:
                        e.lerp_(p, 1 - decay)
                taken = step + 1
            if pressed():
                raise KeyboardInterrupt
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise BadInput(
                    f"expected a finite loss of {name}, found {losses[-1]} at step {step}; "
                    "lower the learning rate, with another --out"
                )
            if taken % every == 0:
                rate = (taken - first) / (time.monotonic() - began)
                recent = losses[-every:]  # fewer than `every` after a resumption
                mean, left = sum(recent) / len(recent), (steps - taken) / rate / 60
                line = f"{name} {taken}/{steps}  loss {mean:.4f}  {rate:.2f} steps/s  {left:.0f} min"
                print(line, flush=True)
                with state.with_suffix(".csv").open("a") as curve:
                    curve.write(f"{taken},{mean:.5f}\n")
            if show and taken % show_every == 0:
                show(ema, taken)
            if time.monotonic() - last_save > save_s:
                save(taken)
                last_save = time.monotonic()
    except KeyboardInterrupt:
        save(taken)
        raise
    if first < steps:
        save(steps)
    return ema
