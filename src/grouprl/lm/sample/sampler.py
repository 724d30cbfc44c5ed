"""Sampling groups of completions from a packed model.

The sampler reads each prompt once. A *row* is one completion in progress. A *decode step* adds one token to every row
at once. Rows that have ended leave the batch, so that later steps cost less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group
from grouprl.lm.packed.trial import Trial
from grouprl.lm.sample.decode_steps import Steps
from grouprl.lm.sample.decode_trials import (
    disagreement,
    find_decode_steps,
    relative_difference,
    step_logits,
    warn_slower,
)
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.episodes import play
from grouprl.lm.sample.recordings import CudaGraphRecorder, GraphRecorder, Repeated
from grouprl.lm.sample.rows import Adjust, Completion, Rows
from grouprl.lm.sample.streams import Draws, Stream, draws_of
from grouprl.lm.sample.turns import Partner, Sampled

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


class Sampler:
    """Samples completions from a packed model.

    :class:`grouprl.lm.sample.decode_steps.DecodeSteps` has three implementations of a decode step. The sampler starts
    with the one that ``steps`` names. On two short prompts it compares the logits with those of the model's own forward
    pass. If they differ by more than rounding, it takes the next slower one (:mod:`grouprl.lm.sample.decode_trials`).

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
        self.recorder: GraphRecorder | None = None
        self._unrecorded: set[tuple[SamplingSettings, bool]] = set()  # settings, and whether logits are adjusted
        self._decode, self.why = find_decode_steps(backbone, precision, steps, trial or Trial(backbone.model))
        if backbone.device.type == "cuda":
            try:
                self.record_with(CudaGraphRecorder(backbone.device))
            except RuntimeError as error:
                self._not_recorded(error)

    @property
    def steps(self) -> Steps:
        """The implementation of a decode step that is in use."""
        return self._decode.steps

    def record_with(self, recorder: GraphRecorder) -> None:
        """Let ``recorder`` record decode steps from now on, if replayed steps give the same logits.

        Otherwise the sampler logs a warning, sets :attr:`why` and records nothing.
        """
        self.recorder = recorder
        exact = self.precision.dtype == torch.float32
        replayed = step_logits(self._decode, _GROUPS, lambda step: Repeated(step, recorder, self._not_recorded))
        if not relative_difference(replayed, step_logits(self._decode, _GROUPS)) <= (1e-3 if exact else 0.02):
            self._not_recorded("replayed ones give other logits than the model")

    def _not_recorded(self, why: object) -> None:
        self.recorder = None
        self._launched_one_by_one(why)

    def _launched_one_by_one(self, why: object) -> None:
        self.why = str(why).splitlines()[0] if str(why) else type(why).__name__
        warn_slower(self.backbone, "several times more slowly, its decode steps launched kernel by kernel", self.why)

    def disagreement(self, trial: Trial) -> str:
        """Compare decode steps with the model's own forward pass. Returns "", or what is wrong."""
        return disagreement(self._decode, trial)

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
        with self._decode.prepared():
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
        with self._decode.prepared():
            decoder = self._decode.appending(slots, settings.max_new_tokens)
            return play(
                decoder, slots, prompts, group_size, settings, self.end_ids, partner, draws, context,
                PROMPT_TOKENS,
            )  # fmt: skip

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
        decoder, logits = self._decode.read(prompts, group_size, settings.max_new_tokens)
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
