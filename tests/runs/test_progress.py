import io
import sys
import time

import pytest

from grouprl.runs import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_where_there_is_no_terminal_it_says_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(100) as progress:
        for i in range(100):
            now[0] += 1.0
            progress.update(i + 1, reward=0.5)
        progress.say("done")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "10/100 steps, 10 s, reward 0.5"
    assert len(lines) == 11
    assert lines[-1] == "done"
    with Progress(100, enabled=False) as progress:
        now[0] += 60.0
        progress.update(50)
    assert capsys.readouterr().err == ""


class Gone:
    """A standard error without a reader."""

    def write(self, text: str) -> None:
        raise BrokenPipeError


def test_a_standard_error_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    for enabled in (None, False, True):
        with Progress(2, enabled) as progress:
            progress.update(1)
            progress.say("text")


def test_it_is_silent_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100) as progress:
        progress.update(50, reward=1.0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_it_is_silent_without_a_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    for enabled in (None, True):
        with Progress(100, enabled) as progress:
            progress.update(50)


def test_it_shows_itself_on_a_terminal_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(100, enabled=False) as progress:
        progress.update(100)
    assert sys.stderr.getvalue() == ""
    with Progress(100) as progress:
        progress.update(100)
    assert "100%" in sys.stderr.getvalue()


def test_it_shows_the_share_the_steps_the_speed_and_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1_000_000, enabled=True, description="CartPole-v1")
    progress.update(250_000, **{"return": 123.456, "eval": None})
    progress.close()
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("CartPole-v1")
    for part in ("25%", "250k/1.00M steps", "return=123.5", "steps/s"):
        assert part in last
    assert "eval" not in last


def test_a_resumed_run_starts_where_it_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, enabled=True, done=40) as progress:
        progress.update(60)
    bars = capsys.readouterr().err.split("\r")
    assert "40%" in bars[1]
    assert "60%" in bars[-1]


def test_the_bar_stays_when_the_last_batch_goes_over(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, enabled=True) as progress:
        progress.update(120)
    assert "100%" in capsys.readouterr().err.split("\r")[-1]
