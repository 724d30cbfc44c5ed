"""Environments in processes of their own, which end whatever happens to the process that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker

from grouprl.envs.closing import close
from grouprl.envs.env_errors import DIED
from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text

PATIENCE = 5.0
"""Seconds in which a worker may close its environment before it is killed."""


class Workers(AsyncVectorEnv):
    """Gymnasium's ``AsyncVectorEnv``, whose workers leave with it and whose errors are told once, by the caller.

    Ctrl-C in a terminal reaches all processes of it. The workers ignore it: the process that started them decides when
    they end.

    Args:
        makers: one for each environment.

    Raises:
        Exception: whatever a maker raised, here or in its worker; no process is left behind.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        self.processes, self.parent_pipes = [], []
        try:
            super().__init__(makers, worker=_work)
        except BaseException:
            _kill(self.processes, os.getpid())
            self.closed = True
            raise
        self._end = weakref.finalize(self, _kill, self.processes, os.getpid())

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As Gymnasium's. Raises TrainingError if a worker died."""
        try:
            return super().reset(seed=seed, options=options)
        except (EOFError, OSError) as error:
            raise self._death("in reset") from error

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As Gymnasium's. Raises TrainingError if a worker died."""
        try:
            return super().step(actions)
        except (EOFError, OSError) as error:
            raise self._death("in step") from error

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Let the workers close their environments, and kill those that do not."""
        close_workers(self, 0.0 if terminate else PATIENCE if timeout is None else timeout)

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Raise the first error that a worker sent. Gymnasium prints it too, and loses errors of two arguments."""
        failed = [i for i, success in enumerate(successes) if not success]
        if not failed:
            return
        told = sorted((self.error_queue.get() for _ in failed), key=lambda each: each[0])
        for index, *_ in told:
            self.parent_pipes[index].close()
            self.parent_pipes[index] = None  # type: ignore[call-overload]  # Gymnasium's sign of a worker that ended
        self._state = AsyncState.DEFAULT
        index, kind, value, trace = told[0]
        if issubclass(kind, GrouprlError):
            error: GrouprlError = kind(str(value))
        else:
            error = TrainingError(f"environment {index} failed in its worker process: {error_text(value)}")
        error.add_note(f"In the worker process:\n{trace}")
        raise error

    def _death(self, when: str) -> TrainingError:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and all(process.is_alive() for process in self.processes):
            time.sleep(0.01)
        dead = [(i, process.exitcode) for i, process in enumerate(self.processes) if not process.is_alive()]
        if not dead:
            return TrainingError(f"the environment failed {when}: {DIED}")
        number, code = dead[0]
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return TrainingError(f"environment {number} failed {when}: {DIED} (it ended {how})")

    def __del__(self) -> None:
        if hasattr(self, "_end"):
            self._end()


def _work(index: int, make: Any, pipe: Any, parent_pipe: Any, memory: Any, errors: Any, *rest: Any) -> None:
    """What a worker does: Gymnasium's loop, without a word on standard error when the parent leaves."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_after, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(Exception):  # the environment cannot be closed, or the parent is gone
        try:
            env = make()
        except Exception as error:
            text = f"environment {index} cannot be made in its worker process: {error_text(error)}"
            errors.put((index, UsageError, text, traceback.format_exc()))
            pipe.send((None, False))
            pipe.recv()  # the parent sends something before it looks
            return
        _async_worker(index, lambda: env, pipe, parent_pipe, memory, errors, *rest)


def _leave_after(parent: int) -> None:
    """End this process once its parent has, even if the environment hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(PATIENCE)
    os._exit(1)


def _kill(processes: Sequence[BaseProcess], parent: int) -> None:
    if os.getpid() != parent:  # a process forked from the parent inherits the object and not the workers
        return
    for process in processes:
        if process.pid is not None:
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()


def close_vector(venv: VectorEnv[Any, Any, Any], patience: float = PATIENCE) -> None:
    """Close ``venv``; workers that are dead, or busy for longer than ``patience`` seconds, stop nobody.

    Where it cannot be closed, a warning says so.

    Gymnasium's own ``close`` waits for an answer of each worker, and fails or hangs where one of them died.
    """
    if isinstance(venv, AsyncVectorEnv):
        if not venv.closed:
            close_workers(venv, patience)
            venv.closed = True
    else:
        close(venv)


def close_workers(venv: AsyncVectorEnv, patience: float) -> None:
    """Ask each worker to close its environment, wait ``patience`` seconds at most, and kill those that still run."""
    for pipe in filter(None, venv.parent_pipes):
        with contextlib.suppress(OSError):
            pipe.send(("close", None))
    deadline = time.monotonic() + patience
    for process, pipe in zip(venv.processes, venv.parent_pipes, strict=True):
        while process.is_alive() and time.monotonic() < deadline:
            process.join(0.01)
            with contextlib.suppress(OSError, EOFError):
                while pipe is not None and pipe.poll():  # a worker that cannot get rid of a result reads nothing
                    pipe.recv()
        process.kill()
        process.join()
        if pipe is not None:
            pipe.close()


def settled(venv: VectorEnv[Any, Any, Any], patience: float = PATIENCE) -> bool:
    """Whether ``venv`` can be reset now. Answers of workers that an interrupted call left behind are thrown away.

    Args:
        venv: any vector environment; only workers can be unsettled.
        patience: seconds to wait for such answers.
    """
    base = getattr(venv.unwrapped, "own", venv.unwrapped)  # of several processes', those of this one
    if not isinstance(base, AsyncVectorEnv):
        return True
    if base.closed or None in base.parent_pipes or not all(process.is_alive() for process in base.processes):
        return False
    deadline = time.monotonic() + patience
    try:
        for pipe in base.parent_pipes:
            pipe.send(("_call", ("__doc__", (), {})))  # answered after what is still due, by a text or None
        for pipe in base.parent_pipes:
            result: Any = ()
            while isinstance(result, tuple):
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    return False
                result, _ = pipe.recv()
    except Exception:  # a dead worker, or half an answer
        return False
    base._state = AsyncState.DEFAULT
    return True


def time_limit_in_workers(venv: VectorEnv[Any, Any, Any]) -> Any:
    """Steps after which ``gymnasium.wrappers.TimeLimit`` ends the episodes of the first worker, or None if none does.

    None also where ``venv`` has no workers, or they do not answer now.
    """
    if not isinstance(venv, AsyncVectorEnv) or not settled(venv):
        return None
    name = "_max_episode_steps"  # a worker that is asked for what its environment lacks ends
    return venv.get_attr(name)[0] if all(venv.call("has_wrapper_attr", name)) else None


def check_settled(venv: VectorEnv[Any, Any, Any]) -> None:
    """Raise UsageError unless :func:`settled`."""
    if not settled(venv):
        raise UsageError(
            "a worker process of the AsyncVectorEnv has ended or does not answer, so it cannot be used any more; make "
            "a new one and call agent.set_env(venv)"
        )
