"""The state of a training run, with which it can be resumed: adapters, their average, optimizer and step in one file."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpx_export.tensor_files import write_torch
from tpx_runtime.errors import BadInput

_FORMAT = "tpx-training 1"
# How messages name entries of the identity, whose keys are part of the format.
_LABELS = {"base": "base files", "pictures and captions": "images and captions"}
_MAX_DECAY = 0.999


@dataclass
class Run:
    """The variables of a run. `step` counts finished steps; `ema` averages parameters over about the last tenth of them."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] = field(init=False)
    step: int = 0
    loss_before: float = float("nan")

    def __post_init__(self) -> None:
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the average with the current parameters."""
        decay = min(_MAX_DECAY, (1 + self.step) / (10 + self.step))
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def copy_average(self) -> None:
        """Set the parameters to their average, at the end of the run."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.ema[name])


def save(run: Run, identity: dict[str, Any], path: Path) -> None:
    """Write the state of a run and its `identity` atomically. Raises BadInput."""
    content = {
        "format": _FORMAT,
        "identity": json.dumps(identity),
        "step": run.step,
        "loss_before": run.loss_before,
        "adapters": {name: p.detach() for name, p in run.parameters.items()},
        "ema": run.ema,
        "optimizer": run.optimizer.state_dict(),
    }
    write_torch(content, path)


def load_saved(path: Path) -> Any:
    """What torch.save wrote to `path`, on the CPU; None for a damaged file, or one that is not of torch."""
    try:
        with warnings.catch_warnings():  # torch warns about unknown pickles; one message is enough
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises many kinds of errors for other files
        return None


def read(path: Path, identity: dict[str, Any], steps: int) -> dict[str, Any]:
    """Load the state at `path`. Every entry of `identity`, which may be incomplete, must match that of the saved run.

    Raises BadInput for the state of another run, of more than `steps` steps, and for other files.
    """
    content = load_saved(path)
    try:
        saved, done = json.loads(content["identity"]), int(content["step"])
        if content["format"] != _FORMAT or not isinstance(saved, dict):
            raise ValueError
    except Exception:  # the file may hold anything else
        raise BadInput(
            f"expected the state of a training run in {path}, found something else; delete it to start again"
        ) from None
    for name, value in identity.items():
        # A run of a version without the flag is one without the flag.
        found = saved.get(name, False if isinstance(value, bool) else None)
        if value == found:
            continue
        if name.startswith("--"):
            before, now = (_option(name, given) for given in (found, value))
            difference = f"{before} as in the run saved in {path}, found {now}"
        else:
            difference = f"the {_LABELS.get(name, name)} of the run saved in {path}, found different ones"
        raise BadInput(
            f"expected {difference}; use the same or another --out, or delete it and --out to start again"
        )
    if done > steps:
        raise BadInput(
            f"expected --steps of {done} or more, the steps of {path}, found {steps}; choose more, or delete it and --out "
            "to start again"
        )
    return dict(content)


def _option(name: str, value: object) -> str:
    """An option as it is given: a flag has no value."""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value}"


def restore(run: Run, content: dict[str, Any], path: Path) -> None:
    """Resume `run` from a state that `read` returned. Raises BadInput for a state that does not fit the model."""
    try:
        shapes = {name: p.shape for name, p in run.parameters.items()}
        if any({n: v.shape for n, v in content[kind].items()} != shapes for kind in ("adapters", "ema")):
            raise ValueError
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(content["adapters"][name])
                run.ema[name].copy_(content["ema"][name])
        run.optimizer.load_state_dict(content["optimizer"])
        run.step, run.loss_before = int(content["step"]), float(content["loss_before"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise BadInput(
            f"expected the state of these adapters in {path}, found one that does not fit; delete it to start again"
        ) from None
