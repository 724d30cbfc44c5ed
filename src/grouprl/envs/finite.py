"""Numbers that are not finite, caught where they come from and named: which environment, which key, which step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from grouprl.envs.policy import Policy
from grouprl.envs.spaces import ObservationCodec
from grouprl.errors import TrainingError
from grouprl.objective.groups import LARGEST_RETURN

Array = npt.NDArray[Any]


def check_rewards(rewards: Array, env: Array, time: Array, where: str = "this batch") -> None:
    """Raise TrainingError if ``rewards [m]`` are not finite or too large, naming environment ``env [m]`` and step
    ``time [m]`` of ``where``.
    """
    fine = np.abs(rewards) <= LARGEST_RETURN  # False for NaN too
    if not fine.all():
        i = int(np.argmin(fine))
        raise TrainingError(
            f"environment {env[i]} returned the reward {rewards[i]} on step {time[i]} of {where}; rewards must be "
            f"finite numbers of at most {LARGEST_RETURN:g}: fix the environment, or wrap it in "
            "gymnasium.wrappers.TransformReward"
        )


def bad_observation(observations: ObservationCodec, encoded: Mapping[str, Array]) -> tuple[int, str] | None:
    """The first row of ``encoded``, each ``[m, ...]``, that is not finite, and a description of it; None if all are."""
    for key, value in encoded.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            row, component = (int(x[0]) for x in np.nonzero(~np.isfinite(value.reshape(len(value), -1))))
            number = value.reshape(len(value), -1)[row, component]
            beyond = " (numbers beyond 3.4e38 are)" if np.isinf(number) else ""
            return row, f"{number}{beyond} in {observations.name_of(key, component)}"
    return None


def check_observations(observations: ObservationCodec, encoded: Mapping[str, Array], env: Array, time: Array) -> None:
    """Raise TrainingError if ``encoded``, each ``[m, ...]``, is not finite, naming environment ``env [m]`` and step
    ``time [m]``.
    """
    found = bad_observation(observations, encoded)
    if found is not None:
        row, what = found
        raise TrainingError(
            f"the observation of environment {env[row]} on step {time[row]} holds {what}; "
            "observations must be finite: fix the environment, or wrap it in gymnasium.wrappers.TransformObservation"
        )


def check_params(params: Array, encoded: Mapping[str, Array], policy: Policy, playing: Array, step: str) -> None:
    """Raise TrainingError if what the policy makes of observations is not finite, saying why.

    Args:
        params: parameters ``[n, K]`` of the distributions of actions. encoded: what they were made of.
        playing: ``[n]``, the rows that matter. step: the step in words, such as ``step 3 of this batch``.
    """
    if math.isfinite(float(params.sum())) or np.isfinite(params[playing]).all():
        return
    env = int(np.flatnonzero(playing & ~np.isfinite(params).all(1))[0])
    found = bad_observation(policy.observations, {key: value[env : env + 1] for key, value in encoded.items()})
    if found is not None:
        raise TrainingError(
            f"the observation of environment {env} on {step} holds {found[1]}; observations must be finite: fix the "
            "environment, or wrap it in gymnasium.wrappers.TransformObservation"
        )
    raise TrainingError(f"the policy gives {params[env]} for environment {env} on {step}; {_why(policy)}")


def check_policy(policy: Policy) -> None:
    """Raise TrainingError if a parameter or a statistic of the policy is not finite: it is not worth saving."""
    fault = _not_finite(policy)
    if fault is not None:
        raise TrainingError(f"the policy cannot be saved: {fault}")


def _not_finite(policy: Policy) -> str | None:
    statistics = {name: getattr(policy, name) for name in ("mean", "variance", "count")}
    for name, tensor in {**statistics, **dict(policy.named_parameters())}.items():  # a mask of a network's may be inf
        if not bool(torch.isfinite(tensor).all()):
            if name in statistics:
                return f"the observations' {name} is not finite: something has changed the policy's statistics"
            return (
                f"its parameter {name} is not finite: something has changed it, or learning_rate is too high; go on "
                "from the last checkpoint"
            )
    return None


def _why(policy: Policy) -> str:
    return _not_finite(policy) or (
        "parameters and observation are finite, so it is the network that overflows or divides by 0: use smaller "
        "weights, or look into a network of your own"
    )
