"""Numbers of a model that are not finite: where they come from, and what to try."""

from __future__ import annotations

from torch import Tensor, nn

from grouprl.errors import TrainingError
from grouprl.learning.shards import held

_SHOWN = 3


class NotFiniteError(TrainingError):
    """A model gives numbers that are not finite."""


def not_finite(what: str, model: nn.Module) -> NotFiniteError:
    """The error that ``what`` of ``model`` is not finite.

    It names the weights that are not finite. If there are none, activations overflow.
    """
    names = [
        name for name, p in model.named_parameters() if p.is_floating_point() and not bool(held(p).isfinite().all())
    ]
    if not names:
        return NotFiniteError(
            f"{what} are not finite, although all weights are, so the activations overflow; load the model with "
            "dtype=torch.float32, set bf16=False, or lower learning_rate"
        )
    others = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return NotFiniteError(
        f"{what} are not finite: look at the weights {', '.join(names[:_SHOWN])}{others}. A step of the optimizer, a "
        "callback or the file they came from is at fault; go on from an older checkpoint, and lower learning_rate if "
        "it was a step"
    )


def all_finite(x: Tensor) -> bool:
    """Whether all numbers are finite."""
    return bool(x.isfinite().all())
