"""Tables of runs: interquartile means with intervals, and how often one setting beats another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grouprl.bench.plan import Scale
from grouprl.bench.results import RETURNS, Result, Results
from grouprl.bench.statistics import FEW_SEEDS, Array, difference, improvement, interval, iqm
from grouprl.printing import in_markdown

_METHOD = (
    "IQM: the mean of the middle half of the runs. In brackets: its 95 % interval by the stratified bootstrap over "
    "seeds. `{column}`: the probability that a run of this setting has a larger `{metric}` than one of {reference}, "
    "with its interval; ties count half."
)


_ALIKE = 1.05
"""Numbers of steps count as the same up to this factor."""


def method(metric: str, reference: str) -> str:
    """How to read a table of a metric whose settings are compared with ``reference``."""
    return _METHOD.format(column=_comparison(metric), metric=metric, reference=reference)


def _comparison(metric: str) -> str:
    """The name of the column that compares: more is better for returns only."""
    return "better" if metric in RETURNS else "larger"


def number(value: float) -> str:
    """Four significant digits at most, no exponent; nothing for what is not known."""
    if not np.isfinite(value):
        return ""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def with_interval(strata: list[Array]) -> str:
    """The IQM of strata, and its interval where there is one."""
    if not strata or not all(len(stratum) for stratum in strata):
        return ""
    found = interval(iqm, strata)
    text = number(float(iqm(*strata)))
    return text if found is None else f"{text} [{number(float(found[0]))}, {number(float(found[1]))}]"


def better(ours: list[Array], others: list[Array]) -> str:
    """The probability that a run of ours scores more than one of the others', with its interval where there is one."""
    if not all(len(stratum) for stratum in (*ours, *others)):
        return ""
    found = interval(improvement, ours, others)
    text = f"{float(improvement(ours, others)):.2f}"
    return text if found is None else f"{text} [{float(found[0]):.2f}, {float(found[1]):.2f}]"


def with_difference(
    ours: Sequence[Array], others: Sequence[Array], statistic: Callable[..., Array] = difference
) -> str:  # fmt: skip
    """The IQM of ours less that of the others, of normalised scores, with its interval where there is one.

    ``statistic`` is another difference of two groups of strata.
    """
    if not all(len(stratum) for stratum in (*ours, *others)):
        return ""
    found = interval(statistic, ours, others)
    text = f"{float(statistic(ours, others)):+.3f}"
    return text if found is None else f"{text} [{float(found[0]):+.3f}, {float(found[1]):+.3f}]"


def reference_of(results: Results, reference: str | None) -> str:
    """The setting that others are compared with: the one named, or the first."""
    return results.settings[0] if reference is None else reference


def table(results: Results, metric: str, reference: str | None = None) -> str:
    """Markdown: a line for each subject and setting. Raises UsageError if no run has the metric."""
    results.check_metric(metric)
    against = reference_of(results, reference)
    others = [name for name in ("greedy", "sampled", "train_seconds", "peak_memory_mb") if name != metric]
    others = [name for name in others if any(_has(results, subject, name) for subject in results.runs)]
    shown = {"train_seconds": "seconds", "peak_memory_mb": "MB"}
    header = ["subject", "setting", "steps", "seeds", f"{metric}: IQM [95 %]", "range", _comparison(metric)]
    lines = [[*header, *(shown.get(name, name) for name in others)]]
    for subject, settings in results.runs.items():
        for setting, runs in settings.items():
            scores = results.scores(subject, setting, metric)
            spread = f"{number(scores.min())} to {number(scores.max())}" if len(scores) else ""
            beside = results.scores(subject, against, metric)
            failed = results.failed[subject, setting]
            lines.append([
                subject, setting, _range([run.trained or run.steps for run in runs]),
                f"{len(runs)} of {len(runs) + failed}" if failed else str(len(runs)),
                with_interval([scores]), spread,
                "" if setting == against or not len(beside) else better([scores], [beside]),
                *(middle(results.scores(subject, setting, name)) for name in others),
            ])  # fmt: skip
    return markdown(lines)


