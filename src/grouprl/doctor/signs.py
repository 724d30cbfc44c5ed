"""Rules that both arenas share. Each is told the names of the columns and of the settings to try."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grouprl.doctor.table import Diagnosis, Table

if TYPE_CHECKING:
    from grouprl.doctor.table import Array

ENOUGH_ROWS = 10
"""Updates under which no rule speaks that looks at the course of a run: fewer are all beginning."""


def rise(values: Array) -> tuple[float, float]:
    """How far the mean of the last third lies above that of the first, and the standard error of that difference.

    The error comes from differences of neighbours (von Neumann's estimate of a variance), which a trend hardly
    changes. Values that are averages over time, whose neighbours share most of what they average, need
    something else.
    """
    import numpy as np

    third = len(values) // 3
    if third < 2:
        return 0.0, float("inf")
    gain = float(values[-third:].mean() - values[:third].mean())
    variance = float(np.square(np.diff(values)).mean() / 2)
    return gain, (variance * 2 / third) ** 0.5


def risen(values: Array) -> bool:
    """Whether :func:`rise` is more than two standard errors, which chance alone exceeds once in 40 runs."""
    gain, error = rise(values)
    return gain > 2 * error


def flat(table: Table, column: str, solved: bool, advice: str) -> Diagnosis | None:
    """The reward has not risen: its last third lies less than two standard errors above its first.

    At least 30 rows that have the column are asked for, because thirds of fewer than 10 have a poor standard error.
    Before half of a run it is too early to say. A run that has solved its task may have begun there, so it is left
    alone.
    """
    values = table.values(column)
    if len(values) < 30 or solved or table.progress < 0.5 or risen(values):
        return None
    gain, error = rise(values)
    first, last = float(table.first(column).mean()), float(table.last(column).mean())
    where = f"{first:.4g} in the first third of the run, {last:.4g} in the last"
    fallen = f"{column} has fallen: {where} (standard error {error:.2g})"
    still = f"{column} has not risen: {where}, which chance explains (standard error {error:.2g})"
    return Diagnosis("reward-flat", fallen if gain < -2 * error else still, advice)


def far_below(table: Table, evaluation: str, training: str, advice: str) -> Diagnosis | None:
    """The last evaluations lie far below training: by more than half of all that training has gained.

    Evaluations act greedily and training samples, so some difference is normal, and a greedy policy that lags for one
    evaluation is too. Therefore the median of the last third of the evaluations, at least three, is compared with the
    median of training, and the scale is what the run has gained, from the lowest tenth of training to its median
    at the end. A run that has gained nothing has no such scale. Before half of a run a greedy policy may be late only.
    """
    import numpy as np

    evaluations, trained = table.last(evaluation), table.values(training)
    if len(evaluations) < 3 or len(trained) < ENOUGH_ROWS or table.progress < 0.5:
        return None
    end, greedy = table.late(training), float(np.median(evaluations))
    gained = end - float(np.quantile(trained, 0.1))
    if not risen(trained) or end - greedy <= 0.5 * gained:
        return None
    return Diagnosis(
        "evaluation-below-training",
        f"{evaluation} is {greedy:.4g} where {training} is {end:.4g}: more than half of what was gained is lost where "
        "actions are not sampled",
        advice,
    )


def clipped(table: Table, column: str, what: str, advice: str) -> Diagnosis | None:
    """More than half of a batch ends outside the clip, in the median over the last third.

    Args:
        column: the share that does. what: it is a share of. advice: what to try.
    """
    share = table.late(column)
    if len(table.values(column)) < ENOUGH_ROWS or not share > 0.5:
        return None
    return Diagnosis("all-clipped", f"{share:.0%} of the {what} are outside the clip, and give no gradient", advice)


def rate_spent(table: Table) -> Diagnosis | None:
    """The learning rate was below a hundredth of its highest value in the last fifth of the updates, or all of them.

    A cosine is below a hundredth for its last 6 %, a straight line for 1 %. A run that spends a fifth there was planned
    shorter than it is. Schedules of environments always last as long as the run.
    """
    rates = table.values("learning_rate")
    if len(rates) < ENOUGH_ROWS:
        return None
    tail = rates[-max(1, len(rates) // 5) :]
    if float(tail.max()) >= 0.01 * float(rates.max()) and rates.max() > 0:
        return None
    return Diagnosis(
        "learning-rate-spent",
        f"the learning rate is at its end: at most {tail.max():.2g} in the last {len(tail)} of {len(rates)} updates, "
        f"where it was up to {rates.max():.2g}",
        "Nothing is learned there. Plan the schedule for the whole run, or end the run earlier.",
    )


TYPICAL_WEIGHT = 0.02
"""The size of a weight of a transformer as models are initialised; those of smaller networks are larger."""


def rate_below_precision(table: Table, dtype: str, advice: str) -> Diagnosis | None:
    """Steps are smaller than what the type of the weights keeps.

    Adam moves each weight by about the learning rate. A type with p bits of precision rounds a change away that is
    below 2^-(p+1) of the weight: p is 24 for float32 and 8 for bfloat16. For a weight of 0.02 that is 6e-10
    and 4e-5.
    """
    rates, bits = table.values("learning_rate"), {"float32": 24, "bfloat16": 8, "float16": 11}.get(dtype)
    if bits is None or len(rates) < ENOUGH_ROWS:
        return None
    least = TYPICAL_WEIGHT * 2.0 ** -(bits + 1)
    highest = float(rates.max())
    if not 0 < highest < least:
        return None
    return Diagnosis(
        "learning-rate-below-precision",
        f"the learning rate is at most {highest:.2g}, and {dtype} rounds away steps below about {least:.1g} of a "
        f"weight of {TYPICAL_WEIGHT:g}: most of the model does not move",
        advice,
    )


def memory_grows(table: Table) -> Diagnosis | None:
    """The memory of the process keeps growing: by 5 % and by 50 MB in each of the last three quarters of a run.

    Memory rises at first, until every buffer has its size, and may rise once more with the longest sample. A leak
    rises steadily. Quarters of five rows are the least that tell one from the other.
    """
    import numpy as np

    values = table.values("memory_gb")
    if len(values) < 20:
        return None
    quarters = [float(np.median(part)) for part in np.array_split(values, 4)]
    if any(after - before < max(0.05 * before, 0.05) for before, after in itertools.pairwise(quarters)):
        return None
    return Diagnosis(
        "memory-grows",
        f"the process holds more and more memory: {', '.join(f'{part:.2f}' for part in quarters)} GB in the quarters "
        "of the run",
        "Something keeps what it should drop: look for lists that grow in the environment, the reward function or a "
        "callback, and for tensors kept with their gradients.",
    )


def machine_busy(table: Table) -> Diagnosis | None:
    """The main thread could have run, but waited for a processor, in 30 % or more of the time.

    That is the median over the last third of the updates. It says nothing of how well the run learns. It says that
    speeds measured meanwhile are too low.
    """
    waited = table.late("cpu_wait")
    if table.rows < ENOUGH_ROWS or not waited >= 0.3:
        return None
    return Diagnosis(
        "machine-busy",
        f"the run waited for a processor in {waited:.0%} of its time: other work has them",
        "Speeds of this run are too low to compare. Run fewer programs at once, or give each its own processors "
        "(taskset), and no more threads than processors.",
        ill=False,
    )


def first_of(found: Sequence[Diagnosis | None]) -> list[Diagnosis]:
    """Those that are there."""
    return [diagnosis for diagnosis in found if diagnosis is not None]
