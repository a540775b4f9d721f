"""The benchmark of full-size exports uses a folder only for one model, and says why a command failed."""

import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from benchmarks import sd3_size
from benchmarks.startup import run_process


def test_a_folder_of_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def write(path: Path, *_: Any, **__: Any) -> None:
        written.append(path)

    for name in ("write_transformer", "write_adapters", "write_rest"):
        monkeypatch.setattr(sd3_size, name, write)
    monkeypatch.setattr(sd3_size, "run_process", lambda command: (1.0, 1.0))
    (tmp_path / "out/bundle/transformer").mkdir(parents=True)
    for _ in range(2):
        assert CliRunner().invoke(sd3_size.main, [str(tmp_path / "out"), "--layers", "2"]).exit_code == 0
    written.clear()
    result = CliRunner().invoke(sd3_size.main, [str(tmp_path / "out"), "--layers", "3"])
    assert result.exit_code == 2 and written == []
    assert "(layers 2), found layers 3; use those, or another OUT" in result.stderr
    (tmp_path / "older/base").mkdir(parents=True)
    assert "found model sd3-medium" in CliRunner().invoke(sd3_size.main, [str(tmp_path / "older")]).stderr


def test_the_message_of_a_failed_process_is_kept() -> None:
    code = "import sys; print('x' * 100_000 + '\\nthe reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(click.ClickException, match=r"expected exit code 0, found 3 \(the reason\):"):
        run_process([sys.executable, "-c", code])
