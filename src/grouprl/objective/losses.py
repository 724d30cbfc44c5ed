"""The losses a configuration can name: one entry each, for both configurations, their checks, the docs and the tests.

A loss is a surrogate per step, and weights that add the steps up. To add one: its surrogate as a function in
surrogates.py, its entry in `LOSSES`, a number worked out by hand in tests/objective/test_losses.py. If it has a
parameter of its own, that is a field of `Objective` and a setting of the configurations, under one name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from grouprl.objective import surrogates
from grouprl.objective.user_functions import TensorFunction
from grouprl.objective.weights import constant_length, sample_mean, sample_sum, token_mean

Level = Literal["token", "turn", "sequence", "sequence_token"]


@dataclass(frozen=True)
class Objective:
    """What is minimised: the settings of the loss, under the names that both configurations give them.

    Those that are not explained here belong to the loss whose name they begin with.

    Attributes:
        loss_type: an entry of `LOSSES`. importance_sampling_level: whose ratio it is; see `importance_logp`.
        epsilon, epsilon_high, delta: the clip; see `clipped`.
        off_policy_mask_threshold: see `off_policy_mask`; None masks nothing.
        beta, kl_estimator: weight and kind of the divergence to the reference; an entry of `DIVERGENCES`.
        entropy_coef: weight of the entropy bonus.
        max_completion_length: the constant length of dr_grpo, in steps.
        surrogate_function: takes the place of the surrogate of loss_type: (logp, logp_old, advantages) -> [S].
    """

    loss_type: str = "dapo"
    importance_sampling_level: Level = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    dppo_threshold: float | None = None
    off_policy_mask_threshold: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    max_completion_length: int = 1
    surrogate_function: TensorFunction | None = None

    @classmethod
    def of(cls, settings: Any, surrogate_function: TensorFunction | None = None) -> Objective:
        """The objective of a configuration: its settings of the same names; what it does not have stays as it is."""
        own = [f.name for f in fields(cls) if f.name in type(settings).model_fields]
        return cls(**{name: getattr(settings, name) for name in own}, surrogate_function=surrogate_function)

    @property
    def high(self) -> float:
        """epsilon_high, or epsilon where it is not given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


