"""What the success of a language model is called: in an environment it solves episodes, else it answers prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Wording(NamedTuple):
    """The name of the share that went well, and of what it is a share of."""

    success: str
    held_out: str

    def __call__(self, text: str) -> str:
        """The text with both in the places of ``{success}``, or ``{Success}`` at its beginning, and ``{held_out}``."""
        return text.format(success=self.success, Success=self.success.capitalize(), held_out=self.held_out)


def wording(config: Mapping[str, Any]) -> Wording:
    """By what config.yaml of a run says of its recipe."""
    recipe = config.get("recipe")
    plays = isinstance(recipe, Mapping) and recipe.get("environment") is not None
    return Wording("solved", "held-out starts") if plays else Wording("accuracy", "held-out prompts")
