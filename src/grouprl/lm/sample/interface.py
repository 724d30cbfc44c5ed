"""What a policy asks of a sampler. The built-in ones and vLLM answer alike, and nobody else knows which it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from grouprl.lm.packed.trial import Trial
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Adjust, Completion
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.sample.turns import Partner, Sampled


class CompletionSampler(Protocol):
    """Samples from a model with its weights as they are at the call.

    Attributes:
        end_ids: the ids of the tokens that end a completion.
    """

    end_ids: list[int]

    def ready(self) -> AbstractContextManager[Any]:
        """Around a generation, in which the weights stay as they are. Where there are several processes, all come here,
        those without a completion of their own too.
        """

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        adjust: Adjust | None = None,
    ) -> list[Completion]:
        """Sample ``group_size`` completions of each prompt. Those of the first prompt come first.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of completions of each prompt.
            settings: how to draw tokens.
            source: where random numbers come from: those of the completions, a stream, or a torch.Generator on the CPU.
            adjust: changes the logits before each draw, or None.

        Raises:
            UsageError: this sampler cannot adjust logits, or cannot take these prompts.
            NotFiniteError: logits are not finite.
            TrainingError: sampling failed.
        """

    def sample_episodes(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        partner: Partner,
        context: int | None = None,
    ) -> list[list[Sampled]]:
        """Sample ``group_size`` episodes of each prompt, as :meth:`grouprl.lm.sample.sampler.Sampler.sample_episodes`.

        Raises UsageError, NotFiniteError or TrainingError as :meth:`sample` does.
        """

    def disagreement(self, trial: Trial) -> str:
        """Compare with the model's own forward pass. Returns "", or what is wrong."""
