"""Damage to any file of a run is named or does no harm: a few dozen of the damages of benchmarks/robustness."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "robustness"))
import damage


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    threads = torch.get_num_threads()
    damage.prepare()
    with tempfile.TemporaryDirectory() as work:  # one that others than root can reach, unlike pytest's
        yield damage.Bench(Path(work))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arena", damage.ARENAS)
def test_no_damage_goes_unnoticed_and_none_is_a_traceback_or_a_hang(bench: Any, arena: str) -> None:
    outcomes = {number: bench.tries(arena, number) for number in range(24)}
    faults = {number: outcome for number, outcome in outcomes.items() if outcome[2] in damage.FAULTS}
    assert faults == {}
    assert len({outcome[2] for outcome in outcomes.values()}) >= 2  # not all damages do nothing
