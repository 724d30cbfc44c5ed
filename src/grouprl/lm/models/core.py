"""The model of transformers, whether PEFT's model is around it or not."""

from __future__ import annotations

from typing import Any


def is_in_peft(model: Any) -> bool:
    """Whether it is PEFT's model around one of transformers, and not one of transformers with an adapter inside."""
    return hasattr(model, "get_base_model")


def core_of(model: Any) -> Any:
    """The model of transformers, without PEFT's model around it."""
    return model.get_base_model() if is_in_peft(model) else model
