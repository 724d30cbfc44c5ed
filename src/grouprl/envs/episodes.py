"""Some episodes of a batch, as it was learned from, for a person to look at."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from grouprl.envs.estimate import Baseline
from grouprl.envs.policy import Policy
from grouprl.envs.rollout import Rollout
from grouprl.objective import returns_to_go
from grouprl.runs.episodes import Batch, Sample, picture
from grouprl.runs.files import rounded

SAMPLES = 8
"""Samples that are kept of a batch."""

POINTS = 60
"""Steps at which a sample is read off, at most."""

CHANNELS = 4
"""Numbers of the observation that are kept."""

DIGITS = 4
"""Significant digits of numbers that are kept."""

FRAMES = 4
"""Pictures that are kept of a sample whose observation is one."""


def batch_of(
    rollout: Rollout, advantages: Tensor, baseline: Baseline | None, policy: Policy, *, step: int, gamma: float,
    estimator: str,
) -> Batch:  # fmt: skip
    """A few samples of a batch.

    Args:
        advantages: ``[S]`` as the loss sees them. baseline: after its fit to this batch. step: of the run.

    Draws no random number and changes nothing.
    """
    first = torch.cumsum(rollout.lengths, 0) - rollout.lengths
    to_go = returns_to_go(rollout.rewards, rollout.lengths, gamma)
    names, shown = _observations(rollout, policy)
    chosen = _chosen(rollout)
    at = [_points(int(rollout.lengths[i])) for i in chosen]
    rows = torch.cat([first[i] + points for i, points in zip(chosen, at, strict=True)])
    values, last = _values(rollout, baseline, rows, torch.tensor(chosen))
    parts = torch.split(torch.arange(len(rows)), [len(points) for points in at])
    samples = []
    for n, (i, part) in enumerate(zip(chosen, parts, strict=True)):
        own = to_go[rows[part]]
        if last is not None and not bool(rollout.terminated[i]):
            own = own + gamma ** (int(rollout.lengths[i]) - at[n]).float() * last[n]
        seen = None if shown is None else shown[rows[part]]
        known = None if values is None else values[part]
        samples.append(_sample(rollout, advantages, i, int(first[i]), at[n], own, known, seen))
    return Batch(step=step, estimator=estimator, names=names, samples_in_batch=len(rollout.lengths), samples=samples)


def _points(length: int) -> Tensor:
    """Where a sample is read off: steps from its beginning, ``[P]``."""
    return torch.linspace(0, length - 1, min(POINTS, length)).round().long()


def _values(
    rollout: Rollout, baseline: Baseline | None, rows: Tensor, samples: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The baseline's values of steps ``rows [m]``, and of what comes after the last step of ``samples [n]``."""
    if baseline is None or baseline.weights is None:
        return None, None
    inputs = {key: value[rows] for key, value in rollout.inputs.items()}
    after = {key: value[samples] for key, value in rollout.last_inputs.items()}
    return baseline.values(inputs, rollout.elapsed[rows]), baseline.values(after, rollout.last_elapsed[samples])


def _chosen(rollout: Rollout) -> list[int]:
    """Whole groups where samples are compared in groups, else samples spread evenly over the batch."""
    n, groups = len(rollout.lengths), rollout.group.tolist()
    if n > SAMPLES and len(set(groups)) > 1:
        return [i for i in range(n) if groups.index(groups[i]) < SAMPLES][:SAMPLES]
    return sorted({i * (n - 1) // (SAMPLES - 1) for i in range(SAMPLES)}) if n > SAMPLES else list(range(n))


def _observations(rollout: Rollout, policy: Policy) -> tuple[list[str], Tensor | None]:
    """Names of some numbers of the observation, and ``[S, C]`` of them."""
    if rollout.observed is None:
        return [], None
    seen = torch.as_tensor(rollout.observed)
    if isinstance(policy.observations.space, Discrete):
        return ["state"], seen.argmax(1, keepdim=True)
    names = [f"obs[{i}]" for i in range(min(CHANNELS, seen.shape[1]))]
    return names, seen[:, : len(names)]


def _sample(
    rollout: Rollout, advantages: Tensor, i: int, start: int, at: Tensor, to_go: Tensor, values: Tensor | None,
    shown: Tensor | None,
) -> Sample:  # fmt: skip
    """Sample ``i``, whose first step is ``start``, read off ``at [P]``; the other tensors are of these points."""
    length = int(rollout.lengths[i])
    rows, whole = start + at, slice(start, start + length)
    ended: Literal["terminated", "truncated", "batch"] = "truncated" if bool(rollout.truncated[i]) else "batch"
    if bool(rollout.terminated[i]):
        ended = "terminated"
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), rollout.rewards[whole].double().cumsum(0)])
    actions = rollout.actions[rows]
    return Sample(
        group=int(rollout.group[i]), begins=int(rollout.elapsed[start]), length=length, ended=ended,
        total=rounded(float(sums[-1]), DIGITS), advantage=rounded(float(advantages[whole].mean()), DIGITS),
        at=at.tolist(),
        observation=[] if shown is None else [_numbers(column) for column in shown.T],
        rewards=_numbers(torch.diff(sums[at + 1], prepend=sums[:1]) / torch.diff(at, prepend=torch.tensor([-1]))),
        to_go=_numbers(to_go), advantages=_numbers(advantages[rows]),
        values=None if values is None else _numbers(values),
        actions=_numbers(actions if actions.dim() == 1 else actions[:, 0]),
        frames=_frames(rollout, start, length),
    )  # fmt: skip


def _frames(rollout: Rollout, start: int, length: int) -> list[str]:
    """Pictures of a sample: the first image in its observation, the newest layers of a stack."""
    images = [value for key, value in rollout.inputs.items() if key != "flat" and value.dim() == 4]
    if not images:
        return []
    rows = start + np.linspace(0, length - 1, min(FRAMES, length)).round().astype(int)
    found = images[0][torch.from_numpy(rows)].cpu().numpy().astype(np.uint8)  # [F, C, H, W]
    return [picture(one.transpose(1, 2, 0) if len(one) == 3 else one[-1], longest=84) for one in found]


def _numbers(values: Tensor) -> list[float | None]:
    """Numbers ``[P]``, rounded; None for what JSON has no number for."""
    return [rounded(value, DIGITS) for value in values.double().tolist()]
