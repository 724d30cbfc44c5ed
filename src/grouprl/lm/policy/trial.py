"""A trial of every path at construction: its log-probabilities are compared with the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError, first_line
from grouprl.lm.packed.trial import Trial, is_rounding, own_pass, own_terms
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.streams import Stream

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompts and completions, each as token ids."""

Own = Callable[[torch.dtype | None], Tensor]
"""Computes log-probabilities ``[m]`` by the model's own forward pass, with products in a precision or in float32."""

Path = Callable[[], tuple[Tensor, Own]]
"""Runs a path. Returns its log-probabilities ``[m]``, and how to compute those of the model's own forward pass."""


class PolicyTrial:
    """Compares learners and samplers with the model's own forward pass in float32.

    A path in low precision may differ by a few times as much as the model's own forward pass in low precision does.

    Args:
        model: a causal model.
        dtype: the dtype of matrix products of the paths.

    Attributes:
        trial: the sequences with which learners are tried.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.trial = model, dtype, Trial(model)

    def learner(self, log_probs: LogProbs) -> str:
        """Try a learner. Returns "", or what is wrong with it."""
        groups = self.trial.groups
        completions = [c for group in groups for c in group.completions]
        tokens = torch.tensor(completions)

        def of_tokens(low: torch.dtype | None = None) -> Tensor:
            logits = self.trial.own(low).flatten(0, 1).cpu() / log_probs.temperature
            return logits.log_softmax(-1).gather(2, tokens[:, :, None]).flatten()

        def path() -> tuple[Tensor, Own]:
            parts = log_probs.micro_batches([group.prompt for group in groups], completions, [0, 0, 1, 1])
            lengths = torch.tensor([len(c) for c in completions])
            return log_probs.without_gradient(parts, lengths), of_tokens

        return self._verdict(path, self.dtype)

    def gradient(self, log_probs: LogProbs) -> str:
        """Try whether the model can be differentiated as it learns. Returns "", or what is wrong."""
        groups, completions = self.trial.groups[:1], self.trial.groups[0].completions[:1]
        weight = next((p for p in self.model.parameters() if p.requires_grad), None)
        try:
            with torch.enable_grad(), log_probs.learning():
                (part,) = log_probs.micro_batches([groups[0].prompt], completions, [0])
                total = log_probs.evaluate(part).logp.sum()
                if weight is not None:
                    torch.autograd.grad(total, weight, allow_unused=True)
        except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            return f"{type(error).__name__}: {first_line(error)[:200]}"
        return ""

    def plain_sampler(self, sampler: PlainSampler) -> str:
        """Try a sampler: two completions of each of two prompts. Returns "", or what is wrong with it.

        It is tried in float32 first if the weights are float32, because rounding would hide differences.
        """
        first = next(self.model.parameters()).dtype
        exactly = PlainSampler(self.model, first, sampler.end_ids, sampler.pad_id, sampler.steps)
        of_both = [(exactly, first), (sampler, self.dtype)] if first != self.dtype else [(sampler, self.dtype)]
        return next((wrong for one, dtype in of_both if (wrong := self._sampled(one, dtype))), "")

    def _sampled(self, sampler: PlainSampler, dtype: torch.dtype) -> str:
        prompts = [group.prompt for group in self.trial.groups]

        def path() -> tuple[Tensor, Own]:
            drawn = sampler.draw(prompts, 2, SamplingSettings(4), Stream(0).next(2 * len(prompts)))
            own = partial(self._own, [(prompts[i // 2], c.ids) for i, c in enumerate(drawn)])
            return torch.cat([c.logp for c in drawn]), own

        return self._verdict(path, dtype)

    def causality(self) -> str:
        """Returns "" if the log-probabilities of tokens do not depend on later tokens, or what is wrong."""
        group = self.trial.groups[0]
        completion = group.completions[0]

        def path() -> tuple[Tensor, Own]:
            prefixes = [([*group.prompt, *completion[:n]], [token]) for n, token in enumerate(completion)]
            return self._own(prefixes), partial(self._own, [(group.prompt, completion)])

        found = self._verdict(path, torch.float32)
        return found and f"tokens see the tokens after them: {found}"

    def _verdict(self, path: Path, dtype: torch.dtype) -> str:
        """Run a path with products in ``dtype``, and compare its log-probabilities with the model's own."""
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
            return f"{type(error).__name__}: {first_line(error)[:200]}"
        return f"log-probabilities differ from those of its own forward pass by {difference:.2g} nats"

    def _own(self, sequences: Sequences, low: torch.dtype | None = None) -> Tensor:
        """Log-probabilities ``[m]`` float32 of all completions, by the model's own forward pass."""
        with own_pass(self.model, low):
            return torch.cat([own_terms(self.model, p, c).logp for p, c in sequences]).cpu()


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu() - wanted).abs().max())
