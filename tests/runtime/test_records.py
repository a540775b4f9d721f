"""Records of settings, which tell whether a run may be resumed."""

from pathlib import Path

import pytest

from tpx_runtime.errors import BadInput
from tpx_runtime.records import differences, require_same_settings


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
