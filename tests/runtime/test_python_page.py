"""docs/python.md: its examples run, and its exit codes are those of the error classes."""

import re
from pathlib import Path

import pytest

from tpx_export import checkpoint
from tpx_export.quantise import verdict
from tpx_export.training import loop
from tpx_runtime import errors
from tpx_runtime.evaluation import generation

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_all_code_blocks_run_in_order(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles/shapes").symlink_to(tiny_bundle, target_is_directory=True)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    exec("\n".join(blocks), {})
    assert {path.name for path in tmp_path.iterdir()} >= {"cube.png", "variation.png", "cube-3.png"}
    printed = re.findall(r"print\(error\) +# (.*)", PAGE)
    assert capsys.readouterr().out.splitlines() == ["cancelled at step 3 of 6", *printed]


def test_exit_codes_match_the_error_classes() -> None:
    rows = re.findall(r"^\| `(\w+)`.* \| (\d+) \|$", PAGE, re.MULTILINE)
    modules = (errors, checkpoint, verdict, loop, generation)
    known = {name: kind for module in modules for name, kind in vars(module).items()}
    assert [known[name].exit_code for name, _ in rows] == [int(code) for _, code in rows]
    listed = {name for name, _ in rows}
    assert listed >= {
        error.__name__
        for error in errors.TpxError.__subclasses__()
        if "tpx_runtime.errors" in error.__module__
    }
