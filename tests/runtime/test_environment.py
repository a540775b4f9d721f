"""The environment variables that engines read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tpx_runtime.environment import (
    MAX_THREADS,
    compiled_folder,
    compiled_next_to_bundles,
    cuda_graphs_requested,
    device_loop_requested,
    requested_threads,
)
from tpx_runtime.errors import BadInput


@pytest.mark.parametrize(
    ("variable", "requested", "unset"),
    [("TPX_CUDA_GRAPHS", cuda_graphs_requested, None), ("TPX_DEVICE_LOOP", device_loop_requested, True)],
)
def test_switches_are_0_or_1(
    monkeypatch: pytest.MonkeyPatch, variable: str, requested: Callable[[], bool | None], unset: bool | None
) -> None:
    assert requested() is unset
    for value, meaning in (("0", False), ("1", True), (" 1 ", True), ("", unset)):
        monkeypatch.setenv(variable, value)
        assert requested() is meaning
    for value in ("false", "off", "2", "\u0661"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(BadInput, match=f"expected {variable} to be 0 or 1, found '{value}'"):
            requested()


@pytest.mark.parametrize("value", ["0", str(MAX_THREADS + 1), "-1", "2.0", "two", "\u0662", "9" * 5000])
def test_rejects_another_number_of_threads(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TPX_THREADS", value)
    with pytest.raises(
        BadInput, match=f"expected TPX_THREADS to be a whole number in 1..{MAX_THREADS}, found "
    ):
        requested_threads()


def test_the_number_of_threads_may_have_spaces_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPX_THREADS", " 3 ")
    assert requested_threads() == 3
    monkeypatch.setenv("TPX_THREADS", "")
    assert requested_threads() is None


def test_a_loop_of_links_is_a_folder_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "loop"))
    assert compiled_folder(tmp_path / "cubes") == tmp_path / "loop/cubes"


def test_what_is_compiled_of_temporary_bundles_is_next_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "all"))
    with compiled_next_to_bundles():
        assert compiled_folder(tmp_path / "cubes") == tmp_path / "cubes.engines"
    assert compiled_folder(tmp_path / "cubes") == tmp_path / "all/cubes"


def test_a_bundle_at_the_root_of_a_drive_is_refused() -> None:
    with pytest.raises(BadInput, match="expected a bundle in a folder, found the root / of a drive; move it"):
        compiled_folder(Path("/"))
