"""Estimators and surrogates of a user's own, as functions of packed tensors, and checks of what they return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text

TensorFunction = Callable[..., Tensor]
"""A function of three tensors; an estimator may ask for more by name."""

Offered = Mapping[str, Callable[[], Any]]
"""What an estimator may ask for beside its three tensors: how each is made, by name."""


def check_function(name: str, value: object, setting: str) -> None:
    """Raises UsageError unless ``value``, the argument ``name``, is a function or None; ``setting`` takes names."""
    if value is not None and not callable(value):
        raise UsageError(
            f"{name}={value!r} must be a function of three tensors; the name of one that ships is a setting: "
            f"{setting}=..."
        )


def per_token(name: str, found: object, like: Tensor) -> Tensor:
    """What the function ``name`` returned, on the device of ``like``.

    Raises TrainingError unless it is a tensor of real numbers in the shape of ``like``.
    """
    if not isinstance(found, Tensor) or found.shape != like.shape:
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TrainingError(f"{name} returned {what}; it must be a tensor of shape {list(like.shape)}")
    if found.layout != torch.strided or found.device.type == "meta":
        raise TrainingError(f"{name} returned a tensor without plain values ({found.layout}, on {found.device})")
    if found.dtype == torch.bool or found.is_complex():
        raise TrainingError(f"{name} returned a tensor of {found.dtype}; it must hold real numbers")
    return found.to(like.device)


def asked_for(function: TensorFunction | None) -> dict[str, bool]:
    """The names that a function asks for after its three tensors, and whether it cannot do without.

    It does not ask for what ``functools.partial`` has given it already.
    """
    if function is None:
        return {}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have none
        return {}
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    others = [p for p in by_place[3:] if p.kind == p.POSITIONAL_OR_KEYWORD]
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {p.name: p.default is p.empty for p in (*others, *by_name) if p.name not in bound}


def check_asked(function: TensorFunction | None, offered: Collection[str]) -> None:
    """Raises UsageError if an estimator asks for something that is not ``offered``."""
    for name, needed in asked_for(function).items():
        if needed and name not in offered:
            raise UsageError(
                f"advantage_function asks for {name!r}; beside rewards, lengths and group it can ask for "
                f"{', '.join(offered) or 'nothing'} here"
            )


def _call(name: str, function: TensorFunction, *given: Tensor, **asked: Any) -> object:
    """What the function returns for copies of what it is given, as it may change them in place."""
    copies: list[Tensor] = [x.clone() for x in given]
    try:
        return function(*copies, **asked)
    except GrouprlError:
        raise
    except Exception as error:
        raise TrainingError(f"{name} raised {error_text(error)}") from error


def own_advantages(
    function: TensorFunction, rewards: Tensor, lengths: Tensor, group: Tensor, offered: Offered | None = None
) -> Tensor:
    """Advantages ``[S]`` by a user's function of rewards ``[S]``, lengths ``[N]`` and groups ``[N]``.

    Args:
        offered: what the function may ask for beside these, by the names of its further arguments.

    Raises UsageError if it asks for something else, TrainingError if it returns anything but one finite number per
    token or step.
    """
    offered = offered or {}
    check_asked(function, offered)
    asked = {name: offered[name]() for name in asked_for(function) if name in offered}
    asked = {name: value.clone() if isinstance(value, Tensor) else value for name, value in asked.items()}
    returned = _call("advantage_function", function, rewards, lengths, group, **asked)
    found = per_token("advantage_function", returned, rewards)
    if not bool(torch.isfinite(found).all()):
        raise TrainingError("advantage_function returned a number that is not finite; look for a division by 0")
    found = found.detach()
    return found if found.is_floating_point() else found.to(rewards.dtype)


def own_surrogate(function: TensorFunction, logp: Tensor, logp_old: Tensor, advantages: Tensor) -> Tensor:
    """The surrogate ``[S]`` by a user's function, each argument ``[S]``.

    Raises TrainingError if it returns anything but one finite number per token or step, differentiable in ``logp``.
    """
    found = per_token("surrogate_function", _call("surrogate_function", function, logp, logp_old, advantages), logp)
    if logp.requires_grad and not found.requires_grad:
        raise TrainingError(
            "surrogate_function returned a tensor that is not differentiable in logp, so nothing would be learned; "
            "compute it of its first argument, without .detach(), .item(), numpy or torch.no_grad"
        )
    if not bool(torch.isfinite(found.detach()).all()) and bool(torch.isfinite(logp.detach()).all()):
        raise TrainingError(
            "surrogate_function returned a number that is not finite; look for a division by 0, or an exp of a large "
            "difference of log-probabilities"
        )
    return found


@dataclass(frozen=True)
class UserFunctions:
    """What takes the places of ``advantage`` and of the surrogate of ``loss_type``; None leaves them.

    Attributes:
        advantage: ``(rewards [S], lengths [N], group [N]) -> [S]``, as :func:`grouprl.objective.outcome`; used as it is
            returned (:func:`grouprl.objective.standardise` centres and scales). Further arguments are filled by their
            names with what the arena offers. For language models the reward of a completion stands at its last token,
            with KL in the reward that of each at its own.
        surrogate: ``(logp [S], logp_old [S], advantages [S]) -> [S]``, as :func:`grouprl.objective.clipped`: what is
            minimised, one number per step, differentiable in ``logp``.

    Raises UsageError if one of them cannot be called.
    """

    advantage: TensorFunction | None = None
    surrogate: TensorFunction | None = None

    def __post_init__(self) -> None:
        check_function("advantage_function", self.advantage, "advantage")
        check_function("surrogate_function", self.surrogate, "loss_type")


NO_USER_FUNCTIONS = UserFunctions()
