"""Sampling groups of completions: each prompt is read once, many rows share a decode step, finished rows leave."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from grouprl.lm.kernels.compile import UnavailableError
from grouprl.lm.llama.block import JoinedProducts, LlamaBlocks, find_llama
from grouprl.lm.llama.decode_c import NativeDecoder, NativeModel, can_decode_in_c
from grouprl.lm.llama.decode_triton import TritonBlocks, can_decode_in_triton
from grouprl.lm.packed.attention import AttentionPlan, PackedAttention
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.recordings import CudaGraphRecorder, GraphRecorder, Repeated
from grouprl.lm.sample.rows import Adjust, Completion, Rows
from grouprl.lm.sample.torch_decoder import TorchDecoder

_log = logging.getLogger("grouprl")

Steps = Literal["native", "blocks", "modules"]
PROMPT_TOKENS = 8192
"""Most prompt tokens read in one pass: it bounds the activations of that pass."""

DROP_ABOVE_SHARE = 0.25
"""On a GPU, the share of rows that may have ended before any leaves: a step without them takes about as long, and
leaving stops the GPU."""

DROP_RECORDED_ABOVE_SHARE, NEVER_DROP_BELOW = 0.5, 64
"""The same where steps are recorded, as other rows need another recording; and rows of which none leaves."""

STEPS_BETWEEN_LOOKS = 8
"""Recorded steps after which a GPU is asked which rows have ended."""


class Decoder(Protocol):
    """Rows of some prompts, token by token."""

    lengths: Tensor
    """``[P]`` tokens of each prompt."""

    def keep(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values ``[S, K, D]`` of the prompts: the ``keep`` of a PackedAttention."""

    def reserve(self) -> bool:
        """Make room for one more token of each row; before each step. Returns whether tensors have moved for that."""

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, V]`` float32 behind one new token of each row, ``ids [B]`` at ``positions [B]``."""

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove rows. Returns for each remaining row which one it was before."""


