"""The state of a run that can be stopped and resumed: adapters, their average, the optimizer and the step, in one file."""

import json
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.files import atomic_file

_FORMAT = "tpx-training 1"
_EMA = 0.999


@dataclass
class Run:
    """What training changes. `step` counts whole steps; `ema` averages the parameters over about the last tenth of them."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] = field(init=False)
    step: int = 0
    loss_before: float = float("nan")

    def __post_init__(self) -> None:
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def average(self) -> None:
        """Draw the average towards the parameters of the step that was just taken."""
        decay = min(_EMA, (1 + self.step) / (10 + self.step))
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Give the parameters the average's values: the run is over."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.ema[name])


def save(run: Run, identity: dict[str, Any], path: Path) -> None:
    """Write the state of a run, and the `identity` that it is recognised by, whole or not at all. Raises BadInput."""
    facts = {
        "format": _FORMAT,
        "identity": json.dumps(identity),
        "step": run.step,
        "loss_before": run.loss_before,
        "adapters": {name: p.detach() for name, p in run.parameters.items()},
        "ema": run.ema,
        "optimizer": run.optimizer.state_dict(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            torch.save(facts, part)
    except (OSError, RuntimeError) as error:  # torch's own for a full disk
        said = shorten(" ".join(str(error).split()), 100)
        raise BadInput(f"expected to write {path}, found: {said}; free some space") from None


def read(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Load the state at `path`. Every entry of `identity` must match the saved run.

    `identity` may be a subset of what was saved. Raises BadInput for another run's state and for a file that is none.
    """
    try:
        with warnings.catch_warnings():  # torch's own about foreign pickles; one line is enough
            warnings.simplefilter("ignore")
            whole = torch.load(path, map_location="cpu", weights_only=True)
        before = json.loads(whole["identity"])
        if whole["format"] != _FORMAT or not isinstance(before, dict):
            raise ValueError
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        raise BadInput(
            f"expected the state of a training run in {path}, found something else; delete it to start anew"
        ) from None
    for name, now in identity.items():
        if now != before.get(name):
            said = f"{name} {before.get(name)} as in the run that {path} holds, found {now}"
            if not name.startswith("--"):
                said = f"the {name} of the run that {path} holds, found another"
            raise BadInput(f"expected {said}; use that, or another --out, or delete the file to start anew")
    return dict(whole)


def restore(run: Run, whole: dict[str, Any], path: Path) -> None:
    """Resume `run` from a state that was read. Raises BadInput for a state that does not fit the model."""
    try:
        shapes = {name: p.shape for name, p in run.parameters.items()}
        if any({n: v.shape for n, v in whole[kind].items()} != shapes for kind in ("adapters", "ema")):
            raise ValueError
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(whole["adapters"][name])
                run.ema[name].copy_(whole["ema"][name])
        run.optimizer.load_state_dict(whole["optimizer"])
        run.step, run.loss_before = int(whole["step"]), float(whole["loss_before"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise BadInput(
            f"expected the state of these adapters in {path}, found one that does not fit; delete it to start anew"
        ) from None
