"""The steps: each draws its pictures, noise, depth and routes from its own number, so that a resumed run is the same run."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tpx_export.training import state
from tpx_export.training.data import Data, Told, seeded
from tpx_export.training.frozen import adapters_of
from tpx_export.training.settings import Settings
from tpx_runtime.errors import BadInput, Cancelled, TpxError
from tpx_runtime.interrupts import deferred_interrupts
from tpx_runtime.progress import progress

SAVE_EVERY_S = 120.0
_SHOWN = 50  # steps that the shown loss is the mean of
_JUDGED = 16  # pictures that the loss before and after is taken of
_CLIP = 1.0  # the greatest norm of a gradient
_BATCH, _ROUTES, _JUDGE = 2, 3, 4  # random streams; data.py has 1


class TrainingFailed(TpxError):
    """Training ran, but cannot go on."""

    exit_code = 5


class Objective(Protocol):
    """A loss: FlowLoss, DiffusionLoss."""

    def __call__(
        self, model: nn.Module, clean: Tensor, told: Told, depth: int, stream: torch.Generator
    ) -> Tensor:
        """Latents float32 [B, C, S, S] and their conditioning -> a scalar."""


@dataclass(frozen=True)
class Job:
    """A model on `device`, and the loss, data and settings to train it with."""

    model: nn.Module
    objective: Objective
    data: Data
    settings: Settings
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """Steps taken, and the loss on fixed pictures, noise and noise levels: of the base, of the adapters' average."""

    steps: int
    loss_before: float
    loss_after: float


def fit(job: Job, steps: int, saved: Path, identity: dict[str, Any]) -> Outcome:
    """Train the model's adapters up to `steps`, from the state at `saved` where there is one; they end as their average.

    A saved state is only resumed if it agrees with `identity`. The state is written every two minutes, at the end and at
    Ctrl-C, which raises Cancelled after the current step. Raises BadInput for a state of another run, TrainingFailed for
    a loss that is not finite.
    """
    parameters = adapters_of(job.model)
    run = state.Run(parameters, _optimizer(parameters, job.settings))
    if saved.exists():
        state.restore(run, state.read(saved, identity), saved)
    if run.step > steps:
        raise BadInput(
            f"expected --steps of {run.step} or more, which {saved} has taken already, found {steps}; ask for more, or "
            "delete the file to start anew"
        )
    try:
        if run.step == 0:
            run.loss_before = judge(job)
        _steps(job, run, steps, lambda: state.save(run, identity, saved), saved)
        run.use_average()
        return Outcome(run.step, run.loss_before, judge(job))
    except KeyboardInterrupt:
        held = f"{saved} holds its last saved state" if saved.exists() else "nothing was written"
        raise Cancelled(f"cancelled; {held}") from None


def _steps(job: Job, run: state.Run, steps: int, save: Callable[[], None], saved: Path) -> None:
    losses: list[float] = []
    last_save, first = time.monotonic(), run.step
    with deferred_interrupts() as interrupted, progress("training", steps) as advance:
        while run.step < steps:
            losses = [*losses[1 - _SHOWN :], one_step(job, run)]
            advance(run.step, f"loss {sum(losses) / len(losses):.4f}")
            if interrupted.is_set():
                save()
                raise Cancelled(
                    f"cancelled after {run.step} of {steps} steps, which {saved} holds; the same command goes on"
                )
            if time.monotonic() - last_save > SAVE_EVERY_S:
                save()
                last_save = time.monotonic()
    if run.step > first:
        save()


def one_step(job: Job, run: state.Run) -> float:
    """Take the next step; returns the loss before it. Raises TrainingFailed where that or its gradient is not finite."""
    settings, device = job.settings, job.device
    stream = seeded(settings.seed, _BATCH, run.step)
    dropped = (torch.rand(settings.batch, generator=stream) < settings.caption_dropout).tolist()
    depth = settings.thinking.max_depth
    if settings.depth == "random":
        depth = int(torch.randint(1, depth + 1, (1,), generator=stream))
    rows = job.data.rows(settings.seed, run.step, settings.batch)
    clean, told = job.data.batch(rows, dropped, device)
    for group in run.optimizer.param_groups:
        group["lr"] = settings.lr * min(1.0, (run.step + 1) / max(1, settings.warmup))
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seeded(settings.seed, _ROUTES, run.step).initial_seed())
        loss = job.objective(job.model, clean, told, depth, stream)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), _CLIP).item()
    if not math.isfinite(value := loss.item()) or not math.isfinite(norm):
        raise TrainingFailed(
            f"expected a finite loss, found {value} with a gradient of {norm} at step {run.step + 1}; take a lower --lr, or "
            "--precision fp32"
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.average()
    run.step += 1
    return value


@torch.no_grad()
def judge(job: Job) -> float:
    """The mean loss of up to 16 pictures in evaluation mode at full depth, the noise and its levels always the same."""
    batch, total = job.settings.batch, 0.0
    rows = list(range(min(_JUDGED, len(job.data))))
    job.model.eval()
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        clean, told = job.data.batch(some, [False] * len(some), job.device)
        stream = seeded(job.settings.seed, _JUDGE, start)
        loss = job.objective(job.model, clean, told, job.settings.thinking.max_depth, stream)
        total += loss.item() * len(some)
    job.model.train()
    return total / len(rows)


def _optimizer(parameters: dict[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW. Biases do not decay, nor do modulations, whose scales are neutral at one."""
    free = {name for name in parameters if name.endswith((".bias", ".scale", ".shift"))}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name not in free]},
        {"params": [p for name, p in parameters.items() if name in free], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
