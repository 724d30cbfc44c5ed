"""A run: train an agent and leave a folder anyone understands. What the command line's train and resume do."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from grouprl.envs import loading, presets
from grouprl.envs.arguments import whole_number, yes_or_no
from grouprl.envs.config import check_names
from grouprl.envs.env_kwargs import to_json
from grouprl.envs.grpo import GRPO, Callback
from grouprl.envs.learn_call import train_until
from grouprl.envs.policy import Network
from grouprl.envs.recorder import RunResult, recording
from grouprl.envs.run_settings import Beside, RunSettings, as_written, called, plan
from grouprl.envs.stable_baselines import checked_callbacks
from grouprl.envs.vector import EnvLike
from grouprl.errors import UsageError, shown
from grouprl.importing import load_function
from grouprl.machine.ranks import Ranks, join
from grouprl.objective.user_functions import TensorFunction, UserFunctions
from grouprl.reading import with_numbers
from grouprl.runs import RunFolder
from grouprl.runs.files import user_path
from grouprl.runs.folder import newest_good
from grouprl.runs.state import load_state, read_meta, taking_up

_log = logging.getLogger("grouprl")


def train(
    env_id: str,
    out: str | os.PathLike[str],
    *,
    preset: str | None = "auto",
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress_bar: bool | None = None,
    announce: Callable[[RunFolder], None] | None = None,
) -> RunResult:
    """Train on ``env_id`` and leave a run folder at ``out``.

    Args:
        env_id: a Gymnasium id.
        out: the run folder; must not exist, or be empty, unless ``overwrite``.
        preset: as for :class:`~grouprl.envs.grpo.GRPO`.
        steps: environment steps; default: the preset's, or 500,000.
        seed: overrides the configuration's.
        settings: fields of :class:`~grouprl.envs.config.GRPOConfig`; ``advantage_function`` and ``surrogate_function``
            too, as ``module:function``.
        env_kwargs: for the environment's constructor.
        run: fields of :class:`RunSettings`.
        progress_bar: True, False, or None for "if standard error is a terminal".
        announce: called with the run folder once everything asked for is known to be possible.

    Raises:
        UsageError: something asked for is not possible; nothing is left behind.
        TrainingError: the environment or the numbers failed; the last checkpoint stays and can be resumed. Nothing is
            left behind if no update was done.
    """
    chosen = presets.resolve(env_id, preset)
    values, functions = _split_functions(settings or {})
    check_names(values)
    if seed is not None:
        values["seed"] = seed
    overwrite = yes_or_no("overwrite", overwrite)
    if steps is not None:
        steps = whole_number("steps", steps, least=1)
    total = steps if steps is not None else chosen.total_timesteps if chosen else 500_000
    planned = plan(total, run or {}, chosen.eval_every if chosen else None)
    ranks = join(gpu=str(values.get("device", "cpu")).startswith("cuda"))
    with ranks.telling():
        place = ranks.once(lambda: user_path(out).absolute())
        ranks.once(lambda: RunFolder(place).check_free(overwrite))
        with RunFolder(place).locked() if ranks.first else nullcontext():
            agent = GRPO(env_id, preset=preset, env_kwargs=env_kwargs, **_loaded(functions), **values)
            if agent.env_lost:
                agent.close()
                raise UsageError(
                    f"a run must be able to make its environment again: {agent.env_lost}; register an id whose entry "
                    "point makes that argument itself, or train from Python: GRPO(...).learn(n, callback=Run(folder))"
                )
            about = as_written(agent, planned, env_id, chosen.name if chosen else None, functions)
            folder = RunFolder(ranks.once(lambda: RunFolder.create(place, about, overwrite=overwrite).path))
            if announce is not None and ranks.first:
                announce(folder)
            with folder.kept_in_order() if ranks.first else nullcontext():
                return _run(folder, planned, agent, 0, progress_bar)


FUNCTIONS = ("advantage_function", "surrogate_function")
"""What a run takes as ``module:function``, in the place of settings."""


def _split_functions(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of the configuration, and the functions of a user's own by name. Raises UsageError for no name."""
    functions = {name: settings[name] for name in FUNCTIONS if settings.get(name) is not None}
    for name, function in functions.items():
        if not isinstance(function, str):
            raise UsageError(
                f"{name}={shown(function)}: a run must find it again, so give its name as text, module:function; "
                f"GRPO(env, {name}=...) takes the function itself"
            )
    return {name: value for name, value in settings.items() if name not in FUNCTIONS}, functions


