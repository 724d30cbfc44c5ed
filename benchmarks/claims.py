"""The claims of the tutorial chapter, measured: claims/*.yaml become rows, and the rows results/claims.md.

python benchmarks/claims.py               # what is not measured yet, then the tables; it can be stopped and goes on
python benchmarks/claims.py --only cost   # one part: cost, stability or noise
python benchmarks/claims.py --only cost --again  # the part anew: for seconds, on a machine that does nothing else
python benchmarks/claims.py --table       # only the tables

`grouprl bench` does the runs; docs/claims.md says what they mean. PPO needs the peers' environment: README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import reporting
from grouprl.bench.rows import Row
from grouprl.bench.statistics import iqm
from grouprl.bench.tables import markdown, number
from reporting import HERE, Benchmark, Groups, measure

RESULTS = reporting.RESULTS / "claims"
PARTS = ("cost", "stability", "noise")

LEARNED = 0.5
"""The normalised score from which on a run has learned something that it can lose."""
STAYS = 3
"""Evaluations at the end of a run that must all be low for a collapse."""

BYTES = 16
"""Of a parameter in training: itself, its gradient, and two moments of Adam, in single precision."""


def read(part: str, folder: Path = RESULTS) -> Benchmark:
    """A part's file, with the rows that it has."""
    return Benchmark.read(HERE / "claims" / f"{part}.yaml", folder / part)


# --- no critic -------------------------------------------------------------------------------------------------------
def cost_table(groups: Groups) -> str:
    """Parameters, memory and seconds a step."""
    measured = ["parameters", "KB in training", "peak MB", "CPU µs a step", "µs a step", "cores"]
    lines = [["environment", "method", "seeds", *measured]]
    for (subject, method), rows in groups.items():
        cpu, wall = (
            float(np.median([row[name] / row["steps_done"] for row in rows])) * 1e6
            for name in ("train_cpu_seconds", "train_seconds")
        )
        lines.append([
            subject, method, str(len(rows)), f"{rows[0]['parameters']:,}", number(rows[0]["parameters"] * BYTES / 1e3),
            number(float(np.median([row["peak_memory_mb"] for row in rows]))), number(cpu), number(wall),
            f"{cpu / wall:.2f}",
        ])  # fmt: skip
    return markdown(lines)


# --- stable updates --------------------------------------------------------------------------------------------------
def collapsed(scores: Sequence[float]) -> bool:
    """Whether a run fell below half of its best and stayed there.

    Args:
        scores: normalised, of all evaluations in their order. A run whose best is below `LEARNED` had nothing to lose.
    """
    best = max(scores)
    return best >= LEARNED and len(scores) > STAYS and max(scores[-STAYS:]) < best / 2


def scores(row: Row, scale: tuple[float, float]) -> list[float]:
    """Normalised scores of the evaluations of a run, the last one included."""
    returns = [point["greedy"] for point in row["curve"]] + [row["greedy"]["mean"]]
    return [(value - scale[0]) / (scale[1] - scale[0]) for value in returns]


def stability_table(groups: Groups, scales: dict[str, tuple[float, float]]) -> str:
    """KL(old || new) of updates, and what became of the runs."""
    kl = ["KL: median", "99th percentile", "largest"]
    lines = [["environment", "clip", "epochs", "seeds", *kl, "IQM of the final return", "learned", "collapsed"]]
    for (subject, method), rows in groups.items():
        clip, _, epochs = method.rpartition("-")
        moved = np.concatenate([row["approx_kl"] for row in rows])
        median, high = np.quantile(moved, [0.5, 0.99], method="higher")
        curves = [scores(row, scales[subject]) for row in rows]
        lines.append([
            subject, {"clip": "0.2", "no-clip": "none"}[clip], epochs, str(len(rows)),
            *(f"{float(value):.3g}" for value in (median, high, moved.max())),
            number(float(iqm(np.array([row["greedy"]["mean"] for row in rows])))),
            str(sum(max(curve) >= LEARNED for curve in curves)), str(sum(map(collapsed, curves))),
        ])  # fmt: skip
    return markdown(lines)


