"""One optimizer step: the gradient of the loss over some samples, in parts, then clip and step."""

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
from grouprl.lm.policy.log_probs import Part, steps_of
from grouprl.lm.policy.policy import Policy
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.user_functions import NOTHING, Custom
from grouprl.objective.packed import segment_sum


class Step:
    """What one optimizer step learns from: chosen once, so that each pass over it sees the same parts.

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
        reference = self.policy.reference if self.config.kl_in == "loss" else None
        if self.parts and reference is not None and not self._known(samples.known_ref):
            logp_ref = reference.log_probs(self.parts, lengths)
            self._store(samples.logp_ref, samples.known_ref, logp_ref)
        old_known = self._known(samples.known_old)
        device = self.policy.device
        with self.policy.learner.learning() if self.parts else nullcontext():
            for part in self.parts:
                index = steps_of(part.samples, lengths)
                fixed = Fixed(
                    samples.advantages[index].to(device), self.weights[index].to(device),
                    samples.logp_old[index].to(device) if old_known else None,
                    None if reference is None else samples.logp_ref[index].to(device),
                    lengths[part.samples].to(device),
                )  # fmt: skip
                terms = self.policy.learner.evaluate(part)
                loss, part_sums = token_loss(self.config, terms.logp, terms.entropy, fixed, self.custom)
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
