"""Run folders near a path that is none, for messages."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def holds_runs(path: Path) -> list[Path]:
    """The run folders in a folder that is no run and no model itself, the newest first."""
    if any((path / name).is_file() for name in ("config.yaml", "config.json", "adapter_config.json")):
        return []
    with suppress(OSError):
        return sorted((c.parent for c in path.glob("*/config.yaml")), key=lambda run: run.stat().st_mtime, reverse=True)
    return []


def another_run(path: Path) -> str:
    """Which run folder to give instead of `path`, which is none: inside it or its runs, beside it, or under runs."""
    for place in (path, path / "runs", path.parent, Path("runs").absolute()):
        if runs := holds_runs(place):
            shown = os.path.relpath(runs[0])
            many = f"{os.path.relpath(place)} holds {len(runs)} runs; the newest" if len(runs) > 1 else "There"
            return f"{many} is {shown}." if len(shown) < len(str(runs[0])) else f"{many} is {runs[0]}."
    return "Give the folder that `grouprl train` made."
