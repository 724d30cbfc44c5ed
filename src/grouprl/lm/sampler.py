"""Sampling groups of completions: each prompt is read once, many rows share a decode step, finished rows leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from grouprl.lm.attention import PackedAttention
from grouprl.lm.backbone import Backbone
from grouprl.lm.decoding import TorchDecoder
from grouprl.lm.lean import LeanStep, lean_step
from grouprl.lm.native.compile import UnavailableError
from grouprl.lm.native.decode import NativeDecoder, NativeModel, supported
from grouprl.lm.packing import Group, Pack
from grouprl.lm.products import Products
from grouprl.lm.sampling import SamplingSettings, draw, greedy, keep_likely, penalise_repetition

Steps = Literal["native", "lean", "modules"]
PROMPT_TOKENS = 8192
"""Most prompt tokens read in one pass: it bounds the activations of that pass."""

WAITING = 0.25
"""On a GPU, the share of rows that may have ended before any leaves: a step without them takes about as long, and
leaving stops the GPU."""

Adjust = Callable[[Tensor, Tensor, int], Tensor]
"""(logits [B, V], which completions the rows are [B], steps so far) -> logits; called before drawing. On a GPU some of
the completions may have ended; what is drawn for those is dropped."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        ids: ``[n]`` token ids as sampled, the end-of-sequence token included if it ended by itself.
        logp: ``[n]`` log-probability of each under the distribution it was drawn from.
        finished: whether it ended by itself; otherwise it was cut at the maximal length.
    """

    ids: list[int]
    logp: Tensor
    finished: bool


class Decoder(Protocol):
    """Rows of some prompts, token by token."""

    lengths: Tensor
    """``[P]`` tokens of each prompt."""

    def keep(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values ``[S, K, D]`` of the prompts: the ``keep`` of a PackedAttention."""

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, V]`` float32 behind one new token of each row, ``ids [B]`` at ``positions [B]``."""

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove rows. Returns for each remaining row which one it was before."""


