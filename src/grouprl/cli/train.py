"""The command that trains on an environment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grouprl.cli.common import app, assigned, command, count
from grouprl.errors import UsageError, shown
from grouprl.printing import show
from grouprl.reading import read_yaml, with_numbers

if TYPE_CHECKING:
    from grouprl.envs.recorder import RunResult
    from grouprl.runs import RunFolder

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting; may be repeated. See: grouprl settings"),
]
EnvAssignments = Annotated[
    list[str] | None,
    typer.Option(
        "--env", "-e", metavar="KEY=VALUE", help="An argument of the environment's constructor; may be repeated."
    ),
]


@app.command()
def train(
    env: Annotated[
        str | None, typer.Argument(help="A Gymnasium id such as CartPole-v1, or module:Env (a file here will do).")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A preset's name; auto = the one named like ENV, if any; default = the robust default.  "
            "[default: auto]"
        ),
    ] = None,
    assignments: Assignments = None,
    env_assignments: EnvAssignments = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.  [default: 0]")] = None,
    steps: Annotated[
        int | None,
        typer.Option(parser=count, metavar="N", help="Environment steps.  [default: of the preset, or 500000]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/ENV-seedN-DATE-TIME]")] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard (default), wandb, or none; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.yaml that an earlier run left: the same run again, unless told otherwise."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="End the run when a step of the environments, or making one, takes longer; setting env_timeout.  "
            "[default: never]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run already in --out.")] = False,
    video: Annotated[bool, typer.Option(help="Film one episode at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a policy on an environment and leave a run folder.

    It holds the model, metrics, curves, a report, a video and a summary.

    Examples:

      grouprl train CartPole-v1 --seed 1

      grouprl train LunarLander-v3 --steps 1000000 --set learning_rate=5e-4 --set n_envs=32

      grouprl train CartPole-v1 --preset script

      grouprl train my_package:MyEnv-v0 --env difficulty=3 --track wandb
    """
    from grouprl.envs import training
    from grouprl.runs import default_run_path

    settings, run = _split(assigned(assignments))
    stray = next((one for one in env_assignments or [] if "=" not in one), None)
    if env is None and stray is not None:
        raise UsageError(
            "--env gives an argument to the environment, KEY=VALUE; which one to train on comes first: "
            f"grouprl train {stray}"
        )
    env_kwargs = assigned(env_assignments)
    if config is not None and preset is not None:
        raise UsageError(
            f"--preset {preset} beside --config: the file has every setting already; leave one of the two out"
        )
    preset = preset or "auto"
    if config is not None:
        env, preset, steps, seed, settings, env_kwargs, run = _from_file(
            config, env, steps, seed, settings, env_kwargs, run
        )
    if env is None:
        raise UsageError("say what to train on: grouprl train ENV, or --config FILE")
    if timeout is not None:
        settings["env_timeout"] = timeout
    if track:
        run["track"] = tuple(track)
    if not video:
        run["video"] = False
    number = settings.get("seed", 0) if seed is None else seed
    folder = out or default_run_path("runs", preset if preset not in ("auto", "default") else env, number)
    try:
        result = training.train(
            env, folder, preset=preset, steps=steps, seed=seed, settings=settings, env_kwargs=env_kwargs, run=run,
            overwrite=overwrite, progress_bar=False if quiet else None,
            announce=_announce,
        )  # fmt: skip
    except UsageError as error:
        from grouprl.lm.run import recipe

        if env in recipe.names() and env in str(error):
            raise UsageError(f"{env!r} trains a language model: {command('grouprl')} train-lm {env}") from None
        raise
    report(result)


