"""The training loop: resumed runs end like uninterrupted ones, and files on disk are always complete."""

import copy
import math
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor, nn

from samples.shapes.fit import atomic_save, fit, step_generator, warmup_cosine
from tpx_runtime.errors import BadInput

STEPS = 12
# Learning rates of the weight (AdamW) and of the bias (SGD with momentum).
RATES = (0.05, 0.01)


class Killed(BaseException):
    """Simulates a killed process: nothing catches it."""


class Task:
    """Trains a linear layer to sum its inputs; the loss of step `stop`, if given, raises `error`."""

    def __init__(self, stop: int | None = None, error: type[BaseException] = Killed) -> None:
        torch.manual_seed(1)
        self.module = nn.Linear(3, 1)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([self.module.weight], lr=RATES[0]),
            torch.optim.SGD([self.module.bias], lr=RATES[1], momentum=0.9),
        ]
        self.stop, self.error = stop, error
        self.seen: list[int] = []
        self.rates: list[list[float]] = []

    def loss_at(self, step: int) -> Tensor:
        if step == self.stop:
            raise self.error
        self.seen.append(step)
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers])
        inputs = torch.randn(8, 3, generator=step_generator(0, step))
        return (self.module(inputs)[:, 0] - inputs.sum(1)).square().mean()

    def run(
        self, state: Path, loss_at: Callable[[int], Tensor] | None = None, **settings: object
    ) -> nn.Module:
        # Saves after every step by default.
        settings = {"steps": STEPS, "save_every_s": -1.0, "settings": {"seed": 0}, **settings}
        return fit("sum", self.module, self.optimizers, loss_at or self.loss_at, state=state, **settings)  # type: ignore[arg-type]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, value), (_, expected) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


def uninterrupted(tmp_path: Path) -> tuple[Task, nn.Module]:
    task = Task()
    ema = task.run(tmp_path / "unbroken.pt")
    assert task.seen == list(range(STEPS))
    return task, ema


@pytest.mark.parametrize(("error", "save_every_s"), [(Killed, -1.0), (KeyboardInterrupt, 1000.0)])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, error: type[BaseException], save_every_s: float
) -> None:
    reference, ema = uninterrupted(tmp_path)
    state = tmp_path / "state.pt"
    steps_by_process = []
    for stop in (5, 6, None):
        # Like a new process, which has only the saved file.
        task = Task(stop, error)
        if stop:
            with pytest.raises(error):
                task.run(state, save_every_s=save_every_s)
        else:
            resumed = task.run(state, save_every_s=save_every_s)
        steps_by_process.append(task.seen)
    assert steps_by_process == [list(range(5)), [5], list(range(6, STEPS))]
    assert_same(task.module, reference.module)
    assert_same(resumed, ema)
    assert task.rates == reference.rates[6:]


def test_a_killed_run_resumes_from_its_last_save(tmp_path: Path) -> None:
    reference, ema = uninterrupted(tmp_path)
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        Task(4, KeyboardInterrupt).run(state, save_every_s=1000)
    with pytest.raises(Killed):
        Task(7).run(state, save_every_s=1000)
    task = Task()
    resumed = task.run(state)
    assert task.seen == list(range(4, STEPS))
    assert_same(resumed, ema)
    assert_same(task.module, reference.module)


