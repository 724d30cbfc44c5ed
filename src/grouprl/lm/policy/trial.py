"""A trial of the learner at construction: its log-probabilities are compared with the model's own forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import error_text
from grouprl.lm.packed.trial import Trial
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.sample.trial import Own, own_log_probs, verdict


class PolicyTrial:
    """Compares learners with the model's own forward pass in float32.

    A path in low precision may differ by a few times as much as the model's own forward pass in low precision does.

    Args:
        model: a causal model.
        dtype: the dtype of matrix products of the paths.

    Attributes:
        trial: the sequences with which learners and samplers are tried.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.trial = model, dtype, Trial(model)

    def learner(self, log_probs: LogProbs) -> str:
        """Try a learner. Returns "", or what is wrong with it.

        Differences count as they are at temperature 1: a low one divides logits, and their rounding, by little.
        """
        count = min(1.0, log_probs.temperature)
        groups = self.trial.groups
        completions = [c for group in groups for c in group.completions]
        tokens = torch.tensor(completions)

        def of_tokens(low: torch.dtype | None = None) -> Tensor:
            logits = self.trial.own(low).flatten(0, 1).cpu() / log_probs.temperature
            return count * logits.log_softmax(-1).gather(2, tokens[:, :, None]).flatten()

        def path() -> tuple[Tensor, Own]:
            parts = log_probs.micro_batches([group.prompt for group in groups], completions, [0, 0, 1, 1])
            lengths = torch.tensor([len(c) for c in completions])
            return count * log_probs.without_gradient(parts, lengths), of_tokens

        return verdict(path, self.dtype)

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
            return error_text(error)
        return ""

    def causality(self) -> str:
        """Returns "" if the log-probabilities of tokens do not depend on later tokens, or what is wrong."""
        group = self.trial.groups[0]
        completion = group.completions[0]

        def path() -> tuple[Tensor, Own]:
            prefixes = [([*group.prompt, *completion[:n]], [token]) for n, token in enumerate(completion)]
            return own_log_probs(self.model, prefixes), partial(own_log_probs, self.model, [(group.prompt, completion)])

        found = verdict(path, torch.float32)
        return found and f"tokens see the tokens after them: {found}"
