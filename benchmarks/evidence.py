"""Methods beside each other on environments: evidence.yaml becomes rows, and the rows results/evidence.md.

python benchmarks/evidence.py                             # what is not measured yet, then the report; it goes on
python benchmarks/evidence.py --only sb3-ppo --seeds 0-1  # some of it
python benchmarks/evidence.py --table                     # only the report, and its pictures in docs/images

`grouprl bench` does the runs; docs/evidence.md says what they mean. PPO needs the peers' environment: README.md.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from grouprl.bench import figures, harness, tables
from grouprl.bench.plan import Scale
from grouprl.bench.results import Result, Results
from grouprl.bench.statistics import Array, iqm, on_grid
from grouprl.bench.tables import better, markdown, middle, number, with_interval
from reporting import ENOUGH, Benchmark, main, verdict

PPO = "sb3-ppo"
OURS = ("grouprl-preset", "grouprl-default")
PARTS = 100
"""Of the longest run: the grid on which curves are read off."""

PUBLISHED = {  # environment without its version: what PPO reached elsewhere, by RL Zoo and by CleanRL
    "CartPole": ("500 @100k", "490 @500k"),
    "Acrobot": ("-73.5 @1M", "-86 @500k"),
    "MountainCar": ("-110.4 @1M", ""),
    "MountainCarContinuous": ("88.3 @20k", ""),
    "Pendulum": ("-172 @100k", ""),
    "LunarLander": ("242 @1M (v2)", ""),
    "HalfCheetah": ("5819 @1M (v3)", "1443 @1M (v4)"),
    "Hopper": ("2410 @1M (v3)", "2383 @1M (v4)"),
    "Walker2d": ("3479 @1M (v3)", "2288 @1M (v4)"),
}


# --- each environment, and beside PPO --------------------------------------------------------------------------------
def of_one_processor(results: Results) -> tuple[Results, str]:
    """For what is said of seconds: of each environment, the runs on the processor that most of its methods ran on.

    Returns: them, and a line on those left out.
    """
    kept: list[Result] = []
    left_out: Counter[str] = Counter()
    for by in results.runs.values():
        runs = [run for one in by.values() for run in one]
        methods = Counter(name for one in by.values() for name in {run.processor for run in one})
        counted = Counter(run.processor for run in runs)
        most = max(counted, key=lambda name: (methods[name], counted[name], name))
        kept += [run for run in runs if run.processor == most]
        left_out += Counter({name: n for name, n in counted.items() if name != most})
    used = sorted({run.processor for run in kept})
    if len(used) == 1 and not left_out:
        return Results.of(kept), ""
    return Results.of(kept), (
        " Seconds compare within an environment only: they are of runs on the processor that most methods ran on there "
        f"({' or '.join(used)}); {sum(left_out.values())} runs on another one are left out."
    )


def each_environment(results: Results, timed: Results) -> str:
    """A line for each environment and method; seconds are of the runs in ``timed``."""
    reached = ["greedy: IQM [95 %]", "range", "sampled"]
    lines = [["environment", "method", "steps", "seeds", *reached, "CPU seconds", "steps per CPU second", "peak MB"]]
    for subject, methods in results.runs.items():
        for method, runs in methods.items():
            greedy = results.scores(subject, method, "greedy")
            clocks = [run.clock for run in timed.runs.get(subject, {}).get(method, ()) if run.clock]
            spent = [clock[-1][0] / clock[-1][1] for clock in clocks if clock[-1][1]]
            lines.append([
                subject, method, f"{runs[-1].steps:,}", str(len(runs)), with_interval([greedy]),
                f"{number(greedy.min())} to {number(greedy.max())}", middle(results.scores(subject, method, "sampled")),
                middle(np.array([clock[-1][1] for clock in clocks])), middle(np.array(spent)),
                middle(results.scores(subject, method, "peak_memory_mb")),
            ])  # fmt: skip
    return markdown(lines)


def ratio(ours: Array, others: Array, scale: Scale | None) -> str:
    """Of the normalised IQMs; nothing where there is no scale, or the others' is not above 0."""
    if scale is None:
        return ""
    low, high = scale
    own, other = ((float(iqm(scores)) - low) / (high - low) for scores in (ours, others))
    return f"{own / other:.2f}" if other > 0 else ""


def beside_ppo(results: Results, scales: dict[str, Scale]) -> str:
    """A line for each environment and method of grouprl that PPO has runs beside."""
    lines = [["environment", "method", "IQM [95 %]", "PPO: IQM [95 %]", "seeds", "ratio", "better", "verdict"]]
    for subject, methods in results.runs.items():
        ppo = results.scores(subject, PPO, "greedy")
        for method in OURS if len(ppo) else ():
            if method in methods:
                own = results.scores(subject, method, "greedy")
                lines.append([
                    subject, method, with_interval([own]), with_interval([ppo]), f"{len(own)}, {len(ppo)}",
                    ratio(own, ppo, scales.get(subject)), better([own], [ppo]), verdict([own], [ppo]),
                ])  # fmt: skip
    return markdown(lines) if len(lines) > 1 else ""


