"""The command line, run in the process of a test."""

from __future__ import annotations

import sys
from pathlib import Path

from grouprl import cli


def call(*arguments: str | Path) -> int:
    """Run the entry point as the shell would; returns the exit status."""
    argv, sys.argv = sys.argv, ["grouprl", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
    return 0
