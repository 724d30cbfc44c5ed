"""What launchers say of the processes they started, and what one process alone does with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.run import training as lm_training
from grouprl.machine.ranks import ALONE, Place, Ranks, join, launched, refuse_several_processes

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "1"}, Place()),
        ({"WORLD_SIZE": " "}, Place()),
        (TORCHRUN, Place(3, 4, 1)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, Place(5, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Place()),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Place()),  # the script of a job, which no srun started
        ({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Place()),
    ],
)
def test_the_place_of_a_process_is_what_its_launcher_says(environ: dict[str, str], place: Place) -> None:
    assert launched(environ) == place


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 says that 2 processes train together, but RANK is not set.*unset WORLD_"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not set, so they cannot meet; .*torchrun"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({**TORCHRUN, "RANK": "first"}, "RANK='first' must be a whole number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' must be a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"2 processes were started \(OMPI_COMM_WORLD_SIZE=2\).*torchrun"),
        ({"PMI_SIZE": "3"}, r"3 processes were started \(PMI_SIZE=3\)"),
    ],
)
def test_an_environment_that_says_too_little_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        launched(environ)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpu": True}, r"rank 3 is number 1 on its host, which has 1 GPU.*share a GPU with ddp_backend='gloo'"),
        ({"gpu": True, "backend": "nccl"}, "start at most 1 processes"),
        ({"backend": "nccl"}, "ddp_backend='nccl' talks between GPUs.*leave it out"),
    ],
)
def test_processes_without_a_gpu_of_their_own_are_told_what_serves_them(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=said):
        join(**given)


@pytest.mark.parametrize(("n", "world"), [(7, 3), (2, 4), (8, 2), (0, 2)])
def test_shares_are_blocks_that_hold_everything_once(n: int, world: int) -> None:
    shares = [Ranks(Place(rank, world)).share(n) for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_exchanges_with_itself() -> None:
    ten = torch.tensor([10.0])
    ALONE.add(ten)
    ALONE.spread(ten)
    ALONE.wait()
    ALONE.check_same("settings", {"seed": 1}, "")
    assert ten.item() == 10.0
    assert ALONE.gather("a") == ["a"]
    assert ALONE.once(lambda: 3) == 3
    assert ALONE.agree(True, False) == [True, False]
    with pytest.raises(KeyError), ALONE.telling():
        raise KeyError


def test_a_configuration_says_which_process_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GRPOConfig(report_to=[])
    names = ("world_size", "process_index", "local_process_index", "local_rank", "should_save", "parallel_mode")
    assert [getattr(config, name) for name in names] == [1, 0, 0, -1, True, "not_parallel"]
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert [getattr(config, name) for name in names] == [4, 3, 1, 1, False, "distributed"]


def test_what_runs_in_one_process_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"an evaluation runs in one process, and 4 were started \(this is rank 3\)"):
        lm_training.evaluate(tmp_path)
    with pytest.raises(UsageError, match="playing runs in one process"):
        refuse_several_processes("playing")


@pytest.mark.skipif(sys.platform == "win32", reason="no such address")
def test_processes_that_cannot_meet_are_told_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**TORCHRUN, "MASTER_ADDR": "no.such.host.invalid"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"rank 3 of 4 cannot meet the others at no\.such\.host\.invalid:29500"):
        lm_training.train("tiny", tmp_path / "run", settings={"ddp_timeout": 0.1})
    assert not (tmp_path / "run").exists()
