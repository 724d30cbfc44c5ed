"""What hangs, or is much slower than before, is named with its time; and the thread that looks ends by itself."""

import logging
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from grouprl.runs import watchdog
from grouprl.runs.watchdog import Watch


class Clock:
    """Seconds that the test counts, in the place of those that pass; and nobody looks but the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watchdog, "_watcher", SimpleNamespace(add=lambda watch: None, remove=lambda watch: None))

    def watch(self, watch: Watch, seconds: float, calls: int = 1) -> None:
        """The thing is called and takes so long, looked at every half second."""
        with watch:
            end = self.now + seconds
            while self.now + 0.5 < end:
                self.now += 0.5
                watch.look(self.now)
            self.now = end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.WARNING, "grouprl")
    return Clock(monkeypatch)


def test_the_first_call_is_named_after_half_a_minute_and_at_each_doubling(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.watch(Watch("reward function 'judge'", advice="; say=so"), 130.0)
    said = [record.message.partition(";")[0] for record in caplog.records]
    assert said == [f"reward function 'judge' has been running for {n} s" for n in (30, 60, 120)]
    assert caplog.records[0].message.endswith("; say=so")


@pytest.mark.parametrize(("usual", "named"), [(0.001, 2.0), (0.1, 10.0), (1.0, 30.0), (20.0, 200.0)])
def test_what_is_long_follows_from_the_calls_before(
    clock: Clock, caplog: pytest.LogCaptureFixture, usual: float, named: float
) -> None:
    watch = Watch("it")
    for _ in range(5):
        clock.watch(watch, usual)
    clock.watch(watch, named - 0.1)
    assert caplog.messages == []
    clock.watch(watch, named + 0.1)
    assert len(caplog.messages) == 1
    assert f"usually takes {usual:.2g} s" in caplog.messages[0]


def test_a_call_that_was_slow_between_two_looks_is_named_when_it_ends(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch("it")
    clock.watch(watch, 0.01)
    with watch:
        clock.now += 2.5
    assert caplog.messages == ["it took 2.5 s, and usually takes 0.01 s"]


def test_many_short_calls_are_watched_by_their_count(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    steps = 0
    watch = Watch("environment Toy", progress=lambda: steps)
    for _ in range(3):
        with watch:  # a batch of an hour, of steps that take a tenth of a second
            for _ in range(7200):
                steps, clock.now = steps + 5, clock.now + 0.5
                watch.look(clock.now)
    assert caplog.messages == []
    with watch:
        for _ in range(30):
            clock.now += 0.5
            watch.look(clock.now)
    assert caplog.messages == ["environment Toy has been running for 10 s, and usually takes 0.1 s"]


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "grouprl-watch"]


def test_a_hanging_call_is_named_by_the_thread_with_the_line_it_is_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "_TICK", 0.01)
    monkeypatch.setattr(watchdog, "_long", lambda usual: 0.02)
    monkeypatch.setattr(watchdog, "_LEAST", 0.0)
    caplog.set_level(logging.WARNING, "grouprl")
    with Watch("reward function 'slow'"):
        until = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.001)
    assert "reward function 'slow' has been running for 0." in caplog.messages[0]
    assert f"of {__file__}" in caplog.messages[0]


def test_the_thread_ends_when_nothing_is_called_any_more_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK", 0.01)
    for _ in range(2):
        with suppress(ZeroDivisionError), Watch("it"):
            assert len(watchers()) == 1
            _ = 1 / 0
        for thread in watchers():
            thread.join(timeout=10)
        assert watchers() == []
        assert not watchdog._watcher._watches
