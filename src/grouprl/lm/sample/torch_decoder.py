"""Decode steps of any packed model by torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grouprl.lm.packed.attention import AttentionPlan
from grouprl.lm.packed.decode_attention import DecodeAttention
from grouprl.lm.packed.packing import Pack


class TorchDecoder:
    """Rows of some prompts, token by token, by torch operations.

    Args:
        hidden: last hidden states ``[B, d]`` of tokens ``[B]`` at positions ``[B]`` whose attention follows a plan.
        head: on top of them. pack: the prompts. group_size: rows of each. longest: most tokens of a row.
        dtype: of products.
    """

    def __init__(
        self, hidden: Callable[[Tensor, Tensor, AttentionPlan], Tensor], head: nn.Linear, pack: Pack, group_size: int,
        longest: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.hidden, self.head = hidden, head
        # On a CPU small float32 products are three times faster than bfloat16 ones, and these are all small.
        kept = torch.float32 if pack.ids.device.type == "cpu" else dtype
        self.plan = DecodeAttention(pack, group_size, longest, kept)
        self.lengths, self.keep, self.drop = self.plan.lengths, self.plan.keep, self.plan.drop
        self.reserve = self.plan.reserve

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, V]`` behind one new token of each row, ``ids [B]`` at ``positions [B]``."""
        self.plan.begin()
        hidden = self.hidden(ids, positions, self.plan)
        self.plan.end()
        logits: Tensor = self.head(hidden)
        return logits.float()
