"""State files: named tensors and a JSON mapping in one safetensors file, without pickle.

The mapping is stored as text in the header of the file, so any safetensors reader can open it too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grouprl.errors import TrainingError, UsageError
from grouprl.runs.files import atomic_path, plain_number, user_path

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
_EXPECTED = "Expected a state file saved by grouprl (*.safetensors)."


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` (any shape, dtype and device) and `meta` to `path` atomically.

    Tensors that share memory or are not contiguous are stored as independent copies. `meta` is stored as JSON: tuples
    come back as lists and keys as strings; integers of any size, NaN and infinities come back as they were.

    Raises:
        UsageError: a value is no dense tensor, `meta` is not JSON, or the path cannot be written.
        TrainingError: the disk is full or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        text = json.dumps(dict(meta), default=plain_number)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Cannot store the meta data of {path} as JSON: {error}.") from error
    header = {"grouprl_format": str(FORMAT_VERSION), "meta": text}
    stored = _independent(tensors)
    with atomic_path(path) as temporary:
        try:
            save_file(stored, str(temporary), metadata=header)
            _sort_header(temporary)
        except SafetensorError as error:  # it wraps the operating system's own errors, such as a full disk
            raise TrainingError(f"Cannot write {path}: {str(error).rstrip('.')}.") from error


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back (tensors on the CPU, meta) from a file that `save_state` wrote.

    Raises UsageError if the file is missing, empty, cut short, damaged or not a state file of grouprl.
    """
    from safetensors import safe_open

    meta = read_meta(path)
    with safe_open(str(path), framework="pt", device="cpu") as file:
        # Cloned, because the tensors would otherwise stay mapped to a file that the next save replaces.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, meta  # noqa: SIM118


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the meta data alone and check that the file is whole; cheap, whatever the size. Raises as `load_state`."""
    from safetensors import SafetensorError, safe_open

    path = user_path(path)
    if not path.exists():
        raise UsageError(f"There is no file {path}. {_EXPECTED}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder. {_EXPECTED}")
    try:
        with path.open("rb") as raw:
            start = raw.read(16)
        if not start:
            raise UsageError(f"{path} is empty (0 bytes). {_EXPECTED}")
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UsageError(f"{path} is {_describe(start)} ({error}). {_EXPECTED}") from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}. {_EXPECTED}") from error
    return _parse_header(path, header)


def _sort_header(path: Path) -> None:
    """Put the header's own entries in a fixed order; safetensors' is random, and equal states should be equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # always so: the same text in another order
            file.seek(8)
            file.write(text.ljust(size))


def _parse_header(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if "grouprl_format" not in header:
        raise UsageError(f"{path} is a safetensors file, but holds no state of a run or an agent. {_EXPECTED}")
    version = header["grouprl_format"]
    if version != str(FORMAT_VERSION):
        raise UsageError(
            f"{path} has state format {version!r}, but this grouprl reads format {FORMAT_VERSION}. "
            "Load it with the version of grouprl that saved it."
        )
    try:
        meta = json.loads(header.get("meta", ""))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged: its meta data is not JSON ({error}). {_EXPECTED}") from error
    if not isinstance(meta, dict):
        raise UsageError(f"{path} is damaged: its meta data is not a mapping. {_EXPECTED}")
    return meta


def _describe(start: bytes) -> str:
    """What a file that is no readable safetensors file most likely is, from its first bytes."""
    if start.startswith(b"PK"):
        return "a zip archive, such as torch.save or Stable-Baselines3 write; grouprl reads no pickles"
    if start.startswith(b"\x80") and start[1:2] <= b"\x05":
        return "a Python pickle; grouprl reads no pickles"
    if start[8:9] == b"{":
        return "a safetensors file that is cut short or damaged"
    return "not a safetensors file, or a damaged one"


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, which safetensors demands."""
    import torch

    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UsageError(f"Cannot store {name!r}: expected a dense tensor, got {type(tensor).__name__}.")
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        if memory in seen:
            plain = plain.clone()
            memory = plain.untyped_storage().data_ptr()
        seen.add(memory)
        stored[name] = plain
    return stored
