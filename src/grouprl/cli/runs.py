"""Commands on a run folder, of either arena."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grouprl.cli import train, train_lm
from grouprl.cli.common import app, command, count
from grouprl.errors import UsageError
from grouprl.machine.ranks import refuse_several_processes
from grouprl.printing import show
from grouprl.runs.files import user_path

if TYPE_CHECKING:
    from grouprl.lm.run.watching import Watching
    from grouprl.lm.train.evaluation import HeldOut
    from grouprl.runs.wording import Wording

Run = Annotated[Path, typer.Argument(help="A run folder, as train or train-lm leaves it, or a model.safetensors.")]
Seed = Annotated[int, typer.Option(help="Seed of the episodes' starts.")]
Sampled = Annotated[bool, typer.Option("--sampled", help="Sample from the policy instead of taking what is likeliest.")]


def of_language(run: Path) -> bool:
    """Whether a run is of the language arena."""
    from grouprl.runs import RunFolder

    return (run / "config.yaml").is_file() and RunFolder.open(run).read_config().get("arena") == "lm"


def _check_arena(run: Path, *, language: bool) -> None:
    """Raises UsageError if a command for one arena is given a run of the other; anything but a run passes."""
    if (run / "config.yaml").is_file() and of_language(run) != language:
        what, other = ("an environment", "play") if language else ("a language model", "chat")
        raise UsageError(f"{run} is a run of {what}: {command('grouprl')} {other} {shlex.quote(str(run))}")


def check_there(run: Path) -> None:
    """Raises UsageError, which names a run that exists, where there is neither a run folder nor a saved agent."""
    from grouprl.runs import RunFolder

    given = user_path(run)
    saved = given / "model.safetensors" if given.is_dir() else given
    if not saved.exists() and not user_path(f"{run}.safetensors").exists():
        RunFolder.open(run)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The folder of an interrupted run.")],
    steps: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="A new total of steps, to make a run longer.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Go on with an interrupted run as if it had never stopped."""
    progress_bar = False if quiet else None
    if of_language(run):
        from grouprl.lm.run import training as language

        train_lm.report(language.resume(run, steps=steps, progress_bar=progress_bar))
        return
    from grouprl.envs import training

    train.report(training.resume(run, steps=steps, progress_bar=progress_bar))


@app.command()
def evaluate(
    run: Run,
    episodes: Annotated[
        int | None,
        typer.Option(help="Complete episodes (default 100), or held-out prompts of a language model."),
    ] = None,
    seed: Seed = 0,
    sampled: Sampled = False,
    env: Annotated[str | None, typer.Option("--on", help="Another environment with the same spaces.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="A new file for what a language model answered, and what it got for it.")
    ] = None,
) -> None:
    """Measure a trained policy over episodes, or a model on prompts."""
    if of_language(run):
        from grouprl.lm.run.training import evaluate as evaluate_model
        from grouprl.runs import RunFolder
        from grouprl.runs.wording import wording

        if sampled or env is not None:
            raise UsageError("--sampled and --on are for environments; a language model answers greedily")
        if seed:
            raise UsageError("--seed is for environments; a language model answers the same questions each time")
        show(_measured(evaluate_model(run, episodes, answers), wording(RunFolder.open(run).read_config())))
        return
    from grouprl.envs.evaluation import evaluate as evaluate_agent
    from grouprl.envs.grpo import GRPO

    if answers is not None:
        raise UsageError("--answers is for language models; `grouprl play --video` shows what a policy does")
    check_there(run)
    refuse_several_processes("an evaluation")
    agent = GRPO.load(run)
    result = evaluate_agent(
        agent, env, 100 if episodes is None else episodes, deterministic=not sampled, seed=seed
    ).summary()
    kind = "sampled" if sampled else "greedy"
    show(
        f"{env or agent.env_id}: mean return {result['mean_return']:.2f} +- {result['std_return']:.2f} "
        f"(std over episodes), min {result['min']:.2f}, max {result['max']:.2f}, "
        f"{result['episodes']:.0f} {kind} episodes of {result['mean_length']:.0f} steps on average"
    )


def _measured(result: HeldOut, words: Wording) -> str:
    """What an evaluation of a language model found: success, turns of episodes, and what went wrong in them."""
    low, high = result.interval
    lines = [
        f"{words.success} {result.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}), "
        f"mean reward {result.reward:.3f}, greedy, on {result.n} {words.held_out}"
    ]
    if "episodes/mean_turns" in result.numbers:
        lines.append(f"{result.numbers['episodes/mean_turns']:.1f} turns an episode on average")
        others = {k: v for k, v in result.numbers.items() if k not in ("episodes/mean_turns", "success")}
        lines += [f"  {name}: {value:.3f}" for name, value in others.items()]
    return "\n".join(lines)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run folder of train-lm, or any model: id, folder, GGUF file, smollm2.")],
    sampled: Sampled = False,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a reply.  [default: of the run, or 256]")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Without the task's system message and examples.")] = False,
) -> None:
    """Talk to a trained language model; watch one that acts.

    It is asked as it was trained to be.
    """
    from grouprl.lm.run.watching import Watching, is_agent
    from grouprl.runs import RunFolder
    from grouprl.runs.nearby import holds_runs

    _check_arena(user_path(run), language=True)
    if holds_runs(user_path(run)):
        RunFolder.open(run)  # which says what to give
    if is_agent(run):
        watching = Watching.open(run, sampled=sampled, max_tokens=tokens)
        show(watching.about)
        _watch(watching)
        return
    from grouprl.lm.run.chat import Chat

    conversation = Chat.open(run, sampled=sampled, max_tokens=tokens, bare=bare)
    show(f"{conversation.about} (an empty line ends it)")
    while question := _typed():
        try:
            show(conversation.ask(question))
        except UsageError as error:  # of this question; the next one may do
            show(f"error: {error}", sys.stderr)