Surrogate = Callable[[Objective, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(objective, logp [m], logp_old [m], advantages [m], lengths [n]) -> the loss of each step [m]."""
Weights = Callable[[Objective, Tensor, int], Tensor]
"""(objective, lengths [n], number of samples of the whole optimizer step) -> the weight of each step [S]."""
Cut = Callable[[Objective, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(objective, logp, logp_old, advantages) -> two of [m] bool: steps of A < 0, and of A > 0, that are bounded."""


@dataclass(frozen=True)
class Loss:
    """A loss, as the setting `loss_type` names it.

    Attributes:
        about, source: what it computes and where it comes from, for people.
        surrogate, weights: what it is.
        cut: which steps are bounded, for the metrics; None where none is. Their gradient is cut off, except with cispo,
            which caps it, and spo, which turns it round.
        parameters: the fields of `Objective` that it reads.
        cap: its `epsilon_high` is a bound on the ratio itself, not a distance from 1.
        levels: whose ratio it may take; see `importance_logp`.
        whole_samples: it needs all steps of a sample together, as only language models have them.
        probabilities: it needs the probabilities of single actions, which neither samples nor densities have.
        environments: environments offer it; not where it would be another entry under a second name.
    """

    about: str
    source: str
    surrogate: Surrogate
    weights: Weights
    cut: Cut | None = None
    parameters: tuple[str, ...] = ()
    cap: bool = False
    levels: tuple[Level, ...] = ("token", "turn", "sequence", "sequence_token")
    whole_samples: bool = False
    probabilities: bool = False
    environments: bool = True


def mean_over_steps(o: Objective, lengths: Tensor, n_samples: int) -> Tensor:
    """All steps weigh the same."""
    return token_mean(lengths)


def mean_over_samples(o: Objective, lengths: Tensor, n_samples: int) -> Tensor:
    """All samples weigh the same, however long."""
    return sample_mean(lengths, n_samples)


def _clipped(o: Objective, logp: Tensor, old: Tensor, a: Tensor, lengths: Tensor | None) -> Tensor:
    return surrogates.clipped(logp, old, a, o.epsilon, o.epsilon_high, o.delta)


def _clipped_cut(o: Objective, logp: Tensor, old: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return surrogates.beyond(logp, old, a, 1.0 - o.epsilon, 1.0 + o.high)


def _vespo(o: Objective, logp: Tensor, old: Tensor, a: Tensor, lengths: Tensor | None) -> Tensor:
    assert lengths is not None
    return surrogates.vespo(logp, old, a, lengths, o.vespo_k_pos, o.vespo_lambda_pos, o.vespo_k_neg, o.vespo_lambda_neg)


def dppo_threshold(o: Objective) -> float:
    """How far a probability may move: as given, or what is usual for the divergence."""
    return o.dppo_threshold if o.dppo_threshold is not None else 0.2 if o.loss_type == "dppo_tv" else 0.05


def _dppo(divergence: Literal["tv", "kl"], about: str) -> Loss:
    def cut(o: Objective, logp: Tensor, old: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        dropped = ~surrogates.dppo_mask(logp, old, a, dppo_threshold(o), divergence)
        return dropped & (a < 0), dropped & (a > 0)

    return Loss(
        about, "DPPO, 2602.04879",
        lambda o, logp, old, a, lengths: surrogates.dppo(logp, old, a, dppo_threshold(o), divergence),
        mean_over_steps,
        cut, parameters=("dppo_threshold",), levels=("token",),
        probabilities=True,
    )  # fmt: skip


_CLIP: dict[str, Any] = {"surrogate": _clipped, "cut": _clipped_cut, "parameters": ("epsilon", "epsilon_high", "delta")}

LOSSES: dict[str, Loss] = {
    "grpo": Loss(
        "clipped ratio; mean over the steps of a sample, then over samples", "DeepSeekMath, 2402.03300",
        weights=mean_over_samples, **_CLIP,
    ),
    "bnpo": Loss(
        "the same as dapo: no number here depends on the micro-batch", "TRL", weights=mean_over_steps, **_CLIP,
        environments=False,
    ),
    "dapo": Loss(
        "clipped ratio; mean over all steps", "PPO, 1707.06347; DAPO, 2503.14476", weights=mean_over_steps, **_CLIP
    ),
    "dr_grpo": Loss(
        "clipped ratio; sum over steps divided by a constant length, mean over samples", "Dr. GRPO, 2503.20783",
        weights=lambda o, lengths, n: constant_length(lengths, o.max_completion_length, n), **_CLIP,
        environments=False,
    ),
    "luspo": Loss(
        "clipped ratio; sum over the steps of a sample, mean over samples", "LUSPO, 2602.05261",
        weights=lambda o, lengths, n: sample_sum(lengths, n), **_CLIP, levels=("sequence", "sequence_token", "turn"),
        whole_samples=True,
    ),
    "cispo": Loss(
        "the capped ratio as a constant weight of log pi; mean over all steps", "CISPO, 2506.13585",
        lambda o, logp, old, a, lengths: surrogates.cispo(logp, old, a, cap=o.high), mean_over_steps,
        cut=lambda o, logp, old, a: surrogates.beyond(logp, old, a, 0.0, o.high),
        parameters=("epsilon_high",), cap=True,
    ),
    "sapo": Loss(
        "a sigmoid gate in the place of the clip; mean over the steps of a sample, then over samples",
        "SAPO, 2511.20347",
        lambda o, logp, old, a, lengths: surrogates.sapo(
            logp, old, a, o.sapo_temperature_pos, o.sapo_temperature_neg
        ),
        mean_over_samples, parameters=("sapo_temperature_pos", "sapo_temperature_neg"),
    ),
    "vespo": Loss(
        "a smooth weight of the ratio of the whole sample, constant, times log pi; mean over all steps",
        "VESPO, 2602.10693", _vespo, mean_over_steps, levels=("token",), whole_samples=True,
        parameters=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    ),
    "spo": Loss(
        "a parabola in the place of the clip, which pulls the ratio back; mean over all steps", "SPO, 2401.16025",
        lambda o, logp, old, a, lengths: surrogates.spo(logp, old, a, o.epsilon), mean_over_steps,
        cut=lambda o, logp, old, a: surrogates.beyond(logp, old, a, 1.0 - o.epsilon, 1.0 + o.epsilon),
        parameters=("epsilon",),
    ),
    "dppo_tv": _dppo("tv", "the ratio, but 0 where the probability has moved too far; mean over all steps"),
    "dppo_kl": _dppo("kl", "the ratio, but 0 where the binary KL divergence is too large; mean over all steps"),
}  # fmt: skip


def names(*, environments: bool) -> tuple[str, ...]:
    """The losses one arena offers."""
    return tuple(n for n, loss in LOSSES.items() if not environments or (loss.environments and not loss.whole_samples))
