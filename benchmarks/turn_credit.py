"""What the gradients of estimators of advantages are on average, beside the true one: exact, and by sampling.

python benchmarks/turn_credit.py          # writes results/turn_credit.md, in about a minute

A problem is a handful of episodes that a policy with one logit per state plays, so the true gradient of the expected
return is a sum. So is the expectation of an estimate from a group of G episodes: over all multisets of G episodes. No
number of the exact columns has noise. The sampled column draws groups, as training does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grouprl.objective import gigpo, leave_one_out, opo, outcome, returns_to_go, timestep
from grouprl.objective.packed import position, segment_ids

RESULTS = Path(__file__).resolve().parent / "results" / "turn_credit.md"
GROUP_SIZE = 8
SAMPLED_GROUPS = 20_000
SMALL_GROUP_SIZE = 4
ROUNDING = 1e-6
"""What may be between two sums that are equal but for rounding."""


class Step(NamedTuple):
    """One turn: the state it was taken in, which of two actions, and its reward."""

    state: int
    action: int
    reward: float


@dataclass(frozen=True)
class Problem:
    """K episodes that a policy can play: action 1 in state s has the probability sigmoid(logits[s]).

    Attributes:
        about: for the table. logits: D numbers. episodes: all that there are, each a sequence of turns.
    """

    name: str
    about: str
    logits: Sequence[float]
    episodes: Sequence[Sequence[Step]]

    def chances(self, logits: Tensor) -> Tensor:
        """``[K]`` the probability of each episode, differentiable."""
        log_p = [torch.nn.functional.logsigmoid(-logits), torch.nn.functional.logsigmoid(logits)]
        return torch.stack([torch.stack([log_p[s.action][s.state] for s in e]).sum() for e in self.episodes]).exp()

    @property
    def theta(self) -> Tensor:
        """The logits ``[D]`` float64."""
        return torch.tensor(self.logits, dtype=torch.float64)

    def true_gradient(self) -> Tensor:
        """``[D]``: the gradient of the expected return."""
        logits = self.theta.requires_grad_()
        returns = torch.tensor([sum(s.reward for s in e) for e in self.episodes], dtype=torch.float64)
        (gradient,) = torch.autograd.grad((self.chances(logits) * returns).sum(), logits)
        return gradient


def _stopping() -> Problem:
    go, stop = 1, 0
    episodes = [[*[Step(t, go, 1.0) for t in range(n - 1)], Step(n - 1, stop, 1.0)] for n in (1, 2, 3)]
    # The fourth turn is played too, and there is nothing left to decide.
    episodes.append([Step(0, go, 1.0), Step(1, go, 1.0), Step(2, go, 2.0)])
    return Problem(
        "stop or go on", "each turn is worth 1, and the policy decides after each of three whether there is another",
        (0.0, 0.0, 0.0), episodes,
    )  # fmt: skip


def _branch() -> Problem:
    left = [[Step(0, 1, 0.0), Step(1, a, float(a))] for a in (0, 1)]
    right = [[Step(0, 0, 0.0), Step(2, a, 0.2 + 0.6 * a)] for a in (0, 1)]
    return Problem(
        "a rare branch", "two turns; the first leads to one of two states, to one of them with probability 0.1",
        (math.log(0.1 / 0.9), 0.0, 0.0), [*left, *right],
    )  # fmt: skip


def _again() -> Problem:
    """Up to three tries in one state: to take what is there (0.5, and 0.2 more for each wait), or to wait."""
    tries = []
    for waits in range(4):
        steps = [Step(0, 0, 0.0)] * min(waits, 3)
        tries.append([*steps, Step(0, 1, 0.5 + 0.2 * waits)] if waits < 3 else steps)
    return Problem(
        "trying again", "up to three turns in one state: take what is there, which ends the episode, or wait for more",
        (0.0,), tries,
    )  # fmt: skip


PROBLEMS = (_stopping(), _branch(), _again())

Estimate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rewards [S], lengths [N], group [N], states [S]) -> advantages [S]."""


