"""Statistics of the routes of a bundle."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from samples.shapes import router
from samples.shapes.score import PAIRS, SINGLES


def test_the_table_has_shares_and_changes_by_block_step_and_third() -> None:
    # Two blocks at depth 2, so four decisions for each of four tokens; three calls, of which the last differs.
    call = np.array([[[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]])
    last = np.array([[[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]])
    rows = router.table([call, call, last], blocks=(1, 5), experts=2).splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [
        ["1", "1", "75 25", "75 25", "100 0", "", "", ""],
        ["1", "2", "50 50", "50 50", "0 100", "25", "25", "100"],
        ["5", "1", "0 100", "0 100", "0 100", "", "", ""],
        ["5", "2", "0 100", "0 100", "25 75", "0", "0", "25"],
    ]


def test_the_command_records_the_routes_of_the_prompts(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(router, "SINGLES", SINGLES[:1])  # whose words the tiny bundle knows
    monkeypatch.setattr(router, "PAIRS", PAIRS[:1])
    monkeypatch.setattr(router, "table", lambda calls, *_: seen.extend(calls))
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime"]
    assert CliRunner().invoke(router.main, [*arguments, "--steps", "3", "--depth", "2"]).exit_code == 0
    # The prompt's branch of two images; two blocks at depth 2; 16 tokens.
    assert [routes.shape for routes in seen] == [(2, 4, 16)] * 3
    options = ["--steps", "3", "--depth", "2", "--guidance", "1"]  # without the other branch
    assert CliRunner().invoke(router.main, [*arguments, *options]).exit_code == 0
    np.testing.assert_array_equal(seen[3], seen[0])
    result = CliRunner().invoke(router.main, [*arguments, "--steps", "2"])
    assert (result.exit_code, result.stderr) == (2, "error: expected --steps of 3 or more, found 2\n")
    manifest = SimpleNamespace(name="plain", model=SimpleNamespace(thinking_blocks=()))
    monkeypatch.setattr(router.Bundle, "open", lambda _: SimpleNamespace(manifest=manifest))
    result = CliRunner().invoke(router.main, arguments)
    assert result.exit_code == 2 and "expected a bundle with thinking blocks, found plain" in result.stderr
