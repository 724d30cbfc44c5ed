"""Trials: log-probabilities of a path, or of what a sampler drew, compared with the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError, error_text
from grouprl.lm.packed.trial import Trial, is_rounding, own_pass, own_terms
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.streams import Draws, Stream

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompts and completions, each as token ids."""

Own = Callable[[torch.dtype | None], Tensor]
"""Computes log-probabilities ``[m]`` by the model's own forward pass, with products in a precision or in float32."""

Path = Callable[[], tuple[Tensor, Own]]
"""Runs a path. Returns its log-probabilities ``[m]``, and how to compute those of the model's own forward pass."""

Draw = Callable[[Sequence[Sequence[int]], int, SamplingSettings, Draws], list[Completion]]
"""Samples completions: prompts, completions of each, how to draw, random numbers."""

_TOKENS = 4
"""The most tokens of each completion that a sampler draws in a trial."""


def verdict(path: Path, dtype: torch.dtype) -> str:
    """Run a path with products in ``dtype``, and compare its log-probabilities with the model's own.

    Returns "", or what is wrong.
    """
    try:
        found, own = path()
        wanted = own(None)
        difference = _largest(found, wanted)
        if is_rounding(difference, dtype, lambda: _largest(own(dtype), wanted)):
            return ""
    except TrainingError:  # the numbers of the model are at fault, whatever path computes them
        raise
    except (UsageError, AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        # A model may raise any of these errors where it does not know the form of the call or the dtype.
        return error_text(error)
    return f"log-probabilities differ from those of its own forward pass by {difference:.2g} nats"


def drawn_verdict(draw: Draw, trial: Trial, dtype: torch.dtype) -> str:
    """Have two completions of each of two prompts drawn. Returns "", or what is wrong with them."""
    prompts = [group.prompt for group in trial.groups]

    def path() -> tuple[Tensor, Own]:
        drawn = draw(prompts, 2, SamplingSettings(_TOKENS), Stream(0).next(2 * len(prompts)))
        own = partial(own_log_probs, trial.model, [(prompts[i // 2], c.ids) for i, c in enumerate(drawn)])
        return torch.cat([c.logp for c in drawn]), own

    return verdict(path, dtype)


def own_log_probs(model: Any, sequences: Sequences, low: torch.dtype | None = None) -> Tensor:
    """Log-probabilities ``[m]`` float32 of all completions, by the model's own forward pass."""
    with own_pass(model, low):
        return torch.cat([own_terms(model, p, c).logp for p, c in sequences]).cpu()


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).abs().max())
