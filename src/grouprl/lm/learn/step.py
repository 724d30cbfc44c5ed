"""One optimizer step: the gradient of the loss over some samples, in micro-batches, then clip and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError
from grouprl.learning.gradient_step import gradient_step
from grouprl.learning.parameters import TrainedParameters
from grouprl.lm.generate.samples import Samples
from grouprl.lm.learn.entropy_control import EntropyControl
from grouprl.lm.learn.metrics import StepSums, cut_metrics, sums_of
from grouprl.lm.packed.head import TokenTerms
from grouprl.lm.policy.log_probs import MicroBatch, steps_of
from grouprl.lm.policy.policy import Policy
from grouprl.lm.sample.finite import all_finite, not_finite
from grouprl.lm.sample.streams import seed_for
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective import LOSSES, Fixed, Objective, policy_loss, sampler_correction
from grouprl.objective.packed import last_index, segment_ids, segment_sum


def step_weights(objective: Objective, lengths: Tensor, counted: Tensor) -> Tensor:
    """Weight ``[S]`` of each token in the loss of an optimizer step: fixed before any of it is evaluated.

    Args:
        lengths: ``[E]`` tokens of the model in all episodes of the step: a completion is an episode of one sample.
        counted: ``[E]`` bool; others weigh 0 (cut-off completions with mask_truncated_completions), and no longer count
            as tokens, but still as samples.
    """
    weights = torch.zeros(int(lengths.sum()))
    if bool(counted.any()):
        of_loss = LOSSES[objective.loss_type].weights
        weights[counted[segment_ids(lengths)]] = of_loss(objective, lengths[counted], len(lengths))
    return weights


class Step:
    """What one optimizer step learns from: chosen once, so that each pass over it sees the same micro-batches.

    Args:
        chosen: ``[n]`` the samples, by index. objective: what is minimised.

    Samples that cannot move the model get no forward pass: cut-off ones with mask_truncated_completions, and those of
    advantage 0 if no KL term, no entropy bonus and no loss of experts moves them, and their entropies decide nothing.
    They still count in the denominators. An episode of several samples weighs as one sample that holds the tokens of
    all of them. Several processes share out the groups among them, and each passes over its own.
    """

    def __init__(
        self, policy: Policy, samples: Samples, chosen: Tensor, config: GRPOConfig, objective: Objective
    ) -> None:
        self.policy, self.samples, self.config, self.objective = policy, samples, config, objective
        lengths = samples.lengths
        counted = samples.finished[chosen] if config.mask_truncated_completions else torch.ones(len(chosen)) > 0
        _, parts = torch.unique_consecutive(samples.episode[chosen], return_counts=True)
        self.weights = torch.zeros(int(lengths.sum()))
        self.weights[steps_of(chosen, lengths)] = step_weights(
            objective, segment_sum(lengths[chosen], parts), counted[last_index(parts)]
        )
        active = counted.clone()
        kl_loss = config.beta > 0 and config.kl_in == "loss"
        by_entropy = config.has_entropy_bonus or config.top_entropy_quantile < 1.0
        by_own_loss = objective.surrogate_function is not None  # nobody knows what it makes of an advantage of 0
        moved_otherwise = kl_loss or by_entropy or by_own_loss or policy.log_probs.experts is not None
        if config.skip_zero_advantage and not moved_otherwise:
            active &= segment_sum(samples.advantages.abs(), lengths)[chosen] > 0
        self.active = chosen[active]
        self.all_active = len(self.active) == int(counted.sum())
        level = objective.importance_sampling_level
        of_each = lengths if level == "token" else samples.n_turns if level == "turn" else torch.ones_like(lengths)
        self.n_ratios = int(of_each[chosen][counted].sum())
        prompts, group = samples.contexts
        sizes = [len(samples.completions[i]) for i in self.active.tolist()]
        self.own = self.active[policy.share(sizes, group[self.active].tolist())]
        index = self.own.tolist()
        batches = policy.log_probs.micro_batches(
            prompts, [samples.completions[i] for i in index], group[index].tolist(),
            None if samples.turns is None else [samples.turns.spans[i] for i in index],
        )  # fmt: skip
        self.micro_batches = [MicroBatch(batch.groups, self.own[batch.samples]) for batch in batches]

    def remember_old(self) -> None:
        """Store log-probabilities under the current policy: before it moves, for a step that comes later."""
        index = steps_of(self.own, self.samples.lengths)
        with self.policy.together():
            if self.micro_batches and not self.samples.knows_old(index):
                logp = self.policy.log_probs.without_gradient(self.micro_batches, self.samples.lengths)
                self.samples.remember_old(index, logp[index])

    def gradients(self, sums: StepSums, mismatch: Mismatch, *, remember: bool, number: int = 0) -> Iterator[None]:
        """Write the gradient of the loss over one micro-batch after another, by a backward pass each.

        Args:
            sums, mismatch: what is met on the way is added to them.
            remember: store the log-probabilities met on the way as those of the old policy, for later passes.
            number: of this pass in the run, on which dropout depends.
        """
        samples, lengths = self.samples, self.samples.lengths
        reference = self.policy.reference if self.config.kl_in == "loss" else None
        active = steps_of(self.own, lengths)
        if reference is not None:
            with reference.in_place(), self.policy.together():
                if self.micro_batches and not samples.knows_reference(active):
                    samples.remember_reference(active, reference.log_probs(self.micro_batches, lengths)[active])
        old_known = samples.knows_old(active)
        device, experts = self.policy.device, self.policy.log_probs.experts
        dropout = self.policy.log_probs.dropout
        first = self._first_look()
        chosen, of_entropy = self._by_entropy(first.entropy if first is not None else None)
        masked = self.config.off_policy_mask_threshold is not None
        elsewhere = masked and (samples.sampled_elsewhere or self.config.use_vllm)
        apart = torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=dropout)
        some = bool(self.micro_batches) or self.policy.sharded is not None
        learning = self.policy.log_probs.learning() if some else nullcontext()
        with apart, learning, self.policy.together(learning=True):
            for batch in self.micro_batches:
                index = steps_of(batch.samples, lengths)
                fixed = Fixed(
                    advantages=samples.advantages[index].to(device),
                    weights=self.weights[index].to(device),
                    logp_old=samples.logp_old[index].to(device) if old_known else None,
                    logp_ref=None if reference is None else samples.logp_ref[index].to(device),
                    logp_sampled=samples.logp_sampled[index].to(device) if elsewhere else None,
                    lengths=lengths[batch.samples].to(device),
                    turns=samples.turn_lengths[steps_of(batch.samples, samples.n_turns)].to(device),
                    chosen=None if chosen is None else chosen[index].to(device),
                    entropy_weights=None if of_entropy is None else of_entropy[index].to(device),
                )
                if dropout:  # depends on the seed, on the pass and on the group alone
                    torch.manual_seed(seed_for(self.config.seed, number, int(batch.samples[0])))
                tokens = self.policy.log_probs.evaluate(batch)
                correction = self._correction(tokens.logp.detach(), index, fixed)
                fixed = fixed._replace(correction=correction)
                terms = policy_loss(
                    self.objective, tokens.logp, fixed, entropy=None if of_entropy is None else tokens.entropy
                )
                loss = terms.loss
                balance = None
                if experts is not None:
                    assert tokens.routed is not None
                    whole = tokens.routed if first is None or first.routed is None else first.routed
                    balance = experts.loss(tokens.routed, whole)
                    loss = loss + experts.coefficient * balance
                if not loss.requires_grad:
                    raise UsageError(
                        "the loss depends on no trained weight: the adapter is merged into the model or switched off; "
                        "undo that (model.unmerge_adapter()), or begin anew with the model as it is now"
                    )
                self.policy.backward(loss)
                here = sums_of(self.objective, terms, tokens.entropy, fixed)
                here.balance = 0.0 if balance is None else float(balance.detach())
                logp = tokens.logp.detach().cpu()
                self._check_finite(here, logp)
                sums.add(here)
                if not old_known or correction is not None:
                    old = samples.logp_old[index] if old_known else logp
                    mismatch.add(old - samples.logp_sampled[index])
                if correction is not None:
                    of_samples = correction[last_index(lengths[batch.samples])]
                    mismatch.add_ratios(correction if self._of_tokens else of_samples)
                if remember and not old_known:
                    samples.remember_old(index, logp)
                yield None

    @property
    def _of_tokens(self) -> bool:
        return self.config.vllm_importance_sampling_mode.startswith("token")

    def _correction(self, logp: Tensor, index: Tensor, fixed: Fixed) -> Tensor | None:
        """By what surrogates are multiplied as another program sampled, ``[m]``, or None if none did.

        Args:
            logp: ``[m]`` under the policy. index: the tokens. fixed: what is fixed of them.
        """
        config = self.config
        if not (config.use_vllm and config.vllm_importance_sampling_correction):
            return None
        assert fixed.lengths is not None
        return sampler_correction(
            logp if fixed.logp_old is None else fixed.logp_old, self.samples.logp_sampled[index].to(logp.device),
            fixed.lengths, config.vllm_importance_sampling_mode, config.vllm_importance_sampling_clip_min,
            config.vllm_importance_sampling_clip_max,
        )  # fmt: skip

    def _first_look(self) -> TokenTerms | None:
        """What the whole step has to be known of before the first gradient, by a pass without one; None: nothing.

        These are the entropies ``[S]`` on whose quantile the loss depends, and what the routers of a mixture of experts
        do with all tokens of all processes. A single micro-batch says the second itself.
        """
        log_probs, ranks = self.policy.log_probs, self.policy.ranks
        experts, by_entropy = log_probs.experts, self.config.top_entropy_quantile < 1.0
        alone = ranks.world == 1 and len(self.micro_batches) == 1 and not log_probs.dropout
        if not len(self.active) or not (by_entropy or (experts is not None and not alone)):
            return None
        found = TokenTerms(torch.zeros(0), torch.zeros(len(self.weights)))
        with self.policy.together():
            if self.micro_batches:
                found = log_probs.terms_without_gradient(self.micro_batches, self.samples.lengths)
        if by_entropy:
            ranks.add(found.entropy)  # each is 0 where another process has it
        if experts is None:
            return found
        routed = found.routed or experts.nothing(self.policy.device)
        ranks.add(*routed)
        return found._replace(routed=routed)

    def _by_entropy(self, entropy: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are learned from, ``[S]`` bool, and what each weighs in the entropy bonus; None: all, no bonus.

        Those of the highest entropy are learned from (arXiv 2506.01939): at or above the quantile over all tokens that
        count in the step, under the policy as it is. The bonus is a mean over these tokens, whatever ``loss_type``.

        Args:
            entropy: ``[S]`` of all tokens, if a first look at them was necessary.
        """
        config, lengths = self.config, self.samples.lengths
        share, bonus = config.top_entropy_quantile, config.has_entropy_bonus
        if share == 1.0 and not bonus:
            return None, None
        counted, chosen = torch.zeros(len(self.weights)).bool(), None
        counted[steps_of(self.active, lengths)] = True
        if share < 1.0 and entropy is not None:
            ordered = entropy[counted].sort().values
            least = ordered[math.ceil((len(ordered) - 1) * (1.0 - share) - 1e-9)]
            chosen = counted = counted & (entropy >= least)
        return chosen, counted / counted.sum().clamp(min=1) if bonus else None

    def _check_finite(self, sums: StepSums, logp: Tensor) -> None:
        """Raise TrainingError if a number of a micro-batch is not finite: about the first that is not, in their order.

        Args:
            sums: those of the micro-batch. logp: ``[m]``.
        """
        if not all_finite(logp) or not math.isfinite(sums.entropy):
            raise not_finite("log-probabilities of completions", self.policy.model)
        if not math.isfinite(sums.kl):
            raise TrainingError(
                "the divergence to the reference is not finite: the policy has moved too far from it; lower "
                "learning_rate, raise beta, or set kl_estimator='k1'"
            )
        if not math.isfinite(sums.loss):
            raise TrainingError(
                f"the loss is not finite ({sums.loss}), although log-probabilities are; the advantages or the ratios "
                "to the old policy are too large: scale the rewards, or lower learning_rate"
            )


