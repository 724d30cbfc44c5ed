"""A decode step of a packed model: by compiled code, by torch operations, or by the modules of the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from grouprl.lm.llama.block import JoinedProducts, LlamaBlocks
from grouprl.lm.llama.decode_c import NativeDecoder, NativeModel
from grouprl.lm.llama.decode_triton import TritonBlocks
from grouprl.lm.packed.attention import AttentionPlan, PackedAttention
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision, is_touched
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.sample.appending import AppendingDecoder, NativeRows, TorchRows
from grouprl.lm.sample.torch_decoder import TorchDecoder

Steps = Literal["native", "blocks", "modules"]


class Decoder(Protocol):
    """Holds the keys and values of B rows and computes the logits of each row's next token."""

    lengths: Tensor
    """The number of tokens of each prompt, ``[P]``."""

    def keep(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store the keys and values ``[S, K, D]`` of the prompts for one layer.

        :class:`PackedAttention` calls this once per layer while it reads the prompts.
        """

    def reserve(self) -> bool:
        """Make room for one more token in each row. Call this before each step.

        Returns True if tensors were allocated anew. A recording of earlier steps is then invalid.
        """

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Append the token ``ids [B]`` at ``positions [B]`` to each row.

        Returns the logits ``[B, V]`` float32 of the next token of each row.
        """

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove the rows with the indices in ``finished``.

        Returns the previous index of each remaining row.
        """


class DecodeSteps:
    """Runs a model in decode steps.

    There are three implementations, from the fastest to the slowest:

    - "native" runs compiled code, C on a CPU and Triton on a GPU. It supports Llama-shaped models.
    - "blocks" runs torch operations without the modules of transformers. It supports Llama-shaped models.
    - "modules" runs the modules of the model itself. It supports every packed model.

    Args:
        backbone: the model.
        precision: the precision of matrix products.
        steps: the implementation.
        llama: the blocks of a Llama-shaped model, which "native" and "blocks" need; None for "modules".
    """

    def __init__(
        self, backbone: Backbone, precision: LowPrecision, steps: Steps, llama: LlamaBlocks | None = None
    ) -> None:
        self.backbone, self.precision, self.steps, self.llama = backbone, precision, steps, llama
        self._blocks: LlamaBlocks | None = None
        self._native: NativeModel | None = None
        self._joined: JoinedProducts | None = None
        self._kernels: TritonBlocks | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Put the model into evaluation mode and lay its weights out for decode steps, while the context is open."""
        training, on_cpu = self.backbone.model.training, self.backbone.device.type == "cpu"
        self.backbone.model.eval()
        self._blocks = self.llama
        if self.llama is not None and any(map(is_touched, (*self.backbone.decoder.modules(), self.backbone.head))):
            self._blocks = None  # hooks that were added since construction would not be called
        try:
            if self.steps == "native" and self._blocks is not None and on_cpu:
                low = self.precision.dtype == torch.bfloat16
                with torch.no_grad():
                    self._native = NativeModel(self.backbone.decoder, self.backbone.head, self._blocks.specs, low)
                    yield
                return
            with torch.no_grad(), self.backbone.on_device():
                # On a CPU, precision.sampling() lays out the layers one by one.
                if self._blocks is not None and not on_cpu and JoinedProducts.can_join(self._blocks):
                    self._joined = JoinedProducts(self._blocks, self.precision)
                    if self.steps == "native":
                        self._kernels = TritonBlocks(self._blocks, self._joined, self.precision.dtype)
                with self.precision.sampling(without=() if self._joined is None else self._joined.linears):
                    yield
        finally:
            self._blocks = self._native = self._joined = self._kernels = None
            self.backbone.model.train(training)

    def read(self, prompts: Sequence[Sequence[int]], group_size: int, max_new_tokens: int) -> tuple[Decoder, Tensor]:
        """Read P prompts, each for ``group_size`` rows of up to ``max_new_tokens`` more. Call this while prepared.

        Returns a decoder of the rows and the logits ``[P, V]`` of each prompt's next token.
        """
        pack = Pack.of([Group(prompt, ()) for prompt in prompts], self.backbone.device)
        decoder: Decoder
        if self._native is not None:
            decoder = NativeDecoder(self._native, pack, group_size, max_new_tokens)
            hidden = self._native.read(pack, decoder.keep)
            return decoder, self._native.logits(hidden[decoder.lengths.cumsum(0) - 1])
        head, dtype = self.backbone.head, self.precision.dtype
        decoder = TorchDecoder(self._hidden, head, pack, group_size, max_new_tokens, dtype)
        hidden = self._hidden(pack.ids, pack.positions, PackedAttention(pack, dtype, decoder.keep, native=False))
        return decoder, head(hidden[decoder.lengths.cumsum(0) - 1]).float()

    def appending(self, slots: int, longest: int) -> AppendingDecoder:
        """A decoder for so many rows, of so many tokens behind their prompts at most. Call this while prepared."""
        if self._native is not None:
            return NativeRows(self._native, slots, longest)
        return TorchRows(self._hidden, self.backbone.head, self.precision.dtype, self.backbone.device, slots, longest)

    def _hidden(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Compute the last hidden states ``[B, d]`` of the tokens ``ids [B]`` at ``positions [B]``."""
        if self._kernels is not None:
            return self._kernels.hidden(ids, positions, plan)
        if self._blocks is not None:
            return self._blocks.hidden(ids, positions, plan, self._joined)
        with self.backbone.following(plan):
            return self.backbone.hidden(ids, positions)