def mean_of_those_alive(values: Tensor, lengths: Tensor, group: Tensor, *, others: bool = False) -> Tensor:
    """``[S]``: the mean of ``values [S]`` over the group's episodes that have such a turn; ``others``: without its own.

    A turn that no other episode has gets 0 with ``others``.
    """
    cell = group[segment_ids(lengths)] * (int(lengths.max()) + 1) + position(lengths)
    zero = torch.zeros(int(cell.max()) + 1, dtype=values.dtype)
    total, n = zero.index_add(0, cell, values)[cell], zero.index_add(0, cell, torch.ones_like(values))[cell]
    return (total - values) / (n - 1).clamp(min=1) if others else total / n


def summed_over_turns(rewards: Tensor, lengths: Tensor, group: Tensor, states: Tensor) -> Tensor:
    """Each turn's reward less the mean of those alive at this turn, summed from the turn to the end."""
    return returns_to_go(rewards - mean_of_those_alive(rewards, lengths, group), lengths, 1.0)


def to_go_of_those_alive(rewards: Tensor, lengths: Tensor, group: Tensor, states: Tensor) -> Tensor:
    """The return-to-go less the mean of those alive at this turn."""
    to_go = returns_to_go(rewards, lengths, 1.0)
    return to_go - mean_of_those_alive(to_go, lengths, group)


def to_go_of_others_alive(rewards: Tensor, lengths: Tensor, group: Tensor, states: Tensor) -> Tensor:
    """The return-to-go less the mean of the others alive at this turn, less nothing where there are none."""
    to_go = returns_to_go(rewards, lengths, 1.0)
    return to_go - mean_of_those_alive(to_go, lengths, group, others=True)


ESTIMATES: dict[str, Estimate] = {
    "timestep": lambda r, n, g, s: timestep(r, n, g),
    "leave_one_out": lambda r, n, g, s: leave_one_out(r, n, g),
    "outcome, scale_rewards=none": lambda r, n, g, s: outcome(r, n, g, scale="none"),
    "outcome": lambda r, n, g, s: outcome(r, n, g),
    "opo": lambda r, n, g, s: opo(r, n, g),
    "gigpo, scale_rewards=none": lambda r, n, g, s: gigpo(r, n, g, s, scale="none"),
    "gigpo": lambda r, n, g, s: gigpo(r, n, g, s),
    "*return-to-go less the mean of the others alive*": to_go_of_others_alive,
    "*return-to-go less the mean of those alive*": to_go_of_those_alive,
    "*rewards less the mean of those alive, summed*": summed_over_turns,
}
"""By the settings of grouprl that name them; those in italics are no estimators of grouprl."""


def gradients(problem: Problem, members: Tensor, estimate: Estimate) -> Tensor:
    """``[M, D]``: the estimate of the gradient from each of M groups of G episodes ``members [M, G]``."""
    m, size = members.shape
    n_turns = torch.tensor([len(e) for e in problem.episodes])
    flat = torch.tensor([[s.state, s.action] for e in problem.episodes for s in e])
    rewards = torch.tensor([s.reward for e in problem.episodes for s in e], dtype=torch.float64)
    first = n_turns.cumsum(0) - n_turns
    which = members.flatten()
    lengths = n_turns[which]
    steps = first[which].repeat_interleave(lengths) + position(lengths)
    state, action = flat[steps].unbind(1)
    group = torch.arange(m).repeat_interleave(size)
    advantages = estimate(rewards[steps], lengths, group, state)
    score = action - torch.sigmoid(problem.theta)[state]
    cell = group[segment_ids(lengths)] * len(problem.logits) + state
    summed = torch.zeros(m * len(problem.logits), dtype=torch.float64).index_add(0, cell, advantages * score)
    return summed.view(m, -1) / size


class Found(NamedTuple):
    """Of an estimate: its expectation beside the true gradient.

    Attributes:
        along: how much of the true gradient it is: its projection on it, 1 if there is no bias.
        cosine: between the two, 1 if there is no bias in the direction.
        noise: the standard deviation of the estimate from one group, in lengths of its expectation.
    """

    along: float
    cosine: float
    noise: float

    @classmethod
    def of(cls, mean: Tensor, square: float, true: Tensor) -> Found:
        """From the expectation ``[D]``, and that of the squared length."""
        size = float(mean.norm())
        along = float(mean @ true / (true @ true))
        if size < 1e-12:
            return cls(along, math.nan, math.inf)
        return cls(along, float(mean @ true) / (size * float(true.norm())), math.sqrt(square - size**2) / size)


