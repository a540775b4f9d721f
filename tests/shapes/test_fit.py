"""The training loop: resumed runs end like uninterrupted ones, and files on disk are always complete."""

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from samples.shapes.fit import atomic_save, fit, step_generator, warmup_cosine
from tpx_runtime.errors import BadInput

STEPS = 12
RATES = (0.05, 0.01)  # of the weight (AdamW) and of the bias (SGD with momentum)


class Killed(BaseException):
    """Raised in place of a kill; nothing catches it."""


class Task:
    """Trains a linear layer to sum its inputs; the loss of step `stop`, if given, raises `by`."""

    def __init__(self, stop: int | None = None, by: type[BaseException] = Killed) -> None:
        torch.manual_seed(1)
        self.module = nn.Linear(3, 1)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([self.module.weight], lr=RATES[0]),
            torch.optim.SGD([self.module.bias], lr=RATES[1], momentum=0.9),
        ]
        self.stop, self.by = stop, by
        self.seen: list[int] = []
        self.rates: list[list[float]] = []

    def loss_at(self, step: int) -> Tensor:
        if step == self.stop:
            raise self.by
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
    for (name, one), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def uninterrupted(tmp_path: Path) -> tuple[Task, nn.Module]:
    task = Task()
    ema = task.run(tmp_path / "unbroken.pt")
    assert task.seen == list(range(STEPS))
    return task, ema


@pytest.mark.parametrize(("by", "save_every_s"), [(Killed, -1.0), (KeyboardInterrupt, 1000.0)])
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, by: type[BaseException], save_every_s: float
) -> None:
    reference, ema = uninterrupted(tmp_path)
    state = tmp_path / "state.pt"
    seen = []
    for stop in (5, 6, None):
        task = Task(stop, by)  # like a new process: only the file is left
        if stop:
            with pytest.raises(by):
                task.run(state, save_every_s=save_every_s)
        else:
            resumed = task.run(state, save_every_s=save_every_s)
        seen.append(task.seen)
    assert seen == [list(range(5)), [5], list(range(6, STEPS))]
    assert_same(task.module, reference.module)
    assert_same(resumed, ema)
    assert task.rates == reference.rates[6:]


def test_a_killed_run_goes_back_to_its_last_save(tmp_path: Path) -> None:
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


def test_ctrl_c_while_progress_is_drawn_repeats_no_step(tmp_path: Path) -> None:
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


def test_ctrl_c_between_two_optimizers_takes_the_step_whole(tmp_path: Path, how: signal.Signals) -> None:
    reference, ema = uninterrupted(tmp_path)
    state, task = tmp_path / "state.pt", Task()
    step = task.optimizers[0].step

    def pressed() -> None:
        step()
        if len(task.seen) == 5:
            signal.raise_signal(how)

    task.optimizers[0].step = pressed  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        task.run(state, save_every_s=1000)
    again = Task()
    assert_same(again.run(state), ema)
    assert_same(again.module, reference.module)
    assert again.seen == list(range(5, STEPS))


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
def test_the_state_of_another_run_is_refused(tmp_path: Path, change: dict[str, float], message: str) -> None:
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


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    first = Task()
    ema = first.run(state, save_every_s=1000)
    before = state.read_bytes()
    again = Task(stop=0)
    assert_same(again.run(state), ema)
    assert_same(again.module, first.module)
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
        decay = min(0.6, (step + 1) / (step + 10))  # as in `train_step`
        average = decay * average + (1 - decay) * weight
    assert isinstance(ema, nn.Linear)
    torch.testing.assert_close(ema.weight.detach(), average)
    assert not ema.weight.requires_grad
    assert not torch.equal(ema.weight, task.module.weight)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    task = Task()
    task.module.bias.requires_grad_(False)
    bias, weight = task.module.bias.clone(), task.module.weight.detach().clone()
    ema = task.run(tmp_path / "state.pt")
    assert torch.equal(task.module.bias, bias)
    assert isinstance(ema, nn.Linear)
    assert torch.equal(ema.bias, bias)
    assert not torch.equal(task.module.weight, weight)


def test_each_optimizer_keeps_its_own_rate(tmp_path: Path) -> None:
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


def test_progress_tells_the_mean_of_the_last_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.pt"
    losses: dict[int, float] = {}

    def watched(task: Task) -> Callable[[int], Tensor]:
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
        task.run(state, watched(task), log_every=4)
    assert printed() == [("4/12", mean(0, 4))]
    task = Task()
    task.run(state, watched(task), log_every=4)
    assert printed() == [
        ("8/12", mean(6, 8)),
        ("12/12", mean(8, 12)),
    ]  # the first is only over steps since the resumption


def test_show_is_given_the_average(tmp_path: Path) -> None:
    shown: list[int] = []
    given: list[nn.Module] = []

    def show(module: nn.Module, step: int) -> None:
        shown.append(step)
        given.append(module)

    ema = Task().run(tmp_path / "state.pt", show=show, show_every=5)
    assert shown == [5, 10]
    assert all(module is ema for module in given)


def test_warmup_then_cosine() -> None:
    factors = [warmup_cosine(step, 1000) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[49] == pytest.approx(0.5)
    assert factors[99] == factors[100] == 1
    assert factors[550] == pytest.approx(0.51)
    assert factors[1000] == pytest.approx(0.02)
    assert factors[:100] == sorted(factors[:100])
    assert factors[100:] == sorted(factors[100:], reverse=True)


def test_streams_of_steps() -> None:
    def draw(seed: int, step: int) -> Tensor:
        return torch.rand(100, generator=step_generator(seed, step))

    first = draw(3, 7)
    torch.rand(5)  # the global generator is independent
    assert torch.equal(first, draw(3, 7))
    assert not torch.equal(first, draw(3, 8))
    assert not torch.equal(first, draw(4, 7))
    assert draw(-1, 0).isfinite().all()


def test_save_whole_makes_its_folder_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "state.pt"
    for value in (1, 2):
        atomic_save({"value": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True)["value"] == value
        assert list(path.parent.iterdir()) == [path]


def test_save_whole_keeps_the_old_file_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    atomic_save({"value": 1}, path)

    def half(value: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            atomic_save({"value": 2}, path)
    assert torch.load(path, weights_only=True) == {"value": 1}
    atomic_save({"value": 3}, path)
    assert list(tmp_path.iterdir()) == [path]
