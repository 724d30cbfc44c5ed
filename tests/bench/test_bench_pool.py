"""Processes side by side: what they report, what becomes of those that break, and that none stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from grouprl.bench import pool
from grouprl.bench.cells import ENVIRONMENTS, Cell

Outcomes = dict[str, dict[str, Any]]


def worker(tmp_path: Path, name: str, code: str) -> Cell:
    """A cell whose worker is ``code``; it has ``cell``, what it was given."""
    script = tmp_path / f"{name}.py"
    script.write_text("import json, os, sys, time\ncell = json.loads(sys.stdin.readline())\n" + textwrap.dedent(code))
    return Cell(name, "Env", ENVIRONMENTS, 10, 0, worker=(sys.executable, str(script)))


def run(*cells: Cell, jobs: int = 2, **options: Any) -> Outcomes:
    waiting, outcomes = list(cells), {}
    pool.run(
        lambda: waiting.pop(0) if waiting else None, lambda cell, out: outcomes.update({cell.method: out}), jobs=jobs,
        **options,
    )  # fmt: skip
    return outcomes


RESULT = 'print(json.dumps({"result": {"greedy": {"mean": 5.0}}}))'


def test_a_worker_is_given_its_cell_and_its_points_and_result_are_heard(tmp_path: Path) -> None:
    said = run(
        worker(
            tmp_path,
            "good",
            """
            print("a library says something")
            print(json.dumps({"point": {"step": 1, "greedy": cell["steps"]}}), flush=True)
            print(json.dumps({"result": {"greedy": {"mean": 5.0}, "seen": [cell["method"], cell["final_starts"]]}}))
            """,
        )
    )["good"]
    assert said["status"] == "done"
    assert said["curve"] == [{"step": 1, "greedy": 10}]
    assert said["seen"] == ["good", 20_000]
    assert said["seconds"] > 0


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ('raise ValueError("no such thing")', "ValueError: no such thing"),
        ('print(json.dumps({"error": "what is wrong"})); sys.exit(1)', "what is wrong"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("pass", "it ended without a result"),
        (RESULT + "; sys.exit(3)", "it ended without a result"),
        (
            'print(json.dumps({"result": {"mean": 5.0}}))',
            "its worker gave no result that can be used: greedy: Field required",
        ),
        (
            'print(json.dumps({"point": {"step": "x"}})); ' + RESULT,
            "its worker gave no result that can be used: curve.0.step: Input should be a valid number",
        ),
        (
            'print(json.dumps({"result": {"greedy": {"mean": float("nan")}}}))',
            "its worker gave no result that can be used: greedy.mean: Input should be a finite number",
        ),
        (
            'print(json.dumps({"result": {"greedy": {"mean": 1.0}, "warnings": "diverged"}}))',
            "its worker gave no result that can be used: warnings: Input should be a valid list",
        ),
        ('raise ValueError("no entry with hf_" + "a1B2" * 8)', "ValueError: no entry with (secret)"),
    ],
)
def test_a_worker_that_breaks_is_an_outcome_and_the_others_go_on(tmp_path: Path, code: str, error: str) -> None:
    outcomes = run(worker(tmp_path, "bad", code), worker(tmp_path, "good", RESULT), jobs=1)
    assert outcomes["bad"]["status"] == "failed"
    assert outcomes["bad"]["error"] == error
    assert outcomes["good"]["status"] == "done"


def test_lines_that_are_no_messages_are_passed_over_and_the_last_needs_no_end(tmp_path: Path) -> None:
    code = 'print("[" * 200_000); sys.stdout.write(json.dumps({"result": {"greedy": {"mean": 5.0}}}))'
    assert run(worker(tmp_path, "good", code))["good"]["greedy"] == {"mean": 5.0}


def test_a_secret_is_kept_out_of_what_a_worker_said(tmp_path: Path) -> None:
    code = 'sys.stderr.write("hf_" + "a1B2" * 8 + "x" * 1975); sys.exit(1)'
    said = run(worker(tmp_path, "bad", code))["bad"]
    assert "B2" not in said["said"] + said["error"]


def test_a_command_that_does_not_exist_is_an_outcome_too() -> None:
    outcomes = run(Cell("none", "Env", ENVIRONMENTS, 1, 0, worker=("/no/such/program",)))
    assert outcomes["none"]["error"] == "cannot start '/no/such/program': No such file or directory"


def test_the_seconds_of_processors_count_those_of_the_processes_that_a_worker_waited_for(tmp_path: Path) -> None:
    code = """
    import subprocess
    burn = "import time\\nwhile time.process_time() < {}: pass"
    subprocess.run([sys.executable, "-c", burn.format(0.3)], check=True)
    while time.process_time() < 0.2: pass
    print(json.dumps({"result": {"greedy": {"mean": 0.0}}}))
    """
    assert run(worker(tmp_path, "busy", code))["busy"]["cpu_seconds"] >= 0.5


SLEEP = """
open(cell["env_kwargs"]["mark"], "w").write(str(os.getpid()))
time.sleep(60)
"""


def sleeper(tmp_path: Path) -> tuple[Cell, Path]:
    """A cell whose worker sleeps, and the file in which it says its number."""
    made = worker(tmp_path, "sleeper", SLEEP)
    return Cell(
        "sleeper", "Env", ENVIRONMENTS, 1, 0, env_kwargs={"mark": str(tmp_path / "mark")}, worker=made.worker
    ), (tmp_path / "mark")


def ends(mark: Path) -> bool:
    """Whether the process that wrote its number is gone soon."""
    for _ in range(100):
        try:
            os.kill(int(mark.read_text()), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_cell_that_is_not_wanted_any_more_is_killed_without_an_outcome(tmp_path: Path) -> None:
    cell, mark = sleeper(tmp_path)
    assert run(cell, dropped=lambda _: mark.exists() and mark.read_text() != "") == {}
    assert ends(mark)


def test_whatever_ends_the_pool_no_process_stays(tmp_path: Path) -> None:
    cell, mark = sleeper(tmp_path)

    def interrupted(_: Cell) -> bool:
        if mark.exists() and mark.read_text():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(cell, dropped=interrupted)
    assert ends(mark)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is told that its parent has ended")
def test_workers_end_with_a_pool_that_is_killed(tmp_path: Path) -> None:
    cell, mark = sleeper(tmp_path)
    code = f"""
from grouprl.bench import pool
from grouprl.bench.cells import Cell
waiting = [{cell!r}]
pool.run(lambda: waiting.pop() if waiting else None, print, jobs=1)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        for _ in range(200):
            if mark.exists() and mark.read_text():
                break
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    assert ends(mark)


def test_workers_have_one_thread_and_one_core_each(tmp_path: Path) -> None:
    code = """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    found = {"cores": cores, "threads": os.environ["OMP_NUM_THREADS"]}
    print(json.dumps({"result": {"greedy": {"mean": 0.0}, **found}}))
    time.sleep(0.3)
    """
    outcomes = run(worker(tmp_path, "one", code), worker(tmp_path, "two", code))
    assert [len(one["cores"]) for one in outcomes.values()] == [1, 1]
    assert {one["threads"] for one in outcomes.values()} == {"1"}
    if len(pool.cores()) > 1:
        assert outcomes["one"]["cores"] != outcomes["two"]["cores"]
