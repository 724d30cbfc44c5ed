"""What each choice of the robust default buys: one changed at a time, over environments and seeds.

    python benchmarks/envs_ablation.py --jobs 2      # about half an hour on two cores
    python benchmarks/envs_ablation.py --table       # only render the table again

The budgets are those of the presets. One line of results/envs_ablation.jsonl per run; runs already there with the same
configuration are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import envs_learning as learning

RESULTS = learning.RESULTS.with_name("envs_ablation.jsonl")
ENVIRONMENTS = ("Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "LunarLander-v3")
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one baseline for all moments": {"advantage": "batch_returns"},
    "a baseline for each moment": {"advantage": "timestep"},
    "a baseline for whole episodes": {"advantage": "outcome"},
    "one environment": {"n_envs": 1},
    "small batches, many small steps": {"n_envs": 1, "collect": "segments", "n_steps": 200, "minibatch_size": 32},
    "observations as they come": {"normalize_observations": False},
    "a large last layer": {"output_gain": 1.0},
    "a constant step size": {"lr_schedule": "constant", "kl_stop": 0.04},
    "no entropy bonus": {"entropy_coef": 0.0},
    "no repeated actions": {"sticky": 0.0},
    "learning from every batch": {"skip_without_signal": False},
}
"""What is changed, and the settings that change it."""


def plan(seeds: list[int]) -> list[learning.Run]:
    """One entry per seed, environment and variant, in this order, so that whatever is there when it stops compares."""
    return [
        {**run, "variant": variant}
        for seed in seeds
        for name in ENVIRONMENTS
        for variant, settings in VARIANTS.items()
        for run in learning.plan([name], [seed], None, "default", settings)
    ]


def render(runs: list[learning.Run]) -> str:
    """The Markdown report: a row for each variant, a column for each environment."""
    newest = {(run["variant"], run["name"]): run["config_hash"] for run in runs}
    found: dict[tuple[str, str], dict[int, learning.Run]] = {}
    for run in runs:
        if run["config_hash"] == newest[run["variant"], run["name"]]:
            found.setdefault((run["variant"], run["name"]), {})[run["seed"]] = run
    budgets = {run["name"]: run["budget"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for variant, settings in VARIANTS.items():
        cells = [found.get((variant, name), {}) for name in budgets]
        shown = [learning.with_interval(learning.means_of(list(cell.values()))) if cell else "" for cell in cells]
        fewer = [f" ({len(cell)} of {len(seeds)} seeds)" if len(cell) < len(seeds) else "" for cell in cells]
        shown = [text + note for text, note in zip(shown, fewer, strict=True)]
        changed = " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())
        rows.append([variant, f"`{changed}`" if changed else "", *shown])
    header = ["the robust default", "changed", *(f"{name}, {steps:,} steps" for name, steps in budgets.items())]
    machines = sorted({f"{run['machine']['cpu']}, {run['machine']['cores']} cores" for run in runs})
    about = (
        "Made by `python benchmarks/envs_ablation.py --table` from `envs_ablation.jsonl`. Greedy return of the final "
        f"policy over {learning.FINAL_EPISODES} episodes; interquartile mean over seeds {', '.join(map(str, seeds))} "
        "with a 95 % bootstrap interval. One choice is changed at a time, with what hangs on it: one environment "
        "repeats no actions, and a baseline for moments or whole episodes needs whole episodes. Nothing is tuned again "
        "after the change. With two or three seeds the interval is simply their range."
    )
    title = "# What each choice of the robust default buys"
    return f"{title}\n\n{about}\n\n{learning.markdown(header, rows)}\n{'; '.join(machines)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="render the table again, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON lines; the table goes beside them as .md")
    given = parser.parse_args()
    failed = 0
    if not given.table:
        wanted = plan([int(seed) for seed in given.seeds.split(",")])
        failed = learning.run_all(wanted, given.out, given.jobs, Path(sys.executable))
    learning.report(given.out, render, failed)


if __name__ == "__main__":
    main()