def _range(steps: Sequence[float]) -> str:
    """Numbers of steps: the most, or from the least to the most where they do not do for one another."""
    low, high = min(steps), max(steps)
    return f"{high:,.0f}" if _alike(low, high) else f"{low:,.0f} to {high:,.0f}"


def _alike(low: float, high: float) -> bool:
    """Whether two numbers of steps may stand for each other."""
    return high <= _ALIKE * low


def _has(results: Results, subject: str, metric: str) -> bool:
    return any(len(results.scores(subject, setting, metric)) for setting in results.runs[subject])


def middle(values: Array) -> str:
    """The IQM of values, without an interval; nothing of none."""
    return number(float(iqm(values))) if len(values) else ""


def normalised(results: Results, metric: str, scales: Mapping[str, Scale], setting: str) -> dict[str, Array]:
    """Scores of a setting on each subject that has a scale and runs of it: 0 and 1 are what the scale names."""
    found = {}
    for subject, (low, high) in scales.items():
        scores = results.scores(subject, setting, metric) if subject in results.runs else np.empty(0)
        if len(scores):
            found[subject] = (scores - low) / (high - low)
    return found


def overall(results: Results, metric: str, scales: Mapping[str, Scale], reference: str | None = None) -> str:
    """Markdown: normalised scores over all subjects, each setting beside the reference on the subjects of both."""
    against = reference_of(results, reference)
    beside = normalised(results, metric, scales, against)
    lines = [["setting", "subjects", "normalised IQM [95 %]", f"less that of {against}", "better"]]
    for setting in results.settings:
        own = normalised(results, metric, scales, setting)
        both = [subject for subject in own if subject in beside]
        compared = ["", ""]
        if setting != against and both:
            ours, others = [own[s] for s in both], [beside[s] for s in both]
            compared = [with_difference(ours, others), better(ours, others)]
        if own:
            lines.append([setting, str(len(own)), with_interval(list(own.values())), *compared])
    return markdown(lines)


def warnings(results: Results) -> list[str]:
    """What keeps a table from saying what it seems to say."""
    notes = list(results.notes)
    few = sorted({len(runs) for by in results.runs.values() for runs in by.values() if len(runs) < FEW_SEEDS})
    if few:
        notes.append(
            f"some settings have {few[0]} seed{'s' if few[0] > 1 else ''}: with fewer than {FEW_SEEDS} no difference "
            "is sure, and an interval is hardly more than the range"
        )
    for subject, by in results.runs.items():
        numbers = {len(runs) for runs in by.values()}
        if len(numbers) > 1:
            notes.append(f"settings on {subject} have different numbers of seeds: {min(numbers)} to {max(numbers)}")
        for setting, runs in by.items():
            if failed := results.failed[subject, setting]:
                notes.append(
                    f"{failed} of {len(runs) + failed} runs of {setting} on {subject} failed, and its score is that of "
                    "the others"
                )
        notes += _of_steps(subject, by)
        budgets = {run.steps for runs in by.values() for run in runs}
        if len(budgets) > 1:
            notes.append(f"runs on {subject} have different budgets: {min(budgets):,} to {max(budgets):,} steps")
    return notes


def _of_steps(subject: str, by: Mapping[str, Sequence[Result]]) -> list[str]:
    """What is to be said of the steps that the settings of a subject were trained for, beside their budgets."""
    done = {setting: [run.trained or run.steps for run in runs] for setting, runs in by.items()}
    most = max(done, key=lambda setting: max(done[setting]))
    least = min(done, key=lambda setting: min(done[setting]))
    low, high = min(done[least]), max(done[most])
    budget = max(run.steps for run in by[most])
    notes = []
    if not _alike(budget, high):
        notes.append(
            f"{most} on {subject} was trained for {high:,.0f} steps where {budget:,} were asked for: a batch is "
            "always finished; ask for more steps, or for smaller batches"
        )
    if most != least and not _alike(low, high):
        notes.append(
            f"settings on {subject} were trained for different numbers of steps: {low:,.0f} ({least}) to {high:,.0f} "
            f"({most}); more steps are an advantage"
        )
    return notes


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(text: str) -> str:
    """Text that ends neither its cell nor its line, and is no HTML."""
    return in_markdown(text).replace("|", "\\|")
