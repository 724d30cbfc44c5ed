import os
import signal
import sys
import threading
from textwrap import dedent

import pytest

from grouprl.errors import TrainingError
from grouprl.lm.rewards.worker import Worker
from grouprl.runs.time_limit import within


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "called.py").write_text(
        dedent("""
        import os, sys, time
        calls = 0

        def f(do, value=None):
            global calls
            calls += 1
            if do == "sleep":
                time.sleep(600)
            if do == "raise":
                raise ValueError("no\\nluck")
            if do == "print":
                print("noise")
            if do == "die":
                os._exit(1)
            if do == "fill":
                return len(bytearray(6 << 30))
            return {"value": value, "calls": calls, "pid": os.getpid()}
        """)
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    worker = Worker("called:f", timeout=60.0)
    yield worker
    worker.close()


def test_a_call_returns_what_the_function_returns_and_the_process_stays(worker):
    first = worker.call(None, do="", value=[1, "ü\n", None])
    second = worker.call(None, do="")
    assert first["value"] == [1, "ü\n", None]
    assert (first["calls"], second["calls"]) == (1, 2)
    assert first["pid"] == second["pid"] != os.getpid()


def test_a_call_that_takes_too_long_is_late_and_the_next_one_is_answered(worker):
    pid = worker.call(None, do="")["pid"]
    worker._timeout = 0.5
    assert worker.call("late", do="sleep") == "late"
    worker._timeout = 60.0
    assert worker.call("late", do="")["pid"] != pid


def test_a_process_that_was_killed_between_calls_costs_no_answer(worker):
    pid = worker.call(None, do="")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert worker.call("late", do="", value=5)["value"] == 5


def test_a_call_that_kills_the_process_is_late(worker):
    assert worker.call("late", do="die") == "late"
    assert worker.call("late", do="")["calls"] == 1


def test_what_is_printed_is_not_taken_for_an_answer(worker):
    assert worker.call(None, do="print", value=1)["value"] == 1


def test_what_the_function_raises_is_raised_here(worker):
    with pytest.raises(TrainingError, match="called:f raised ValueError: no\nluck"):
        worker.call(None, do="raise")
    assert worker.call(None, do="", value=1)["value"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce the limit")
def test_memory_is_limited(worker):
    with pytest.raises(TrainingError, match="MemoryError"):
        worker.call(None, do="fill")


def test_a_function_that_is_not_there_is_an_error_and_not_a_wait(capfd):
    with pytest.raises(TrainingError, match="no_such_module:f did not start; its message stands above"):
        Worker("no_such_module:f", 1.0).call(None)
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_a_module_that_takes_long_to_load_costs_no_answer(worker, tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(1.5)")
    assert Worker("called:f", 1.0, imports=["slow"]).call("late", do="", value=1)["value"] == 1


def test_threads_get_their_own_answers(worker):
    got = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: worker.call(None, do="", value=i)["value"]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: i for i in range(8)}


def test_a_closed_worker_leaves_no_process_and_can_be_called_again(worker):
    pid = worker.call(None, do="")["pid"]
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert worker.call(None, do="")["pid"] != pid


def test_a_call_that_was_broken_off_leaves_no_answer_for_the_next_one(worker):
    pid = worker.call(None, do="")["pid"]
    with pytest.raises(TimeoutError):
        within(0.2, lambda: worker.call(None, do="sleep"))
    with pytest.raises(ProcessLookupError):  # it has ended
        os.kill(pid, 0)
    assert worker.call(None, do="", value="mine")["value"] == "mine"