def exactly(problem: Problem, estimate: Estimate, size: int = GROUP_SIZE) -> Found:
    """Over all groups of ``size`` episodes, each with its probability."""
    p = problem.chances(problem.theta)
    members = torch.tensor(list(combinations_with_replacement(range(len(p)), size)))
    counts = torch.stack([(members == k).sum(1) for k in range(len(p))], 1).double()
    log_weight = math.lgamma(size + 1) - (counts + 1).lgamma().sum(1) + counts @ p.log()
    weight = log_weight.exp()
    found = gradients(problem, members, estimate)
    return Found.of(weight @ found, float(weight @ found.square().sum(1)), problem.true_gradient())


def by_sampling(problem: Problem, estimate: Estimate, n_groups: int, size: int = GROUP_SIZE) -> tuple[float, float]:
    """``along`` of the mean over ``n_groups`` sampled groups, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    p = problem.chances(problem.theta)
    members = torch.multinomial(p, n_groups * size, replacement=True, generator=generator).view(n_groups, size)
    true = problem.true_gradient()
    along = gradients(problem, members, estimate) @ true / (true @ true)
    return float(along.mean()), float(along.std() / math.sqrt(n_groups))


def verdict(name: str) -> str:
    """What the exact numbers of all problems say, for groups of two sizes: a bias may hide in one of them."""
    found = [exactly(problem, ESTIMATES[name], size) for problem in PROBLEMS for size in (SMALL_GROUP_SIZE, GROUP_SIZE)]
    if all(abs(f.along - 1) < ROUNDING and abs(f.cosine - 1) < ROUNDING for f in found):
        return "no bias"
    factors = [(size - 1) / size for _ in PROBLEMS for size in (SMALL_GROUP_SIZE, GROUP_SIZE)]
    if all(abs(f.along - c) < ROUNDING and abs(f.cosine - 1) < ROUNDING for f, c in zip(found, factors, strict=True)):
        return "no bias but in size: (G - 1) / G of it"
    return "biased"


def table() -> str:
    """All results in Markdown."""
    lines = [
        "# What estimators give on average",
        "",
        f"`python benchmarks/turn_credit.py`. Groups of {GROUP_SIZE} episodes, no discount, and nothing is scaled over "
        "the batch afterwards.",
        "",
        "- *along*: the expected estimate projected on the true gradient of the expected return, in parts of it.",
        "- *cosine*: of the angle between the two.",
        "- *noise*: the standard deviation of the estimate from one group, in lengths of its expectation.",
        f"- *sampled*: *along* from {SAMPLED_GROUPS:,} sampled groups, with its standard error. The other three are "
        "exact: sums over all groups.",
        "",
        "Estimators in italics are not grouprl's: they take the mean over the episodes of the group that are still "
        "going on. Those that centre or scale over the whole batch are not here, and neither are `maxrl` and "
        "`pass_at_k`, which have another aim than the expected return.",
        "",
    ]
    for problem in PROBLEMS:
        lines += [f"## {problem.name.capitalize()}", "", f"{problem.about.capitalize()}.", ""]
        lines += ["| estimator | along | cosine | noise | sampled |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, estimate in ESTIMATES.items():
            f, (mean, error) = exactly(problem, estimate), by_sampling(problem, estimate, SAMPLED_GROUPS)
            numbers = f"{f.along:.4f} | {f.cosine:.4f} | {f.noise:.3f} | {mean:.4f} ± {error:.4f}"
            lines.append(f"| {_ticked(name)} | {numbers} |")
        lines.append("")
    lines += ["## All problems, groups of 4 and of 8", "", "| estimator | |", "| --- | --- |"]
    lines += [f"| {_ticked(name)} | {verdict(name)} |" for name in ESTIMATES]
    return "\n".join(lines) + "\n"


def _ticked(name: str) -> str:
    return name if name.startswith("*") else ", ".join(f"`{part}`" for part in name.split(", "))


def main() -> None:
    """Write the table."""
    RESULTS.write_text(table(), encoding="utf-8")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
