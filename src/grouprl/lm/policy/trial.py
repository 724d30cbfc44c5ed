"""A trial of every path at construction: its log-probabilities are compared with the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError, first_line
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.trial import random_tokens
from grouprl.lm.policy.log_probs import LogProbs, own_terms
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion

_TOLERANCE = 1e-3
"""The largest allowed difference in nats in float32."""

_LOW_TOLERANCE = 0.05
"""The difference in nats that is allowed in low precision whatever the model."""

_TIMES_ITS_OWN = 4.0
"""How many times the error of the model's own forward pass in low precision a path may have."""

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompts and completions, each as token ids."""


class AnySampler(Protocol):
    """What a trial needs of a sampler."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        generator: torch.Generator,
    ) -> list[Completion]:
        """Sample ``group_size`` completions of each prompt."""


class Trial:
    """Compares paths with the model's own forward pass: one sequence at a time, without padding and without a cache.

    The forward pass runs in float32 where the layers of the model allow it. A path in low precision may differ from it
    by a few times as much as the model's own forward pass in low precision does.

    Args:
        model: a causal model.
        dtype: the dtype of matrix products of the paths.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.device: torch.device = next(model.parameters()).device

    def learner(self, log_probs: LogProbs) -> str:
        """Try a learner on completions of two prompts. Returns "", or what is wrong with it."""
        prompts = [self._tokens(5, 0), self._tokens(3, 1)]
        completions, group = [self._tokens(4, 2), self._tokens(2, 3), self._tokens(5, 4)], [0, 0, 1]
        lengths = torch.tensor([len(c) for c in completions])

        def path() -> tuple[Tensor, Sequences]:
            found = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
            return found, [(prompts[g], c) for g, c in zip(group, completions, strict=True)]

        return self._verdict(path, log_probs.temperature)

    def sampler(self, sampler: AnySampler) -> str:
        """Try a sampler: two completions of each of two prompts. Returns "", or what is wrong with it."""
        prompts = [self._tokens(6, 0), self._tokens(3, 1)]

        def path() -> tuple[Tensor, Sequences]:
            drawn = sampler.sample(prompts, 2, SamplingSettings(4), torch.Generator().manual_seed(0))
            return torch.cat([c.logp for c in drawn]), [(prompts[i // 2], c.ids) for i, c in enumerate(drawn)]

        return self._verdict(path)

    def causality(self) -> str:
        """Returns "" if the log-probabilities of tokens do not depend on later tokens, or what is wrong."""
        prompt, completion = self._tokens(5, 0), self._tokens(6, 2)

        def path() -> tuple[Tensor, Sequences]:
            parts = [self._log_probs([([*prompt, *completion[:n]], [token])]) for n, token in enumerate(completion)]
            return torch.cat(parts), [(prompt, completion)]

        found = self._verdict(path)
        return found and f"tokens see the tokens after them: {found}"

    def _tokens(self, n: int, seed: int) -> list[int]:
        return random_tokens(self.model.config, n, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _verdict(self, path: Callable[[], tuple[Tensor, Sequences]], temperature: float = 1.0) -> str:
        training = self.model.training
        self.model.eval()
        try:
            found, sequences = path()
            wanted = self._log_probs(sequences, temperature)
            difference = _largest(found, wanted)
            allowed = _TOLERANCE if self.dtype == torch.float32 else _LOW_TOLERANCE
            if self.dtype != torch.float32 and not difference <= allowed:
                own = self._log_probs(sequences, temperature, low=True)
                allowed = max(_LOW_TOLERANCE, _TIMES_ITS_OWN * _largest(own, wanted))
        except TrainingError:  # the numbers of the model are at fault, whatever path computes them
            raise
        except (UsageError, AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            # A model may raise any of these errors where it does not know the form of the call or the dtype.
            return f"{type(error).__name__}: {first_line(error)[:200]}"
        finally:
            self.model.train(training)
        if difference <= allowed:
            return ""
        return f"log-probabilities differ from those of its own forward pass by {difference:.2g} nats"

    def _log_probs(self, sequences: Sequences, temperature: float = 1.0, low: bool = False) -> Tensor:
        """Log-probabilities ``[m]`` float32 of all completions, by the model's own forward pass."""
        context: AbstractContextManager[Any] = nullcontext()
        if low:
            context = torch.autocast(self.device.type, self.dtype)
        elif next(self.model.parameters()).dtype != torch.float32:
            context = LowPrecision(self.model, torch.float32).exactly()
        with context:
            return torch.cat([own_terms(self.model, p, c, temperature).logp for p, c in sequences]).cpu()


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).abs().max())
