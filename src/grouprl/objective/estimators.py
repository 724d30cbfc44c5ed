"""The estimators a configuration can name: one entry each, read by both configurations, their checks, docs and tests.

To add one: its function in advantages.py or outcomes.py, its entry in `ESTIMATORS`, a number worked out by hand in
tests/objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from grouprl.objective import advantages, outcomes


@dataclass(frozen=True)
class Estimation:
    """What an estimator may be told beside rewards, lengths and groups.

    Attributes:
        gamma: discount. scale_rewards: whose standard deviation divides `outcome`. eps: what is added to it.
        pass_k: k of pass@k; None: the size of the group.
        states: ``[S]`` int64, equal where the states of steps are; negative: equal to none. gigpo_weight: weight of the
            comparison within equal states.
    """

    gamma: float = 1.0
    scale_rewards: Literal["group", "batch", "none"] = "group"
    eps: float = 1e-8
    pass_k: int | None = None
    states: Tensor | None = None
    gigpo_weight: float = 1.0


@dataclass(frozen=True)
class Estimator:
    """An estimator, as the setting `advantage` names it.

    Attributes:
        about, source: what it computes and where it comes from, for people.
        function: (rewards [S], lengths [N], group [N], settings) -> advantages [S]; None for the baseline of
            environments, which is fitted to states.
        whole_samples: it needs complete episodes: what a cut episode is worth it cannot tell.
        compares: it compares the samples of a group, so that a group of one teaches nothing.
        nonnegative: it divides by a mean of returns, none of which may be below 0.
        standardised: environments centre and scale its advantages over the batch; the others are used as they come.
        discounted: it reads gamma.
        turns: it gives credit within an episode, so that for language models its step is a turn and never a token.
        states: it needs to know in which state each step was taken.
        environments, language_models: which arena offers it.
    """

    about: str
    source: str
    function: Callable[[Tensor, Tensor, Tensor, Estimation], Tensor] | None
    whole_samples: bool = True
    compares: bool = True
    nonnegative: bool = False
    standardised: bool = False
    discounted: bool = False
    turns: bool = False
    states: bool = False
    environments: bool = True
    language_models: bool = True


def _gigpo(rewards: Tensor, lengths: Tensor, group: Tensor, s: Estimation) -> Tensor:
    assert s.states is not None
    assert s.scale_rewards != "batch"
    return advantages.gigpo(
        rewards, lengths, group, s.states, s.gamma, s.gigpo_weight, scale=s.scale_rewards, eps=s.eps
    )


ESTIMATORS: dict[str, Estimator] = {
    "baseline": Estimator(
        "generalised advantage on a closed-form linear baseline", "Duan et al. 2016, 1604.06778; GAE, 1506.02438",
        None, whole_samples=False, compares=False, standardised=True, discounted=True, language_models=False,
    ),
    "outcome": Estimator(
        "the return, centred and scaled in its group", "GRPO, 2402.03300; Dr. GRPO, 2503.20783",
        lambda r, n, g, s: advantages.outcome(r, n, g, scale=s.scale_rewards, eps=s.eps),
    ),
    "leave_one_out": Estimator(
        "the return less the mean of the group's other samples", "RLOO, 2402.14740",
        lambda r, n, g, s: advantages.leave_one_out(r, n, g), standardised=True,
    ),
    "timestep": Estimator(
        "the return-to-go less the mean of the group's other samples at the same step",
        "GR2PO, 2609.19850; GPG, 2510.03679",
        lambda r, n, g, s: advantages.timestep(r, n, g, gamma=s.gamma), standardised=True, discounted=True,
        turns=True,
    ),
    "gigpo": Estimator(
        "the return, centred and scaled in its group, and the return-to-go, among steps of the group in equal states",
        "GiGPO, 2505.10978", _gigpo, discounted=True, turns=True, states=True,
    ),
    "batch_returns": Estimator(
        "the return-to-go, centred and scaled over all steps of the batch", "the script that docs/tutorial.md retells",
        lambda r, n, g, s: advantages.batch_returns(r, n, s.gamma), whole_samples=False, compares=False,
        discounted=True, language_models=False,
    ),
    "opo": Estimator(
        "the return less the length-weighted mean of the group", "OPO, 2505.23585",
        lambda r, n, g, s: outcomes.opo(r, n, g), standardised=True,
    ),
    "maxrl": Estimator(
        "the return, centred and divided by the mean of its group; returns must not be negative",
        "MaxRL, 2602.02710", lambda r, n, g, s: outcomes.maxrl(r, n, g), nonnegative=True,
    ),
    "pass_at_k": Estimator(
        "what a sample adds to the best of k", "2503.19595; PKPO, 2505.15201",
        lambda r, n, g, s: outcomes.pass_at_k(r, n, g, s.pass_k), environments=False,
    ),
    "reinforce_pp": Estimator(
        "the return-to-go, centred and scaled over all steps of the batch", "REINFORCE++, 2501.03262",
        lambda r, n, g, s: outcomes.reinforce_pp(r, n, g, gamma=s.gamma), compares=False, discounted=True,
        environments=False,
    ),
    "reinforce_pp_baseline": Estimator(
        "the return less the mean of its group, scaled over all steps of the batch",
        "REINFORCE++-baseline, 2501.03262",
        lambda r, n, g, s: outcomes.reinforce_pp(r, n, g, gamma=s.gamma, baseline=True), discounted=True,
    ),
}  # fmt: skip


def names(*, environments: bool) -> tuple[str, ...]:
    """The estimators one arena offers."""
    return tuple(n for n, e in ESTIMATORS.items() if (e.environments if environments else e.language_models))
