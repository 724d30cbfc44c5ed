"""The command that writes a trained policy for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grouprl.cli.common import app
from grouprl.cli.runs import Run, check_there, of_language
from grouprl.errors import UsageError
from grouprl.printing import show
from grouprl.runs.files import user_path


@app.command()
def export(
    run: Run,
    format: Annotated[
        str | None, typer.Option(help="onnx or torch (a .pt2 of torch.export).  [default: onnx]", metavar="FORMAT")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder.  [default: export-FORMAT in the run folder, or beside the file]")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="module:builder of the network, if the policy was trained with its own.")
    ] = None,
) -> None:
    """Write a trained policy for programs without grouprl.

    Normalisation, masks and bounds are inside. The folder also gets a model card, and policy.json, which says what goes
    in and comes out. What was written is compared with the agent first. A language model is in the format of Hugging
    Face already; adapters are merged.
    """
    if of_language(run):
        if network is not None:
            raise UsageError("--network is for environments; a language model is saved with its architecture")
        from grouprl.lm.run.export import export as export_model

        for line in export_model(run, out, format):
            show(line)
        return
    from grouprl.envs.exported import export_policy
    from grouprl.envs.grpo import GRPO
    from grouprl.importing import load_function
    from grouprl.runs import RunFolder

    check_there(run)
    kind = format or "onnx"
    agent = GRPO.load(run, network=None if network is None else load_function(network))
    given = user_path(run)
    folder = RunFolder.open(given) if (given / "config.yaml").is_file() else None
    if out is None:
        out = folder.export_path(kind) if folder else given.with_name(f"{given.stem}-export-{kind}")
    made = export_policy(agent, out, kind, run=folder)
    for note in made.notes:
        show(f"note: {note}")
    print(f"agrees with predict in {made.checked}; largest difference {made.difference:.1e}")
    print(f"wrote {made.file}; {made.folder / 'README.md'} says how to load it")
