"""Rounds, failures, images that differ, continued runs, and the report: with real processes and no engine."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tpx_engines.bench.configurations import Configuration
from tpx_engines.bench.measure import Plan, run
from tpx_engines.bench.record import Record
from tpx_engines.bench.report import as_text
from tpx_engines.bench.runner import Timing
from tpx_engines.bench.summary import rows
from tpx_engines.bench.worker import Worker
from tpx_runtime.errors import BadInput

Configure = Callable[..., Configuration]
Planner = Callable[..., Plan]
Recorder = Callable[..., Record]
Started = Callable[[], list[int]]


def test_every_unit_is_sampled_once_a_round(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    seen, advanced = record(), list[int]()
    made = plan(configuration("right"), configuration("slow", step_s=0.01))
    units = made.units(seen)
    run(made, seen, lambda label, done: advanced.append(done))
    for entry in seen.data["configurations"].values():
        assert {unit: len(samples) for unit, samples in entry["samples"].items()} == {
            "cold": 2,
            "draw 1": 2,
            "draw 2": 2,
        }
    assert sum(advanced) == units == 2 * (1 + 3 * 2)
    assert len(set(started())) == 2 * (1 + 2)
    fast, slow = rows(seen.data)
    assert slow.step_ms is not None and slow.step_ms >= 10
    assert slow.image_s is not None and slow.image_s >= 0.03
    assert fast.cold_s is not None and fast.image_s is not None and fast.cold_s > 10 * fast.image_s
    assert fast.peak_mb is not None and 10 < fast.peak_mb < 1000


def test_a_sample_is_the_mean_of_as_many_batches_as_its_time_holds() -> None:
    taken = iter((0.25, 0.125, 0.0625, 0.25, 9.0))

    class Drawing:
        def draw(self, images: int) -> tuple[list[object], Timing]:
            assert images == 4
            return [], Timing(seconds := next(taken), seconds / 2)

    worker = Worker()
    worker._runner = Drawing()  # type: ignore[assignment]
    answer = worker.draw(images=4, seconds=0.5)
    assert (answer["seconds"], answer["step_seconds"]) == (0.6875 / 4, 0.34375 / 4)
    assert worker.draw(images=4, seconds=0.5)["seconds"] == 9.0


def test_a_wrong_picture_shows_as_a_low_psnr(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    seen = record()
    first = configuration("right")
    again = Configuration("again", 2, first.factory, first.options)
    run(plan(first, again, configuration("wrong"), rounds=1, batches=(1,)), seen)
    right, same, wrong = rows(seen.data)
    assert right.same and same.same and not wrong.same
    assert wrong.psnr_db == pytest.approx(14.15, abs=0.01)  # 20 log10(255 / 50)
    text = as_text(seen.data)
    assert [line.split(" |")[0] for line in text.splitlines() if "| 14.2, different image |" in line] == [
        "| wrong"
    ]
    assert "Different image than right (PSNR below 35 dB): wrong. " in text


def test_from_35_db_on_pictures_count_as_equal(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    seen = record()
    run(plan(configuration("right"), configuration("wrong"), rounds=1, batches=(1,)), seen)
    (entry,) = [entry for entry in seen.data["configurations"].values() if entry["name"] == "wrong"]
    for decibels, other in ((35.0, False), (34.99, True)):
        entry["psnr_db"] = decibels
        assert rows(seen.data)[1].differs is other
        assert ("ifferent image" in as_text(seen.data)) is other


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("unavailable", "expected a GPU, found none; buy one"),
        ("broken", "RuntimeError: deep inside a framework"),
        ("killed", "expected an answer from the worker process, found signal SIGKILL"),
        ("missing", "AttributeError: "),
    ],
)
def test_a_failing_configuration_is_listed_with_its_reason(
    configuration: Configure, plan: Planner, record: Recorder, factory: str, reason: str
) -> None:
    seen = record()
    run(plan(configuration("right"), configuration(factory), rounds=1, batches=(1,)), seen)
    text = as_text(seen.data)
    assert f"Not measured:\n\n- {factory}: {reason}" in text
    assert "| right | " in text
    assert f"| {factory} | " not in text


def test_what_is_known_not_to_run_here_is_listed_and_not_started(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    seen = record()
    run(plan(configuration("right", problem="expected a GPU, found none"), rounds=1), seen)
    assert started() == []
    assert "- right: expected a GPU, found none" in as_text(seen.data)


def test_a_finished_configuration_is_not_measured_again(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    both = (configuration("right"), configuration("wrong"))
    run(plan(both[0], rounds=1, batches=(1,)), record())
    before = len(started())
    run(plan(both[0], rounds=1, batches=(1,)), record())
    assert len(started()) == before
    run(plan(*both, rounds=1, batches=(1,)), record())
    assert len(started()) == before + 2  # the other one, warm and cold
    # Compared with the image of the first run.
    assert rows(record().data)[1].psnr_db == pytest.approx(14.15, abs=0.01)
    assert [row.speed_up for row in rows(record().data)] == [1.0, None]
    text = as_text(record().data)
    assert "No speed-up for wrong: measured in another run than right, " in text


def test_rounds_that_are_added_to_all_are_compared_with_each_other_alone(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    first, second = configuration("right"), configuration("slow", step_s=0.01)
    run(plan(first, rounds=1, batches=(1,)), record())
    run(plan(first, second, rounds=3, batches=(1,)), record())
    stamps = [
        [(sample["run"], sample["round"]) for sample in record().entry(one)["samples"]["draw 1"]]
        for one in (first, second)
    ]
    assert stamps == [[(1, 0), (2, 1), (2, 2)], [(2, 0), (2, 1), (2, 2)]]
    slow = rows(record().data)[1]
    assert slow.speed_up is not None and slow.speed_up < 1
    assert "No speed-up for" not in as_text(record().data)


def test_more_rounds_add_only_what_is_missing(
    configuration: Configure, plan: Planner, record: Recorder
) -> None:
    one = configuration("right")
    run(plan(one, rounds=1), record())
    (first,) = record().entry(one)["samples"]["draw 1"]
    run(plan(one, rounds=3), record())
    samples = record().entry(one)["samples"]
    assert samples["draw 1"][0] == first
    assert {unit: len(taken) for unit, taken in samples.items()} == {"cold": 3, "draw 1": 3, "draw 2": 3}


def test_another_version_of_a_package_is_measured_anew(
    configuration: Configure, plan: Planner, record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = configuration("right", packages=("engine",))
    monkeypatch.setattr("tpx_engines.bench.configurations.version", lambda package: "1.0")
    run(plan(one, rounds=1), record())
    assert record().finished(one, 1, (1, 2))
    monkeypatch.setattr("tpx_engines.bench.configurations.version", lambda package: "1.1")
    assert not record().finished(one, 1, (1, 2))


def test_results_of_other_settings_are_kept_from_being_mixed(record: Recorder, tmp_path: Path) -> None:
    record()
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(
        BadInput, match=r"expected the settings .* \(steps 3\), found steps 4; use those, or another --json"
    ):
        record(steps=4)
    assert (tmp_path / "bench.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "tpx-bench", "version": 1}', "\x00"])
def test_a_file_of_something_else_is_refused_and_left_alone(
    record: Recorder, tmp_path: Path, content: str
) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(BadInput, match="expected results of tpx-bench"):
        record()
    assert (tmp_path / "bench.json").read_text() == content


def test_the_report_comes_from_the_file_alone(
    configuration: Configure, plan: Planner, record: Recorder, tmp_path: Path
) -> None:
    seen = record()
    seen.data["flops"]["2"] = 3_000_000
    seen.data["peaks"]["fp32"] = {"flops": [1e9, 2e9], "by": "a library"}
    slow = configuration("slow", step_s=0.01)
    cached = replace(slow, name="cached", cache_interval=2)
    run(plan(configuration("right"), slow, cached, rounds=1), seen)
    text = as_text(json.loads((tmp_path / "bench.json").read_text()))
    assert text == as_text(seen.data)
    assert "fp32 2 GFLOP/s (a library)" in text
    (row,) = [row for row in rows(seen.data) if row.name == "slow"]
    assert row.step_ms is not None
    assert row.peak_share == pytest.approx(3e6 / (row.step_ms / 1e3) / 2e9)
    assert [row.peak_share for row in rows(seen.data) if row.name == "cached"] == [None]


def test_what_compiles_is_started_cold_once_with_the_setting_that_was_chosen(
    configuration: Configure, plan: Planner, record: Recorder, started: Started
) -> None:
    seen = record()
    run(plan(configuration("compiled", compiles=True), rounds=3, batches=(1,)), seen)
    assert len(started()) == 2
    text = as_text(seen.data)
    assert (
        "- compiled: freezing was the fastest (default 5.00 ms, freezing 4.00 ms); compiled in 12 s" in text
    )


def test_speed_up_compares_within_a_round(record: Recorder, configuration: Configure) -> None:
    seen, first, second = record(), configuration("right"), configuration("slow")
    seen.data["references"]["2"] = {"by": "right", "png": ""}
    slow_minute = ((1.0, 0.5), (9.0, 4.5), (2.0, 1.0))  # it slowed both
    for number, (reference_s, own_s) in enumerate(slow_minute):
        seen.add(first, "draw 1", number, {"seconds": reference_s, "step_seconds": reference_s / 3})
        seen.add(second, "draw 1", number, {"seconds": own_s, "step_seconds": own_s / 3})
    assert [row.speed_up for row in rows(seen.data)] == [1.0, 2.0]
    assert [row.image_s for row in rows(seen.data)] == [2.0, 1.0]
