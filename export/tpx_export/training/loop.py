"""The training loop. Images, noise, depth and routes of a step depend only on seed and step, so a run can be resumed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tpx_export.training import state
from tpx_export.training.data import Conditioning, Data, seeded_generator
from tpx_export.training.frozen import adapter_parameters
from tpx_export.training.settings import Settings
from tpx_runtime.errors import Cancelled, TpxError
from tpx_runtime.interrupts import deferred_interrupts
from tpx_runtime.progress import progress

SAVE_EVERY_S = 120.0
_LOSS_WINDOW = 50  # the displayed loss is the mean over this many steps
_EVAL_IMAGES = 16  # for the loss before and after training
_MAX_GRAD_NORM = 1.0
_BATCH, _ROUTES, _EVALUATION = 2, 3, 4  # keys of random generators; data.py has 1


class TrainingFailed(TpxError):
    """Training started but cannot continue."""

    exit_code = 5


class Objective(Protocol):
    """A loss: FlowLoss, DiffusionLoss."""

    def __call__(
        self,
        model: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        depth: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Latents float32 [B, C, H, W] and their conditioning -> a scalar."""


@dataclass(frozen=True)
class Job:
    """A model on `device`, with the loss, data and settings of its training."""

    model: nn.Module
    objective: Objective
    data: Data
    settings: Settings
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """Numbers of pictures and steps, and the loss on fixed images, noise and noise levels, before and after."""

    pictures: int
    steps: int
    loss_before: float
    loss_after: float


def fit(job: Job, steps: int, state_path: Path, identity: dict[str, Any]) -> Outcome:
    """Train the model's adapters up to `steps`, and then set them to their average.

    A state at `state_path` is resumed if it has the same `identity`. The state is written every two minutes, at the end and
    at Ctrl-C, which raises Cancelled after the current step. Raises BadInput for the state of another run or of more
    steps, TrainingFailed for a loss that is not finite, also that of the result.
    """
    parameters = adapter_parameters(job.model)
    run = state.Run(parameters, _optimizer(parameters, job.settings))
    if state_path.exists():
        state.restore(run, state.read(state_path, identity, steps), state_path)
    try:
        if run.step == 0:
            run.loss_before = evaluate(job)
        _train(job, run, steps, lambda: state.save(run, identity, state_path), state_path)
        run.copy_average()
        if not math.isfinite(loss_after := evaluate(job)):
            raise _not_finite(f"{loss_after} after step {run.step}")
        return Outcome(len(job.data), run.step, run.loss_before, loss_after)
    except KeyboardInterrupt:
        kept = f"{state_path} has the last saved state" if state_path.exists() else "nothing was written"
        raise Cancelled(f"cancelled; {kept}") from None


def _train(job: Job, run: state.Run, steps: int, save: Callable[[], None], state_path: Path) -> None:
    losses: list[float] = []
    last_save, first = time.monotonic(), run.step
    with deferred_interrupts() as interrupted, progress("training", steps, first) as advance:
        while run.step < steps:
            losses = [*losses[1 - _LOSS_WINDOW :], train_step(job, run)]
            advance(run.step, f"loss {sum(losses) / len(losses):.4f}")
            if interrupted.is_set():
                save()
                raise Cancelled(
                    f"cancelled after {run.step} of {steps} steps, saved in {state_path}; the same command resumes the run"
                )
            if time.monotonic() - last_save > SAVE_EVERY_S:
                save()
                last_save = time.monotonic()
    if run.step > first:
        save()


def train_step(job: Job, run: state.Run) -> float:
    """Take one step and return its loss. Raises TrainingFailed if the loss or the gradient is not finite."""
    settings, device = job.settings, job.device
    generator = seeded_generator(settings.seed, _BATCH, run.step)
    dropped = (torch.rand(settings.batch, generator=generator) < settings.caption_dropout).tolist()
    depth = settings.thinking.max_depth
    if settings.depth == "random":
        depth = int(torch.randint(1, depth + 1, (1,), generator=generator))
    rows = job.data.rows(settings.seed, run.step, settings.batch)
    latents, conditioning = job.data.batch(rows, dropped, device)
    for group in run.optimizer.param_groups:
        group["lr"] = settings.lr * min(1.0, (run.step + 1) / max(1, settings.warmup))
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seeded_generator(settings.seed, _ROUTES, run.step).initial_seed())
        loss = job.objective(job.model, latents, conditioning, depth, generator)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), _MAX_GRAD_NORM).item()
    if not math.isfinite(value := loss.item()) or not math.isfinite(norm):
        raise _not_finite(f"{value} with a gradient norm of {norm} at step {run.step + 1}")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.update_average()
    run.step += 1
    return value


def _not_finite(found: str) -> TrainingFailed:
    return TrainingFailed(
        f"expected a finite loss, found {found}; use a lower --lr or --precision fp32, with another --out"
    )


@torch.no_grad()
def evaluate(job: Job) -> float:
    """The mean loss over up to 16 random images in evaluation mode at full depth, with fixed noise and noise levels."""
    batch, total = job.settings.batch, 0.0
    order = torch.randperm(len(job.data), generator=seeded_generator(job.settings.seed, _EVALUATION))
    rows = sorted(order[:_EVAL_IMAGES].tolist())
    job.model.eval()
    for start in range(0, len(rows), batch):
        batch_rows = rows[start : start + batch]
        latents, conditioning = job.data.batch(batch_rows, [False] * len(batch_rows), job.device)
        generator = seeded_generator(job.settings.seed, _EVALUATION, start)
        depth = job.settings.thinking.max_depth
        loss = job.objective(job.model, latents, conditioning, depth, generator)
        total += loss.item() * len(batch_rows)
    job.model.train()
    return total / len(rows)


def _optimizer(parameters: dict[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW without weight decay for biases and modulations, whose neutral scale is 1."""
    no_decay = {name for name in parameters if name.endswith((".bias", ".scale", ".shift"))}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name not in no_decay]},
        {"params": [p for name, p in parameters.items() if name in no_decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
