"""Sampling with the model's own methods, for models that the packed path does not support."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.models.core import core_of
from grouprl.lm.packed.trial import Trial, is_rounding, own_pass, own_terms
from grouprl.lm.sample.appending import ReadAgain
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.episodes import play
from grouprl.lm.sample.rows import Adjust, Completion, Rows
from grouprl.lm.sample.streams import Draws, Stream, draws_of
from grouprl.lm.sample.trial import drawn_verdict
from grouprl.lm.sample.turns import Partner, Sampled

_log = logging.getLogger("grouprl")

PlainSteps = Literal["generate", "generate by length", "forward passes"]
PLAIN_STEPS: tuple[PlainSteps, ...] = get_args(PlainSteps)
"""The ways in which the plain sampler can decode, from the fastest to the slowest."""

PASS_ROWS = 64
"""The most rows of one forward pass. This limits the memory for activations and logits."""


class _Drawing:
    """A logits processor of ``generate`` that draws the tokens, and leaves ``generate`` no other choice.

    Args:
        begin: makes the rows, from the number of tokens in the vocabulary.
        keep: keep the log-probabilities that the model itself gives the tokens. end: a token by which it ends a row.
    """

    def __init__(self, begin: Callable[[int], Rows], keep: bool, end: int) -> None:
        self._begin, self._keep, self._end = begin, keep, end
        self._model_logp: list[Tensor] = []
        self.rows: Rows | None = None
        self._step = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.rows is None:
            self.rows = self._begin(scores.shape[-1])
        self.rows.prepare(self._step)
        self.rows.draw_tokens(scores.float().clone())
        self._step += 1
        if self._keep:
            self._model_logp.append(scores.float().log_softmax(-1).gather(1, self.rows.token[:, None])[:, 0])
        token = self.rows.token
        if self.rows.settings.stop is not None and (over := self.rows.ended()):
            token = token.index_fill(0, torch.tensor(over, device=token.device), self._end)  # generate need not go on
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)

    def completions(self) -> list[Completion]:
        """What was drawn."""
        assert self.rows is not None
        drawn = self.rows.completions()
        if not self._keep:
            return drawn
        logp = torch.stack(self._model_logp, 1).cpu()
        return [replace(each, model_logp=logp[i, : len(each.ids)]) for i, each in enumerate(drawn)]


class PlainSampler:
    """Samples completions from any causal model.

    It replaces :class:`grouprl.lm.sample.sampler.Sampler` for models that cannot be packed, and it is slower. Tokens
    are drawn as they are there, so those of a completion do not depend on which others are sampled beside it.

    There are three ways to decode, from the fastest to the slowest:

    - "generate" calls the ``generate`` method of the model, with all prompts padded on the left to the same length.
    - "generate by length" calls it for the prompts of each length, without padding. Recurrent models read padding as
      tokens, and some models count positions from the padding.
    - "forward passes" runs a forward pass over the whole sequence for each token, without padding and without a cache.
      The caches of some models give other logits than a forward pass, and PEFT drops some prefixes in ``generate``.

    At each call, the sampler compares the longest and the shortest sequence with the model's own forward pass. If they
    differ by more than rounding, it samples again in the next slower way.

    Args:
        model: a causal model of transformers.
        dtype: the dtype of matrix products. Any dtype but float32 turns autocast on.
        end_ids: the ids of the tokens that end a completion.
        pad_id: the id of the token that pads shorter prompts.
        steps: how to decode.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, end_ids: Sequence[int], pad_id: int, steps: PlainSteps = "generate"
    ) -> None:
        self.model, self.dtype, self.end_ids, self.pad_id = model, dtype, list(end_ids), pad_id
        self.steps = steps
        self._warned = False

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

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of completions of each prompt.
            settings: how to draw tokens.
            source: where random numbers come from: those of the completions, a stream, or a torch.Generator on the CPU.
            adjust: must be None.

        Returns:
            ``P * group_size`` completions. The completions of the first prompt come first.

        Raises:
            UsageError: ``adjust`` is given. ``generate`` has no place for it.
            TrainingError: the log-probabilities of what was drawn are not those of the model's own forward pass,
                however the sampler decodes.
        """
        if adjust is not None:
            raise UsageError("the plain sampler cannot adjust logits; use attention='auto'")
        draws, why = draws_of(source, len(prompts) * group_size), ""
        for steps in PLAIN_STEPS[PLAIN_STEPS.index(self.steps) :]:
            completions = self.draw(prompts, group_size, settings, draws, steps)
            why = self._differs(prompts, completions, settings)
            if not why:
                return completions
            if not self._warned:
                self._warned = True
                _log.warning("%s samples some prompts again, because %s gave other %s", self._name(), steps, why)
        raise TrainingError(f"{self._name()} cannot be sampled from at this length: {why}")

    @torch.no_grad()
    def sample_episodes(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        partner: Partner,
        context: int | None = None,
    ) -> list[list[Sampled]]:
        """Sample episodes as :meth:`grouprl.lm.sample.sampler.Sampler.sample_episodes` does.

        Every token takes a forward pass over its whole sequence, which any model can do.
        """
        device = next(self.model.parameters()).device
        draws = draws_of(source, len(prompts) * group_size)
        slots = min(PASS_ROWS, len(prompts) * group_size)
        with self._sampling():
            decoder = ReadAgain(self._next_logits, device, PASS_ROWS)
            return play(
                decoder, slots, prompts, group_size, settings, self.end_ids, partner, draws, context,
                sum(map(len, prompts)) + 1,
            )  # fmt: skip

    def disagreement(self, trial: Trial) -> str:
        """Compare with the model's own forward pass. Returns "", or what is wrong.

        It is tried in float32 first if the weights are float32, because rounding would hide differences.
        """
        first = next(self.model.parameters()).dtype
        exactly = PlainSampler(self.model, first, self.end_ids, self.pad_id, self.steps)
        of_both = [(exactly, first), (self, self.dtype)] if first != self.dtype else [(self, self.dtype)]
        return next((wrong for one, dtype in of_both if (wrong := drawn_verdict(one.draw, trial, dtype))), "")

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        draws: Draws,
        steps: PlainSteps | None = None,
    ) -> list[Completion]:
        """Sample as :meth:`sample` does, without a comparison with the model's own forward pass.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of completions of each prompt.
            settings: how to draw tokens.
            draws: the random numbers of the completions.
            steps: how to decode, by default as the constructor was told.
        """
        steps = steps or self.steps
        sample_some = self._by_passes if steps == "forward passes" else self._by_generate
        parts = [list(range(len(prompts)))] if steps == "generate" else _by_length(prompts)
        completions: list[list[Completion]] = [[]] * len(prompts)
        with self._sampling():
            for part in parts:
                own = draws.of([i * group_size + j for i in part for j in range(group_size)])
                drawn = sample_some([prompts[i] for i in part], group_size, settings, own)
                for place, i in enumerate(part):
                    completions[i] = drawn[place * group_size : (place + 1) * group_size]
        return [completion for group in completions for completion in group]

    def _differs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], settings: SamplingSettings
    ) -> str:
        """Compare a completion of the longest and one of the shortest prompt with the model's own forward pass.

        Some caches and masks are right up to a length alone. Returns "", or what is wrong. With filters or penalties
        the distribution is not the model's, so the model's own log-probabilities are compared, where there are any.
        """
        changed = _changes_more_than_temperature(settings)
        if changed and any(each.model_logp is None for each in completions):
            return ""
        temperature = 1.0 if changed else settings.temperature or 1.0
        n = len(completions) // max(1, len(prompts))
        by_length = sorted(range(len(completions)), key=lambda i: len(prompts[i // n]) + len(completions[i].ids))
        chosen = sorted({by_length[0], by_length[-1]})
        kept = [completions[i].model_logp if changed else completions[i].logp for i in chosen]
        found = torch.cat([logp for logp in kept if logp is not None])

        def own(low: torch.dtype | None = None) -> Tensor:
            with own_pass(self.model, low):
                terms = [own_terms(self.model, prompts[i // n], completions[i].ids, temperature).logp for i in chosen]
                return torch.cat(terms).cpu()

        wanted = own()
        difference = float((found - wanted).abs().max())
        if is_rounding(difference, self.dtype, lambda: float((own(self.dtype) - wanted).abs().max())):
            return ""
        return f"log-probabilities than its own forward pass, by {difference:.2g} nats"

    def _name(self) -> str:
        return type(core_of(self.model)).__name__

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Put the model into evaluation mode, without generation settings of its own, while the context is open."""
        from transformers import GenerationConfig

        device = next(self.model.parameters()).device
        training, checkpoints_own = self.model.training, getattr(self.model, "generation_config", None)
        self.model.eval()
        # The generation settings of a checkpoint would change the distribution without the user's knowledge.
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        try:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield
        finally:
            self.model.train(training)
            self.model.generation_config = checkpoints_own

    def _by_generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, settings: SamplingSettings, draws: Draws
    ) -> list[Completion]:
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        drawing = _Drawing(
            lambda v: Rows(prompts, group_size, settings, self.end_ids, v, device, draws),
            _changes_more_than_temperature(settings), self.end_ids[0],
        )  # fmt: skip
        self.model.generate(
            input_ids=ids.repeat_interleave(group_size, 0), attention_mask=mask.repeat_interleave(group_size, 0),
            do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=self.end_ids,
            pad_token_id=self.pad_id, logits_processor=[drawing], synced_gpus=False,
        )  # fmt: skip
        return drawing.completions()

    def _by_passes(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        draws: Draws,
    ) -> list[Completion]:
        """Sample from prompts of one length."""
        device, completions = next(self.model.parameters()).device, []
        at_once = max(1, PASS_ROWS // group_size)
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            ids = torch.tensor([list(p) for p in some], device=device).repeat_interleave(group_size, 0)
            rows: Rows | None = None
            for t in range(settings.max_new_tokens):
                logits = self._next_logits(ids)
                if rows is None:
                    own = draws.of(slice(start * group_size, (start + len(some)) * group_size))
                    rows = Rows(some, group_size, settings, self.end_ids, logits.shape[-1], device, own)
                rows.prepare(t)
                rows.draw_tokens(logits)
                ended = set(rows.ended())
                if len(ended) == len(rows):
                    break
                ids = torch.cat([ids, rows.token[:, None]], 1)
                if ended:
                    remaining = [i for i in range(len(rows)) if i not in ended]
                    rows.keep(remaining)
                    ids = ids[remaining]
            assert rows is not None
            completions += rows.completions()
        return completions

    def _next_logits(self, ids: Tensor) -> Tensor:
        """The logits ``[B, V]`` float32 of the token after each row of ``ids [B, T]``."""
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        logits: Tensor = out.logits
        return logits[:, -1].float()


def _changes_more_than_temperature(settings: SamplingSettings) -> bool:
    """Whether tokens are drawn from another distribution than the model's at some temperature."""
    return settings.filtered or settings.repetition_penalty != 1.0 or settings.min_new_tokens > 0


def _by_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The indices of the prompts of each length."""
    members: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(len(prompt), []).append(i)
    return list(members.values())
