"""Write into each preset what to expect of it, from rows of `grouprl bench`.

python benchmarks/expectations.py

Rows of evidence.yaml and presets.yaml in results/evidence and results/presets, of a preset as it is. A preset keeps
what it says as long as there are fewer seeds than that was measured with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grouprl.bench.rows import Row
from grouprl.envs import presets
from reporting import HERE, RESULTS, Benchmark

FILES = ("evidence", "presets")
PRESETS = HERE.parent / "src" / "grouprl" / "envs" / "presets"


def expectation(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Mean greedy return over seeds with its spread, and the command that measures it. ``name``: of the rows' file."""
    means = [row["greedy"]["mean"] for row in rows]
    return {
        "mean_return": round(float(np.mean(means)), 2),
        "lowest_seed": round(min(means), 2),
        "highest_seed": round(max(means), 2),
        "seeds": sorted(row["seed"] for row in rows),
        "steps": rows[0]["steps"],
        "measured": f"greedy, {rows[0]['greedy']['episodes']} episodes per seed; "
        f"grouprl bench benchmarks/{name}.yaml --only '{rows[0]['method']}/{rows[0]['subject']}'",
    }


def with_expectation(text: str, expected: dict[str, Any]) -> str:
    """A preset's file with another ``expect`` block, which is always the last."""
    block = yaml.safe_dump({"expect": expected}, sort_keys=False, width=200, default_flow_style=None)
    return text.split("expect:\n")[0] + block


def update(results: Path = RESULTS, folder: Path = PRESETS) -> dict[str, dict[str, Any]]:
    """Replace the blocks of presets that rows say more of; returns these blocks by preset."""
    written = {}
    for name in FILES:
        for rows in Benchmark.read(HERE / f"{name}.yaml", results / name).groups.values():
            named = rows[0]["preset"]
            if named is None:
                continue
            preset = presets.load(named)
            as_it_is = (rows[0]["env_id"], rows[0]["steps"]) == (preset.env_id, preset.total_timesteps)
            if as_it_is and not rows[0]["settings"] and len(rows) >= len(preset.expect.get("seeds", [])):
                path = folder / f"{named}.yaml"
                written[named] = expectation(name, rows)
                path.write_text(with_expectation(path.read_text(encoding="utf-8"), written[named]), encoding="utf-8")
    return written


if __name__ == "__main__":
    for preset, expected in update().items():
        print(f"{preset}: {expected['mean_return']} over {len(expected['seeds'])} seeds")
