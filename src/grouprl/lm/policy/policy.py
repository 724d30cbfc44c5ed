"""The model in training, with its sampler, its log-probabilities and its reference model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.lm.llama.adapters import nonzero_adapters
from grouprl.lm.models.context import context_length
from grouprl.lm.models.load import eos_token_ids
from grouprl.lm.packed.low_precision import LowPrecision, supports_bf16
from grouprl.lm.policy.balance import find_experts
from grouprl.lm.policy.fastest import find_learner, find_sampler, warn_if_own_pass_fails, warn_of_plain_paths
from grouprl.lm.policy.log_probs import check_logits
from grouprl.lm.policy.reference import Reference
from grouprl.lm.policy.sharded import ShardedModels
from grouprl.lm.policy.structure import structure
from grouprl.lm.policy.trial import PolicyTrial
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.finite import NotFiniteError, not_finite
from grouprl.lm.sample.interface import CompletionSampler
from grouprl.lm.sample.rows import Adjust, Completion
from grouprl.lm.sample.stopping import Stops
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.sample.turns import Partner, Sampled
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE, Ranks


class Policy:
    """A causal language model that samples and learns.

    Args:
        model: a causal model of transformers or a PEFT model around one, on its device.
        tokenizer: defines which tokens end a completion.
        config: the settings of the run, among them precision, temperature, size of micro-batches and ``beta``.
        ref_model: the reference model of the KL divergence. By default the reference is the model as it is now.
        ranks: the processes that share the work. sharded: what made ``model`` a sharded one, or None.

    Attributes:
        model: the model.
        config: the settings of the run.
        device: the device of the model.
        precision: the precision of matrix products.
        packed: whether the packed paths run the model.
        why_plain: the reason why the plain paths run the model, or "".
        log_probs: computes log-probabilities of completions.
        sampler: samples completions.
        reference: the reference model of the KL divergence, or None if ``beta`` is 0.

    Raises:
        UsageError: ``config`` asks for bfloat16 on a device that does not have it, ``ref_model`` does not fit, the
            logits of a model are not finite, or no path gives the log-probabilities of the model's own forward pass.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: GRPOConfig, ref_model: Any = None, ranks: Ranks = ALONE,
        sharded: ShardedModels | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.ranks, self.sharded = model, config, ranks, sharded
        self._stops = Stops(config.stop_strings, tokenizer) if config.stop_strings else None
        self.device: torch.device = next(model.parameters()).device
        fast = supports_bf16(self.device)
        if config.bf16 and not fast and self.device.type != "cpu":
            raise UsageError(f"bf16=True, but {self.device} has no bfloat16; leave bf16 out")
        low = fast if config.bf16 is None else config.bf16
        weight_dtype = next(model.parameters()).dtype
        dtype = torch.bfloat16 if low or weight_dtype == torch.bfloat16 else torch.float32
        with self.together():
            check_logits("the model's logits", model)
        self.precision = LowPrecision(model, dtype, config.native)
        recompute = sharded is not None and sharded.sharding.recompute
        if config.gradient_checkpointing or recompute:  # before the trials, as it changes how the model learns
            model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs or {"use_reentrant": False})
        trial = PolicyTrial(model, self.precision.dtype)
        ends = eos_token_ids(model, tokenizer)
        with nonzero_adapters(model), self.together():
            self.log_probs, self.why_plain = find_learner(
                model, config, self.precision, trial, sharded=sharded is not None
            )
            self.log_probs.by_entropy = config.has_entropy_bonus
            self.log_probs.experts = find_experts(model, config.router_aux_loss_coef, trial.trial)
            self.packed = self.log_probs.backbone is not None
            self.sampler: CompletionSampler = find_sampler(
                model, config, self.precision, self.log_probs.backbone, ends, tokenizer.pad_token_id, trial, ranks
            )
        if not self.packed and config.attention == "auto":
            warn_of_plain_paths(model, self.why_plain)
        if self.packed and self.precision.dtype != torch.float32:
            warn_if_own_pass_fails(model, self.precision.dtype, trial)
        self.reference = self._reference(ref_model)
        self._structure = structure(model)

    def together(self, *, learning: bool = False) -> AbstractContextManager[Any]:
        """Around passes of the model, which all processes make together if it is sharded; each comes here then.

        Args:
            learning: each pass is followed by :meth:`backward`.
        """
        return nullcontext() if self.sharded is None else self.sharded.together(learning=learning)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to that of the model."""
        if self.sharded is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.sharded.backward(loss)

    def check(self) -> None:
        """Check that learner and sampler still compute what the model does, if a module of it was changed.

        Raises:
            UsageError: they do not.
        """
        now = structure(self.model)
        if now == self._structure:
            return
        trial = PolicyTrial(self.model, self.precision.dtype)
        with nonzero_adapters(self.model), self.together():
            wrong = trial.learner(self.log_probs) or self.sampler.disagreement(trial.trial)
        if wrong:
            raise UsageError(
                f"modules of the model were replaced or changed since training was set up, and are not heard: {wrong}; "
                "undo that, or begin anew with the model as it is now"
            )
        self._structure = now

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        source: torch.Generator | Stream | Draws,
        settings: SamplingSettings | None = None,
        adjust: Adjust | None = None,
    ) -> list[Completion]:
        """Sample ``group_size`` completions of each prompt.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of completions of each prompt.
            source: where random numbers come from: those of the completions, a stream, or a torch.Generator on the CPU.
            settings: how to draw tokens. By default the settings of the configuration.
            adjust: changes the logits before each draw, or None.

        Returns:
            ``P * group_size`` completions. The completions of the first prompt come first.

        Raises:
            UsageError: ``adjust`` is given, but the packed paths do not run the model.
            TrainingError: the logits of the model are not finite.
        """
        settings = settings or self.sampling()
        try:
            return self.sampler.sample(prompts, group_size, settings, source, adjust)
        except NotFiniteError:
            raise not_finite("the model's logits", self.model) from None

    def sampling(self, *, greedy: bool = False) -> SamplingSettings:
        """How to sample as the configuration says, or (``greedy``) the likeliest tokens."""
        return sampling_settings(self.config, greedy=greedy, stop=self._stops)

    def share(self, sizes: Sequence[int], group: Sequence[int]) -> list[int]:
        """Which of n samples this process learns from: whole groups, such that all have about as many tokens.

        Args:
            sizes: the tokens of each sample. group: the group of each.
        """
        if self.ranks.world == 1:
            return list(range(len(sizes)))
        total: dict[int, int] = {}
        for g, size in zip(group, sizes, strict=True):
            total[g] = total.get(g, 0) + size
        load, owner = [0] * self.ranks.world, {}
        for g in sorted(total, key=lambda g: (-total[g], g)):
            owner[g] = load.index(min(load))
            load[owner[g]] += total[g]
        return [i for i, g in enumerate(group) if owner[g] == self.ranks.rank]

    def sample_episodes(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        source: torch.Generator | Stream | Draws,
        partner: Partner,
        settings: SamplingSettings | None = None,
    ) -> list[list[Sampled]]:
        """Sample ``group_size`` episodes of each prompt, in turns of the model and of a partner.

        :meth:`grouprl.lm.sample.sampler.Sampler.sample_episodes` says when turns and episodes end. No sample is longer
        than the context of the model.

        Args:
            prompts: the token ids of each of the P prompts.
            group_size: the number of episodes of each prompt.
            source: where random numbers come from: those of the episodes, a stream, or a torch.Generator on the CPU.
            partner: the other side. Episodes are numbered as they are returned.
            settings: how to draw tokens. By default the settings of the configuration.

        Returns:
            ``P * group_size`` episodes with their samples. Those of the first prompt come first.

        Raises:
            UsageError: a prompt leaves no room for a turn.
            TrainingError: the logits of the model are not finite.
        """
        settings = settings or self.sampling()
        try:
            return self.sampler.sample_episodes(
                prompts, group_size, settings, source, partner, context_length(self.model)
            )
        except NotFiniteError:
            raise not_finite("the model's logits", self.model) from None

    def _reference(self, ref_model: Any) -> Reference | None:
        """The reference model, or None if ``beta`` is 0. Raises UsageError if ``ref_model`` cannot be the reference."""
        if self.config.beta == 0:
            if ref_model is not None:
                raise UsageError("ref_model is given, but beta=0 gives it no weight; set beta, or leave it out")
            return None
        other = None
        if ref_model is not None:
            if {id(p) for p in ref_model.parameters()} & {id(p) for p in self.model.parameters()}:
                raise UsageError(
                    "ref_model shares weights with the model and would be trained along; leave it out (the reference "
                    "is then the model as it is now), or pass a copy"
                )
            if self.sharded is None:
                ref_model = ref_model.to(self.device)
            else:
                self.sharded.take(ref_model)
            with self.together():
                check_logits("the logits of ref_model", ref_model)
            # The parameters of ref_model keep requires_grad=True, although nothing computes their gradients. torch uses
            # other products for weights without it, and these round differently. The KL divergence between a model and
            # its copy would then not be 0.
            precision = LowPrecision(ref_model, self.precision.dtype, self.config.native)
            trial = PolicyTrial(ref_model, precision.dtype)
            with nonzero_adapters(ref_model), self.together():
                sharded = self.sharded is not None
                other = ref_model, find_learner(ref_model, self.config, precision, trial, sharded=sharded)[0]
        reference = Reference(self.model, self.log_probs, other)
        if self.config.sync_ref_model:
            reference.check_can_follow()
        return reference


def sampling_settings(config: GRPOConfig, *, greedy: bool = False, stop: Stops | None = None) -> SamplingSettings:
    """The sampling settings of a configuration.

    Args:
        config: the settings of the run.
        greedy: take the likeliest token at each step, with neither filters nor a repetition penalty.
        stop: the stop strings, with what reads them.
    """
    if greedy:
        return SamplingSettings(
            config.max_completion_length, temperature=0.0, min_new_tokens=config.min_new_tokens,
            max_turn_tokens=config.max_turn_length, stop=stop,
        )  # fmt: skip
    return SamplingSettings(
        max_new_tokens=config.max_completion_length, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, min_p=config.min_p or 0.0, repetition_penalty=config.repetition_penalty,
        min_new_tokens=config.min_new_tokens, max_turn_tokens=config.max_turn_length, stop=stop,
    )  # fmt: skip
