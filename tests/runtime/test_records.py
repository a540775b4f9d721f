"""Records of settings, which tell whether a run may be resumed."""

from pathlib import Path

import pytest

from tpx_runtime.errors import BadInput
from tpx_runtime.records import differences, read_json, require_same_settings, write_json


def test_differences_name_each_setting_and_say_where_it_is_missing() -> None:
    before, now = {"steps": 20, "seed": 0}, {"steps": 5, "seed": 0, "cache_interval": 1}
    assert differences(before, now) == ("steps 20, no cache_interval", "steps 5, cache_interval 1")


def test_a_missing_setting_equals_none() -> None:
    assert differences({"steps": 20}, {"steps": 20, "limit": None}) is None


def test_a_run_with_other_settings_is_not_resumed() -> None:
    require_same_settings({"steps": 20}, {"steps": 20}, Path("runs"))
    with pytest.raises(BadInput) as caught:
        require_same_settings({"steps": 20}, {"steps": 5}, Path("runs"), "--json")
    assert str(caught.value) == (
        "expected the settings of the run in runs (steps 20), found steps 5; use those, or another --json"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "a damaged file"),
        (b'{"steps": 20', "a damaged file"),
        (b"3", "a damaged file"),
        (b"\xff", "a damaged file"),
        (b"[" * 100_000, "a damaged file"),
        (None, "No such file or directory"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    write_json(path := tmp_path / "result.json", {"row": "base"})
    assert read_json(path) == {"row": "base"}
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(BadInput) as caught:
        read_json(path)
    assert str(caught.value) == f"expected a record in {path}, found: {reason}; delete it to repeat that part"


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(path := tmp_path / "result.json", {"row": "base"})

    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(BadInput, match="No space left on device; free some space or choose another place"):
        write_json(path, {"row": "other"})
    assert read_json(path) == {"row": "base"} and list(tmp_path.iterdir()) == [path]


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"prompt": "a \ud800 é"})
    assert read_json(tmp_path / "a.json") == {"prompt": "a \ud800 é"}
    assert "\\ud800 é" in (tmp_path / "a.json").read_text(encoding="utf-8")