def test_ctrl_c_in_the_show_callback_repeats_no_step(tmp_path: Path) -> None:
    reference, ema = uninterrupted(tmp_path)
    state = tmp_path / "state.pt"

    def show(module: nn.Module, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Task().run(state, show=show, show_every=4, save_every_s=1000)
    task = Task()
    resumed = task.run(state)
    assert task.seen == list(range(4, STEPS))
    assert_same(resumed, ema)
    assert_same(task.module, reference.module)


def test_ctrl_c_between_two_optimizers_completes_the_step(tmp_path: Path, how: signal.Signals) -> None:
    reference, ema = uninterrupted(tmp_path)
    state, task = tmp_path / "state.pt", Task()
    step = task.optimizers[0].step

    def step_and_interrupt() -> None:
        step()
        if len(task.seen) == 5:
            signal.raise_signal(how)

    task.optimizers[0].step = step_and_interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        task.run(state, save_every_s=1000)
    resumed = Task()
    assert_same(resumed.run(state), ema)
    assert_same(resumed.module, reference.module)
    assert resumed.seen == list(range(5, STEPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 2}, rf"\(steps {STEPS}\), found steps 2; use those"),
        ({"settings": {"seed": 1}}, r"\(seed 0\), found seed 1; use those, or another --out"),
        ({"ema_decay": 0.5}, r"\(ema decay 0.999\), found ema decay 0.5"),
        ({"rate": 0.5}, r"\(rates \[\[0.05\], \[0.01\]\]\), found rates \[\[0.5\], \[0.01\]\]"),
        ({"weight": 3.0}, r"\(first weights [0-9a-f]{16}\), found first weights [0-9a-f]{16}"),
    ],
)
def test_rejects_the_state_of_another_run(tmp_path: Path, change: dict[str, float], message: str) -> None:
    state = tmp_path / "state.pt"
    Task().run(state)
    before = state.read_bytes()
    other, change = Task(), dict(change)
    if rate := change.pop("rate", None):
        other.optimizers[0].param_groups[0]["lr"] = rate
    if weight := change.pop("weight", None):
        torch.nn.init.constant_(other.module.weight, weight)
    with pytest.raises(BadInput, match=f"expected the settings of the run in .*state.pt {message}"):
        other.run(state, **change)
    assert state.read_bytes() == before


