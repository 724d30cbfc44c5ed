"""Names an environment that takes unusually long, and ends a run that waits for it too long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from gymnasium import Env
from gymnasium.vector import VectorEnv

from grouprl.envs.checked import Checked
from grouprl.envs.shared import Shared
from grouprl.errors import TrainingError
from grouprl.runs.time_limit import within
from grouprl.runs.watchdog import Watch

T = TypeVar("T")


class StepWatch:
    """Looks on while environments are stepped, at no cost to the steps.

    Args:
        venv: the environments, or a single one.
        steps: how many vector steps and resets they have done so far.
        timeout: seconds that one vector step, or the reset of all, may take; None for any time.
    """

    def __init__(
        self, venv: VectorEnv[Any, Any, Any] | Env[Any, Any], steps: Callable[[], int], timeout: float | None
    ) -> None:
        self._venv, self._steps, self._timeout = venv, steps, timeout
        self._thread = 0
        self._watch = Watch(lambda: f"a step of {self._who(_running(self._thread))}", steps, _advice(timeout))

    def run(self, call: Callable[[], T]) -> T:
        """What ``call()`` returns, which steps the environments again and again.

        Raises:
            TrainingError: a step took longer than the time limit. The environments must be reset before the next one.
        """

        def here() -> T:
            self._thread = threading.get_ident()
            return call()

        with self._watch:
            try:
                return within(self._timeout, here, self._got_on, "an environment")
            except TimeoutError as error:
                who = self._who(_raised(error.__context__))
                raise _late(f"a step of {who}", self._timeout) from error

    def _got_on(self) -> int:
        return self._steps() + (self._venv.waited if isinstance(self._venv, Shared) else 0)

    def _who(self, frames: Iterator[FrameType]) -> str:
        """The environment that these frames, innermost first, are waiting for."""
        for frame in frames:
            seen = frame.f_locals
            if isinstance(seen.get("self"), Checked):
                return f"environment {seen['self'].number}"
            pipes = getattr(self._venv.unwrapped, "parent_pipes", [])
            if (pipe := seen.get("pipe")) is not None and pipe in pipes:  # Gymnasium waits for one worker after another
                return f"environment {pipes.index(pipe)}"
        return "the vector environment"


def making(name: str, made: Callable[[], int], timeout: float | None, call: Callable[[], T]) -> T:
    """What ``call()`` returns, which makes environments called ``name``; ``made()`` of them are made so far.

    Raises:
        TrainingError: one of them took longer than ``timeout`` seconds.
    """

    def what() -> str:
        return f"making environment {made()} ({name})"

    with Watch(what, made, _advice(timeout)):
        try:
            return within(timeout, call, made, "the constructor of an environment")
        except TimeoutError as error:
            raise _late(what(), timeout) from error


def _advice(timeout: float | None) -> str:
    return "" if timeout is not None else "; env_timeout (--timeout), in seconds, ends a run that waits for it"


def _late(what: str, timeout: float | None) -> TrainingError:
    return TrainingError(
        f"{what} had not ended after {timeout:g} s, which env_timeout (--timeout) allows; raise it, or let the "
        "environment give up by itself"
    )


def _running(thread: int) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _raised(error: BaseException | None) -> Iterator[FrameType]:
    frames, trace = [], None if error is None else error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return reversed(frames)
