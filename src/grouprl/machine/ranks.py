"""The processes of one training: which of them this one is, and how they share work, agree and fail together.

Whoever trains asks :func:`join`. Alone, nothing of torch.distributed is imported and every method does nothing. Every
exchange first says how each process fares, so an error of one of them is an error of all, with its own words.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text, first_line, shown
from grouprl.machine.local_exchange import LocalExchange, connect

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_ELSEWHERE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes they started that do not say where these meet: Open MPI, MPICH, MVAPICH."""

_HOW = "start the script by torchrun --nproc-per-node N, accelerate launch or srun"


class Place(NamedTuple):
    """One process among those of a training."""

    rank: int = 0
    """Its number."""
    world: int = 1
    """How many there are."""
    local: int = 0
    """Its number among those of its host."""


def launched(environ: Mapping[str, str] = os.environ) -> Place:
    """Which process this is, as the variables of torchrun, accelerate launch or Slurm's srun say.

    Raises UsageError if they say that there are several, but not which one this is or where they meet.
    """
    world = _whole(environ, "WORLD_SIZE")
    if world is not None and world > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name, "").strip():
                raise UsageError(
                    f"WORLD_SIZE={world} says that {world} processes train together, but {name} is not set, so they "
                    f"cannot meet; {_HOW}, or unset WORLD_SIZE to train in one"
                )
        rank, local = _whole(environ, "RANK") or 0, _whole(environ, "LOCAL_RANK")
        return _checked(Place(rank, world, rank if local is None else local), "RANK", "WORLD_SIZE")
    tasks = _whole(environ, "SLURM_STEP_NUM_TASKS")
    if world is None and tasks is not None and tasks > 1:
        rank, local = _whole(environ, "SLURM_PROCID") or 0, _whole(environ, "SLURM_LOCALID") or 0
        return _checked(Place(rank, tasks, local), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    for name in _ELSEWHERE:
        started = _whole(environ, name)
        if world is None and started is not None and started > 1:
            raise UsageError(
                f"{started} processes were started ({name}={started}), and nothing says where they meet; {_HOW}. If "
                f"these are runs of their own, unset {name} and give each its own seed and folder"
            )
    return Place()


def _whole(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdigit():
        raise UsageError(f"{name}={shown(text)} must be a whole number, as launchers set it; {_HOW}, or unset {name}")
    return int(text)


def _checked(place: Place, rank: str, world: str) -> Place:
    if place.rank >= place.world:
        raise UsageError(f"{rank}={place.rank} must be below {world}={place.world}; {_HOW}")
    return place


class Ranks:
    """The processes of one training, seen from one of them.

    Args:
        place: which it is. group: of torch.distributed, on CPUs; None for one process alone.

    Attributes:
        rank: the number of this process. world: how many there are. local: its number on its host.
    """

    def __init__(self, place: Place, group: Any = None) -> None:
        self.rank, self.world, self.local = place
        self._group = group
        self._local: LocalExchange | None = None
        self._told: BaseException | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Which of n things are this process's: a contiguous block, of sizes that differ by at most one."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    @property
    def group(self) -> Any:
        """The group of torch.distributed that exchanges on CPUs; None for one process alone."""
        return self._group

    def connect(self, timeout: float) -> Ranks:
        """Exchange without torch.distributed from now on, if all processes run on one host; gives itself.

        Args:
            timeout: seconds to wait for another process.
        """
        self._local = connect(self.rank, self.world, self._all_gather, timeout)
        return self

    # --- exchanges: every process takes part in each, in the same order ----------------------------------------------

    def gather(self, value: T, what: str = "gather") -> list[T]:
        """The values of all processes, in their order. A value is anything that can be pickled.

        Args:
            what: the word for it, by which a process is told from one that gathers something else.
        """
        return [value] if self.world == 1 else self._exchange(what, value)

    def once(self, function: Callable[[], T]) -> T:
        """What ``function`` gives in the first process, which alone calls it."""
        if self.world == 1:
            return function()
        found: T = self._exchange("once", function() if self.first else None)[0]
        return found

    def agree(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set in any process."""
        if self.world == 1:
            return list(flags)
        return [any(of_all) for of_all in zip(*self._exchange("agree", flags), strict=True)]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            self._exchange("wait", None)

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor by the sum over all processes, of which each gets the same bits."""
        if self.world == 1:
            return
        self._exchange("add", [tuple(tensor.shape) for tensor in tensors])
        for tensor in tensors:
            self._on_tensor(lambda dist, group, x: dist.all_reduce(x, group=group), tensor)

    def spread(self, *tensors: Tensor) -> None:
        """Replace each tensor by that of the first process."""
        if self.world == 1:
            return
        self._exchange("spread", [tuple(tensor.shape) for tensor in tensors])
        for tensor in tensors:
            self._on_tensor(lambda dist, group, x: dist.broadcast(x, 0, group=group), tensor)

    def check_same(self, what: str, values: Mapping[str, Any], advice: str) -> None:
        """Raise UsageError, in all processes, about the first of ``values`` that is not the same in all of them."""
        if self.world == 1:
            return
        found = self._exchange("check", dict(values))
        for rank, other in enumerate(found):
            for name in (*found[0], *other):
                if name not in other or name not in found[0] or other[name] != found[0][name]:
                    mine, theirs = (x.get(name, "nothing") for x in (found[0], other))
                    raise UsageError(
                        f"the ranks have different {what}: {name} is {shown(mine)} on rank 0 and {shown(theirs)} on "
                        f"rank {rank}; {advice}"
                    )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around whatever exchanges: an error of this process within becomes one of all, at their next exchange."""
        try:
            yield
        except Exception as error:
            if self.world > 1 and not self._have_been_told(error):
                self._told = error
                said = str(error) if isinstance(error, GrouprlError) else error_text(error, whole=True)
                with suppress(Exception):  # the others may have ended
                    self._all_gather(("error", isinstance(error, UsageError), said))
            raise

    def lost(self, error: Exception) -> TrainingError:
        """The error in the place of ``error``, which an exchange raised because another process is gone or hangs."""
        said = first_line(error)
        if "imed out" in said or "imeout" in said:
            self._told = TrainingError(
                f"rank {self.rank} waited too long for another rank, which hangs or computes for longer than "
                "ddp_timeout says; look at what it does (py-spy dump), or raise ddp_timeout"
            )
        else:
            self._told = TrainingError(
                f"rank {self.rank} lost another rank, which ended without a word: it was killed, ran out of memory, or "
                "had nothing more to do; resume from the newest checkpoint, or let torchrun --max-restarts do it, and "
                "call train, evaluate, and with fsdp save_model too, in every process"
            )
        return self._told

    def _have_been_told(self, error: BaseException | None) -> bool:
        """Whether an error is one that all processes know of, or was made of it."""
        while error is not None and error is not self._told:
            error = error.__cause__ or error.__context__
        return error is not None

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        found = self._all_gather((kind, None, value))
        for rank, (said, usage, text) in enumerate(found):
            if said == "error":
                text = text if text.startswith("rank ") else f"rank {rank}: {text}"
                self._told = UsageError(text) if usage else TrainingError(text)
                raise self._told
        for rank, (said, _, _) in enumerate(found):
            if said != found[0][0]:
                self._told = TrainingError(
                    f"rank {rank} waits for the others to {said} while rank 0 waits to {found[0][0]}: they do not run "
                    "the same program; a callback or reward function must call the trainer on all ranks or on none"
                )
                raise self._told
        return [value for _, _, value in found]

    def _all_gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        if self._local is not None:
            message = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
            try:
                messages = self._local.gather(message)
            except OSError as error:
                raise self.lost(error) from None
            return [pickle.loads(said) for said in messages]
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise self.lost(error) from None
        return found

    def _on_tensor(self, what: Callable[[Any, Any, Tensor], Any], tensor: Tensor) -> None:
        import torch
        import torch.distributed as dist

        try:
            if tensor.device.type == "cuda" and "nccl" in str(dist.get_backend_config()):
                what(dist, None, tensor)
                return
            exact = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype != torch.bfloat16
            passed = tensor if exact else tensor.detach().cpu().float().contiguous()
            what(dist, self._group, passed)
            if not exact:
                tensor.copy_(passed)
        except RuntimeError as error:
            raise self.lost(error) from None


ALONE = Ranks(Place())
"""One process."""

_joined: Ranks | None = None


def join(*, gpu: bool = False, timeout: float = 1800.0, backend: str | None = None) -> Ranks:
    """Meet the other processes of this training, or those that were met before; alone where there is one.

    A group that exists already, as within Ray's TorchTrainer, is used as it is.

    Args:
        gpu: each process has a GPU, that of its number on its host.
        timeout: seconds to wait for another process.
        backend: how the processes talk: "nccl", between GPUs, or "gloo", through the memory of the hosts, which lets
            several processes share a GPU. Default: nccl between GPUs and gloo elsewhere.

    Raises UsageError if they cannot meet, or there are fewer GPUs than processes.
    """
    global _joined
    if _joined is not None:
        return _joined
    there = _existing()
    place = launched() if there is None else there
    if place.world == 1:
        return ALONE
    import torch
    import torch.distributed as dist

    if backend == "nccl" and not gpu:
        raise UsageError("ddp_backend='nccl' talks between GPUs, and these processes compute on CPUs; leave it out")
    if gpu:
        n_gpus = torch.cuda.device_count()
        if place.local >= n_gpus and backend != "gloo":
            raise UsageError(
                f"rank {place.rank} is number {place.local} on its host, which has {n_gpus} GPU(s); start at most "
                f"{n_gpus} processes there, set use_cpu=True, or let them share a GPU with ddp_backend='gloo'"
            )
        torch.cuda.set_device(place.local % n_gpus)
    wait = timedelta(seconds=timeout)
    backends = "cpu:gloo,cuda:nccl" if gpu and backend != "gloo" else "gloo"
    if there is None:
        environ = _meeting_point()
        address = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        try:
            meeting = dist.rendezvous("env://", place.rank, place.world, timeout=wait)  # type: ignore[attr-defined]
            store, _, _ = next(iter(meeting))
            # torchrun keeps the store when it starts the processes again, with the addresses of those that ended.
            attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(
                backends, store=dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
                rank=place.rank, world_size=place.world, timeout=wait,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            raise UsageError(
                f"rank {place.rank} of {place.world} cannot meet the others at {address}: {first_line(error)}; check "
                "that all were started, that the port is free, and GLOO_SOCKET_IFNAME on several hosts"
            ) from error
        atexit.register(_part)
    _joined = Ranks(place, dist.new_group(backend="gloo", timeout=wait)).connect(timeout)
    if place.rank:  # what all of them would say is said once
        logging.getLogger("grouprl").setLevel(logging.ERROR)
    return _joined


def _existing() -> Place | None:
    """The place in a process group that somebody else made."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    rank = int(dist.get_rank())
    return Place(rank, int(dist.get_world_size()), int(os.environ.get("LOCAL_RANK", rank)))


def _meeting_point() -> Mapping[str, str]:
    """The environment, with where the processes meet; Slurm's says it in its own way."""
    environ = os.environ
    if not environ.get("MASTER_ADDR"):
        environ["MASTER_ADDR"] = environ.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
    if not environ.get("MASTER_PORT"):
        environ["MASTER_PORT"] = str(20000 + int(environ.get("SLURM_JOB_ID", "0") or 0) % 20000)
    return environ


def _part() -> None:
    """Leave the group, without which a process that is done ends in an error."""
    global _joined
    _joined = None
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


def here() -> Place:
    """Which process this is, whether it has met the others or not. Raises UsageError as :func:`launched`."""
    if _joined is not None:
        return Place(_joined.rank, _joined.world, _joined.local)
    return _existing() or launched()


def refuse_several_processes(what: str) -> None:
    """Raise UsageError if a launcher started several processes, and ``what`` runs in one."""
    place = here()
    if place.world > 1:
        raise UsageError(
            f"{what} runs in one process, and {place.world} were started (this is rank {place.rank}); start it "
            "without a launcher"
        )
