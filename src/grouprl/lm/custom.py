"""An estimator and a surrogate of one's own, as functions in the shape of those in :mod:`grouprl.objective`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError

TensorFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Custom:
    """What takes the places of ``advantage`` and of the surrogate of ``loss_type``; None leaves them.

    Attributes:
        advantage: ``(rewards [S], lengths [N], group [N]) -> [S]``, as :func:`grouprl.objective.outcome`: the reward of
            a completion stands at its last token, with KL in the reward that of each token at its own.
        surrogate: ``(logp [S], logp_old [S], advantages [S]) -> [S]``, as :func:`grouprl.objective.clipped`: what is
            minimised, one number per token, differentiable in ``logp``.

    Raises UsageError if one of them cannot be called.
    """

    advantage: TensorFunction | None = None
    surrogate: TensorFunction | None = None

    def __post_init__(self) -> None:
        for name in ("advantage", "surrogate"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                setting = {"advantage": "advantage", "surrogate": "loss_type"}[name]
                raise UsageError(
                    f"{name}_function={value!r} must be a function of three tensors; the names of those that ship are "
                    f"for the configuration: GRPOConfig({setting}=...)"
                )

    def advantages(self, rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
        """What the function says, checked. Raises TrainingError if it is not one finite number per token."""
        assert self.advantage is not None
        found = _checked("advantage", self.advantage(rewards, lengths, group), rewards)
        if not bool(torch.isfinite(found).all()):
            raise TrainingError("the advantage function returned a number that is not finite; look for a division by 0")
        return found

    def losses(self, logp: Tensor, logp_old: Tensor, advantages: Tensor) -> Tensor:
        """What the function says, checked. Raises TrainingError if it is not one number per token."""
        assert self.surrogate is not None
        return _checked("surrogate", self.surrogate(logp, logp_old, advantages), logp)


def _checked(name: str, found: object, like: Tensor) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != like.shape:
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise TrainingError(f"the {name} function returned {what}; it must be a tensor of shape {list(like.shape)}")
    return found