def _announce(folder: RunFolder) -> None:
    config = folder.read_config()
    preset = f"preset {config['preset']}" if config["preset"] else "the robust default"
    own = config.get("functions", {})
    advantage = own.get("advantage_function", config["config"]["advantage"])
    loss = own.get("surrogate_function", config["config"]["loss_type"])
    print(
        f"training on {config['env_id']} with {preset} (advantage={advantage}, "
        f"loss_type={loss}); the run folder is {folder.path}",
        flush=True,
    )


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of learning, and settings of the run."""
    from grouprl.envs.run_settings import RunSettings

    run = {key: value for key, value in values.items() if key in RunSettings.__dataclass_fields__}
    return {key: value for key, value in values.items() if key not in run}, run


def _from_file(
    path: Path,
    env: str | None,
    steps: int | None,
    seed: int | None,
    settings: dict[str, Any],
    env_kwargs: dict[str, Any],
    run: dict[str, Any],
) -> tuple[str, str, int, int | None, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a config.yaml says, under what the command line says."""
    from grouprl.envs.env_kwargs import from_json

    saved = read_yaml(path)
    _check_reproducible(path, saved, seed if seed is not None else settings.get("seed"))
    own = saved.get("own", {}) if isinstance(saved, dict) else {}
    lost = {name: called for name, called in own.items() if name not in settings} if isinstance(own, dict) else {}
    if lost:
        said = ", ".join(f"{name} ({called})" for name, called in lost.items())
        raise UsageError(
            f"{path} is of a run with functions of its own, which a command cannot find: {said}; train from Python, "
            "GRPO(..., network=...), or name a function: --set advantage_function=module:function"
        )
    try:
        if beside := [str(name) for place in saved.get("callbacks", {}).values() for name in place]:
            show(f"note: the run of {path} had callbacks, which a command does not call: {', '.join(beside)}")
        saved_run = with_numbers(dict(saved["run"]))
        total = saved_run.pop("total_timesteps")
        return (
            env or saved["env_id"],
            "default",
            steps or total,
            seed,
            {**saved["config"], **saved.get("functions", {}), **settings},
            {**from_json(saved["env_kwargs"]), **env_kwargs},
            {**saved_run, **run},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path} is not the config.yaml of a run; give one that grouprl train left") from None


def _check_reproducible(path: Path, saved: Any, seed: int | None) -> None:
    """Raises UsageError for a config.yaml whose run would silently become another one.

    Args:
        path: of the file; named in the error.
        saved: what it says.
        seed: what the command line says of it, which wins, or None.
    """
    config = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(config, dict):
        return
    top, own = saved.get("seed"), config.get("seed")
    if seed is None and top is not None and top != own:
        raise UsageError(
            f"{path} has two seeds: seed={shown(top)} at the top and seed={shown(own)} under config; put the same into "
            "both, or say which: --seed N"
        )
    if saved.get("begun_at"):
        there = shlex.quote(str(path.parent))
        raise UsageError(
            f"{path} is of a run that began from the weights of another agent, after its {shown(saved['begun_at'])} "
            "steps, and the file does not hold them, so training would begin from random weights. To go on with that "
            f"run: {command('grouprl')} resume {there}; to do it again, in Python: "
            "GRPO.load(MODEL).learn(n, callback=Run(FOLDER)), with the model it began from; to begin from random "
            "weights, take the line begun_at out of the file"
        )


def report(result: RunResult) -> None:
    """Say what a run left and what to type next."""
    folder = result.folder.path
    for note in result.notes:
        show(f"note: {note}")
    if result.summary is None:
        print(f"stopped after {result.agent.num_timesteps} steps; nothing is lost. Go on with:")
        print(f"  {command('grouprl')} resume {shlex.quote(str(folder))}")
        raise typer.Exit(130)
    summary, final = result.summary, result.summary["eval"]
    solved = summary["solved_at_steps"]
    print(
        f"{summary['total_steps']:,} steps in {summary['train_seconds']:.2f} s of training "
        f"({summary['steps_per_second']:,.0f} steps/s)"
        + (f"; solved after {solved:,} steps, {summary['solved_at_seconds']:.2f} s" if solved is not None else "")
    )
    print(
        f"greedy return over {final['episodes']:.0f} episodes: {final['mean_return']:.1f} +- {final['std_return']:.1f} "
        f"(min {final['min']:.1f}, max {final['max']:.1f})"
    )
    print(f"run folder: {folder}")
    grouprl, typed = command("grouprl"), shlex.quote(str(folder))
    shows = not any(note.startswith("no video") for note in result.notes)  # else it has no pictures to show
    commands = ("play",) * shows + ("evaluate", "plot", "doctor")
    print("\n".join(["next:", *(f"  {grouprl} {command} {typed}" for command in commands)]))
    if result.folder.episodes_page.exists():
        print(f"  open {result.folder.episodes_page} in a browser: episodes with baseline and advantage")
    if result.folder.report_page.exists():
        print(f"  open {result.folder.report_page} in a browser: settings, curves, and what the doctor says")
    if result.folder.tensorboard_path.exists():
        print(f"  {command('tensorboard')} --logdir {shlex.quote(str(folder.parent))}")
    if result.agent.config.advantage == "baseline" and result.agent.env_id == "CartPole-v1":
        print(f"  {grouprl} train CartPole-v1 --preset formula   (GRPO as tutorials have it; see docs/tutorial.md)")
