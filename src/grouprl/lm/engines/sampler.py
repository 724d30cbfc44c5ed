"""The sampler that asks vLLM, with the weights handed over before each generation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.engines.colocated import ColocatedEngine
from grouprl.lm.engines.engine import Answer, Engine, Request, options_of
from grouprl.lm.engines.server import ServerEngine
from grouprl.lm.engines.turns import play
from grouprl.lm.engines.weights import check_weights, gathers, hub_weights
from grouprl.lm.packed.trial import Trial
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.finite import NotFiniteError, all_finite
from grouprl.lm.sample.progress import Bounds
from grouprl.lm.sample.rows import Adjust, Completion
from grouprl.lm.sample.streams import Draws, Stream, draws_of
from grouprl.lm.sample.trial import drawn_verdict
from grouprl.lm.sample.turns import Partner, Sampled
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE, Ranks

_log = logging.getLogger("grouprl")


class VllmSampler:
    """Samples completions by vLLM.

    Weights are handed over before each generation, so completions are always those of the model as it is. Every
    completion is a request of its own, with a seed of its own, whichever process asks for it.

    Args:
        model: a causal model of transformers, or a PEFT model around one.
        engine: vLLM with a model of this shape. end_ids: the tokens that end a completion.
        ranks: the processes that sample, each its own completions.

    Attributes:
        end_ids: the same, in order.
    """

    def __init__(self, model: Any, engine: Engine, end_ids: Sequence[int], ranks: Ranks = ALONE) -> None:
        self.model, self.engine, self.ranks = model, engine, ranks
        self.end_ids = sorted(set(end_ids))
        self._ready = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        """As :meth:`grouprl.lm.sample.interface.CompletionSampler.ready`: hand over the weights as they are now.

        Raises TrainingError if vLLM does not take them.
        """
        if self._ready:
            yield
            return
        self._hand_over()
        self._ready = True
        try:
            yield
        finally:
            self._ready = False

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Give vLLM the weights: each process its own, or the first one that of all."""
        mine = self.ranks.first or not self.engine.serves_all
        of_all = self.ranks.world > 1 and gathers(self.model)
        weights = hub_weights(self.model)
        try:
            if mine:
                self.engine.load(weights)
        finally:
            if of_all:  # each weight takes all processes, one that needs none and one that failed too
                for _ in weights:
                    pass
        if self.engine.serves_all:
            self.ranks.wait()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        adjust: Adjust | None = None,
    ) -> list[Completion]:
        """As :meth:`grouprl.lm.sample.interface.CompletionSampler.sample`, without ``adjust``."""
        if adjust is not None:
            raise UsageError("vLLM cannot adjust logits; set use_vllm=False")
        if not self._ready:
            self._check_alone()
        longest = max(map(len, prompts), default=0)
        if longest + settings.max_new_tokens > self.engine.context:
            raise UsageError(
                f"a prompt has {longest} tokens and its completion up to {settings.max_new_tokens}, and "
                f"{self.engine.where} takes {self.engine.context} in all; raise {self.engine.context_setting}, or "
                "lower max_completion_length"
            )
        seeds = draws_of(source, len(prompts) * group_size).seeds()
        requests = [
            Request(list(prompts[i // group_size]), seed, settings.max_new_tokens) for i, seed in enumerate(seeds)
        ]
        with self.ready():
            return self._ask(settings, requests)

    def _ask(self, settings: SamplingSettings, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request, with finite log-probabilities."""
        answers = self.engine.generate(requests, options_of(settings, self.end_ids))
        found = [self._completion(answer, settings) for answer in answers]
        if not all(completion.ids for completion in found):
            raise TrainingError(f"{self.engine.where} returned a completion without a token")
        if not all_finite(torch.cat([completion.logp for completion in found])):
            raise NotFiniteError("logits are not finite")
        return found

    def _check_alone(self) -> None:
        """Raise UsageError if other processes would have to hand over the weights with this one, and may not do it."""
        if self.ranks.world > 1:
            raise UsageError(
                f"use_vllm=True: the {self.ranks.world} processes hand over the weights together, so vLLM samples in "
                "trainer.train(), in trainer.evaluate() and in a rollout_func, and not in between; sample there, or "
                "start one process"
            )

    def _completion(self, answer: Answer, settings: SamplingSettings) -> Completion:
        """The completion, up to a stop string if there is one: vLLM is handed tokens, and knows no text."""
        ids, logp, stop = answer.ids, torch.tensor(answer.logp, dtype=torch.float32), settings.stop
        if stop is not None:
            may = stop.may_end(int(self.model.get_input_embeddings().weight.shape[0]))
            for n in range(max(1, settings.min_new_tokens), len(ids) + 1):
                if may[ids[n - 1]] and ids[n - 1] not in self.end_ids and stop.ends(ids[:n]):
                    return Completion(ids[:n], logp[:n], True, stopped=True)
        return Completion(ids, logp, answer.finished)

    def sample_episodes(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        settings: SamplingSettings,
        source: torch.Generator | Stream | Draws,
        partner: Partner,
        context: int | None = None,
    ) -> list[list[Sampled]]:
        """As :meth:`grouprl.lm.sample.interface.CompletionSampler.sample_episodes`.

        An episode is cut where vLLM takes no more tokens, as where the context of the model ends.
        """
        if not self._ready:
            self._check_alone()
        draws = draws_of(source, len(prompts) * group_size)
        longest = max(map(len, prompts), default=0)
        if longest >= self.engine.context:
            raise UsageError(
                f"a prompt has {longest} tokens, and {self.engine.where} takes {self.engine.context} in all, so it "
                f"leaves no room for a turn; raise {self.engine.context_setting}, or leave out such prompts"
            )
        bounds = Bounds(settings, self.engine.context if context is None else min(context, self.engine.context))
        with self.ready():
            return play(
                functools.partial(self._ask, settings), [prompts[i // group_size] for i in range(len(draws))], bounds,
                partner, draws, side_by_side=self.engine.side_by_side,
            )  # fmt: skip

    def disagreement(self, trial: Trial) -> str:
        """As :meth:`grouprl.lm.sample.interface.CompletionSampler.disagreement`."""
        with self.ready():
            return drawn_verdict(self.sample, trial, self.engine.dtype)


def vllm_sampler(
    model: Any, config: GRPOConfig, dtype: torch.dtype, end_ids: Sequence[int], trial: Trial, ranks: Ranks = ALONE
) -> VllmSampler:
    """Start vLLM or find its server, hand it the weights, and try it.

    Args:
        model: a causal model, or a PEFT model around one. dtype: of the learner's products, which vLLM takes too.
        ranks: the processes that sample; all of them call this.

    Raises:
        UsageError: vLLM is not installed or cannot run the model, there is no such server, or it samples otherwise than
            the model.
    """
    check_weights(model)
    if config.vllm_importance_sampling_correction and _reshaped(config):
        _log.warning(
            "%s: completions come from fewer tokens than the model learns from, so the ratios of the importance "
            "sampling correction are all below 1, and the more so the longer they are; set it to its default, or "
            "vllm_importance_sampling_correction=False", " and ".join(_reshaped(config)),
        )  # fmt: skip
    make: Callable[[Any, GRPOConfig, torch.dtype, Ranks], Engine]
    make = ServerEngine if config.vllm_mode == "server" else ColocatedEngine
    sampler = VllmSampler(model, make(model, config, dtype, ranks), end_ids, ranks)
    try:
        wrong = sampler.disagreement(trial)
    except TrainingError as error:
        raise UsageError(str(error)) from error
    if wrong:
        raise UsageError(
            f"{sampler.engine.where} samples otherwise than the model: {wrong}; "
            + ("start the server with the model that is trained, or " if config.vllm_mode == "server" else "")
            + "set use_vllm=False"
        )
    return sampler


def _reshaped(config: GRPOConfig) -> list[str]:
    """The settings that let the sampler draw from another distribution than the learner knows."""
    found = {
        f"top_p={config.top_p}": config.top_p < 1, f"top_k={config.top_k}": config.top_k > 0,
        f"min_p={config.min_p}": bool(config.min_p),
        f"repetition_penalty={config.repetition_penalty}": config.repetition_penalty != 1,
    }  # fmt: skip
    return [name for name, on in found.items() if on]
