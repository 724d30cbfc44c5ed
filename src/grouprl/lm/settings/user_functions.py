"""An estimator and a surrogate of one's own, as functions in the shape of those in :mod:`grouprl.objective`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grouprl.objective.user_functions import TensorFunction, check_function, own_advantages, per_token


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
        check_function("advantage_function", self.advantage, "GRPOConfig(advantage")
        check_function("surrogate_function", self.surrogate, "GRPOConfig(loss_type")

    def advantages(self, rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
        """What the function says, checked. Raises TrainingError if it is not one finite number per token."""
        assert self.advantage is not None
        return own_advantages(self.advantage, rewards, lengths, group)

    def losses(self, logp: Tensor, logp_old: Tensor, advantages: Tensor) -> Tensor:
        """What the function says, checked. Raises TrainingError if it is not one number per token."""
        assert self.surrogate is not None
        return per_token("surrogate_function", self.surrogate(logp, logp_old, advantages), logp)


NOTHING = Custom()