# --- noise -----------------------------------------------------------------------------------------------------------
def noise_table(groups: Groups) -> str:
    """Final returns by the noise of training: a line for each method on an environment."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (subject, method), rows in groups.items():
        name, _, sigma = method.rpartition("-")
        found.setdefault((subject, name), {})[sigma] = [row["greedy"]["mean"] for row in rows]
    sigmas = sorted({sigma for cells in found.values() for sigma in cells}, key=float)
    lines = [["environment", "method", "seeds", *(f"sigma {sigma}" for sigma in sigmas)]]
    for (subject, name), cells in found.items():
        seeds = sorted({len(returns) for returns in cells.values()})
        lines.append([
            subject, name, " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))),
            *(_with_worst(cells.get(sigma, [])) for sigma in sigmas),
        ])  # fmt: skip
    return markdown(lines)


def _with_worst(returns: list[float]) -> str:
    if not returns:
        return ""
    worst = f" (worst {number(min(returns))})" if len(returns) > 1 else ""
    return number(float(np.mean(returns))) + worst


# --- the report ------------------------------------------------------------------------------------------------------
INTRO = """# The claims of the chapter

Made by `python benchmarks/claims.py --table` from the rows in `claims`. What they mean:
[../../docs/claims.md](../../docs/claims.md).
"""
COST = """
## No critic

Equal networks for the policy, batches, epochs and minibatches; medians over seeds. *KB in training*: parameters,
gradients, and Adam's two moments. *Peak*: of the whole process, with all that it imports. *Cores*: CPU seconds over
seconds; where it is far below 1 the machine was busy, and only CPU seconds count.

"""
STABILITY = f"""
## Stable updates

KL(old ‖ new) of each update, over all updates of all seeds, estimated on steps of the batch (k3). *Learned*: runs whose
best normalised score is {LEARNED:g} or more, with 0 and 1 as in `evidence.yaml`. *Collapsed*: those of them whose last
{STAYS} evaluations are all below half of the best.

"""
NOISE = """
## Noisy rewards

Mean greedy return without noise, after training with Gaussian noise on every reward; the worst seed in brackets. Sigma
counts in the size of a reward, which is 1 on CartPole and Acrobot and 6 on Pendulum. *preset* and *default*: grouprl's
preset, and its robust default. *outcome*: the chapter's estimator, with the robust default's other settings, but no
repeated actions. *formula*: the chapter's objective. *sb3-ppo*: Stable-Baselines3's PPO, RL-Zoo's settings.

"""


def report(folder: Path = RESULTS) -> str:
    """results/claims.md: a section for each part that has runs."""
    parts = {part: read(part, folder) for part in PARTS}
    cost, stability, noise = (parts[part].groups for part in PARTS)
    text = INTRO
    if cost:
        text += COST + cost_table(cost) + made(cost)
    if stability:
        text += STABILITY + stability_table(stability, parts["stability"].plan.scales) + made(stability)
    if noise:
        text += NOISE + noise_table(noise) + made(noise)
    return text


def made(groups: Groups) -> str:
    """The budgets of a part, and the machines it was measured on."""
    rows = [row for group in groups.values() for row in group]
    steps = dict.fromkeys(f"{row['steps']:,} on {row['subject']}" for row in rows)
    machines = dict.fromkeys(f"{row['machine']['processor']}, cores: {row['machine']['cores']}" for row in rows)
    return f"\nSteps: {', '.join(steps)}. {'; '.join(machines)}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--again", action="store_true", help="measure anew what has rows")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, help="runs at once; seconds of the part cost need 1, its default")
    arguments = parser.parse_args()
    status = 0
    for part in PARTS if not arguments.table else ():
        if arguments.only in (None, part):
            jobs = arguments.jobs or (1 if part == "cost" else None)
            out = RESULTS / part
            if arguments.again:
                (out / "rows.jsonl").unlink(missing_ok=True)
            options = [] if jobs is None else [f"--jobs={jobs}"]
            status = max(status, measure(HERE / "claims" / f"{part}.yaml", out, *options))
    (HERE / "results" / "claims.md").write_text(report(), encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