def test_rejects_a_damaged_or_foreign_state(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    Task().run(state)
    content = state.read_bytes()
    saved = torch.load(state, weights_only=True)
    other: list[object] = [[1], torch.zeros(2), {"model": {}}, {"settings": 3}]
    other += [saved | change for change in ({"module": {}}, {"ema": 3}, {"optimizers": []}, {"step": None})]
    damaged = [b"", content[: len(content) // 2], b"nothing of the kind", b"j\n", pickle.dumps(Path("x"))]
    message = f"expected the state of this run in {state}, found something else; delete it to start again"
    for value in [*damaged, *other]:
        torch.save(value, state)
        if isinstance(value, bytes):
            state.write_bytes(value)
        with pytest.raises(BadInput, match=message):
            Task().run(state)


def test_a_finished_run_returns_without_training(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    first = Task()
    ema = first.run(state, save_every_s=1000)
    before = state.read_bytes()
    second = Task(stop=0)
    assert_same(second.run(state), ema)
    assert_same(second.module, first.module)
    assert state.read_bytes() == before


def test_ema_follows_the_weights(tmp_path: Path) -> None:
    task = Task()
    average = copy.deepcopy(task.module.weight.detach())
    weights: list[Tensor] = []

    def loss_at(step: int) -> Tensor:
        weights.append(task.module.weight.detach().clone())
        return task.loss_at(step)

    ema = task.run(tmp_path / "state.pt", loss_at, ema_decay=0.6)
    for step, weight in enumerate([*weights[1:], task.module.weight.detach()]):
        # As in `train_step`.
        decay = min(0.6, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * weight
    assert isinstance(ema, nn.Linear)
    torch.testing.assert_close(ema.weight.detach(), average)
    assert not ema.weight.requires_grad
    assert not torch.equal(ema.weight, task.module.weight)


def test_frozen_parameters_do_not_change(tmp_path: Path) -> None:
    task = Task()
    task.module.bias.requires_grad_(False)
    bias, weight = task.module.bias.clone(), task.module.weight.detach().clone()
    ema = task.run(tmp_path / "state.pt")
    assert torch.equal(task.module.bias, bias)
    assert isinstance(ema, nn.Linear)
    assert torch.equal(ema.bias, bias)
    assert not torch.equal(task.module.weight, weight)


def test_each_optimizer_keeps_its_own_learning_rate(tmp_path: Path) -> None:
    task, _ = uninterrupted(tmp_path)
    for step, rates in enumerate(task.rates):
        assert rates == pytest.approx([rate * warmup_cosine(step, STEPS) for rate in RATES])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    task = Task()
    task.optimizers = [torch.optim.SGD(task.module.parameters(), lr=1.0)]
    before = torch.cat([p.detach().flatten() for p in task.module.parameters()])
    task.run(tmp_path / "state.pt", lambda step: 1e6 * task.loss_at(step), steps=1, max_grad_norm=0.5)
    after = torch.cat([p.detach().flatten() for p in task.module.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5 * warmup_cosine(0, 1), rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, bad: float) -> None:
    state = tmp_path / "state.pt"
    task = Task()
    with pytest.raises(BadInput, match=f"expected a finite loss of sum, found {bad} at step 3; lower"):
        task.run(state, lambda step: task.loss_at(step) * (bad if step == 3 else 1))
    saved = torch.load(state, weights_only=True)
    assert saved["step"] == 3
    assert all(value.isfinite().all() for part in ("module", "ema") for value in saved[part].values())


def test_progress_prints_the_mean_of_the_last_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.pt"
    losses: dict[int, float] = {}

    def recorded_loss(task: Task) -> Callable[[int], Tensor]:
        def loss_at(step: int) -> Tensor:
            loss = task.loss_at(step)
            losses[step] = loss.item()
            return loss

        return loss_at

    def printed() -> list[tuple[str, float]]:
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [(line[1], float(line[3])) for line in lines]

    def mean(first: int, last: int) -> float:
        return pytest.approx(sum(losses[i] for i in range(first, last)) / (last - first), abs=1e-4)

    task = Task(6, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        task.run(state, recorded_loss(task), log_every=4)
    assert printed() == [("4/12", mean(0, 4))]
    task = Task()
    task.run(state, recorded_loss(task), log_every=4)
    # The first mean is only of the steps since the run was resumed.
    assert printed() == [("8/12", mean(6, 8)), ("12/12", mean(8, 12))]


def test_show_receives_the_averaged_module(tmp_path: Path) -> None:
    shown_steps: list[int] = []
    shown_modules: list[nn.Module] = []

    def show(module: nn.Module, step: int) -> None:
        shown_steps.append(step)
        shown_modules.append(module)

    ema = Task().run(tmp_path / "state.pt", show=show, show_every=5)
    assert shown_steps == [5, 10]
    assert all(module is ema for module in shown_modules)


def test_warmup_then_cosine() -> None:
    factors = [warmup_cosine(step, 1000) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[49] == pytest.approx(0.5)
    assert factors[99] == factors[100] == 1
    assert factors[550] == pytest.approx(0.51)
    assert factors[1000] == pytest.approx(0.02)
    assert factors[:100] == sorted(factors[:100])
    assert factors[100:] == sorted(factors[100:], reverse=True)


def test_step_generators_depend_only_on_seed_and_step() -> None:
    def random_values(seed: int, step: int) -> Tensor:
        return torch.rand(100, generator=step_generator(seed, step))

    first = random_values(3, 7)
    # The global generator is independent.
    torch.rand(5)
    assert torch.equal(first, random_values(3, 7))
    assert not torch.equal(first, random_values(3, 8))
    assert not torch.equal(first, random_values(4, 7))
    assert random_values(-1, 0).isfinite().all()


def test_atomic_save_creates_its_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "state.pt"
    for value in (1, 2):
        atomic_save({"value": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["value"] == value
        assert list(path.parent.iterdir()) == [path]


def test_atomic_save_keeps_the_old_file_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    atomic_save({"value": 1}, path)

    def write_half_and_stop(value: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half_and_stop)
        with pytest.raises(Killed):
            atomic_save({"value": 2}, path)
    assert torch.load(path, weights_only=True) == {"value": 1}
    atomic_save({"value": 3}, path)
    assert list(tmp_path.iterdir()) == [path]
