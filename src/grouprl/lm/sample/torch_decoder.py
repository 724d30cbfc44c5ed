"""Decode steps of any packed model with torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grouprl.lm.packed.attention import AttentionPlan
from grouprl.lm.packed.decode_attention import DecodeAttention
from grouprl.lm.packed.packing import Pack


class TorchDecoder:
    """Decodes B rows with torch operations. It implements :class:`grouprl.lm.sample.decode_steps.Decoder`.

    Args:
        hidden: a function of token ids ``[B]``, their positions ``[B]`` and an attention plan. It returns the last
            hidden states ``[B, d]``.
        head: the linear layer that maps hidden states to logits.
        pack: the P prompts.
        group_size: the number of rows of each prompt, so that B = P * group_size at first.
        longest: the most new tokens of a row.
        dtype: the dtype of matrix products.
    """

    def __init__(
        self,
        hidden: Callable[[Tensor, Tensor, AttentionPlan], Tensor],
        head: nn.Linear,
        pack: Pack,
        group_size: int,
        longest: int,
        dtype: torch.dtype,
    ) -> None:
        self.hidden, self.head = hidden, head
        # The products of attention are small, and on a CPU small products in float32 are three times faster.
        cache_dtype = torch.float32 if pack.ids.device.type == "cpu" else dtype
        self.plan = DecodeAttention(pack, group_size, longest, cache_dtype)
        self.lengths, self.keep, self.drop = self.plan.lengths, self.plan.keep, self.plan.drop
        self.reserve = self.plan.reserve

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Append the token ``ids [B]`` at ``positions [B]`` to each row.

        Returns the logits ``[B, V]`` float32 of the next token of each row.
        """
        self.plan.begin()
        hidden = self.hidden(ids, positions, self.plan)
        self.plan.end()
        logits: Tensor = self.head(hidden)
        return logits.float()
