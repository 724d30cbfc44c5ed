"""The command that examines a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from grouprl.cli.common import app
from grouprl.printing import show


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="A run folder, of either arena, finished or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what is wrong with a run, and what to try.

    The exit code is 0 if nothing is, 1 if something is, 2 if the folder cannot be read.
    """
    from grouprl.doctor import examine, to_text

    found = examine(run)
    ill = any(one.ill for one in found)
    if as_json:
        print(json.dumps({"run": str(run), "healthy": not ill, "diagnoses": [asdict(one) for one in found]}, indent=2))
    else:
        show(to_text(found))
    if ill:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, of either arena, finished or not.")],
) -> None:
    """Write report.html anew into a run folder.

    It has settings, curves, the evaluation, what the doctor says, and links. Where a GRPOTrainer in Python wrote
    transcripts.jsonl, it is transcripts.html instead: what the model wrote, group by group.
    """
    from grouprl.doctor.examine import is_language
    from grouprl.doctor.report import write_report
    from grouprl.runs import RunFolder
    from grouprl.runs.files import user_path

    folder = RunFolder(user_path(run).absolute())
    if not folder.config_path.is_file() and folder.transcripts_path.is_file():
        from grouprl.runs.transcripts import write_html

        write_html(folder.transcripts_path, folder.transcripts_page, folder.path.name)
        show(f"wrote {folder.transcripts_page}")
        return
    if is_language(RunFolder.open(run).read_config()):
        from grouprl.lm.settings.config import GRPOConfig

        defaults = GRPOConfig().to_dict()
    else:
        from grouprl.envs.run_settings import default_settings

        defaults = default_settings()
    show(f"wrote {write_report(run, defaults)}")
