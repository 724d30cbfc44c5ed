"""Which choices of the robust default matter: ablations.yaml becomes rows, and the rows results/ablations.md.

python benchmarks/ablations.py                               # what is not measured yet, then the report; it goes on
python benchmarks/ablations.py --only 'epochs=*' --seeds 0-1 # some of it
python benchmarks/ablations.py --table                       # only the report

`grouprl bench` does the runs; docs/ablations.md says what they mean.
"""

from __future__ import annotations

import json
from typing import Any

from grouprl.bench import harness
from grouprl.bench.plan import Scale
from grouprl.bench.results import Results
from grouprl.bench.statistics import Array, mean_difference
from grouprl.bench.tables import markdown, normalised, with_difference, with_interval
from reporting import ENOUGH, Benchmark, main, verdict

DEFAULT = "default"


def sides(results: Results, scales: dict[str, Scale], method: str) -> dict[str, tuple[Array, Array]]:
    """Normalised scores of a change and of the default, for each environment that both have runs of."""
    own, usual = (normalised(results, "greedy", scales, name) for name in (method, DEFAULT))
    return {subject: (own[subject], usual[subject]) for subject in own if subject in usual}


def changed(settings: dict[str, Any], method: str) -> str:
    """The settings that a change needs besides the one that it is called after."""
    rest = {name: value for name, value in settings.items() if name != method.partition("=")[0]}
    return ", ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in rest.items())


def line(
    method: str, beside: dict[str, tuple[Array, Array]], settings: dict[str, Any], subjects: list[str]
) -> list[str]:
    """A change beside the default: differences on each environment and on all of both, and a word for the last."""
    ours, usual = [own for own, _ in beside.values()], [other for _, other in beside.values()]
    each = [with_difference(*([side] for side in beside[s])) if s in beside else "" for s in subjects]
    seeds = sorted({len(scores) for scores in ours})
    return [
        method, changed(settings, method), *each, with_difference(ours, usual, mean_difference), str(len(ours)),
        " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), verdict(ours, usual, mean_difference),
    ]  # fmt: skip


def table(benchmark: Benchmark) -> str:
    """A line for each change that has runs beside the default's, the largest difference over all environments first."""
    results, scales = benchmark.results, benchmark.plan.scales
    settings = {cell.method: cell.settings for cell in benchmark.plan.cells}
    subjects = list(results.runs)
    found = []
    for method in benchmark.methods:
        beside = sides(results, scales, method)
        if method != DEFAULT and beside:
            ours, usual = zip(*beside.values(), strict=True)
            found.append((-abs(float(mean_difference(ours, usual))), line(method, beside, settings[method], subjects)))
    found.sort(key=lambda one: one[0])
    header = ["change", "with it", *subjects, "all", "environments", "seeds", "verdict"]
    return markdown([header, *(cells for _, cells in found)]) if found else ""


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

"""
USUAL = """
## The default as it is

Greedy return of the final policy over 100 episodes. IQM: the mean of the middle half of the seeds. In brackets: its
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
    if not benchmark.results.runs:
        return text
    text += USUAL + usual_table(benchmark.results) + CHANGES + table(benchmark)
    return f"{text}\n{harness.made_of(benchmark.rows)}"


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "ablations", report))
