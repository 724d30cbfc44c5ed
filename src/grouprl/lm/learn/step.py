"""One optimizer step: the gradient of the loss over some samples, in micro-batches, then clip and step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import TrainingError
from grouprl.lm.generate.samples import Samples
from grouprl.lm.learn.loss import Fixed, LossSums, step_weights, token_loss
from grouprl.lm.learn.parameters import MasterParameters
from grouprl.lm.policy.log_probs import MicroBatch, steps_of
from grouprl.lm.policy.policy import Policy
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.user_functions import NOTHING, Custom
from grouprl.objective.packed import segment_sum


class Step:
    """What one optimizer step learns from: chosen once, so that each pass over it sees the same micro-batches.

    Args:
        chosen: ``[n]`` the samples, by index. custom: may hold a surrogate of the user's own.

    Samples that cannot move the model get no forward pass: cut-off ones with mask_truncated_completions, and those of
    advantage 0 if no KL term moves them. They still count in the denominators.
    """

    def __init__(
        self, policy: Policy, samples: Samples, chosen: Tensor, config: GRPOConfig, custom: Custom = NOTHING
    ) -> None:
        self.policy, self.samples, self.config, self.custom = policy, samples, config, custom
        lengths = samples.lengths
        counted = samples.finished[chosen] if config.mask_truncated_completions else torch.ones(len(chosen)) > 0
        self.weights = torch.zeros(int(lengths.sum()))
        self.weights[steps_of(chosen, lengths)] = step_weights(config, lengths[chosen], counted)
        active = counted.clone()
        kl_loss = config.beta > 0 and config.kl_in == "loss"
        if config.skip_zero_advantage and not kl_loss:
            active &= segment_sum(samples.advantages.abs(), lengths)[chosen] > 0
        self.active = chosen[active]
        self.n_tokens, self.n_samples = int(lengths[chosen][counted].sum()), int(counted.sum())
        index = self.active.tolist()
        batches = policy.log_probs.micro_batches(
            [p.ids for p in samples.prompts], [samples.completions[i] for i in index], samples.group[index].tolist()
        )
        self.micro_batches = [MicroBatch(batch.groups, self.active[batch.samples]) for batch in batches]

    def remember_old(self) -> None:
        """Store log-probabilities under the current policy: before it moves, for a step that comes later."""
        index = steps_of(self.active, self.samples.lengths)
        if self.micro_batches and not self.samples.knows_old(index):
            logp = self.policy.log_probs.without_gradient(self.micro_batches, self.samples.lengths)
            self.samples.remember_old(index, logp[index])

    def gradient(self, parameters: MasterParameters, *, remember: bool) -> tuple[LossSums, dict[str, float]]:
        """Add up the gradient of the loss over all micro-batches.

        Args:
            remember: store the log-probabilities met on the way as those of the old policy, for later passes.
        """
        samples, lengths = self.samples, self.samples.lengths
        parameters.start()
        sums, mismatch, worst = LossSums(), 0.0, 0.0
        reference = self.policy.reference if self.config.kl_in == "loss" else None
        active = steps_of(self.active, lengths)
        if self.micro_batches and reference is not None and not samples.knows_reference(active):
            samples.remember_reference(active, reference.log_probs(self.micro_batches, lengths)[active])
        old_known = samples.knows_old(active)
        device = self.policy.device
        with self.policy.log_probs.learning() if self.micro_batches else nullcontext():
            for batch in self.micro_batches:
                index = steps_of(batch.samples, lengths)
                fixed = Fixed(
                    samples.advantages[index].to(device), self.weights[index].to(device),
                    samples.logp_old[index].to(device) if old_known else None,
                    None if reference is None else samples.logp_ref[index].to(device),
                    lengths[batch.samples].to(device),
                )  # fmt: skip
                terms = self.policy.log_probs.evaluate(batch)
                loss, part_sums = token_loss(self.config, terms.logp, terms.entropy, fixed, self.custom)
                loss.backward()  # type: ignore[no-untyped-call]
                sums.add(part_sums)
                logp = terms.logp.detach().cpu()
                if not old_known:
                    difference = (logp - samples.logp_sampled[index]).abs()
                    mismatch, worst = mismatch + float(difference.sum()), max(worst, float(difference.max()))
                if remember and not old_known:
                    samples.remember_old(index, logp)
        parameters.finish()
        extra = {}
        if not old_known and self.micro_batches:
            extra = {
                "sampling/sampling_logp_difference/mean": mismatch / max(1, sums.tokens),
                "sampling/sampling_logp_difference/max": worst,
            }
        return sums, extra


def take(
    step: Step, parameters: MasterParameters, optimizer: Any, config: GRPOConfig, *, remember: bool, on_gradient: Any
) -> dict[str, float]:
    """Do the optimizer step and return its metrics, in TRL's names.

    Args:
        on_gradient: called between clipping and stepping.

    Raises TrainingError if the gradient is not finite; the parameters are left as they were.
    """
    sums, extra = step.gradient(parameters, remember=remember)
    norm = parameters.clip(config.max_grad_norm)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient is not finite (norm {norm}); the rewards or the learning rate are probably too large: "
            "scale the rewards, lower learning_rate, or set bf16=False"
        )
    on_gradient()
    optimizer.step()  # with a gradient of 0 as well: momentum goes on as it would without the skipping
    metrics = {"loss": sums.loss, "grad_norm": norm, **extra, **_clipped(step, sums, config)}
    if sums.tokens:
        metrics["entropy"] = sums.entropy / sums.tokens
        if config.beta > 0 and config.kl_in == "loss":
            metrics["kl"] = sums.kl / sums.tokens
    return metrics


def _clipped(step: Step, sums: LossSums, config: GRPOConfig) -> dict[str, float]:
    """Shares of ratios that the clip cuts off, of all that count: those of samples without advantage are not cut."""
    n = step.n_tokens if config.importance_sampling_level == "token" else step.n_samples
    if not n or config.loss_type == "sapo" or step.custom.surrogate is not None:
        return {}
    low, high = sums.low / n, sums.high / n
    if config.loss_type == "cispo":
        return {"cispo_clip_ratio": high}
    return {
        "clip_ratio/low_mean": low, "clip_ratio/low_min": sums.least_low if len(step.active) == step.n_samples else 0.0,
        "clip_ratio/high_mean": high, "clip_ratio/high_max": sums.most_high, "clip_ratio/region_mean": low + high,
    }  # fmt: skip