def in_words(results: Results) -> str:
    """One line for each method of grouprl: on how many environments it is above PPO, level with it, or below."""
    lines = []
    for method in OURS:
        words: dict[str, list[str]] = {}
        for subject, methods in results.runs.items():
            if method in methods and PPO in methods:
                sides = ([results.scores(subject, name, "greedy")] for name in (method, PPO))
                words.setdefault(verdict(*sides), []).append(subject)
        said = [f"{word} on {len(found)} ({', '.join(found)})" for word, found in sorted(words.items())]
        lines.append(f"- {method}, beside PPO: {'; '.join(said) or 'no environment has runs of both'}.\n")
    return "".join(lines)


# --- all environments ------------------------------------------------------------------------------------------------
def with_intervals(results: Results) -> Results:
    """The runs of methods on environments with two seeds or more; where there is one seed, there is no interval."""
    kept = {s: {m: runs for m, runs in by.items() if len(runs) > 1} for s, by in results.runs.items()}
    return Results({s: by for s, by in kept.items() if by})


def shared(results: Results, scales: dict[str, Scale]) -> Results:
    """The environments with a scale that PPO and grouprl's presets and default have, and the methods that have all.

    Of these three, those that have runs at all.
    """
    central = [name for name in (PPO, *OURS) if name in results.settings]
    subjects = [s for s, by in results.runs.items() if s in scales and all(name in by for name in central)]
    methods = [name for name in results.settings if subjects and all(name in results.runs[s] for s in subjects)]
    return results.only(methods, subjects)


def overall(results: Results, scales: dict[str, Scale]) -> str:
    """Normalised scores over all environments with a scale, each method beside PPO on those that both have."""
    several = with_intervals(results)
    compared = several if len(several.settings) > 1 and PPO in several.settings else results
    return tables.overall(compared, "greedy", scales, PPO)


# --- wall clock ------------------------------------------------------------------------------------------------------
def course(runs: list[Result]) -> tuple[Array, Array]:
    """Steps, and the IQM over seeds of the greedy curves there; a run that has ended stays where it ended.

    At the end of a run its final evaluation counts, which has more episodes than those on the way.
    """
    ended = [[*run.curve[:-1], (run.curve[-1][0], run.values["greedy"])] for run in runs]
    grid = np.linspace(0, max(curve[-1][0] for curve in ended), PARTS + 1)
    return grid, iqm(np.stack([on_grid(curve, grid) for curve in ended], axis=-1))


def first_reach(runs: list[Result], target: float) -> tuple[float, float] | None:
    """CPU seconds and steps after which the curve of a method is first at or above a target; None if it never is.

    The seconds are the IQM over seeds of those that the runs had spent at this step.
    """
    grid, curve = course(runs)
    there = np.flatnonzero(curve >= target)
    if not len(there):
        return None
    step = grid[there[0]]
    return float(iqm(np.array([on_grid(run.clock, np.array([step]))[0] for run in runs]))), float(step)


def wall_clock(results: Results) -> str:
    """For each environment what each method needs to reach PPO's final score; last, how often each is the first.

    A preset that sets nothing is the default, and its runs are the same ones: then both are the first.
    """
    beside = [by for by in results.runs.values() if PPO in by]
    methods = [method for method in results.settings if any(method in by for by in beside)]
    lines = [["environment", "PPO's final IQM", *methods, "first"]]
    wins = dict.fromkeys(methods, 0)
    for subject, by in results.runs.items():
        timed = {method: runs for method, runs in by.items() if all(run.clock for run in runs)}
        if PPO not in timed:
            continue
        _, ppo = course(timed[PPO])
        target = float(ppo[-1])
        if target <= ppo[0]:
            lines.append([subject, f"{number(target)}, not above its first", *[""] * len(methods), ""])
            continue
        found = {method: first_reach(runs, target) for method, runs in timed.items()}
        reached = {method: at[0] for method, at in found.items() if at is not None}
        first = [method for method, at in reached.items() if at == min(reached.values())] if len(timed) > 1 else []
        untrained = any(at is not None and at[1] == 0 for at in found.values())
        for method in [] if untrained else first:
            wins[method] += 1
        said = "none, an untrained policy has it" if untrained else ", ".join(first)
        lines.append([subject, number(target), *(_reached(found, method) for method in methods), said])
    if len(lines) == 1:
        return ""
    lines.append(["first on so many", "", *(str(wins[method]) for method in methods), ""])
    return markdown(lines)


def _reached(found: dict[str, tuple[float, float] | None], method: str) -> str:
    if method not in found:
        return ""
    at = found[method]
    return "not reached" if at is None else f"{number(at[0])} s, {at[1]:,.0f}"


