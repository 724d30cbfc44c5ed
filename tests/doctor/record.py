"""Records the metrics of runs: healthy ones, which the doctor must find nothing wrong with, and ill ones.

Each healthy run is that of a preset or a recipe, made with its own settings, at its default seed or one of those that
it names, and nothing else::

    grouprl train CartPole-v1 --out healthy-runs/CartPole-v1 --no-video --track none
    grouprl train CartPole-v1 --preset formula --out healthy-runs/formula --no-video --track none
    grouprl train Ant-v5 --preset locomotion --out healthy-runs/locomotion --no-video --track none
    grouprl train-lm nth-word --seed 0 --out healthy-runs/nth-word --track none
    ...
    python tests/doctor/record.py healthy healthy-runs/*

For each folder this writes `healthy/NAME.csv`, with the columns that rules read and four digits of each number, and an
entry in `healthy/runs.yaml`, with the settings that rules read. `ill/nth-word-seed42` is the recipe at its default
seed with another estimator: after 60 steps all completions of a group are copies, and the accuracy stays at 0.74::

    grouprl train-lm nth-word --out ill-runs/nth-word-seed42 --set advantage=outcome --set scale_rewards=none
    python tests/doctor/record.py ill ill-runs/*
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import yaml

from grouprl.doctor.examine import goal_of, is_language
from grouprl.runs import RunFolder, read_metrics

COLUMNS = (
    "step", "return_mean", "return_batch", "eval_return", "episodes", "skipped_batches", "degenerate_groups",
    "policy_entropy", "policy_std", "approx_kl", "clip_fraction", "reward", "eval_reward", "eval_accuracy", "entropy",
    "kl", "clip_ratio/region_mean", "frac_reward_zero_std", "frac_duplicates", "length_reward_correlation",
    "completions/clipped_ratio", "completions/mean_length", "episodes/truncated", "learning_rate", "memory_gb",
    "cpu_wait",
)  # fmt: skip
SETTINGS = (
    "lr_schedule", "learning_rate", "kl_target", "reset_each_batch", "master_dtype", "max_completion_length",
)  # fmt: skip


def record(into: Path, path: Path) -> dict[str, Any]:
    """Write the metrics of a run; returns its entry in runs.yaml."""
    folder = RunFolder.open(path)
    if not folder.is_finished():
        raise SystemExit(f"{path} is not finished")
    config, metrics = folder.read_config(), read_metrics(folder.metrics_path)
    columns = [name for name in COLUMNS if name in metrics]
    with (into / f"{path.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        rows = zip(*(metrics[name] for name in columns), strict=True)
        writer.writerows(["" if math.isnan(x) else f"{x:.4g}" for x in row] for row in rows)
    settings = {name: config["config"][name] for name in SETTINGS if name in config["config"]}
    return {"language_model": is_language(config), "goal": goal_of(folder), "settings": settings}


def main() -> None:
    """Record the runs in the folders that are given, after the name of the folder to record into."""
    into = Path(__file__).parent / sys.argv[1]
    runs = into / "runs.yaml"
    entries = yaml.safe_load(runs.read_text()) if runs.exists() else {}
    entries |= {path.name: record(into, path) for path in map(Path, sys.argv[2:])}
    runs.write_text(yaml.safe_dump(dict(sorted(entries.items()))))


if __name__ == "__main__":
    main()
