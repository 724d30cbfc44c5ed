"""The command line: thin. Each command parses its arguments, calls one function, and says what came of it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grouprl.errors import GrouprlError, UsageError

if TYPE_CHECKING:
    from grouprl.envs.training import RunResult

app = typer.Typer(
    name="grouprl",
    help="Reinforcement learning without a critic: GRPO for Gymnasium environments.\n\n"
    "Start with:  grouprl train CartPole-v1",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _count(text: str) -> int:
    """A whole number, also as 1e6."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value.is_integer():
        raise typer.BadParameter(f"{text!r} is not a whole number such as 100000 or 1e6")
    return int(value)


Run = Annotated[Path, typer.Argument(help="A run folder, as train leaves it, or a model.safetensors.")]
Seed = Annotated[int, typer.Option(help="Seed of the episodes' starts.")]
Sampled = Annotated[
    bool, typer.Option("--sampled", help="Sample actions from the policy instead of taking the likeliest.")
]
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
    env: Annotated[str | None, typer.Argument(help="A Gymnasium id such as CartPole-v1, or package:Env-v0.")] = None,
    preset: Annotated[
        str, typer.Option(help="A preset's name; auto = the one named like ENV, if any; default = the robust default.")
    ] = "auto",
    assignments: Assignments = None,
    env_assignments: EnvAssignments = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.  [default: 0]")] = None,
    steps: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="N", help="Environment steps.  [default: of the preset, or 500000]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/ENV-seedN-DATE-TIME]")] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard (default), wandb, or none; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.yaml that an earlier run left: the same run again, unless told otherwise."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run already in --out.")] = False,
    video: Annotated[bool, typer.Option(help="Film one episode at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a policy and leave a run folder: model, metrics, curve, video, summary.

    Examples:

      grouprl train CartPole-v1 --seed 1

      grouprl train LunarLander-v3 --steps 1000000 --set learning_rate=5e-4 --set n_envs=32

      grouprl train CartPole-v1 --preset tutorial

      grouprl train my_package:MyEnv-v0 --env difficulty=3 --track wandb
    """
    from grouprl.envs import training
    from grouprl.runs import default_run_path

    settings, run = _split(_assigned(assignments))
    env_kwargs = _assigned(env_assignments)
    if config is not None:
        env, preset, steps, seed, settings, env_kwargs, run = _from_file(
            config, env, steps, seed, settings, env_kwargs, run
        )
    if env is None:
        raise UsageError("say what to train on: grouprl train ENV, or --config FILE")
    if track:
        run["track"] = tuple(track)
    if not video:
        run["video"] = False
    folder = out or default_run_path("runs", preset if preset not in ("auto", "default") else env, seed or 0)
    result = training.train(
        env, folder, preset=preset, steps=steps, seed=seed, settings=settings, env_kwargs=env_kwargs, run=run,
        overwrite=overwrite, progress_bar=False if quiet else None,
        announce=lambda run: print(f"training on {env}; the run folder is {run.path}", flush=True),
    )  # fmt: skip
    _report(result)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of an interrupted run.")],
    steps: Annotated[
        int | None, typer.Option(parser=_count, metavar="N", help="A new total of steps, to make a run longer.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Go on with an interrupted run as if it had never stopped."""
    from grouprl.envs import training

    _report(training.resume(run, steps=steps, progress_bar=False if quiet else None))


@app.command()
def evaluate(
    run: Run,
    episodes: Annotated[int, typer.Option(help="Complete episodes to play.")] = 100,
    seed: Seed = 0,
    sampled: Sampled = False,
    env: Annotated[str | None, typer.Option("--on", help="Another environment with the same spaces.")] = None,
) -> None:
    """Play complete episodes with a trained policy and print their returns."""
    from grouprl.envs.evaluation import evaluate as evaluate_agent
    from grouprl.envs.grpo import GRPO

    agent = GRPO.load(run)
    result = evaluate_agent(agent, env, episodes, deterministic=not sampled, seed=seed).summary()
    kind = "sampled" if sampled else "greedy"
    print(
        f"{env or agent.env_id}: mean return {result['mean_return']:.2f} +- {result['std_return']:.2f} "
        f"(std over episodes), min {result['min']:.2f}, max {result['max']:.2f}, "
        f"{result['episodes']:.0f} {kind} episodes of {result['mean_length']:.0f} steps on average"
    )


@app.command()
def play(
    run: Run,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to show.")] = 3,
    seed: Seed = 0,
    sampled: Sampled = False,
    video: Annotated[Path | None, typer.Option(help="Write a video here instead of opening a window.")] = None,
) -> None:
    """Watch a trained policy: in a window where there is a screen, in a video file otherwise."""
    from grouprl.envs import watch
    from grouprl.envs.grpo import GRPO

    agent = GRPO.load(run)
    if video is None and watch.has_screen():
        env = watch.make_rendering(agent, "human")
        try:
            for episode in range(episodes):
                *_, total = watch.play_episode(agent, env, seed + episode, not sampled)
                print(f"episode {episode + 1}: return {total:g}", flush=True)
        finally:
            env.close()
        return
    path = video or (run / "play.mp4" if run.is_dir() else run.with_name("play.mp4"))
    if video is None:
        print("there is no screen here, so this goes to a video file")
    for note in watch.record_episodes(agent, path, episodes, seed, not sampled):
        print(f"note: {note}")
    if path.exists():
        print(f"wrote {path}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; runs that differ only in their seed share a curve.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("curves.png"),
    x: Annotated[str, typer.Option(help="Column of metrics.csv across: step, train_seconds, ...")] = "step",
    y: Annotated[
        str, typer.Option(help="Column of metrics.csv upwards: return_mean, eval_return, ...")
    ] = "return_mean",
) -> None:
    """Draw learning curves, with a band over seeds."""
    from grouprl.envs.vector import reward_threshold
    from grouprl.runs import RunFolder
    from grouprl.runs.plots import plot_runs

    thresholds = {reward_threshold(str(RunFolder.open(path).read_config().get("env_id"))) for path in runs}
    threshold = thresholds.pop() if len(thresholds) == 1 and y in ("return_mean", "eval_return") else None
    plot_runs(runs, out, x=x, y=y, threshold=threshold)
    print(f"wrote {out}")


@app.command("presets")
def presets_command(
    name: Annotated[str | None, typer.Argument(help="Show one preset in full.")] = None,
) -> None:
    """List the presets with the result to expect, or show one."""
    from grouprl.envs import presets

    if name is not None:
        import yaml

        preset = presets.load(name)
        print(yaml.safe_dump(preset.__dict__, sort_keys=False, allow_unicode=True).strip())
        return
    print(f"{'preset':28s} {'environment':28s} {'steps':>10s}  expect (mean greedy return)")
    for known in presets.names():
        preset = presets.load(known)
        print(
            f"{known:28s} {preset.env_id:28s} {preset.total_timesteps:>10,d}  {preset.expect.get('mean_return', '-')}"
        )


@app.command()
def settings() -> None:
    """List every setting of --set with its default and meaning."""
    from grouprl.envs.config import GRPOConfig
    from grouprl.envs.training import RunSettings

    for name, field in GRPOConfig.model_fields.items():
        print(f"{name:22s} {field.get_default()!s:12s} {field.description}")
    print("\nof the run:")
    for name, item in RunSettings.__dataclass_fields__.items():
        print(f"{name:22s} {'preset' if name in ('total_timesteps', 'eval_every') else item.default!s:12s}")


def main() -> None:
    """Entry point: one clear line for an error of the user's or the environment's, a traceback only for ours."""
    try:
        app()
    except GrouprlError as error:
        if os.environ.get("GROUPRL_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _assigned(pairs: list[str] | None) -> dict[str, Any]:
    """``["a=1", "b=[2, 3]"]`` as a mapping; values are read as YAML."""
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise UsageError(f"cannot read {pair!r}; write KEY=VALUE, such as learning_rate=1e-3")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"cannot read the value of {pair!r}; quote it as YAML, such as \"{key}='text'\"") from None
        values[key.strip()] = _number(value)
    return values


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` (no dot) as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of learning, and settings of the run."""
    from grouprl.envs.training import RunSettings

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
    import yaml

    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        saved_run = dict(saved["run"])
        total = saved_run.pop("total_timesteps")
        saved_run["track"] = tuple(saved_run["track"])
        return (
            env or saved["env_id"],
            "default",
            steps or total,
            seed,
            {**saved["config"], **settings},
            {**saved["env_kwargs"], **env_kwargs},
            {**saved_run, **run},
        )
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise UsageError(f"{path} is not the config.yaml of a run; give one that grouprl train left") from None


def _command(name: str) -> str:
    """How to call a program of this installation from here: by name, or by path where it is not on the PATH."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not own.exists() or (found is not None and Path(found).resolve() == own.resolve()):
        return name
    return os.path.relpath(own)


def _report(result: RunResult) -> None:
    folder = result.folder.path
    for note in result.notes:
        print(f"note: {note}")
    if result.summary is None:
        print(f"stopped after {result.agent.num_timesteps} steps; nothing is lost. Go on with:")
        print(f"  {_command('grouprl')} resume {folder}")
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
    grouprl = _command("grouprl")
    print(f"next:\n  {grouprl} play {folder}\n  {grouprl} evaluate {folder}\n  {grouprl} plot {folder}")
    if result.folder.tensorboard_path.exists():
        print(f"  {_command('tensorboard')} --logdir {folder.parent}")
