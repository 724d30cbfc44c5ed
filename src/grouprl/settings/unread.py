"""Settings that somebody chose, and that another setting leaves without any effect: found by a table of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from grouprl.errors import shown
from grouprl.objective import ESTIMATORS, LOSSES
from grouprl.objective.losses import Loss


class Unread(NamedTuple):
    """A rule.

    Attributes:
        names: settings that nothing reads where the rule holds.
        holds: asked with the configuration, and with what the rules know beside it.
        why: what makes it so, and what to do.
    """

    names: Sequence[str]
    holds: Callable[[Any, Mapping[str, bool]], object]
    why: str


def _usual(config: BaseModel) -> Loss:
    """The loss of who chooses none."""
    return LOSSES[type(config).model_fields["loss_type"].default]


OF_LOSS = (
    Unread(
        tuple(sorted({name for loss in LOSSES.values() for name in loss.parameters})),
        lambda c, about: about["own_surrogate"],
        "surrogate_function computes the loss of a step; build this into it",
    ),
    Unread(
        ("loss_type",), lambda c, about: about["own_surrogate"] and LOSSES[c.loss_type].weights is _usual(c).weights,
        "surrogate_function computes the loss of a step, and steps weigh as without it; leave one of the two out",
    ),
    Unread(
        ("epsilon",), lambda c, _: "epsilon" not in LOSSES[c.loss_type].parameters,
        "the loss that loss_type names has no such bound; the table of losses says what it has",
    ),
)  # fmt: skip
"""What both arenas know of the settings of losses, if they know ``own_surrogate``, whether one was given."""

OF_SCALE = Unread(
    ("scale_rewards",), lambda c, _: c.advantage not in ("outcome", "gigpo"),
    "only advantage='outcome' and 'gigpo' read it, the others scale in their own way",
)  # fmt: skip
"""What both arenas know of the scale of rewards."""

OF_DISCOUNT = Unread(
    ("gamma", "gamma_final"),
    lambda c, about: c.gamma < 1.0 and not (about["own_advantage"] or ESTIMATORS[c.advantage].discounted),
    "the estimator that advantage names counts rewards in full; advantage='timestep' discounts them",
)  # fmt: skip
"""What both arenas know of the discount, if they know ``own_advantage``, whether such a function was given."""


def without_effect(
    rules: Iterable[Unread], config: BaseModel, given: Iterable[str] | None, about: Mapping[str, bool]
) -> list[str]:
    """One sentence for each chosen setting that nothing reads: its value, and why.

    A value that is the default's was not chosen, whoever wrote it down, because leaving it out changes nothing.

    Args:
        config: all settings. given: the names of those that somebody chose; None: all that differ from their default.
        about: what the rules have to know beside the settings.
    """
    fields = type(config).model_fields
    names_given = fields if given is None else [name for name in given if name in fields]
    chosen = {name for name in names_given if getattr(config, name) != _default(fields, name)}
    found: dict[str, str] = {}
    for rule in rules:
        names = [name for name in rule.names if name in chosen and name not in found]
        if names and rule.holds(config, about):
            found |= {name: f"{name}={shown(getattr(config, name))} has no effect: {rule.why}" for name in names}
    return [found[name] for name in fields if name in found]


def _default(fields: Mapping[str, Any], name: str) -> Any:
    return fields[name].get_default(call_default_factory=True)
