"""Every setting of each arena as a row: for its list, and for a mistyped option that is one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = tuple[str, Any, str]
"""A setting: its name, its default, what it takes and means."""


def of_environments() -> Iterator[tuple[str, list[Row]]]:
    """The settings of ``train``, under headings."""
    from grouprl.envs.config import GRPOConfig
    from grouprl.envs.run_settings import RunSettings
    from grouprl.settings.describe import sections

    yield from _configuration(GRPOConfig, sections(GRPOConfig))
    fields = RunSettings.__dataclass_fields__
    of_preset = ("total_timesteps", "eval_every")
    yield "of the run", [(name, "of the preset" if name in of_preset else fields[name].default, "") for name in fields]


def of_language_models() -> Iterator[tuple[str, list[Row]]]:
    """The settings of ``train-lm``, under headings."""
    from grouprl.lm.run import recipe
    from grouprl.lm.settings.fields import Fields
    from grouprl.settings.describe import sections

    yield from _configuration(Fields, sections(Fields))
    of_recipe = recipe.settable()
    yield (
        "of the recipe (docs/language-models.md describes them)",
        [(name, default, "") for name, default in of_recipe.items()],
    )


def _configuration(config: Any, parts: dict[str, list[str]]) -> Iterator[tuple[str, list[Row]]]:
    from grouprl.settings.describe import allowed

    for heading, names in parts.items():
        fields = {name: config.model_fields[name] for name in names}
        yield (
            heading,
            [
                (name, field.get_default(), ": ".join(filter(None, (allowed(field), field.description))))
                for name, field in fields.items()
            ],
        )