def _typed() -> str | None:
    """A line that a person types, or None if there will be none any more."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text in {error.encoding}: {error.reason}") from None


def _watch(watching: Watching) -> None:
    while (line := _typed()) is not None:
        if line == ("" if watching.asks else "q"):
            return
        try:
            for said in watching.play(line):
                show(said)
        except UsageError as error:  # of this line; the next one may do
            show(f"error: {error}", sys.stderr)


@app.command()
def play(
    run: Run,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to show.")] = 3,
    seed: Seed = 0,
    sampled: Sampled = False,
    video: Annotated[Path | None, typer.Option(help="Write a video here instead of opening a window.")] = None,
) -> None:
    """Watch a trained policy in a window, or in a video file.

    The file is written where there is no screen.
    """
    from grouprl.envs import watch
    from grouprl.envs.closing import close
    from grouprl.envs.grpo import GRPO

    _check_arena(run, language=False)
    check_there(run)
    agent = GRPO.load(run)
    if video is None and watch.has_screen():
        env = watch.make_rendering(agent, "human")
        try:
            for episode in range(episodes):
                *_, total = watch.play_episode(agent, env, seed + episode, not sampled)
                print(f"episode {episode + 1}: return {total:g}", flush=True)
        finally:
            close(env)
        return
    path = video or (run / "play.mp4" if run.is_dir() else run.with_name("play.mp4"))
    if video is None:
        print("there is no screen here, so this goes to a video file")
    before = path.stat().st_mtime_ns if path.exists() else None
    notes = watch.record_episodes(agent, path, episodes, seed, not sampled)
    if not path.exists() or path.stat().st_mtime_ns == before:
        raise UsageError("; ".join(notes))
    for note in notes:
        show(f"note: {note}")
    print(f"wrote {path}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; runs that differ only in their seed share a curve.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("curves.png"),
    x: Annotated[str, typer.Option(help="Column of metrics.csv across: step, train_seconds, ...")] = "step",
    y: Annotated[
        str | None,
        typer.Option(
            help="Column of metrics.csv upwards: return_mean, eval_return, reward, eval_accuracy, ...  "
            "[default: return_mean, or reward of language models]"
        ),
    ] = None,
) -> None:
    """Draw learning curves, with a band over seeds."""
    from grouprl.runs import RunFolder
    from grouprl.runs.plots import plot_runs

    if all(of_language(path) for path in runs):
        _report(plot_runs(runs, out, x=x, y=y or "reward"), out)
        return
    from grouprl.envs.vector import reward_threshold

    y = y or "return_mean"
    thresholds = {reward_threshold(str(RunFolder.open(path).read_config().get("env_id"))) for path in runs}
    threshold = thresholds.pop() if len(thresholds) == 1 and y in ("return_mean", "eval_return") else None
    _report(plot_runs(runs, out, x=x, y=y, threshold=threshold), out)


def _report(notes: list[str], out: Path) -> None:
    for note in notes:
        show(f"note: {note}")
    print(f"wrote {out}")
