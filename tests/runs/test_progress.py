import io
import sys

import pytest

from grouprl.runs import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_is_silent_when_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100) as progress:
        progress.update(50, reward=1.0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_it_is_silent_without_a_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(100) as progress:
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
