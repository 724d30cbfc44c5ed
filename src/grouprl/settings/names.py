"""Names that people give: one of a table, a setting of another library, and the nearest name to what was mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class OneOf:
    """For an annotation: the value must be one of some names, such as those of a table.

    Attributes:
        names: those that are allowed. elsewhere: names of other libraries and papers, and what they are called here.
    """

    names: tuple[str, ...]
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def check(self, value: str) -> str:
        """The value. Raises ValueError with the names that are allowed, and the nearest."""
        if value in self.names:
            return value
        close = difflib.get_close_matches(value, self.names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        if self.elsewhere.get(value, "").partition(" ")[0] in self.names:
            hint = f"; {value!r} is called {self.elsewhere[value]!r} here"
        raise ValueError(f"must be one of {', '.join(map(repr, self.names))}{hint}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """How pydantic is told."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))


ADVANTAGES_ELSEWHERE = {"grpo": "outcome", "gae": "baseline", "rloo": "leave_one_out"}
"""Names that estimators have elsewhere."""

ALIASES = {
    "lr": "learning_rate", "alpha": "learning_rate", "n_epochs": "epochs", "num_epochs": "epochs",
    "update_epochs": "epochs", "ent_coef": "entropy_coef", "entropy_weight": "entropy_coef",
    "batch_size": "minibatch_size", "lambda_": "gae_lambda", "lam": "gae_lambda", "discount": "gamma",
    "num_envs": "n_envs", "grad_clip": "max_grad_norm", "clip_grad_norm": "max_grad_norm",
    "random_state": "seed", "random_seed": "seed", "net_arch": "hidden_sizes", "activation_fn": "activation",
    "clip_eps": "epsilon", "clip_epsilon": "epsilon", "cliprange": "epsilon", "kl_coef": "beta", "kl_coeff": "beta",
    "dual_clip": "delta", "adam_eps": "adam_epsilon",
}  # fmt: skip
"""Names that settings have elsewhere, where the nearest name by letters would be another setting."""


def unknown_setting(
    name: str, known: Collection[str], otherwise: Callable[[], str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> str:
    """What to say of a name that is no setting: what it is called here, the nearest name, or ``otherwise()``.

    Args:
        elsewhere: Names of other libraries, where the nearest name by letters would mislead: what to do instead.
    """
    if name in elsewhere:
        return f"there is no setting {name!r}: {elsewhere[name]}"
    if (ours := ALIASES.get(name)) in known:
        return f"{name!r} is called {ours!r} here"
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting {name!r}; " + (f"did you mean {close[0]!r}?" if close else otherwise())