# --- published figures -----------------------------------------------------------------------------------------------
def published(results: Results) -> str:
    """What PPO reached elsewhere, beside what it reaches here."""
    lines = [["environment", "steps here", "PPO here: IQM [95 %]", "RL Zoo", "CleanRL"]]
    for subject, by in results.runs.items():
        elsewhere = PUBLISHED.get(subject.rpartition("-v")[0])
        if PPO in by and elsewhere is not None:
            own = with_interval([results.scores(subject, PPO, "greedy")])
            lines.append([subject, f"{by[PPO][-1].steps:,}", own, *elsewhere])
    return markdown(lines)


# --- the report ------------------------------------------------------------------------------------------------------
INTRO = """# Methods beside each other

Made by `python benchmarks/evidence.py --table` from the rows in `evidence`. What they mean, and what to keep in mind:
[../../docs/evidence.md](../../docs/evidence.md).

## Runs

"""
SHORT = f"""
## In short

Environments on which the 95 % interval of the difference to PPO's greedy return leaves 0 out (above, below) or does not
(level), with {ENOUGH} seeds or more on both sides:

"""
EACH = """
## Each environment

Returns of the final policy, greedy and sampled, 100 episodes each. IQM: the mean of the middle half of the seeds. In
brackets: its 95 % interval. Seconds are those of training, of the processors; memory is the peak of the
process.{left_out}

"""
BESIDE = f"""
## Beside PPO

*Ratio*: of normalised scores, grouprl's over PPO's. *Better*: the probability that a run of grouprl returns more than
one of PPO. *Verdict*: above or below where the 95 % interval of the difference leaves 0 out, with {ENOUGH} seeds or
more on both sides; level where it does not. Where an environment needs no settings of its own, the preset is the
default, and both lines are of the same runs.

"""
OVERALL = """
## Over all environments

Normalised scores, on environments that have a scale. The difference to PPO and the probability of a higher score are of
the environments that both have. Once PPO and another method have two seeds on an environment, only such runs count.
0 and 1 are {scales}.

"""
CLOCK = f"""
## Wall clock

CPU seconds of training, and steps, until a method's greedy curve first reaches the final score of PPO, which is that of
`{PPO}`. The curve is the IQM over seeds, read off at {PARTS} evenly spaced steps, straight between evaluations; the
score is the IQM of PPO's final evaluations. The seconds are the IQM over seeds of those spent at this step; those of
`sbx-ppo` hold what it compiles. *First* is the method with the fewest seconds, where there are runs of another method
too.{{left_out}}

"""
PUBLISHED_INTRO = """
## Published figures of PPO

They are quoted, and not measured here: other versions of the environments, other budgets (after the @), one to three
seeds.

"""
SOURCES = (
    "\nRL Zoo: RL Baselines3 Zoo's benchmark.md (github.com/DLR-RM/rl-baselines3-zoo), one run each, settings tuned "
    "for each environment. CleanRL: its documentation of PPO (docs.cleanrl.dev), 3 seeds, one configuration for each "
    "family, returns of the last episodes of training.\n"
)


def report(benchmark: Benchmark) -> str:
    """results/evidence.md, and its pictures."""
    results, scales = benchmark.results, benchmark.plan.scales
    text = f"{INTRO}{benchmark.progress()}\n"
    if not results.runs:
        return text
    common = shared(with_intervals(results), scales)
    if not common.runs:
        common = shared(results, scales)
    text += SHORT + in_words(results)
    timed, left_out = of_one_processor(results)
    text += EACH.format(left_out=left_out) + each_environment(results, timed)
    text += benchmark.picture(
        "evidence-curves.png",
        lambda path: figures.curves(results, {s: scales[s] for s in common.runs}, path, benchmark.methods),
        "Greedy evaluations over steps",
    )
    text += BESIDE + beside_ppo(results, scales)
    ends = "; ".join(f"{s} {number(scales[s][0])} to {number(scales[s][1])}" for s in results.runs if s in scales)
    text += OVERALL.format(scales=ends) + overall(results, scales)
    if common.runs:
        says = f"Normalised scores on the {len(common.runs)} environments that all these have: {', '.join(common.runs)}"
        text += benchmark.picture(
            "evidence-scores.png",
            lambda path: figures.scores(common, "greedy", scales, path, benchmark.methods),
            says,
        )
    text += CLOCK.format(left_out=left_out) + wall_clock(timed)
    text += benchmark.picture(
        "evidence-seconds.png",
        lambda path: figures.seconds(timed, path, benchmark.methods),
        "Greedy evaluations over CPU seconds",
    )
    text += PUBLISHED_INTRO + published(results) + SOURCES
    return f"{text}\n{harness.made_of(benchmark.rows)}"


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "evidence", report))