class Sampler:
    """Samples completions from a packed model.

    Args:
        backbone: the model. precision: in which precision it computes.
        end_ids: the tokens that end a completion.
        max_rows: most rows of one decode step; whole groups are sampled together.
        steps: the fastest way of a decode step that may be used: "native" compiled code (Llama-shaped models; C on a
            CPU, Triton on a GPU), "blocks" torch operations without the library's modules around them (Llama-shaped
            models), "modules" the model itself. Each falls back to the next; none changes what is computed.

    On a GPU, steps are recorded and replayed (:mod:`grouprl.lm.sample.recordings`) if that gives the same.

    Attributes:
        steps: the way that is used. recorder: what records steps, if they are. why: what is slower than it could be
            and why, where a user should know.
    """

    def __init__(
        self, backbone: Backbone, precision: LowPrecision, end_ids: Sequence[int], max_rows: int = 256,
        steps: Steps = "native",
    ) -> None:  # fmt: skip
        self.backbone, self.precision = backbone, precision
        self.end_ids = sorted(set(end_ids))
        self.max_rows = max_rows
        self.steps, self.why = steps, ""
        self.recorder: GraphRecorder | None = None
        self._unrecorded: set[tuple[SamplingSettings, bool]] = set()  # how, and whether adjusted
        self.llama: LlamaBlocks | None = None
        self._native: NativeModel | None = None
        self._joined: JoinedProducts | None = None
        self._kernels: TritonBlocks | None = None
        self._find_steps()
        if backbone.device.type == "cuda":
            try:
                self.record_with(CudaGraphRecorder(backbone.device))
            except RuntimeError as error:
                self._not_recorded(error)

    def record_with(self, recorder: GraphRecorder) -> None:
        """Have ``recorder`` record decode steps from now on, if replayed ones give what steps give."""
        self.recorder = recorder
        exact = self.precision.dtype == torch.float32
        if not _difference(self._try(recorder), self._try()) <= (1e-3 if exact else 0.02):
            self._not_recorded("replayed ones give other logits than the model")

    def _not_recorded(self, why: object) -> None:
        self.recorder = None
        self._launched_one_by_one(why)

    def _launched_one_by_one(self, why: object) -> None:
        reason = str(why).splitlines()[0] if str(why) else type(why).__name__
        self._slower("several times more slowly, its decode steps launched kernel by kernel", reason)

    def _slower(self, how: str, why: str) -> None:
        self.why = why
        _log.warning("%s samples %s: %s", type(self.backbone.core).__name__, how, why)

    def sample(
        self, prompts: Sequence[Sequence[int]], group_size: int, settings: SamplingSettings, generator: torch.Generator,
        adjust: Adjust | None = None,
    ) -> list[Completion]:  # fmt: skip
        """``group_size`` completions of each prompt, prompt after prompt.

        ``generator`` lives on the CPU. A row's draws do not depend on which other rows are still running.
        """
        out: list[Completion] = []
        with self._sampling():
            for start, stop in self._batches([len(p) for p in prompts], group_size):
                out += self._batch(prompts[start:stop], group_size, settings, generator, adjust, start * group_size)
        return out

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Within, the model evaluates, and its weights are laid out for decode steps."""
        training, on_cpu = self.backbone.model.training, self.backbone.device.type == "cpu"
        self.backbone.model.eval()
        try:
            if self.steps == "native" and self.llama is not None and on_cpu:
                low = self.precision.dtype == torch.bfloat16
                with torch.no_grad():
                    self._native = NativeModel(self.backbone.decoder, self.backbone.head, self.llama.specs, low)
                    yield
                return
            with torch.no_grad(), self.backbone.on_device():
                # on a CPU, layers are laid out one by one
                if self.llama is not None and not on_cpu and JoinedProducts.can_join(self.llama):
                    self._joined = JoinedProducts(self.llama, self.precision)
                    if self.steps == "native":
                        self._kernels = TritonBlocks(self.llama, self._joined, self.precision.dtype)
                with self.precision.sampling(without=() if self._joined is None else self._joined.linears):
                    yield
        finally:
            self._native = self._joined = self._kernels = None
            self.backbone.model.train(training)

    def _batches(self, lengths: Sequence[int], group_size: int) -> Iterator[tuple[int, int]]:
        """Consecutive prompts whose rows decode together: at most max_rows rows and PROMPT_TOKENS, or one prompt."""
        start, tokens = 0, 0
        for i, length in enumerate(lengths):
            if i > start and ((i + 1 - start) * group_size > self.max_rows or tokens + length > PROMPT_TOKENS):
                yield start, i
                start, tokens = i, 0
            tokens += length
        if lengths:
            yield start, len(lengths)

    def _find_steps(self) -> None:
        """Settle for the first way that the model has the parts for and that gives what its modules give."""
        if self.steps == "modules":
            return
        llama = find_llama(self.backbone)
        asked, self.steps = self.steps, "modules"
        if llama is None:
            return
        wanted = self._try()
        self.steps, self.llama = "blocks", llama
        exact = self.precision.dtype == torch.float32
        rounds = 0.02 if self.backbone.head.weight.dtype == torch.float32 else 0.05  # the model itself, all it computes
        if not _difference(self._try(), wanted) <= (1e-3 if exact else rounds):
            self.steps, self.llama = "modules", None
        elif asked == "native" and self._compiled(llama):
            try:
                self.steps = "native"
                if not _difference(self._try(), wanted) <= (1e-3 if exact else 0.1):  # it rounds less often
                    raise UnavailableError("compiled decode steps give other logits than the model")
            except Exception as error:  # Triton has errors of its own, as many as ways to fail
                if not isinstance(error, UnavailableError) and self.backbone.device.type == "cpu":
                    raise
                self.steps = "blocks"
                self._slower("at half the speed, without compiled code", str(error))

    def _compiled(self, llama: LlamaBlocks) -> bool:
        """Whether compiled code may be able to run the model's steps: C on a CPU, Triton on a GPU."""
        if self.backbone.device.type == "cpu":
            return can_decode_in_c(self.backbone.decoder, self.backbone.head)
        if self.backbone.device.type != "cuda" or not JoinedProducts.can_join(llama):
            return False
        if not can_decode_in_triton(llama, self.precision.dtype):
            return False
        if util.find_spec("triton") is None:
            self._slower("and learns more slowly", "there is no Triton; install it with: pip install triton")
            return False
        return True

    @torch.no_grad()
    def _try(self, recorder: GraphRecorder | None = None) -> Tensor:
        """Logits ``[3, 4, V]`` of three tokens behind two short prompts."""
        device = self.backbone.device
        out = torch.empty(3, 4, self.backbone.head.weight.shape[0], device=device)
        with self._sampling():
            decoder, _ = self._read([[1, 2, 3, 4], [2, 1]], 2, len(out))
            token, position = torch.empty(4, dtype=torch.int64, device=device), decoder.lengths.repeat_interleave(2)
            logits = torch.empty_like(out[0])
            step = Repeated(lambda: logits.copy_(decoder.step(token, position)), recorder, self._not_recorded)
            for i in range(len(out)):
                token.copy_(torch.tensor([3, 0, 1, 4]).roll(i))
                decoder.reserve()
                step()
                out[i] = logits
                position += 1
        return out

    def _read(self, prompts: Sequence[Sequence[int]], group_size: int, max_new_tokens: int) -> tuple[Decoder, Tensor]:
        """Read the prompts: a decoder of their rows, and the logits ``[P, V]`` behind each prompt."""
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

    def _hidden(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Last hidden states ``[B, d]`` of tokens ``ids [B]`` at ``positions [B]``."""
        if self._kernels is not None:
            return self._kernels.hidden(ids, positions, plan)
        if self.llama is not None:
            return self.llama.hidden(ids, positions, plan, self._joined)
        with self.backbone.following(plan):
            return self.backbone.hidden(ids, positions)

    @torch.no_grad()
    def _batch(
        self, prompts: Sequence[Sequence[int]], group_size: int, settings: SamplingSettings, generator: torch.Generator,
        adjust: Adjust | None, first: int,
    ) -> list[Completion]:  # fmt: skip
        decoder, logits = self._read(prompts, group_size, settings.max_new_tokens)
        look = 1 if self.recorder is None else STEPS_BETWEEN_LOOKS
        rows = Rows(
            prompts, group_size, settings, self.end_ids, logits.shape[-1], self.backbone.device, generator, adjust,
            first, ahead=look,
        )  # fmt: skip
        kind = (settings, adjust is not None)

        def failed(error: RuntimeError) -> None:
            self._unrecorded.add(kind)
            self._launched_one_by_one(error)

        recorder = None if kind in self._unrecorded else self.recorder
        step = Repeated(lambda: rows.draw_tokens(decoder.step(rows.token, rows.position)), recorder, failed)
        rows.prepare(0)
        rows.draw_tokens(logits.repeat_interleave(group_size, 0))
        for t in range(1, settings.max_new_tokens):
            if t % look == 0:
                ended = rows.ended()
                if len(ended) == len(rows):
                    break
                if self._leave(len(ended), len(rows)):
                    rows.keep(decoder.drop(ended))
                    step.moved()
            if decoder.reserve():
                step.moved()
            rows.prepare(t)
            step()
        return rows.completions()

    def _leave(self, ended: int, rows: int) -> bool:
        """Whether those of the rows that have ended should go."""
        if self.recorder is not None:
            return rows > NEVER_DROP_BELOW and ended > DROP_RECORDED_ABOVE_SHARE * rows
        return ended > (DROP_ABOVE_SHARE if self.backbone.device.type == "cuda" else 0.0) * rows


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
