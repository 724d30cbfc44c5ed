"""What the presets of the language arena reach: accuracy on held-out questions before and after, over seeds.

    python benchmarks/lm_presets.py                               # all presets, seeds 0, 1, 2: about 15 minutes
    python benchmarks/lm_presets.py --preset tiny --seeds 0,1,2,3,42 # one of them; the newest run of a seed counts
    python benchmarks/lm_presets.py --table                       # render again, run nothing

Each run is the command of the README, ``grouprl train-lm PRESET --seed SEED``, in a process of its own. What it writes
in summary.json is appended to results/lm_presets.jsonl; from that come the table, the ``expect`` block of each preset,
and the learning curves in docs/images (of the runs that still lie in build/lm-presets).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import measuring

HERE = Path(__file__).resolve().parent
LOG, PAGE = HERE / "results" / "lm_presets.jsonl", HERE / "results" / "lm_presets.md"
PRESETS = HERE.parent / "src" / "grouprl" / "lm" / "run" / "presets"
IMAGES = HERE.parent / "docs" / "images"
RUNS = HERE.parent / "build" / "lm-presets"
DRAWN = ("nth-word", "arithmetic")

Run = dict[str, Any]


def measure(preset: str, seed: int) -> None:
    """Train once and append what it reached."""
    out = RUNS / f"{preset}-{seed}"
    line = [sys.executable, "-m", "grouprl", "train-lm", preset, "--seed", str(seed), "--out", str(out), "--overwrite"]
    whole = measuring.run_command([*line, "--quiet", "--track", "none"])
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    record = {
        "preset": preset, "seed": seed, "summary": summary, "command": whole, "commit": measuring.commit(),
        "machine": measuring.machine(), "versions": measuring.versions("grouprl", "torch", "transformers"),
    }  # fmt: skip
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{preset} seed {seed}: {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}", flush=True)


def newest() -> dict[str, list[Run]]:
    """Preset -> its newest run of each seed, by seed."""
    found: dict[str, dict[int, Run]] = {}
    for line in LOG.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found.setdefault(run["preset"], {})[run["seed"]] = run
    return {preset: [runs[seed] for seed in sorted(runs)] for preset, runs in sorted(found.items())}


def held_out(preset: str) -> str:
    """What a preset is evaluated on."""
    recipe = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text(encoding="utf-8"))
    return f"{recipe.get('n_eval', 256)} {'starts' if 'environment' in recipe else 'questions'}"


def spread(runs: Sequence[Run], name: str, digits: int) -> str:
    """Median and range of a number of the summaries."""
    values = [run["summary"][name] for run in runs]
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(found: dict[str, list[Run]]) -> str:
    """The Markdown page."""
    runs = [run for of_preset in found.values() for run in of_preset]
    versions = ", ".join(sorted({f"{name} {v}" for run in runs for name, v in run["versions"].items()}))
    machines = "; ".join(sorted({f"{run['machine']['cpu']}, {run['machine']['cores']} cores" for run in runs}))
    lines = [
        "# Presets of the language arena", "",
        f"Made by `python benchmarks/lm_presets.py --table` from `{LOG.name}`. Greedy accuracy on held-out "
        "questions, or the share of an environment's held-out starts that end solved; median (range) over seeds. "
        "Training seconds leave out loading, evaluation and files, the whole command has them.",
        f"  \n{machines}; {versions}; commit {', '.join(sorted({run['commit'] for run in runs}))}.", "",
        "| preset | seeds | held out | accuracy before | after | training s | whole command s | peak memory (GB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for preset, of_preset in found.items():
        seeds = ", ".join(str(run["seed"]) for run in of_preset)
        whole = statistics.median(run["command"]["wall_seconds"] for run in of_preset)
        numbers = [spread(of_preset, name, 3) for name in ("accuracy_before", "accuracy_after")]
        cells = [preset, seeds, held_out(preset), *numbers, spread(of_preset, "train_seconds", 0), f"{whole:.0f}"]
        lines.append("| " + " | ".join([*cells, spread(of_preset, "peak_memory_gb", 2)]) + " |")
    return "\n".join(lines) + "\n"


def expect(preset: str, runs: Sequence[Run]) -> None:
    """Replace the ``expect`` block, the last of a preset's file."""
    middle = {n: statistics.median(r["summary"][n] for r in runs) for n in ("accuracy_before", "accuracy_after")}
    block = {
        **{name: round(value, 3) for name, value in middle.items()},
        "seeds": [run["seed"] for run in runs],
        "train_seconds": round(statistics.median(run["summary"]["train_seconds"] for run in runs)),
        "measured": f"greedy, {held_out(preset)} held out, two cores, medians; python benchmarks/lm_presets.py",
    }
    path = PRESETS / f"{preset}.yaml"
    head = path.read_text(encoding="utf-8").split("expect:\n")[0]
    text = yaml.safe_dump({"expect": block}, sort_keys=False, width=110, default_flow_style=None)
    path.write_text(head + text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    parser.add_argument("--preset", action="append", choices=names, help="default: all; may be repeated")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--table", action="store_true", help="render again, run nothing")
    given = parser.parse_args()
    if not given.table:
        for seed in map(int, given.seeds.split(",")):
            for preset in given.preset or names:
                measure(preset, seed)
    found = newest()
    PAGE.write_text(table(found), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    from grouprl.runs.plots import plot_runs

    for preset, runs in found.items():
        expect(preset, runs)
        folders = [RUNS / f"{preset}-{run['seed']}" for run in runs]
        if preset in DRAWN and all(folder.is_dir() for folder in folders):
            plot_runs(folders, IMAGES / f"{preset}.png", y="eval_accuracy")


if __name__ == "__main__":
    main()
