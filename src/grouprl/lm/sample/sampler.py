"""Sampling groups of completions from a packed model.

The sampler reads each prompt once. A *row* is one completion in progress. A *decode step* adds one token to every row
at once. Rows that have ended leave the batch, so that later steps cost less.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import util
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from grouprl.errors import first_line
from grouprl.lm.kernels.compile import UnavailableError
from grouprl.lm.llama.block import JoinedProducts, LlamaBlocks, find_llama
from grouprl.lm.llama.decode_c import NativeDecoder, NativeModel, can_decode_in_c
from grouprl.lm.llama.decode_triton import TritonBlocks, can_decode_in_triton
from grouprl.lm.packed.attention import AttentionPlan, PackedAttention, UnsupportedError
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision, is_touched
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.trial import Trial, is_rounding
from grouprl.lm.sample.appending import AppendingDecoder, NativeRows, TorchRows
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.episodes import play
from grouprl.lm.sample.recordings import CudaGraphRecorder, GraphRecorder, Repeated
from grouprl.lm.sample.rows import Adjust, Completion, Rows
from grouprl.lm.sample.streams import Draws, Stream, draws_of
from grouprl.lm.sample.torch_decoder import TorchDecoder
from grouprl.lm.sample.turns import Partner, Sampled

_log = logging.getLogger("grouprl")

Steps = Literal["native", "blocks", "modules"]
PROMPT_TOKENS = 8192
"""The most prompt tokens that one pass reads. This limits the memory for the activations of the pass."""

DROP_ABOVE_SHARE = 0.25
"""The share of rows that must have ended before the sampler removes them, on a GPU that does not record its steps.

