"""The configuration of language models: whatever a setting is given, it is taken as what it says, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import result_or_clear_error, values

from grouprl.lm import GRPOConfig
from grouprl.lm.settings.trl import FOREIGN, RENAMED

LANGUAGE = sorted({*GRPOConfig.model_fields, *FOREIGN, *RENAMED})


@given(st.dictionaries(st.text(max_size=12), values, min_size=1, max_size=3))
def test_names_that_are_no_settings(settings: dict[str, Any]) -> None:
    result_or_clear_error(lambda: GRPOConfig(**settings))


@pytest.mark.parametrize("part", range(8))
@given(data=st.data(), value=values)
def test_a_setting_of_language_models(part: int, data: st.DataObject, value: Any) -> None:
    name = data.draw(st.sampled_from(LANGUAGE[part::8]))
    made = result_or_clear_error(lambda: GRPOConfig(**{name: value}))
    saved = made and result_or_clear_error(made.to_dict)
    if saved is not None:
        written = json.loads(json.dumps(saved, allow_nan=False))
        assert GRPOConfig(**written) == made


@given(st.dictionaries(st.sampled_from(LANGUAGE), values, max_size=6))
def test_several_settings_of_language_models(settings: dict[str, Any]) -> None:
    result_or_clear_error(lambda: GRPOConfig(**settings))


@given(st.sampled_from(sorted(GRPOConfig.model_fields)), values)
def test_a_setting_of_language_models_that_is_changed_later(name: str, value: Any) -> None:
    config = GRPOConfig()
    result_or_clear_error(lambda: setattr(config, name, value))
    result_or_clear_error(config.in_use)
