"""The command line: thin. Each command parses its arguments, calls one function, and says what came of it."""

from grouprl.cli.starting import ending_at_once

with ending_at_once():
    from grouprl.cli import train, train_lm, runs, export, doctor, bench, listing  # noqa: I001 - the order of the commands in --help
    from grouprl.cli.common import app, main

__all__ = ["app", "bench", "doctor", "export", "listing", "main", "runs", "train", "train_lm"]