Removing rows makes the GPU wait for the CPU, and a step with a few rows fewer takes about as long."""

DROP_RECORDED_ABOVE_SHARE, NEVER_DROP_BELOW = 0.5, 64
"""When the sampler removes ended rows, if decode steps are recorded: more than this share of the rows must have ended,
and the batch must have more than this number of rows. Each removal costs a new recording."""

STEPS_BETWEEN_LOOKS = 8
"""The number of recorded steps between two questions to the GPU which rows have ended. Each question makes it wait."""

_GROUPS = (Group([1, 2, 3, 4], ([3, 0, 1, 4], [0, 1, 4, 3])), Group([2, 1], ([1, 4, 3, 0], [4, 3, 0, 1])))
"""Two prompts with two completions each, with which recorded decode steps are tried."""


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


class Sampler:
    """Samples completions from a packed model.

    There are three implementations of a decode step, from the fastest to the slowest:

    - "native" runs compiled code, C on a CPU and Triton on a GPU. It supports Llama-shaped models.
    - "blocks" runs torch operations without the modules of transformers. It supports Llama-shaped models.
    - "modules" runs the modules of the model itself. It supports every packed model.

    The sampler starts with the implementation that ``steps`` names. On two short prompts it compares the logits with
    those of the model's own forward pass. If they differ by more than rounding, it takes the next slower one.

    On a GPU the sampler records decode steps and replays them (:mod:`grouprl.lm.sample.recordings`), if replayed steps
    give the same logits.

    Args:
        backbone: the model.
        precision: the precision of matrix products.
        end_ids: the ids of the tokens that end a completion.
        max_rows: the most rows of one decode step. A group is never split, so a larger group exceeds this number.
        steps: the fastest implementation that the sampler may use.
        trial: a trial of this model with its weights as they are, to use it more than once.

    Attributes:
        steps: the implementation in use.
        recorder: records decode steps, or None if the sampler launches each kernel from Python.
        why: the reason why sampling is slower than it could be, or "" if there is none.

    Raises:
        UnsupportedError: the modules give other logits in decode steps than in a forward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        precision: LowPrecision,
        end_ids: Sequence[int],
        max_rows: int = 256,
        steps: Steps = "native",
        trial: Trial | None = None,
    ) -> None:
        self.backbone, self.precision = backbone, precision
        self.end_ids = sorted(set(end_ids))
        self.max_rows = max_rows
        self.steps, self.why = steps, ""
        self.recorder: GraphRecorder | None = None
        self._unrecorded: set[tuple[SamplingSettings, bool]] = set()  # settings, and whether logits are adjusted
        self.llama: LlamaBlocks | None = None
        self._native: NativeModel | None = None
        self._joined: JoinedProducts | None = None
        self._kernels: TritonBlocks | None = None
        self._find_steps(trial or Trial(backbone.model))
        if backbone.device.type == "cuda":
            try:
                self.record_with(CudaGraphRecorder(backbone.device))
            except RuntimeError as error:
                self._not_recorded(error)

    def record_with(self, recorder: GraphRecorder) -> None:
        """Let ``recorder`` record decode steps from now on, if replayed steps give the same logits.

        Otherwise the sampler logs a warning, sets :attr:`why` and records nothing.
        """
        self.recorder = recorder
        exact = self.precision.dtype == torch.float32
        if not _difference(self._try(recorder=recorder), self._try()) <= (1e-3 if exact else 0.02):
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

    def ready(self) -> AbstractContextManager[Any]:
        """As :meth:`grouprl.lm.sample.interface.CompletionSampler.ready`: there is nothing to do."""
        return nullcontext()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        adjust: Adjust | None = None,
    ) -> list[Completion]:
        """Sample ``group_size`` completions of each prompt.

        The tokens of a completion do not depend on which others are sampled beside it.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of completions of each prompt.
            settings: how to draw tokens.
            source: where random numbers come from: those of the completions, a stream, or a torch.Generator on the CPU.
            adjust: changes the logits before each draw, or None.

        Returns:
            ``P * group_size`` completions. The completions of the first prompt come first.
        """
        out: list[Completion] = []
        draws = draws_of(source, len(prompts) * group_size)
        with self._sampling():
            for start, stop in self._batches([len(p) for p in prompts], group_size):
                first = start * group_size
                own = draws.of(slice(first, stop * group_size))
                out += self._batch(prompts[start:stop], group_size, settings, own, adjust, first)
        return out

    def sample_episodes(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        partner: Partner,
        context: int | None = None,
    ) -> list[list[Sampled]]:
        """Sample ``group_size`` episodes of each prompt, in turns of the model and of a partner.

        A turn ends with an end token, after ``max_turn_tokens``, or where no more tokens may follow. Then the partner
        is asked for its reply, whatever ended the turn. An episode is over when the partner says so. It is cut where
        the reply leaves no room for another turn; the reply is not appended then.

        The tokens of an episode do not depend on when replies come. With compiled steps on a CPU, they do not depend on
        the other episodes either.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of episodes of each prompt.
            settings: how to draw tokens. ``max_new_tokens`` limits all that follows a prompt, the partner's tokens
                included, and ``max_turn_tokens`` a turn.
            source: where random numbers come from: those of the episodes, a stream, or a torch.Generator on the CPU.
            partner: the other side. Episodes are numbered as they are returned.
            context: the most tokens of a prompt and what follows it, or None.

        Returns:
            ``P * group_size`` episodes. Those of the first prompt come first. An episode has one sample, and one more
            for each time that the partner began it anew.

        Raises:
            UsageError: a prompt leaves no room for a turn.
            NotFiniteError: logits are not finite.
        """
        draws = draws_of(source, len(prompts) * group_size)
        slots = min(self.max_rows, len(prompts) * group_size)
        with self._sampling():
            decoder = self._appending(slots, settings.max_new_tokens)
            return play(
                decoder, slots, prompts, group_size, settings, self.end_ids, partner, draws, context,
                PROMPT_TOKENS,
            )  # fmt: skip

    def _appending(self, slots: int, longest: int) -> AppendingDecoder:
        """A decoder for so many rows, of so many tokens behind their prompts at most."""
        if self._native is not None:
            return NativeRows(self._native, slots, longest)
        return TorchRows(self._hidden, self.backbone.head, self.precision.dtype, self.backbone.device, slots, longest)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Put the model into evaluation mode and lay its weights out for decode steps, while the context is open."""
        training, on_cpu = self.backbone.model.training, self.backbone.device.type == "cpu"
        self.backbone.model.eval()
        found = self.steps, self.llama
        if self.llama is not None and any(map(is_touched, (*self.backbone.decoder.modules(), self.backbone.head))):
            self.steps, self.llama = "modules", None  # hooks that were added since construction would not be called
        try:
            if self.steps == "native" and self.llama is not None and on_cpu:
                low = self.precision.dtype == torch.bfloat16
                with torch.no_grad():
                    self._native = NativeModel(self.backbone.decoder, self.backbone.head, self.llama.specs, low)
                    yield
                return
            with torch.no_grad(), self.backbone.on_device():
                # On a CPU, precision.sampling() lays out the layers one by one.
                if self.llama is not None and not on_cpu and JoinedProducts.can_join(self.llama):
                    self._joined = JoinedProducts(self.llama, self.precision)
                    if self.steps == "native":
                        self._kernels = TritonBlocks(self.llama, self._joined, self.precision.dtype)
                with self.precision.sampling(without=() if self._joined is None else self._joined.linears):
                    yield
        finally:
            self._native = self._joined = self._kernels = None
            self.steps, self.llama = found
            self.backbone.model.train(training)

    def _batches(self, lengths: Sequence[int], group_size: int) -> Iterator[tuple[int, int]]:
        """Ranges of consecutive prompts whose rows decode together.

        A range has at most ``max_rows`` rows and ``PROMPT_TOKENS`` prompt tokens, or it is a single prompt.
        """
        start, tokens = 0, 0
        for i, length in enumerate(lengths):
            if i > start and ((i + 1 - start) * group_size > self.max_rows or tokens + length > PROMPT_TOKENS):
                yield start, i
                start, tokens = i, 0
            tokens += length
        if lengths:
            yield start, len(lengths)

    def _find_steps(self, trial: Trial) -> None:
        """Choose the fastest allowed implementation that supports the model and agrees with its own forward pass."""
        if self.steps == "modules":
            return
        self.llama, asked, low = find_llama(self.backbone), self.steps, self.precision.dtype
        self.steps = "modules"

        def agrees() -> bool:
            return not self.disagreement(trial)

        if self.llama is not None and asked == "native" and self._compiled(self.llama):
            try:
                self.steps = "native"
                if agrees():
                    return
                raise UnavailableError("compiled decode steps give other logits than the model")
            except Exception as error:  # Triton raises many types of errors
                if not isinstance(error, UnavailableError) and self.backbone.device.type == "cpu":
                    raise
                self._slower("at half the speed, without compiled code", str(error))
        if self.llama is not None:
            self.steps = "blocks"
            if agrees():
                return
        self.steps, self.llama = "modules", None
        try:
            agreed = agrees()
        except (RuntimeError, TypeError) as error:  # some layers do not take the dtype of the others' outputs
            raise UnsupportedError(f"its layers cannot run in {low}: {first_line(error)}") from error
        if not agreed:
            raise UnsupportedError("decode steps give other logits than the model's own forward pass")

    def disagreement(self, trial: Trial) -> str:
        """Compare decode steps with the model's own forward pass. Returns "", or what is wrong."""
        low, own = self.precision.dtype, trial.own().flatten(0, 1).transpose(0, 1)
        pieces = self._try_pieces(trial.groups).log_softmax(-1)

        def wrong(found: Tensor, at: list[int], what: str) -> str:
            difference = _difference(found, own[at])

            def of_the_model() -> float:
                return _difference(trial.own(low).flatten(0, 1).transpose(0, 1)[at], own[at])

            if is_rounding(difference, low, of_the_model):
                return ""
            return f"log-probabilities of {what} differ by {difference:.2g} from those of the model's forward pass"

        return wrong(self._try(trial.groups).log_softmax(-1), list(range(len(own))), "decode steps") or wrong(
            pieces, [0, len(own) - 1], "stretches of tokens"
        )

    def _compiled(self, llama: LlamaBlocks) -> bool:
        """Whether compiled code supports the model: C on a CPU, Triton on a GPU."""
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
    def _try(self, groups: Sequence[Group] = _GROUPS, recorder: GraphRecorder | None = None) -> Tensor:
        """Logits ``[n, B, V]`` before each of the n tokens of B completions, which take the place of draws.

        Args:
            groups: two completions of each prompt, all of n tokens.
            recorder: records the decode steps, or None.
        """
        device = self.backbone.device
        tokens = torch.tensor([c for group in groups for c in group.completions]).t()
        with self._sampling():
            decoder, first = self._read([group.prompt for group in groups], 2, len(tokens))
            out = [first.repeat_interleave(2, 0)]
            token = torch.empty_like(tokens[0], device=device)
            position = decoder.lengths.repeat_interleave(2)
            logits = torch.empty_like(out[0])
            step = Repeated(lambda: logits.copy_(decoder.step(token, position)), recorder, self._not_recorded)
            for new in tokens[:-1]:
                token.copy_(new)
                decoder.reserve()
                step()
                out.append(logits.clone())
                position += 1
        return torch.stack(out)

    @torch.no_grad()
    def _try_pieces(self, groups: Sequence[Group]) -> Tensor:
        """Logits ``[2, B, V]`` before the first and the last of the n tokens of B completions, read in pieces.

        The prompts are read once for their completions. Then every completion is read in two pieces, cut at different
        places, beside another one or alone.
        """
        prompts, rows = [group.prompt for group in groups], [c[:-1] for group in groups for c in group.completions]
        slots = list(range(len(rows)))[::-1]
        with self._sampling():
            decoder = self._appending(len(rows), max(map(len, rows)))
            first = decoder.begin(prompts, [slots[2 * i : 2 * i + 2] for i in range(len(prompts))])
            last = first.new_empty(len(rows), first.shape[-1])
            cut = [1 + i % 2 for i in range(len(rows))]
            decoder.append(slots[1:], [row[:n] for row, n in zip(rows[1:], cut[1:], strict=True)])
            last[:1] = decoder.append(slots[:1], rows[:1])
            last[1:] = decoder.append(slots[1:], [row[n:] for row, n in zip(rows[1:], cut[1:], strict=True)])
        return torch.stack([first.repeat_interleave(2, 0), last])

    def _read(self, prompts: Sequence[Sequence[int]], group_size: int, max_new_tokens: int) -> tuple[Decoder, Tensor]:
        """Read the prompts. Returns a decoder of their rows and the logits ``[P, V]`` of each prompt's next token."""
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
        """Compute the last hidden states ``[B, d]`` of the tokens ``ids [B]`` at ``positions [B]``."""
        if self._kernels is not None:
            return self._kernels.hidden(ids, positions, plan)
        if self.llama is not None:
            return self.llama.hidden(ids, positions, plan, self._joined)
        with self.backbone.following(plan):
            return self.backbone.hidden(ids, positions)

    @torch.no_grad()
    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        draws: Draws,
        adjust: Adjust | None,
        first: int,
    ) -> list[Completion]:
        decoder, logits = self._read(prompts, group_size, settings.max_new_tokens)
        look = 1 if self.recorder is None else STEPS_BETWEEN_LOOKS
        rows = Rows(
            prompts, group_size, settings, self.end_ids, logits.shape[-1], self.backbone.device, draws, adjust,
            first,
        )  # fmt: skip
        variant = (settings, adjust is not None)  # a recording fixes both

        def failed(error: RuntimeError) -> None:
            self._unrecorded.add(variant)
            self._launched_one_by_one(error)

        recorder = None if variant in self._unrecorded else self.recorder
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
        """Whether to remove the ended rows, if ``ended`` of ``rows`` rows have ended."""
        if self.recorder is not None:
            return rows > NEVER_DROP_BELOW and ended > DROP_RECORDED_ABOVE_SHARE * rows
        return ended > (DROP_ABOVE_SHARE if self.backbone.device.type == "cuda" else 0.0) * rows


def _difference(logits: Tensor, reference: Tensor) -> float:
    """The relative difference of ``logits`` from ``reference``."""
    return float((logits - reference).norm() / reference.norm())
