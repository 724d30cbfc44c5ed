"""One gradient step: the sum over parts, its norm, the refusal of what is not finite, and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from grouprl.errors import TrainingError
from grouprl.learning.parameters import TrainedParameters
from grouprl.machine.ranks import ALONE, Ranks


class Optimizer(Protocol):
    """Whatever steps: :class:`grouprl.envs.adam.Adam`, or any of PyTorch's."""

    def step(self) -> Any:
        """Move the parameters along their gradient."""


def gradient_step(
    parameters: TrainedParameters,
    optimizer: Optimizer,
    parts: Iterable[Tensor | None],
    max_norm: float,
    *,
    where: str = "",
    advice: str,
    before_step: Callable[[], None] | None = None,
    meet: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Move the parameters along the sum of the gradients of some parts.

    Args:
        parts: each computed as it is asked for, and added in this order, on which the sum of floats depends: either a
            gradient ``[P]``, or None once a backward pass has written its own.
        max_norm: bound on the norm of the sum; 0: none.
        where, advice: what the error says besides: where it happened, and what to try.
        before_step: called once the gradient stands, clipped; it may change the gradient and the weights.
        ranks: the processes whose gradients are summed. meet: called before they are.

    Returns:
        The norm before it was clipped.

    Raises:
        TrainingError: the gradient is not finite; the parameters are left as they were.
        UsageError: ``before_step`` replaced, froze or converted parameters.
    """
    parameters.start()
    for gradient in parts:
        if gradient is not None:
            parameters.add(gradient)
    parameters.finish()
    if meet is not None:
        meet()
    parameters.add_over(ranks)
    norm = parameters.clip(max_norm)
    if not math.isfinite(norm):
        raise TrainingError(f"the gradient is not finite (norm {norm}){where}; {advice}")
    if before_step is not None:
        before_step()
        parameters.check()
    optimizer.step()
    return norm
