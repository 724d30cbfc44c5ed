"""Commands of many runs: benchmarks, sweeps, tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from grouprl.cli.common import app, count

Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at once, each on one core.  [default: one for each core]")]
Metric = Annotated[
    str, typer.Option(help="What the table is of: greedy, sampled, curve_mean, train_seconds, peak_memory_mb, ...")
]
Reference = Annotated[
    str | None, typer.Option(help="The line that the others are compared with.  [default: the first]")
]
Again = Annotated[bool, typer.Option("--again", help="Try runs that failed before again.")]


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="A YAML file: methods, environments or recipes, steps, seeds.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder of rows, tables, figures.  [default: runs/bench-FILE]")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="METHOD/SUBJECT/SEED, or its beginning; * stands for anything; may be repeated."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Other seeds than the file's: 0-4,7.")] = None,
    steps: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Other steps than the file's, for a trial.")
    ] = None,
    jobs: Jobs = None,
    again: Again = False,
    metric: Metric = "greedy",
    reference: Reference = None,
    table: Annotated[bool, typer.Option("--table", help="Run nothing: make tables and figures again.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Run nothing: name the runs.")] = False,
) -> None:
    """Run a benchmark: methods x environments or language models x seeds, then tables and figures.

    One row per run goes into rows.jsonl as soon as it ends. Stopped by Ctrl-C or killed, the same command goes on:
    runs that have a row are not done again.

    Examples:

      grouprl bench compare.yaml

      grouprl bench compare.yaml --only 'outcome/CartPole-v1' --steps 2000

      grouprl bench compare.yaml --table --metric sampled
    """
    from grouprl.bench import harness, plan, pool
    from grouprl.bench.rows import read_rows
    from grouprl.extras import require
    from grouprl.runs.files import user_path
    from grouprl.runs.signals import leaving_on_signals

    require("scipy")
    planned = plan.read(user_path(file), steps=steps, seeds=seeds)
    planned = planned.only(only) if only else planned
    folder = user_path(out) if out is not None else Path("runs") / f"bench-{planned.name}"
    rows = {row["id"]: row for row in read_rows(folder / "rows.jsonl")}
    if show:
        for cell in planned.cells:
            print(f"{rows[cell.id]['status'] if cell.id in rows else 'to do':7s} {cell.name} ({cell.steps:,} steps)")
        return
    failed = 0
    if not table:
        plan.check(planned)
        with leaving_on_signals("stopped; the same command goes on, and runs that have a row are not done again"):
            failed = harness.run(
                planned, folder, jobs=jobs or len(pool.cores()), again=again, say=lambda line: print(line, flush=True)
            )
    found = harness.rows_of(planned, read_rows(folder / "rows.jsonl"))
    text = harness.report(
        found, folder, planned.name, scales=planned.scales, metric=metric, reference=reference, about=planned.about,
        missing=len(planned.cells) - len(found),
    )  # fmt: skip
    print(f"\n{text}\nwrote {folder / 'table.md'}, curves.png and scores.png")
    if failed:
        print(f"error: {failed} runs failed; their rows say why", file=sys.stderr)
        raise typer.Exit(1)
