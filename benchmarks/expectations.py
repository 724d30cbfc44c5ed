"""Write into each preset what to expect of it, from the runs in results/envs_learning.jsonl.

python benchmarks/expectations.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "envs_learning.jsonl"
PRESETS = HERE.parent / "src" / "grouprl" / "envs" / "presets"


def expectation(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean greedy return over seeds with its spread, and how it was measured."""
    means = [run["mean"] for run in runs]
    return {
        "mean_return": round(float(np.mean(means)), 2),
        "lowest_seed": round(min(means), 2),
        "highest_seed": round(max(means), 2),
        "seeds": sorted(run["seed"] for run in runs),
        "steps": runs[0]["budget"],
        "measured": f"greedy, {runs[0]['episodes']} episodes per seed; "
        f"python benchmarks/envs_learning.py --env {runs[0]['name']}",
    }


def main() -> None:
    """Replace the ``expect`` block, always the last of a preset file."""
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        if run["mode"] == "preset":
            groups[run["name"]][run["seed"]] = run  # the newest of a seed counts
    for name, by_seed in groups.items():
        runs = list(by_seed.values())
        path = PRESETS / f"{name}.yaml"
        head = path.read_text(encoding="utf-8").split("expect:\n")[0]
        block = yaml.safe_dump({"expect": expectation(runs)}, sort_keys=False, width=110, default_flow_style=None)
        path.write_text(head + block, encoding="utf-8")
        print(f"{name}: {expectation(runs)['mean_return']} over {len(runs)} seeds")


if __name__ == "__main__":
    main()
