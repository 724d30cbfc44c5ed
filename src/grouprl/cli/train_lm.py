"""The command that trains a language model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grouprl.cli.common import app, assigned, command, count
from grouprl.errors import UsageError
from grouprl.printing import show

if TYPE_CHECKING:
    from grouprl.lm.run.training import RunResult


@app.command("train-lm")
def train_lm(
    recipe: Annotated[str, typer.Argument(help="A preset such as nth-word, or a YAML file. See: grouprl presets")],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Change one setting; may be repeated. See: grouprl settings --lm"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model: hub id, folder, GGUF file, or smollm2.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.  [default: 42]")] = None,
    steps: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Optimizer steps.  [default: of the recipe]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/RECIPE-seedN-DATE-TIME]")] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard (default), wandb, or none, in the place of report_to; may be repeated."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="End the run when a call of a reward function takes longer; setting reward_timeout.  [default: never]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run already in --out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a language model and leave a run folder.

    It holds the model, metrics, transcripts, curves, a report and a summary.

    Examples:

      grouprl train-lm tiny

      grouprl train-lm nth-word --seed 1

      grouprl train-lm arithmetic --model Qwen/Qwen3-0.6B --set learning_rate=5e-6 --set num_generations=16

      grouprl train-lm my_recipe.yaml --set task=my_prompts.jsonl --set reward=my_rewards:score
    """
    from grouprl.lm.run import recipe as recipes
    from grouprl.lm.run import training
    from grouprl.runs import default_run_path

    settings = assigned(assignments)
    if model is not None:
        settings["model"] = model
    if seed is not None:
        settings["seed"] = seed
    if timeout is not None:
        settings["reward_timeout"] = timeout
    try:
        loaded = recipes.load(recipe)
    except UsageError:
        import gymnasium

        if recipe in gymnasium.registry:
            raise UsageError(f"{recipe!r} is an environment: {command('grouprl')} train {recipe}") from None
        raise
    changed = loaded.changed(settings)
    place = out or default_run_path("runs", changed.name, changed.config.get("seed", 42))
    said = f"training {changed.model} on {changed.subject}; the run folder is"
    result = training.train(
        loaded, place, settings=settings, steps=steps, track=tuple(track) if track else None, overwrite=overwrite,
        progress_bar=False if quiet else None, announce=lambda run: print(said, run.path, flush=True),
    )  # fmt: skip
    report(result)


def report(result: RunResult) -> None:
    """Say what a run left and what to type next."""
    from grouprl.runs.wording import wording

    folder, grouprl = result.folder.path, command("grouprl")
    typed = shlex.quote(str(folder))
    for note in result.notes:
        show(f"note: {note}")
    if result.summary is None:
        print(f"stopped after {result.steps} steps; nothing is lost. Go on with:")
        print(f"  {grouprl} resume {typed}")
        raise typer.Exit(130)
    summary = result.summary
    print(
        f"{summary['total_steps']:,} steps in {summary['train_seconds']:.1f} s of training "
        f"({summary['tokens_per_second']:,.0f} sampled tokens/s, {summary['peak_memory_gb']:.2f} GB at most)"
    )
    measured = wording(result.folder.read_config())("{success} on {held_out}, greedy")
    print(f"{measured}: {summary['accuracy_before']:.3f} before, {summary['accuracy_after']:.3f} after")
    print(f"run folder: {folder}")
    print("\n".join(["next:", *(f"  {grouprl} {one} {typed}" for one in ("chat", "evaluate", "plot", "doctor"))]))
    if result.folder.report_page.exists():
        print(f"  open {result.folder.report_page} in a browser: settings, curves, and what the doctor says")
    if result.folder.transcripts_page.exists():
        print(f"  open {result.folder.transcripts_page} in a browser: what it wrote, and what it got for it")
