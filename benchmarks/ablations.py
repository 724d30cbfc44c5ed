"""Which choices of the robust default matter: ablations.yaml becomes rows, and the rows results/ablations.md.

python benchmarks/ablations.py                               # what is not measured yet, then the report; it goes on
python benchmarks/ablations.py --only 'epochs=*' --seeds 0-1 # some of it
python benchmarks/ablations.py --table                       # only the report

`grouprl bench` does the runs; docs/ablations.md says what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grouprl.bench import harness
from grouprl.bench.plan import Plan
from grouprl.bench.results import Results
from grouprl.bench.statistics import Array, mean_difference
from grouprl.bench.tables import markdown, normalised, with_difference, with_interval
from reporting import ENOUGH, Benchmark, main, verdict

DEFAULT = "default"


@dataclass(frozen=True)
class Change:
    """A change beside the default.

    Attributes:
        method: what it is called: a setting and its value. settings: this one, and what hangs on it.
        beside: normalised scores of the change and of the default, for each environment that both have runs of.
    """

    method: str
    settings: dict[str, Any]
    beside: dict[str, tuple[Array, Array]]

    @property
    def sides(self) -> tuple[list[Array], list[Array]]:
        return [ours for ours, _ in self.beside.values()], [others for _, others in self.beside.values()]

    @property
    def difference(self) -> float:
        """Over all environments."""
        return float(mean_difference(*self.sides))

    @property
    def word(self) -> str:
        return verdict(*self.sides, mean_difference)

    @property
    def with_it(self) -> str:
        """The settings that hang on the one that the change is called after."""
        rest = {name: value for name, value in self.settings.items() if name != self.method.partition("=")[0]}
        return ", ".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in rest.items()
        )

    def line(self, subjects: Sequence[str]) -> list[str]:
        """Differences on each environment, their mean, and a word for it."""
        each = [with_difference(*([side] for side in self.beside[s])) if s in self.beside else "" for s in subjects]
        seeds = sorted({len(ours) for ours in self.sides[0]})
        return [
            self.method, self.with_it, *each, with_difference(*self.sides, mean_difference), str(len(self.beside)),
            " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), self.word,
        ]  # fmt: skip


def changes(results: Results, plan: Plan) -> list[Change]:
    """Those that have runs beside the default's, the largest difference over all environments first."""
    settings = {cell.method: cell.settings for cell in plan.cells}
    usual = normalised(results, "greedy", plan.scales, DEFAULT)
    found = []
    for method in settings.keys() - {DEFAULT}:
        own = normalised(results, "greedy", plan.scales, method)
        beside = {subject: (own[subject], usual[subject]) for subject in own if subject in usual}
        if beside:
            found.append(Change(method, settings[method], beside))
    return sorted(found, key=lambda change: (-abs(change.difference), change.method))


def in_words(found: Sequence[Change]) -> str:
    """One line for each word, with the changes that it holds for."""
    lines: dict[str, list[str]] = {"below": [], "above": [], "level": [], "too few seeds": []}
    for change in found:
        lines[change.word].append(f"`{change.method}` ({change.difference:+.2f})")
    return "".join(f"- {said}: {', '.join(named)}\n" for said, named in lines.items() if named)


def table(found: Sequence[Change], subjects: Sequence[str]) -> str:
    header = ["change", "with it", *subjects, "all", "environments", "seeds", "verdict"]
    return markdown([header, *(change.line(subjects) for change in found)]) if found else ""


def usual_table(results: Results) -> str:
    """What the default reaches."""
    lines = [["environment", "steps", "seeds", "greedy: IQM [95 %]"]]
    for subject, by in results.runs.items():
        if DEFAULT in by:
            own = with_interval([results.scores(subject, DEFAULT, "greedy")])
            lines.append([subject, f"{by[DEFAULT][-1].steps:,}", str(len(by[DEFAULT])), own])
    return markdown(lines) if len(lines) > 1 else ""


INTRO = """# One choice of the robust default changed at a time

Made by `python benchmarks/ablations.py --table` from the rows in `ablations`. What they mean:
[../../docs/ablations.md](../../docs/ablations.md).

## Runs

"""
SHORT = f"""
## In short

Changes for which the 95 % interval of the difference to the default, over all environments, leaves 0 out (above, below)
or does not (level), with {ENOUGH} seeds or more on each; in brackets the difference of normalised scores.

"""
USUAL = """
## The default as it is

Greedy return of the final policy over 50 episodes. IQM: the mean of the middle half of the seeds. In brackets: its
95 % interval.

"""
CHANGES = f"""
## Changes

The difference to the default, in normalised scores: -1 is all that there is between a random policy and a good one. In
brackets: its 95 % interval by the stratified bootstrap over seeds. *With it*: what hangs on the change. *All*: the
mean of the differences over the environments that both have. The largest comes first. *Verdict*: above or below the
default where the interval of all leaves 0 out, with {ENOUGH} seeds or more of each on every environment; level where it
does not.

"""


def report(benchmark: Benchmark) -> str:
    """results/ablations.md."""
    text = f"{INTRO}{benchmark.progress()}\n"
    results = benchmark.results
    if not results.runs:
        return text
    found = changes(results, benchmark.plan)
    text += SHORT + in_words(found) + USUAL + usual_table(results) + CHANGES + table(found, list(results.runs))
    return f"{text}\n{harness.made_of(benchmark.rows)}"


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "ablations", report))
