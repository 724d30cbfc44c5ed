"""Sampling with the ``generate`` method of transformers, for models that the packed path does not support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grouprl.errors import UsageError
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.finite import NotFiniteError
from grouprl.lm.sample.rows import Adjust, Completion


def _check_finite(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor of ``generate`` that changes nothing. Raises NotFiniteError for NaN and inf; -inf may be."""
    if not bool((scores.amax(-1) < float("inf")).all()):  # nor is it NaN
        raise NotFiniteError("logits are not finite")
    return scores


class PlainSampler:
    """Samples completions from any model with a ``generate`` method.

    It replaces :class:`grouprl.lm.sample.sampler.Sampler` for models that cannot be packed, and it is slower. The
    tokens of a completion depend on the random generator and also on which prompts are sampled in the same call.

    Args:
        model: a causal model of transformers.
        dtype: the dtype of matrix products. Any dtype but float32 turns autocast on.
        end_ids: the ids of the tokens that end a completion.
        pad_id: the id of the token that pads shorter prompts.
    """

    def __init__(self, model: Any, dtype: torch.dtype, end_ids: Sequence[int], pad_id: int) -> None:
        self.model, self.dtype, self.end_ids, self.pad_id = model, dtype, list(end_ids), pad_id

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        generator: torch.Generator,
        adjust: Adjust | None = None,
    ) -> list[Completion]:
        """Sample ``group_size`` completions of each prompt.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of completions of each prompt.
            settings: how to draw tokens.
            generator: a random generator on the CPU.
            adjust: must be None.

        Returns:
            ``P * group_size`` completions. The completions of the first prompt come first.

        Raises:
            UsageError: ``adjust`` is given. ``generate`` has no place for it.
        """
        if adjust is not None:
            raise UsageError("the plain sampler cannot adjust logits; use attention='auto'")
        from transformers import GenerationConfig

        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = settings.temperature == 0.0
        seed = int(torch.randint(2**62, (), generator=generator))
        training, checkpoints_own = self.model.training, self.model.generation_config
        self.model.eval()
        # The generation settings of a checkpoint would change the distribution without the user's knowledge.
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    out = self.model.generate(
                        input_ids=ids.repeat_interleave(group_size, 0),
                        attention_mask=mask.repeat_interleave(group_size, 0),
                        do_sample=not greedy, max_new_tokens=settings.max_new_tokens,
                        min_new_tokens=settings.min_new_tokens or None, eos_token_id=self.end_ids,
                        pad_token_id=self.pad_id, repetition_penalty=settings.repetition_penalty,
                        return_dict_in_generate=True, output_scores=True, logits_processor=[_check_finite],
                        **({} if greedy else {
                            "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
                            "min_p": settings.min_p or None,
                        }),
                    )  # fmt: skip
        finally:
            self.model.train(training)
            self.model.generation_config = checkpoints_own
        new = out.sequences[:, width:]
        # out.scores has a tensor [N, V] per step. Only the entries of the drawn tokens are needed.
        logp = torch.stack(
            [s.float().log_softmax(-1).gather(1, new[:, t, None])[:, 0] for t, s in enumerate(out.scores)], 1
        ).cpu()
        ends = torch.isin(new, torch.tensor(self.end_ids, device=device)).cpu()
        completions = []
        for row, end, scores in zip(new.tolist(), ends, logp, strict=True):
            finished = bool(end.any())
            n = int(end.int().argmax()) + 1 if finished else len(row)
            completions.append(Completion(row[:n], scores[:n], finished))
        return completions
