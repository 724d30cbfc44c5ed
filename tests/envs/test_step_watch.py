"""Environments that hang are named, and a time limit ends the run."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from typing import Any

import pytest
from test_environment_of_an_agent import Sign

from grouprl import GRPO, TrainingError, evaluate
from grouprl.runs import watchdog
from grouprl.runs.time_limit import within

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 3, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 0,
}  # fmt: skip
made = 0


class SecondHangs(Sign):
    """The one that was made second, in each process, sleeps once for as long as the test says."""

    seconds, at = 30.0, 3

    def __init__(self) -> None:
        super().__init__()
        global made
        made += 1
        self.hangs, self.steps = made == 2, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.hangs and self.steps == self.at:
            self.hang()
        return super().step(action)

    def hang(self) -> None:
        time.sleep(self.seconds)


class UntilNamed(SecondHangs):
    at = 14  # a few steps before say how long one usually takes
    named: Any = None

    def hang(self) -> None:
        self.named.wait(self.seconds)


@pytest.fixture(autouse=True)
def none_made() -> None:
    global made
    made = 0


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_time_limit_ends_a_run_that_waits_for_an_environment(in_thread: bool) -> None:
    agent = GRPO(SecondHangs, env_timeout=0.3, **QUICK)
    raised: list[BaseException] = []

    def learn() -> None:
        try:
            agent.learn(1000)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=learn)
    thread.start() if in_thread else learn()
    if in_thread:
        thread.join()
    assert isinstance(raised[0], TrainingError)
    number = "environment 1" if not in_thread else "environment"  # its thread is not asked where it stands
    assert f"a step of {number}" in str(raised[0]).replace("the vector environment", "environment")
    assert "0.3 s, which env_timeout (--timeout) allows" in str(raised[0])
    agent.learn(64)  # the hanging step is past


def test_an_evaluation_ends_too() -> None:
    agent = GRPO(Sign, env_timeout=0.3, **QUICK)
    with pytest.raises(TrainingError, match=r"a step of environment 1 had not ended after 0\.3 s"):
        evaluate(agent, SecondHangs, episodes=3)


def test_a_worker_that_hangs_is_ended_with_its_number() -> None:
    agent = GRPO(SecondHangs, env_timeout=0.5, vectorization="async", **QUICK)
    with pytest.raises(TrainingError, match=r"a step of environment 0 had not ended after 0\.5 s"):
        agent.learn(1000)
    processes = agent.get_env().processes  # type: ignore[union-attr]
    agent.loop.collector = None
    agent.get_env().close(terminate=True)  # type: ignore[union-attr]
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_takes_long_is_named_while_it_does(
    vectorization: str, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(watchdog, "_LEAST", 0.2)
    monkeypatch.setattr(watchdog, "_TICK", 0.05)
    # It goes on once it is named: how long that takes depends on how busy the machine is.
    monkeypatch.setattr(UntilNamed, "named", multiprocessing.Event())
    monkeypatch.setattr(UntilNamed, "seconds", 60.0)
    logger, seen = logging.getLogger("grouprl"), logging.Handler()
    number = 1 if vectorization == "sync" else 0  # each worker has made its second: the first one showed the spaces
    text = f"a step of environment {number} has been running for"
    monkeypatch.setattr(seen, "emit", lambda record: UntilNamed.named.set() if text in record.getMessage() else None)
    agent = GRPO(UntilNamed, vectorization=vectorization, **QUICK)
    logger.addHandler(seen)
    try:
        with caplog.at_level(logging.WARNING, "grouprl"):
            agent.learn(48)
    finally:
        logger.removeHandler(seen)
        agent.close()
    assert [message for message in caplog.messages if text in message], caplog.messages


def test_the_limit_of_time_counts_from_the_last_progress() -> None:
    steps = [0]

    def many_short_ones() -> str:
        for _ in range(6):
            time.sleep(0.05)
            steps[0] += 1
        return "done"

    assert within(0.2, many_short_ones, lambda: steps[0]) == "done"
    with pytest.raises(TimeoutError):
        within(0.2, many_short_ones)


class CannotBeMade(Sign):
    """The one that is made third waits for as long as one lets it."""

    def __init__(self) -> None:
        super().__init__()
        global made
        made += 1
        if made == 3:
            time.sleep(60)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_constructor_that_hangs_ends_too(vectorization: str) -> None:
    children = multiprocessing.active_children()
    global made
    made = 1 if vectorization == "async" else 0  # each worker makes its own after the one that shows the spaces
    number = 2 if vectorization == "sync" else 1
    with pytest.raises(
        TrainingError, match=rf"making environment {number} \(CannotBeMade\) had not ended after 0\.3 s"
    ):
        GRPO(CannotBeMade, env_timeout=0.3, **{**QUICK, "vectorization": vectorization})
    assert multiprocessing.active_children() == children


def test_an_evaluation_waits_for_no_constructor() -> None:
    agent = GRPO(Sign, env_timeout=0.3, **QUICK)
    with pytest.raises(TrainingError, match=r"making environment 2 \(CannotBeMade\)"):
        evaluate(agent, CannotBeMade, episodes=3)


def test_a_time_limit_below_any_step_is_one_error() -> None:
    for _ in range(20):
        with pytest.raises(TrainingError, match="env_timeout"):
            GRPO(Sign, env_timeout=1e-9, **QUICK)
