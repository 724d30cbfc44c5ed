"""Accuracy against seconds of training: grouprl beside TRL on "nth-word", the same hyper-parameters, several seeds.

    python benchmarks/lm_learning.py                    # both sides in turn, seeds 0, 1, 2: about 80 minutes
    python benchmarks/lm_learning.py --side grouprl     # one side alone
    python benchmarks/lm_learning.py --table            # write the table and the picture again, measure nothing

What both sides do is `lm_work.TASK`: the same weights, the same training prompts in the same order, the same held-out
questions, optimizer, batch and loss. Sampling has each library's own random numbers, so steps agree in distribution and
not one by one. Evaluation is greedy, and the clock stands still meanwhile. Each run is a process of its own and a line
of results/lm_learning.jsonl; the newest run of each side and seed counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_speed
import lm_work
import measuring

RESULTS = lm_speed.RESULTS
LOG = RESULTS / "lm_learning.jsonl"
PICTURE = RESULTS.parent.parent / "docs" / "images" / "lm-learning.png"
WORKERS = {
    "grouprl": (lm_speed.OURS, "lm_worker_grouprl.py", 120.0),
    "trl": (lm_speed.PEER, "lm_worker_trl.py", 1080.0),
}
LEVELS = (0.5, 0.7, 0.8, 0.9)


def measure(sides: list[str], seeds: list[int]) -> None:
    """Every side once per seed, taking turns."""
    for seed in seeds:
        for side in sides:
            python, worker, seconds = WORKERS[side]
            given = ("--work", "nth-word", "--seed", str(seed), "--seconds", str(seconds))
            result = lm_speed.run(python, worker, *given)
            with LOG.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"side": side, "machine": measuring.machine(), "commit": measuring.commit(), **result})
                    + "\n"
                )
            last = result["curve"][-1]
            print(f"{side} seed {seed}: {last['accuracy']:.3f} after {last['step']} steps, {last['seconds']:.0f} s")


def reached(curve: list[dict[str, float]], level: float) -> dict[str, float] | None:
    """The first point of the curve at or above ``level``."""
    return next((point for point in curve if point["accuracy"] >= level), None)


def newest() -> dict[str, dict[int, dict[str, Any]]]:
    """Side -> seed -> its newest run."""
    runs: dict[str, dict[int, dict[str, Any]]] = {side: {} for side in WORKERS}
    for line in LOG.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        runs[run["side"]][run["seed"]] = run
    return {side: dict(sorted(seeds.items())) for side, seeds in runs.items() if seeds}


def _spread(values: list[float | None], digits: int) -> str:
    """Median and range; a seed that never got there is "not reached"."""
    if all(value is None for value in values):
        return "not reached"
    known = sorted(float("inf") if value is None else value for value in values)
    middle = statistics.median(known)
    shown = [f"{v:.{digits}f}" if v < float("inf") else "not reached" for v in (middle, known[0], known[-1])]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def table() -> str:
    """The Markdown page."""
    runs = newest()
    every = [run for seeds in runs.values() for run in seeds.values()]
    versions = sorted({item for run in every for item in run["versions"].items()})
    machine = every[0]["machine"]
    common = min(int(run["curve"][-1]["step"]) for run in every)
    lines = [
        "# Learning nth-word, accuracy against seconds", "",
        "Made by `python benchmarks/lm_learning.py --table` from `lm_learning.jsonl`. SmolLM2-135M-Instruct,",
        f"8 prompts x 8 completions a step; greedy accuracy on {lm_work.TASK.held_out} held-out questions every "
        f"{lm_work.TASK.evaluate_every} steps.",
        "Median (range) over seeds. Seconds are of training; evaluating is left out.  ",
        f"{machine['cpu']}, {machine['cores']} cores, {lm_work.THREADS} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions) + ".", "",
        f"| side | seeds | seconds a step | accuracy after {common} steps | seconds to that | at the end | after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for side, seeds in runs.items():
        curves = [run["curve"] for run in seeds.values()]
        last, then = [c[-1] for c in curves], [next(p for p in c if p["step"] == common) for c in curves]
        cells = [
            side,
            ", ".join(map(str, seeds)),
            _spread([p["seconds"] / p["step"] for p in last], 2),
            _spread([p["accuracy"] for p in then], 2),
            _spread([p["seconds"] for p in then], 0),
            _spread([p["accuracy"] for p in last], 2),
            f"{statistics.median(p['step'] for p in last):.0f} steps, "
            f"{statistics.median(p['seconds'] for p in last):.0f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for field in ("step", "seconds"):
        names = " | ".join(f"{field}s to {level}".replace("secondss", "seconds") for level in LEVELS)
        lines += ["", f"| side | {names} |", "| --- |" + " --- |" * len(LEVELS)]
        for side, seeds in runs.items():
            points = [[reached(run["curve"], level) for run in seeds.values()] for level in LEVELS]
            cells = [_spread([p[field] if p else None for p in row], 0) for row in points]
            lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path) -> None:
    """Accuracy against seconds and against steps, a line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, (side, seeds) in zip(("C0", "C1"), newest().items(), strict=False):
        for i, run in enumerate(seeds.values()):
            curve = run["curve"]
            for axes, field in ((left, "seconds"), (right, "step")):
                axes.plot(
                    [point[field] for point in curve],
                    [point["accuracy"] for point in curve],
                    color=colour,
                    label=side if i == 0 else None,
                )
    left.set(xlabel="seconds of training", ylabel="greedy held-out accuracy", ylim=(0, 1))
    right.set(xlabel="optimizer steps")
    left.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", action="append", choices=list(WORKERS), help="default: both; may be repeated")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if not given.table:
        subprocess.run([str(lm_speed.OURS), str(lm_speed.HERE / "lm_work.py")], check=True)
        measure(given.side or list(WORKERS), [int(seed) for seed in given.seeds.split(",")])
    (RESULTS / "lm_learning.md").write_text(table(), encoding="utf-8")
    draw(PICTURE)
    print(f"wrote {RESULTS / 'lm_learning.md'} and {PICTURE}", file=sys.stderr)


if __name__ == "__main__":
    main()
