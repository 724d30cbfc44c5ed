"""Tensors of which each process writes its part, by PyTorch's distributed checkpoints (DCP), as safetensors files.

DCP's own format is a pickle, which runs whatever code somebody put into it. Its format of safetensors holds the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grouprl.errors import DamagedFileError, TrainingError, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

SHARDS = "shards"
"""The folder in a checkpoint."""


def check_available() -> None:
    """Raise UsageError if this PyTorch does not write shards as safetensors."""
    if not hasattr(_dcp(), "HuggingFaceStorageWriter"):
        raise UsageError("checkpoints of a sharded model need torch 2.8 or newer; install it, or leave fsdp out")


def write(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Write the parts of some tensors into an empty folder; all processes of ``group`` call this.

    Raises TrainingError if one of them cannot write.
    """
    dcp = _dcp()
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except (dcp.CheckpointException, OSError) as error:
        raise TrainingError(
            f"Cannot write {folder.parent}: {_cause(error)}. All processes must reach it, and it needs free space."
        ) from error


def _dcp() -> Any:
    import torch.distributed.checkpoint as dcp

    return dcp


def _cause(error: BaseException) -> str:
    failures: Any = getattr(error, "failures", None)
    inner = next(iter(failures.values()), None) if failures else None
    return first_line(inner[0] if isinstance(inner, tuple) else error)


def read(folder: Path, prefix: str, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors in ``folder`` whose names begin with ``prefix.``, without it. No process waits for another.

    Args:
        like: for a name the tensor whose shape, device and shards it takes on if it has the same shape; None: it is
            whole, and on the CPU.

    Raises DamagedFileError if the files are not what DCP wrote.
    """
    import torch

    if not folder.is_dir():
        return {}
    dcp = _dcp()
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        into: dict[str, Tensor] = {}
        for name, about in reader.read_metadata().state_dict_metadata.items():
            if not name.startswith(f"{prefix}."):
                continue
            place = like(name.removeprefix(f"{prefix}."))
            if place is not None and place.shape == about.size:
                into[name] = torch.empty_like(place, dtype=about.properties.dtype, requires_grad=False)
            else:
                into[name] = torch.empty(about.size, dtype=about.properties.dtype)
        if into:
            with warnings.catch_warnings():  # that nobody else takes part, as is meant
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(dict(into), storage_reader=reader, no_dist=True)
    except Exception as error:  # of DCP, of safetensors, and of what a crafted header leads to
        raise DamagedFileError(f"{folder} is damaged: {_cause(error)}.") from error
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in into.items()}