class Sampler:
    """Samples completions from a packed model.

    Args:
        backbone: the model. products: in which precision it computes.
        end_ids: the tokens that end a completion.
        max_rows: most rows of one decode step; whole groups are sampled together.
        steps: the fastest way of a decode step that may be used: "native" compiled code (Llama-shaped models on a
            CPU), "lean" torch operations without the library's modules around them (Llama-shaped models), "modules"
            the model itself. Each falls back to the next; none changes what is computed.

    Attributes:
        steps: the way that is used. why: why it is not the one asked for, where a user can do something about it.
    """

    def __init__(
        self, backbone: Backbone, products: Products, end_ids: Sequence[int], max_rows: int = 256,
        steps: Steps = "native",
    ) -> None:  # fmt: skip
        self.backbone, self.products = backbone, products
        self.end_ids = torch.tensor(sorted(set(end_ids)), device=backbone.device)
        self.max_rows = max_rows
        self.steps, self.why = steps, ""
        self.lean: LeanStep | None = None
        self._native: NativeModel | None = None
        self._find_steps()

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
        training = self.backbone.model.training
        self.backbone.model.eval()
        try:
            if self.steps == "native" and self.lean is not None:
                low = self.products.dtype == torch.bfloat16
                with torch.no_grad():
                    self._native = NativeModel(self.backbone.decoder, self.backbone.head, self.lean.ways, low)
                    yield
            else:
                with self.products.sampling():
                    yield
        finally:
            self._native = None
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
        lean = lean_step(self.backbone)
        asked, self.steps = self.steps, "modules"
        if lean is None:
            return
        wanted = self._try()
        self.steps, self.lean = "lean", lean
        exact = self.products.dtype == torch.float32
        if _difference(self._try(), wanted) > (1e-3 if exact else 0.02):
            self.steps, self.lean = "modules", None
        elif asked == "native" and supported(self.backbone.decoder, self.backbone.head):
            try:
                self.steps = "native"
                if _difference(self._try(), wanted) > (1e-3 if exact else 0.1):  # it rounds less often
                    self.steps, self.why = "lean", "compiled decode steps give other logits than the model"
            except UnavailableError as error:
                self.steps, self.why = "lean", str(error)

    @torch.no_grad()
    def _try(self) -> Tensor:
        """Logits ``[4, V]`` of the second token behind two short prompts."""
        ids = torch.tensor([[3, 0, 1, 4], [1, 2, 0, 3]], device=self.backbone.device)
        with self._sampling():
            decoder, _ = self._read([[1, 2, 3, 4], [2, 1]], 2, 2)
            at = decoder.lengths.repeat_interleave(2)
            decoder.step(ids[0], at)
            return decoder.step(ids[1], at + 1)

    def _read(self, prompts: Sequence[Sequence[int]], group_size: int, max_new_tokens: int) -> tuple[Decoder, Tensor]:
        """Read the prompts: a decoder of their rows, and the logits ``[P, V]`` behind each prompt."""
        pack = Pack.of([Group(prompt, ()) for prompt in prompts], self.backbone.device)
        decoder: Decoder
        if self._native is not None:
            decoder = NativeDecoder(self._native, pack, group_size, max_new_tokens)
            hidden = self._native.read(pack, decoder.keep)
            return decoder, self._native.logits(hidden[decoder.lengths.cumsum(0) - 1])
        decoder = TorchDecoder(self.backbone, self.lean, self.products.dtype, pack, group_size)
        lengths = decoder.lengths
        with self.backbone.following(PackedAttention(pack, self.products.dtype, decoder.keep, native=False)):
            hidden = self.backbone.hidden(pack.ids, pack.positions)
        return decoder, self.backbone.head(hidden[lengths.cumsum(0) - 1]).float()

    @torch.no_grad()
    def _batch(
        self, prompts: Sequence[Sequence[int]], group_size: int, settings: SamplingSettings, generator: torch.Generator,
        adjust: Adjust | None, first: int,
    ) -> list[Completion]:  # fmt: skip
        device, n = self.backbone.device, len(prompts) * group_size
        decoder, logits = self._read(prompts, group_size, settings.max_new_tokens)
        logits = logits.repeat_interleave(group_size, 0)
        position = decoder.lengths.repeat_interleave(group_size)
        seen = None
        if settings.repetition_penalty != 1.0:
            seen = torch.zeros(n, logits.shape[-1], dtype=torch.bool, device=device)
            for i, prompt in enumerate(prompts):
                seen[i * group_size : (i + 1) * group_size, torch.tensor(prompt, device=device)] = True
        rows = torch.arange(n, device=device)
        tokens = torch.zeros(n, settings.max_new_tokens, dtype=torch.int64, device=device)
        logps = torch.zeros(n, settings.max_new_tokens, device=device)
        lengths = torch.zeros(n, dtype=torch.int64, device=device)
        ended = torch.zeros(n, dtype=torch.bool, device=device)
        waiting = WAITING if device.type == "cuda" else 0.0
        for step in range(settings.max_new_tokens):
            uniform = _moved(torch.rand(n, generator=generator), device)[rows]
            if adjust is not None:
                logits = adjust(logits, rows + first, step)
            if seen is not None:
                logits = penalise_repetition(logits, seen[rows], settings.repetition_penalty)
            if step < settings.min_new_tokens:
                logits[:, self.end_ids] = float("-inf")
            token, logp = _choose(logits, settings, uniform)
            before = ended[rows]
            over = before | torch.isin(token, self.end_ids)
            tokens[rows, step], logps[rows, step], ended[rows] = token, logp, over
            lengths[rows] = torch.where(before, lengths[rows], step + 1)
            if seen is not None:
                seen[rows, token] = True
            n_over = int(over.sum())  # the one number of a step that a GPU is asked for
            if n_over == len(rows):
                break
            if n_over > waiting * len(rows):
                kept = torch.tensor(decoder.drop(over.nonzero()[:, 0].tolist()), device=device)
                rows, token, position = rows[kept], token[kept], position[kept]
            if step + 1 == settings.max_new_tokens:
                break
            logits = decoder.step(token, position)
            position = position + 1
        tokens, logps, counts, finished = tokens.cpu(), logps.cpu(), lengths.tolist(), ended.tolist()
        return [Completion(tokens[i, : counts[i]].tolist(), logps[i, : counts[i]], finished[i]) for i in range(n)]


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without waiting for what a GPU has yet to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _choose(logits: Tensor, settings: SamplingSettings, uniform: Tensor) -> tuple[Tensor, Tensor]:
    if settings.temperature == 0.0:
        return greedy(logits)
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.filtered:
        logits = keep_likely(logits, settings)
    return draw(logits, uniform)