@dataclass
class Mismatch:
    """How far the learner's log-probabilities of the policy that sampled lie from the sampler's."""

    total: float = 0.0
    largest: float = 0.0
    tokens: int = 0
    least_ratio: float = math.inf
    """Of the weights by which that is corrected, one for each token or one for each sample, within their bounds."""
    all_ratios: float = 0.0
    most_ratio: float = 0.0
    ratios: int = 0

    def add(self, difference: Tensor) -> None:
        """Add the differences ``[m]`` of some tokens."""
        apart = difference.abs()
        self.total, self.largest = self.total + float(apart.sum()), max(self.largest, float(apart.max()))
        self.tokens += len(difference)

    def add_ratios(self, ratios: Tensor) -> None:
        """Add the weights ``[k]`` of some tokens or samples."""
        least, most, together = torch.stack([ratios.min(), ratios.max(), ratios.sum()]).tolist()
        self.least_ratio, self.most_ratio = min(self.least_ratio, least), max(self.most_ratio, most)
        self.all_ratios, self.ratios = self.all_ratios + together, self.ratios + len(ratios)

    def merge(self, other: Mismatch) -> None:
        """Add what another process met."""
        self.total, self.largest = self.total + other.total, max(self.largest, other.largest)
        self.tokens += other.tokens
        self.least_ratio = min(self.least_ratio, other.least_ratio)
        self.most_ratio = max(self.most_ratio, other.most_ratio)
        self.all_ratios, self.ratios = self.all_ratios + other.all_ratios, self.ratios + other.ratios

    def metrics(self) -> dict[str, float]:
        """In TRL's names; none if there was nothing to compare."""
        if not self.tokens:
            return {}
        found = {
            "sampling/sampling_logp_difference/mean": self.total / self.tokens,
            "sampling/sampling_logp_difference/max": self.largest,
        }
        if self.ratios:
            found |= {
                "sampling/importance_sampling_ratio/min": self.least_ratio,
                "sampling/importance_sampling_ratio/mean": self.all_ratios / self.ratios,
                "sampling/importance_sampling_ratio/max": self.most_ratio,
            }
        return found


