"""What a process takes of the machine."""

from __future__ import annotations

import mmap
import sys
import time

import pytest

from grouprl.machine.usage import Usage, resident_gb


def test_memory_that_is_taken_shows() -> None:
    before = resident_gb()
    with mmap.mmap(-1, 200_000_000) as block:  # an array could lie in memory that was freed before, and is kept
        block[::4096] = b"." * len(range(0, 200_000_000, 4096))
        assert resident_gb() - before > 0.15


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it")
def test_the_wait_for_a_processor_is_a_share_of_the_time_since_the_last_look() -> None:
    usage = Usage()
    time.sleep(0.05)  # asleep, it waits for nothing
    found = usage.read()
    assert set(found) == {"memory_gb", "cpu_wait"}
    assert 0 <= found["cpu_wait"] <= 1


def test_the_wait_is_what_the_system_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([1.0, 1.25])
    clock = iter([10.0, 11.0])
    monkeypatch.setattr("grouprl.machine.usage._seconds_waited", lambda: next(counted))
    monkeypatch.setattr("grouprl.machine.usage.time.perf_counter", lambda: next(clock))
    assert Usage().read()["cpu_wait"] == pytest.approx(0.25)


def test_where_nobody_counts_the_wait_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grouprl.machine.usage._seconds_waited", lambda: None)
    assert set(Usage().read()) == {"memory_gb"}
