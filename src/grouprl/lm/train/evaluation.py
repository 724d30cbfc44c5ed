"""Evaluation: completions of held-out prompts, sampled or of the likeliest tokens, and what they are worth.

One loop serves a trainer's ``evaluate``, the greedy evaluation of a run by a recipe, and ``grouprl evaluate``. It draws
from a random stream of its own, the same at every evaluation, so that evaluating changes nothing in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grouprl.lm.generate.collect import EVALUATION_STARTS
from grouprl.lm.generate.scored_groups import Metrics, ScoredGroups, describe_scored
from grouprl.lm.prompts import PromptSource
from grouprl.lm.sample.streams import EVALUATION, Stream
from grouprl.lm.train.setup import Setup
from grouprl.machine.busy import sleeping_when_busy

GREEDY_AT_ONCE = 256
"""Completions of a greedy evaluation that are sampled side by side, unless per_device_eval_batch_size says."""


_Z = 1.96
"""Standard deviations to either side of a normal variable that hold 95 % of it."""


@dataclass(frozen=True)
class HeldOut:
    """Greedy performance on held-out prompts, or starts of episodes.

    Attributes:
        reward: the mean reward.
        accuracy: the share of prompts whose reward reaches ``solved_reward``; of episodes, the share that their
            environment counts as solved, if it says which are.
        n: how many there were.
        numbers: what there is to say of episodes, such as their mean number of turns: means by the name of the metric.
    """

    reward: float
    accuracy: float
    n: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy that Wilson gives (1927): also right near 0 and 1."""
        share = _Z**2 / (self.n + _Z**2)
        centre = (1 - share) * self.accuracy + share / 2
        half = ((1 - share) * share * self.accuracy * (1 - self.accuracy) + share**2 / 4) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    setup: Setup, prompts: PromptSource, *, greedy: bool, group_size: int = 1, n: int | None = None,
    at_once: int | None = None, state: Any = None,
) -> Iterator[ScoredGroups]:  # fmt: skip
    """Sample ``group_size`` completions of each prompt, have them judged, and yield them chunk by chunk.

    Args:
        greedy: take the likeliest tokens instead of sampling as the configuration says.
        n: how many prompts, from the first on; default: all.
        at_once: completions of a chunk, in whole groups; default: all.
        state: transformers' TrainerState, which reward functions are given.

    Raises TrainingError if a reward function fails.
    """
    assert prompts.size is not None
    size = prompts.size if n is None else min(n, prompts.size)
    groups = max(1, (at_once or size * group_size) // group_size)
    stream = Stream(setup.config.seed, EVALUATION)
    settings = setup.policy.sampling(greedy=greedy)
    for start in range(0, size, groups):
        chunk = [prompts[i] for i in range(start, min(start + groups, size))]
        numbers = range(EVALUATION_STARTS + start, EVALUATION_STARTS + start + len(chunk))
        with sleeping_when_busy():
            scored = setup.eval_player.draw(chunk, group_size, stream, numbers, settings, state)
        yield scored


def pass_at(right: Sequence[int], n: int, k: int) -> float:
    """The chance that one of ``k`` completions of a prompt is right, a mean over prompts.

    Of ``n`` completions c are right. The share of all choices of k among the n that hold a right one,
    1 - C(n - c, k) / C(n, k), estimates it without bias (arXiv 2107.03374). With k = 1 it is the share of right ones.

    Args:
        right: c of each prompt. n, k: ``k`` is not above ``n``.
    """
    return sum(1.0 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)


def measure(setup: Setup, prompts: PromptSource, *, greedy: bool, state: Any = None) -> Metrics:
    """TRL's metrics of completions of all prompts, as the settings of evaluation say; one each with ``greedy``.

    Raises TrainingError if a reward function fails.
    """
    config, began = setup.config, time.perf_counter()
    group_size = 1 if greedy else config.num_generations_eval or config.num_generations
    chunks = evaluate(
        setup, prompts, greedy=greedy, group_size=group_size, at_once=config.per_device_eval_batch_size, state=state
    )
    parts = list(chunks)
    metrics = describe_scored(parts)
    if config.eval_pass_k is not None and not greedy:
        solved = [right for part in parts for right in part.solved(config.solved_reward, config.solved_by)]
        right = [sum(solved[i : i + group_size]) for i in range(0, len(solved), group_size)]
        metrics |= {f"pass@{k}": pass_at(right, group_size, k) for k in config.eval_pass_k}
        metrics[f"avg@{group_size}"] = pass_at(right, group_size, 1)
    seconds = time.perf_counter() - began
    assert prompts.size is not None
    return {**metrics, "runtime": seconds, "samples_per_second": prompts.size * group_size / seconds}


def evaluate_greedily(
    setup: Setup, prompts: PromptSource, n: int | None = None, *, state: Any = None,
    keep: Callable[[ScoredGroups], None] | None = None,
) -> HeldOut:  # fmt: skip
    """One completion of the likeliest tokens for each of the first ``n`` prompts (default: all).

    Args:
        keep: called with each chunk of completions, such as to write them down.

    Raises TrainingError if a reward function fails.
    """
    at_once = setup.config.per_device_eval_batch_size or GREEDY_AT_ONCE
    returns: list[float] = []
    solved: list[bool] = []
    whole: ScoredGroups | None = None
    for drawn in evaluate(setup, prompts, greedy=True, n=n, at_once=at_once, state=state):
        returns += drawn.returns.tolist()
        solved += drawn.solved(setup.config.solved_reward, setup.config.solved_by)
        whole = drawn if whole is None else whole.concatenate(drawn)
        if keep is not None:
            keep(drawn)
    size = len(returns)
    assert whole is not None
    numbers = {name: value for name, value in whole.metrics().items() if name != "episodes/max_turns"}
    return HeldOut(sum(returns) / size, sum(solved) / size, size, numbers)
