"""One optimizer step: the gradient of the loss over some samples, in parts, then clip and step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import TrainingError
from grouprl.lm.config import GRPOConfig
from grouprl.lm.learner import Part, steps_of
from grouprl.lm.loss import Fixed, LossSums, step_weights, token_loss
from grouprl.lm.parameters import MasterParameters
from grouprl.lm.policy import Policy
from grouprl.lm.samples import Samples
from grouprl.objective.packed import segment_sum


class Step:
    """What one optimizer step learns from: chosen once, so that each pass over it sees the same parts.

    Args:
        chosen: ``[n]`` the samples, by index.

    Samples that cannot move the model get no forward pass: cut-off ones with mask_truncated_completions, and those of
    advantage 0 if no KL term moves them. They still count in the denominators.
    """

    def __init__(self, policy: Policy, samples: Samples, chosen: Tensor, config: GRPOConfig) -> None:
        self.policy, self.samples, self.config = policy, samples, config
        lengths = samples.lengths
        counted = samples.finished[chosen] if config.mask_truncated_completions else torch.ones(len(chosen)) > 0
        self.weights = torch.zeros(int(lengths.sum()))
        self.weights[steps_of(chosen, lengths)] = step_weights(config, lengths[chosen], counted)
        active = counted.clone()
        kl_loss = config.beta > 0 and config.kl_in == "loss"
        if config.skip_zero_advantage and not kl_loss:
            active &= segment_sum(samples.advantages.abs(), lengths)[chosen] > 0
        self.active = chosen[active]
        index = self.active.tolist()
        parts = policy.learner.parts(
            [p.ids for p in samples.prompts], [samples.completions[i] for i in index], samples.group[index].tolist()
        )
        self.parts = [Part(part.groups, self.active[part.samples]) for part in parts]

    def remember_old(self) -> None:
        """Store log-probabilities under the current policy: before it moves, for a step that comes later."""
        if self.parts:
            known = self._known(self.samples.known_old)
            if not known:
                logp = self.policy.learner.log_probs(self.parts, self.samples.lengths)
                self._store(self.samples.logp_old, self.samples.known_old, logp)

    def _known(self, known: Tensor) -> bool:
        return bool(known[steps_of(self.active, self.samples.lengths)].all())

    def _store(self, to: Tensor, known: Tensor, logp: Tensor) -> None:
        index = steps_of(self.active, self.samples.lengths)
        to[index], known[index] = logp[index], True

    def gradient(self, parameters: MasterParameters, *, remember: bool) -> tuple[LossSums, dict[str, float]]:
        """Add up the gradient of the loss over all parts.

        Args:
            remember: store the log-probabilities met on the way as those of the old policy, for later passes.
        """
        samples, lengths = self.samples, self.samples.lengths
        parameters.start()
        sums, mismatch, worst = LossSums(), 0.0, 0.0
        if self.parts and self.config.beta > 0 and not self._known(samples.known_ref):
            logp_ref = self.policy.reference_log_probs(self.parts, lengths)
            self._store(samples.logp_ref, samples.known_ref, logp_ref)
        old_known = self._known(samples.known_old)
        device = self.policy.device
        with self.policy.learner.learning() if self.parts else nullcontext():
            for part in self.parts:
                index = steps_of(part.samples, lengths)
                fixed = Fixed(
                    samples.advantages[index].to(device), self.weights[index].to(device),
                    samples.logp_old[index].to(device) if old_known else None,
                    samples.logp_ref[index].to(device) if self.config.beta > 0 else None,
                    lengths[part.samples].to(device),
                )  # fmt: skip
                terms = self.policy.learner.evaluate(part)
                loss, part_sums = token_loss(self.config, terms.logp, terms.entropy, fixed)
                loss.backward()  # type: ignore[no-untyped-call]
                sums.add(part_sums)
                logp = terms.logp.detach().cpu()
                if not old_known:
                    difference = (logp - samples.logp_sampled[index]).abs()
                    mismatch, worst = mismatch + float(difference.sum()), max(worst, float(difference.max()))
                if remember and not old_known:
                    samples.logp_old[index] = logp
        parameters.finish()
        if remember and not old_known:
            samples.known_old[steps_of(self.active, lengths)] = True
        extra = {}
        if not old_known and self.parts:
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
    tokens = max(1, sums.tokens)
    metrics = {"loss": sums.loss, "grad_norm": norm, **extra}
    if sums.tokens:
        metrics["entropy"] = sums.entropy / tokens
        metrics["clip_ratio/low_mean"] = sums.low / tokens
        metrics["clip_ratio/high_mean"] = sums.high / tokens
        metrics["clip_ratio/region_mean"] = (sums.low + sums.high) / tokens
        if config.beta > 0 and config.kl_in == "loss":
            metrics["kl"] = sums.kl / tokens
    return metrics
