"""The configuration of environments: whatever a setting is given, it is taken as what it says, or refused in words."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import result_or_clear_error, values

from grouprl.envs.config import GRPOConfig, make_config

SETTINGS = sorted(GRPOConfig.model_fields)


def is_plain(value: Any) -> bool:
    """Whether a value is of the types that a file can hold, and finite."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


@pytest.mark.parametrize("part", range(4))
@given(data=st.data(), value=values)
def test_a_setting_of_environments(part: int, data: st.DataObject, value: Any) -> None:
    name = data.draw(st.sampled_from(SETTINGS[part::4]))
    made = result_or_clear_error(lambda: make_config({name: value}))
    if made is not None:
        assert is_plain(getattr(made, name))
        written = json.loads(json.dumps(made.model_dump(mode="json"), allow_nan=False))
        assert make_config(written) == made


@given(st.dictionaries(st.sampled_from(SETTINGS), values, max_size=6))
def test_several_settings_of_environments(settings: dict[str, Any]) -> None:
    result_or_clear_error(lambda: make_config(settings))


@given(st.dictionaries(st.text(max_size=12), values, min_size=1, max_size=3))
def test_names_that_are_no_settings(settings: dict[str, Any]) -> None:
    result_or_clear_error(lambda: make_config(settings))