def optimizer_step(
    step: Step, parameters: TrainedParameters, optimizer: Any, *, remember: bool, on_gradient: Callable[[], None],
    number: int = 0, control: EntropyControl | None = None,
) -> dict[str, float]:  # fmt: skip
    """Do the optimizer step and return its metrics, in TRL's names.

    A gradient of 0 is stepped as well: momentum goes on as it would if nothing had been skipped.

    Args:
        on_gradient: called between clipping and stepping.
        number: of the step in the run, on which dropout depends.
        control: says the weight of the entropy bonus, and hears of the entropy; None: the weight is constant.

    Raises TrainingError if log-probabilities, divergence, loss or gradient are not finite; the parameters are left as
    they were.
    """
    own, ranks = (StepSums(), Mismatch()), step.policy.ranks
    if control is not None:
        step.objective = replace(step.objective, entropy_coef=control.applied)
    sums, mismatch = StepSums(), Mismatch()

    def meet() -> None:
        for of_rank, apart in ranks.gather(own):
            sums.add(of_rank)
            mismatch.merge(apart)

    norm = gradient_step(
        parameters, optimizer, step.gradients(*own, remember=remember, number=number),
        step.config.max_grad_norm,
        advice="the rewards or the learning rate are probably too large: scale the rewards, lower learning_rate, or "
        "set bf16=False", before_step=on_gradient, meet=meet, ranks=ranks,
    )  # fmt: skip
    metrics = {"loss": sums.loss, "grad_norm": norm, **mismatch.metrics()}
    if (experts := step.policy.log_probs.experts) is not None:
        metrics |= {"loss": sums.loss + experts.coefficient * sums.balance, "aux_loss": sums.balance}
    if step.config.has_entropy_bonus:
        if control is not None and sums.tokens:
            control.note(sums.chosen_entropy)
        weight = step.config.entropy_coef if control is None else control.weight
        metrics |= {"policy_loss": sums.loss + sums.bonus, "entropy_coef": weight}
    metrics |= cut_metrics(step.objective, sums, step.n_ratios, all_active=step.all_active)
    if sums.tokens:
        metrics["entropy"] = sums.entropy / sums.tokens
        if step.config.beta > 0 and step.config.kl_in == "loss":
            metrics["kl"] = sums.kl / sums.tokens
    return metrics