def _loaded(functions: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The functions themselves. Raises UsageError if there is no such module or function."""
    return {name: load_function(function) for name, function in functions.items()}


def resume(
    path: str | os.PathLike[str], *, steps: int | None = None, env: EnvLike | None = None,
    env_kwargs: Mapping[str, Any] | None = None, progress_bar: bool | None = None, network: Network | None = None,
    advantage_function: TensorFunction | None = None, surrogate_function: TensorFunction | None = None,
    callback: Callback | Sequence[Callback] | None = None,
) -> RunResult:  # fmt: skip
    """Go on with an interrupted run, from its newest checkpoint, exactly as if it had not stopped.

    A run that was stopped after its last update and before it left its summary is finished.

    Args:
        path: the run folder.
        steps: a new total number of steps, to make a finished run longer (its schedules then differ from those of a run
            planned that long).
        env: the environment, where the run was given a callable that no id names, or where the run shall go on in
            another one. env_kwargs: for its constructor, for ids; without ``env`` for the run's own id.
        progress_bar: True, False, or None for "if standard error is a terminal".
        network, advantage_function, surrogate_function: the run's own, where they were given to ``GRPO`` as functions.
        callback: the callbacks that stood beside ``Run``, as for ``GRPO.learn``, in their order; a file cannot hold
            them, and a warning names those that are missing. One that stood before ``Run`` is called before the update
            is recorded, any other one after it. What they remember of the run so far, only the caller can give back.

    Raises:
        UsageError: no run folder, no readable checkpoint, a run that is already finished or that another process
            works on; or config.yaml says other settings, another seed or, where none is given here, another
            environment than the checkpoint, by which a run goes on.
    """
    if steps is not None:
        steps = whole_number("steps", steps, least=1)
    folder = RunFolder.open(path)
    config = folder.read_config()
    ranks = join(gpu=str(dict(config.get("config") or {}).get("device", "cpu")).startswith("cuda"))
    with ranks.telling(), folder.locked() if ranks.first else nullcontext():
        given = {"advantage_function": advantage_function, "surrogate_function": surrogate_function}
        own = {name: function for name, function in given.items() if function is not None}
        callbacks = checked_callbacks(callback)
        return _resume(folder, config, steps, env, env_kwargs, progress_bar, ranks, network, own, callbacks)


def _resume(
    folder: RunFolder, config: dict[str, Any], steps: int | None, env: EnvLike | None,
    env_kwargs: Mapping[str, Any] | None, progress_bar: bool | None, ranks: Ranks, network: Network | None,
    own: Mapping[str, TensorFunction], callbacks: Sequence[Callback],
) -> RunResult:  # fmt: skip
    try:
        options = (
            with_numbers(dict(config["run"]))
            | {"track": config["run"]["track"]}
            | ({} if steps is None else {"total_timesteps": steps})
        )
        planned = _as_planned(folder, options)
        functions = {**_loaded(_split_functions({**config.get("functions", {})})[1]), **own}
        noted = {place: list(map(str, config.get("callbacks", {}).get(place, ()))) for place in ("before", "after")}
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder.config_path} is not the configuration of an environment run ({error})") from None
    read = functools.partial(_agent_of, env=env, env_kwargs=env_kwargs, network=network, functions=functions)
    found = _newest_agent(folder, read, ranks)
    if found is None:
        raise UsageError(f"{folder.path} holds no checkpoint that can be used; train anew with another --out")
    checkpoint, agent = found
    elsewhere = env is not None or env_kwargs is not None
    try:
        _check_settings(folder, config, read_meta(checkpoint), elsewhere)
    except UsageError:
        agent.close()
        raise
    if agent.num_timesteps >= planned.total_timesteps and folder.is_finished():
        raise UsageError(
            f"{folder.path} has done all of its {planned.total_timesteps} steps; give a larger total with --steps"
        )
    now = {} if steps is None else {"run": config["run"] | {"total_timesteps": steps}}
    if elsewhere and not agent.env_lost:
        now |= {"env_id": agent.env_id, "env_kwargs": to_json(agent.env_kwargs)}
    before, after, beside = _around_the_recorder(callbacks, noted)
    if beside != noted:
        now |= {"callbacks": beside}
    ranks.once(lambda: folder.reopen(config | now if now else None))
    return _run(folder, planned, agent, config.get("begun_at", 0), progress_bar, agent.extra, before, after)


def _around_the_recorder(callbacks: Sequence[Callback], noted: Beside) -> tuple[list[Callback], list[Callback], Beside]:
    """Which callbacks are called before the recorder of the run, and which after it.

    A warning names those of ``noted``, the run's own so far, that are not among ``callbacks``.

    Returns:
        Those before, those after, and all names to note from now on: the missing ones stay.
    """
    missing = {place: list(names) for place, names in noted.items()}
    placed: dict[str, list[Callback]] = {"before": [], "after": []}
    for one in callbacks:
        name = called(one)
        place = "before" if name in missing["before"] else "after"
        placed[place].append(one)
        if name in missing[place]:
            missing[place].remove(name)
    lost = missing["before"] + missing["after"]
    if lost:
        _log.warning(
            "this run had callbacks beside Run, and goes on without %s; where they ended training, saved or changed "
            "something, give them again: training.resume(folder, callback=[...])",
            ", ".join(lost),
        )
    beside = {place: [called(one) for one in placed[place]] + missing[place] for place in placed}
    return placed["before"], placed["after"], beside


def _as_planned(folder: RunFolder, options: Mapping[str, Any]) -> RunSettings:
    """What config.yaml says of the run. Raises UsageError, which names the file, for a value that is not allowed."""
    try:
        return RunSettings(**options)
    except UsageError as error:
        raise UsageError(f"{folder.config_path}, under run: {error}") from None


def _check_settings(folder: RunFolder, config: Mapping[str, Any], saved: Mapping[str, Any], elsewhere: bool) -> None:
    """Raises UsageError if config.yaml says something else than the checkpoint, which decides how a run goes on.

    Args:
        folder: of the run.
        config: what its config.yaml says.
        saved: what its checkpoint says of itself.
        elsewhere: the environment was given anew, and neither of the two decides on it.
    """
    written, held = with_numbers(dict(config.get("config", {}))), saved["config"]
    other = [(name, value, held[name]) for name, value in written.items() if name in held and held[name] != value]
    if config.get("seed", held["seed"]) != held["seed"]:
        other.append(("the seed at the top", config["seed"], held["seed"]))
    places = [] if elsewhere else [(name, config.get(name, saved[name]), saved[name]) for name in ENVIRONMENT]
    moved = [(name, said, has) for name, said, has in places if _as_text(said) != _as_text(has)]
    if not other and not moved:
        return
    said = ", ".join(f"{name}={shown(value)} (the checkpoint: {shown(has)})" for name, value, has in other + moved)
    anew = (
        f"; in another environment it goes on by training.resume({str(folder.path)!r}, env=..., env_kwargs=...)"
        if moved
        else ""
    )
    raise UsageError(
        f"{folder.config_path} has other settings than the run's checkpoint: {said}. A run goes on with those of "
        f"its checkpoint: put them back, or start a new run with grouprl train --config{anew}"
    )


ENVIRONMENT = ("env_id", "env_kwargs")
"""What config.yaml and a checkpoint both say of the environment."""


def _as_text(value: Any) -> str:
    """JSON, for comparing: NaN is like NaN, and 1 unlike 1.0 and true, as it may be to a constructor."""
    return json.dumps(with_numbers(value), sort_keys=True, default=str)


def _newest_agent(folder: RunFolder, agent_of: Callable[[Path], GRPO], ranks: Ranks) -> tuple[Path, GRPO] | None:
    """The newest good checkpoint and its agent, or None. Of several processes the first says which that is."""
    if ranks.world > 1:
        best = ranks.once(lambda: newest_good(folder.checkpoints(), load_state))
        return None if best is None else (best[0], agent_of(best[0]))
    return newest_good(folder.checkpoints(), agent_of)


def _agent_of(
    path: Path, env: EnvLike | None, env_kwargs: Mapping[str, Any] | None, network: Network | None,
    functions: Mapping[str, Callable[..., Any]],
) -> GRPO:  # fmt: skip
    """The agent of a run, as a checkpoint has it. Raises DamagedFileError, or UsageError for its environment."""
    own = UserFunctions(*map(functions.get, FUNCTIONS))
    agent = loading.from_checkpoint(GRPO, path, env, env_kwargs, network, own)
    with taking_up(path):
        extra = agent.extra
        solved = extra["solved_at"]
        agent.extra = {
            "next_eval": int(extra["next_eval"]),
            "next_checkpoint": int(extra["next_checkpoint"]),
            "solved_at": None if solved is None else (int(solved[0]), float(solved[1])),
            "metrics": dict(extra["metrics"]),
            "next_episodes": int(extra["next_episodes"]),
            "episodes": dict(extra["episodes"]),
        }
    return agent


def _run(
    folder: RunFolder, run: RunSettings, agent: GRPO, begun_at: int, progress_bar: bool | None,
    past: Mapping[str, Any] | None = None, before: Sequence[Callback] = (), after: Sequence[Callback] = (),
) -> RunResult:  # fmt: skip
    """Train on schedules that run from ``begun_at`` to the last step of ``run``, and record it.

    ``past`` is for :func:`recording`; ``before`` and ``after`` are callbacks around the one that records.
    """
    with ExitStack() as stack:
        stack.callback(agent.close)
        with recording(folder, run, agent, past) as recorder:
            train_until(agent, begun_at, run.total_timesteps, [*before, recorder, *after], progress_bar)
        assert recorder.result is not None
        return recorder.result
