"""Commands of many runs: benchmarks, sweeps, tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from grouprl.cli.common import app, count
from grouprl.printing import show

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
        typer.Option(help="METHOD/SUBJECT/SEED, or its first parts; * stands for anything; may be repeated."),
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
    listed: Annotated[bool, typer.Option("--list", help="Run nothing: name the runs.")] = False,
) -> None:
    """Run a benchmark over seeds: its table and figures.

    A file lists methods, and the environments or language models that they are tried on.

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
    if listed:
        for cell in planned.cells:
            show(f"{rows[cell.id]['status'] if cell.id in rows else 'to do':7s} {cell.name} ({cell.steps:,} steps)")
        return
    failed = 0
    harness.check_report(planned, metric, reference)
    if not table:
        plan.check(planned)
        with leaving_on_signals("stopped; the same command goes on, and runs that have a row are not done again"):
            failed = harness.run(planned, folder, jobs=jobs or len(pool.cores()), again=again, say=show)
    found = harness.rows_in(planned, folder)
    part = "part-" if only or seeds is not None or steps is not None else ""  # the report of all runs stays
    text = harness.report(
        found, folder, planned.name, scales=planned.scales, metric=metric, about=planned.about, prefix=part,
        reference=reference or planned.cells[0].method, missing=len(planned.cells) - len(found),
    )  # fmt: skip
    show(f"\n{text}\nwrote {folder / f'{part}table.md'}, {part}curves.png and {part}scores.png")
    if failed:
        print(f"error: {failed} runs failed; their rows say why", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def sweep(
    what: Annotated[str, typer.Argument(help="An environment, a preset of either arena, a recipe, or a sweep's file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUES", help="Values to try, A,B,C, or a range, LOW..HIGH; may be repeated."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of each setting.  [default: 0-4]")] = None,
    steps: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Steps of a run.  [default: of the preset or recipe]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Whose settings an environment begins with: auto, default or a name.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="grid (default where all settings have values), random, or tpe (for ranges).")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Settings that random and tpe try.  [default: 20]")] = None,
    prune: Annotated[
        bool | None, typer.Option("--prune", help="End settings early that are below the median of the others.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="greedy (default) or sampled returns at the end.")] = None,
    jobs: Jobs = None,
    again: Again = False,
    out: Annotated[Path | None, typer.Option(help="The folder of the sweep.  [default: runs/sweep-NAME]")] = None,
) -> None:
    """Try settings with several seeds each, and rank them.

    It leaves a table with intervals, and a figure. Optuna chooses the settings. A sweep that was stopped or killed
    goes on with the same command.

    Examples:

      grouprl sweep CartPole-v1 --set learning_rate=1e-3,3e-4 --seeds 0-4

      grouprl sweep LunarLander-v3 --set learning_rate=1e-4..1e-2 --set gamma=0.99,0.999 --trials 30 --prune

      grouprl sweep tiny --set learning_rate=1e-4,2e-4 --steps 100
    """
    from grouprl.bench import asked, harness, pool
    from grouprl.bench import sweep as sweeping
    from grouprl.bench.space import Space
    from grouprl.extras import require
    from grouprl.runs.files import user_path
    from grouprl.runs.signals import leaving_on_signals

    for package in ("scipy", "optuna"):
        require(package)
    options = {
        "seeds": seeds, "steps": steps, "preset": preset, "sampler": sampler, "trials": trials, "prune": prune,
        "metric": metric, "of_command": Space.parse(settings or []),
    }  # fmt: skip
    swept = asked.asked(what, options)
    swept.check()
    name = Path(swept.cell.subject).stem.replace(":", "-")  # a name of a folder on any system
    folder = user_path(out) if out is not None else Path("runs") / f"sweep-{name}"
    with leaving_on_signals("stopped; the same command goes on, and runs that have a row are not done again"):
        found = sweeping.run(swept, folder, jobs=jobs or len(pool.cores()), again=again, say=show)
    show(f"\n{harness.report_sweep(swept, found, folder)}\nwrote {folder / 'table.md'} and {folder / 'sweep.png'}")
    if found.broken:
        raise typer.Exit(1)


@app.command("table")
def table_command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders of either arena, or folders of benchmarks and sweeps.")
    ],
    metric: Annotated[
        str,
        typer.Option(help="greedy: the last evaluation; or a column of metrics.csv, whose last value counts."),
    ] = "greedy",
    reference: Reference = None,
    out: Annotated[Path | None, typer.Option(help="A picture of the scores and curves, to be written.")] = None,
) -> None:
    """Compare runs that exist, in a table with intervals.

    Several seeds of a setting are one line.
    """
    from grouprl.bench import folders, harness
    from grouprl.extras import require

    require("scipy")
    results = folders.of_folders(runs)
    show(harness.table_text(results, metric, reference))
    if out is not None:
        harness.draw(results, metric, out)
        print(f"wrote {out}")
