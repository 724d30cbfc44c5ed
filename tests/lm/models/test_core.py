"""The model of transformers, whether PEFT's model is around it, an adapter is in it, or neither."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from grouprl.lm.models.core import core_of, is_in_peft
from grouprl.lm.models.tiny import build_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def test_the_model_within_pefts_is_found() -> None:
    plain: Any = build_tiny(0)[0]
    assert core_of(plain) is plain
    assert not is_in_peft(plain)
    around = get_peft_model(plain, LORA)
    assert is_in_peft(around)
    assert core_of(around) is plain


def test_a_model_with_an_adapter_inside_is_its_own_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # not of what is tested
    model: Any = build_tiny(0)[0]
    model.add_adapter(LORA)
    assert not is_in_peft(model)
    assert core_of(model) is model
