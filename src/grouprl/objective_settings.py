"""What both configurations share: the settings of the objective, how they are checked, and errors that help."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, Field, GetCoreSchemaHandler, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from grouprl.errors import shown
from grouprl.objective import LOSSES, Objective


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


class ObjectiveSettings(BaseModel):
    """The settings of the objective that mean the same in both arenas. A step is a step of an episode, or a token."""

    # --- objective -----------------------------------------------------------------------------------------------
    epsilon: float = Field(0.2, gt=0, lt=1, description="ratio is clipped below 1 - epsilon; width of spo")
    epsilon_high: float | None = Field(
        None, gt=0, description="ratio is clipped above 1 + epsilon_high; default: epsilon; for cispo the cap itself"
    )
    delta: float | None = Field(
        None, gt=1, description="bound of the ratio where the advantage is negative (two-sided or dual clip)"
    )
    sapo_temperature_pos: float = Field(1.0, gt=0, description="of sapo's gate where the advantage is positive")
    sapo_temperature_neg: float = Field(1.05, gt=0, description="of sapo's gate where it is not")
    dppo_threshold: float | None = Field(
        None, gt=0, lt=1, description="how far dppo lets a probability move; default: 0.2 for dppo_tv, 0.05 for dppo_kl"
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence to the reference; 0 = no reference")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="divide by the standard deviation of the group, of the batch, or not (Dr. GRPO); "
        "True = group, False = none; for advantage=outcome and gigpo, the others scale in their own way",
    )
    gigpo_weight: float = Field(
        1.0, ge=0, description="weight of gigpo's comparison of returns-to-go in equal states; 0 leaves outcome"
    )

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value


def objective_problems(c: ObjectiveSettings, loss_type: str, advantage: str) -> list[str]:
    """Settings of the objective that do not go together: one sentence each, with how to fix it."""
    found: list[str] = []
    if advantage == "gigpo" and c.scale_rewards == "batch":
        found.append("scale_rewards='batch' does not go with advantage='gigpo'; set 'group' or 'none'")
    if advantage != "gigpo" and c.gigpo_weight != type(c).model_fields["gigpo_weight"].default:
        found.append(
            f"gigpo_weight={c.gigpo_weight} is for advantage='gigpo', and advantage is {advantage!r}; leave it out"
        )
    loss = LOSSES[loss_type]
    if loss.cap and (c.epsilon_high is None or c.epsilon_high <= 1):
        found.append(
            f"epsilon_high={c.epsilon_high}: with loss_type={loss_type!r} it is the cap of the ratio itself, as in "
            "TRL, and must exceed 1; 5.0 is usual"
        )
    high = Objective.of(c).high
    if c.delta is not None and "delta" in loss.parameters and c.delta <= 1 + high:
        found.append(f"delta={c.delta} must exceed 1 + epsilon_high = {1 + high:g}; 3.0 or 4.0 is usual")
    for name in sorted({name for other in LOSSES.values() for name in other.parameters} - set(loss.parameters)):
        setting = type(c).model_fields.get(name)
        if name == "epsilon" or setting is None or getattr(c, name) == setting.default:
            continue  # epsilon has a value in every configuration, so that many scripts name it with every loss
        users = [repr(known) for known, other in LOSSES.items() if name in other.parameters]
        advice = "; for its width set epsilon" if loss_type == "spo" else ""
        found.append(
            f"{name}={getattr(c, name)} is for loss_type {' or '.join(users)}, and loss_type is {loss_type!r}; leave "
            f"it out{advice}"
        )
    return found


def explain(error: ValidationError, settings: Mapping[str, FieldInfo]) -> str:
    """A configuration's validation errors for people: what was given, what is allowed, what the setting is."""
    lines: list[str] = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if problem["loc"]:
            name = str(problem["loc"][0])
            info = settings[name]
            message = (
                f"{name}={shown(problem['input'])}: {message} ({info.description}; default {info.get_default()!r})"
            )
        if message not in lines:
            lines.append(message)
    return "; ".join(lines)


def sections(config: type[BaseModel]) -> dict[str, list[str]]:
    """The settings of a configuration under the titles of its sections: its source's ``# --- title ---`` comments."""
    found: dict[str, list[str]] = {}
    for kind in reversed(config.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        title = ""
        for line in inspect.getsource(kind).splitlines():
            if heading := re.match(r"    # --- (.*?)(:.*)? -+$", line):
                title = heading[1]
            elif (setting := re.match(r"    ([a-z]\w*): ", line)) and setting[1] in config.model_fields:
                found.setdefault(title, []).append(setting[1])
    return found


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
