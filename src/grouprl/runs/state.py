"""State files: named tensors and a JSON mapping in one safetensors file, without pickle.

The mapping is stored as text in the header of the file, so any safetensors reader can open it too. The header also
holds a checksum of each tensor and one of itself, so that a file which is not what was saved is never loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64

from grouprl.errors import DamagedFileError, GrouprlError, UsageError, first_line
from grouprl.runs.files import atomic_path, check_file, plain_number, user_path
from grouprl.runs.tensor_file import checksum, dtype_name, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
_EXPECTED = "Expected a state file saved by grouprl (*.safetensors)."
_WHAT = "state file"


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` (any shape, dtype and device) and `meta` to `path` atomically, with checksums of all of it.

    Tensors that share memory or are not contiguous are stored as independent copies. `meta` is stored as JSON: tuples
    come back as lists and keys as strings; integers of any size, NaN and infinities come back as they were.

    Raises:
        UsageError: a value is no dense tensor, `meta` is not JSON, or the path cannot be written.
        TrainingError: the disk is full or broken.
    """
    try:
        text = json.dumps(dict(meta), default=plain_number)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Cannot store the meta data of {path} as JSON: {error}.") from error
    stored = _independent(tensors)

    def metadata(header: dict[str, Any], checksums: Mapping[str, str]) -> dict[str, str]:
        listed = json.dumps(dict(sorted(checksums.items())))
        found = {"grouprl_format": str(FORMAT_VERSION), "meta": text, "checksums": listed}
        return {**found, "header": _header_checksum({**header, "__metadata__": found})}

    with atomic_path(path) as temporary:
        write_tensors(temporary, stored, metadata)


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back (tensors on the CPU, meta) from a file that `save_state` wrote, and verify its checksums.

    Raises DamagedFileError if the file is missing, empty, cut short, damaged or not a state file of grouprl.
    """
    from safetensors import SafetensorError, safe_open

    path = user_path(path)
    meta, checksums = _read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            # Cloned, because the tensors would otherwise stay mapped to a file that the next save replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} is damaged or cannot be read ({error}). {_EXPECTED}") from error
    for name, tensor in tensors.items():
        if checksums.get(name) != checksum(tensor):
            raise DamagedFileError(f"{path} is damaged: {name!r} is not what was saved (its checksum differs).")
    return tensors, meta


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the meta data alone; cheap, whatever the size. Verifies that the header is what was saved.

    Raises as `load_state`.
    """
    return _read_header(user_path(path))[0]


def check_like(
    path: Path, tensors: Mapping[str, Tensor], meta: Any, like: Mapping[str, Tensor], like_meta: Any = None
) -> None:
    """Raise DamagedFileError unless a file holds what a fresh run of the same kind would save.

    Args:
        path: named in the error.
        tensors, meta: what the file holds; it may hold more.
        like: each tensor must be there, with the shape and dtype of this one, and without NaN.
        like_meta: a mapping; what has the same key must be of the same kind.
    """
    import torch

    for name, expected in like.items():
        found = tensors.get(name)
        if found is None:
            raise DamagedFileError(f"{path} is damaged: it lacks the tensor {name!r}.")
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise DamagedFileError(
                f"{path} does not fit: {name!r} is {_shown(found)} there and {_shown(expected)} here. It is damaged, "
                "or of another model."
            )
        if found.is_floating_point() and bool(torch.isnan(found).any()):
            raise DamagedFileError(f"{path} cannot be used: {name!r} holds NaN.")
    _check_kinds(path, meta, like_meta, "")


def _check_kinds(path: Path, found: Any, expected: Any, name: str) -> None:
    if expected is None:
        return
    kinds: tuple[Any, ...] = (bool, (int, float), str, dict, (list, tuple), object)
    kind = next(kind for kind in kinds if isinstance(expected, kind))
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise DamagedFileError(
            f"{path} is damaged: {name or 'its meta data'} is {found!r:.60}, not of the kind of {expected!r:.60}."
        )
    if isinstance(expected, dict):
        for key in expected.keys() & found.keys():
            _check_kinds(path, found[key], expected[key], f"{name}.{key}" if name else str(key))


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@contextmanager
def taking_up(path: Path) -> Iterator[None]:
    """Around code that takes up what was read from `path`: whatever goes wrong there is the file's fault.

    Raises DamagedFileError, which names the file, in the place of errors such as KeyError and ValueError.
    """
    try:
        yield
    except GrouprlError:
        raise
    except KeyError as error:
        raise DamagedFileError(f"{path} is damaged: it lacks {error.args[0] if error.args else '?'!r}.") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {first_line(error)}.") from error


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Meta data and the checksums of the tensors."""
    from safetensors import SafetensorError, safe_open

    if not os.path.lexists(path):
        raise DamagedFileError(f"There is no file {path}. {_EXPECTED}")
    check_file(path, _WHAT)
    try:
        with path.open("rb") as raw:
            start = raw.read(16)
        if not start:
            raise DamagedFileError(f"{path} is empty (0 bytes). {_EXPECTED}")
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
        whole = _raw_header(path)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is {_describe(start)} ({first_line(error)}). {_EXPECTED}") from error
    except OSError as error:
        raise DamagedFileError(f"Cannot read {path}: {error.strerror or error}. {_EXPECTED}") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: its header is not JSON ({error}). {_EXPECTED}") from error
    return _parse_header(path, header, whole)


def _raw_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    return header


def _header_checksum(header: Mapping[str, Any]) -> str:
    """Of all entries of a header but the checksum itself."""
    own = {name: value for name, value in header["__metadata__"].items() if name != "header"}
    text = json.dumps({**header, "__metadata__": own}, sort_keys=True)
    return str(xxh3_64(text.encode("utf-8", "surrogatepass")).hexdigest())


def _parse_header(
    path: Path, header: Mapping[str, str], whole: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    if "header" in header and header["header"] != _header_checksum(whole):
        raise DamagedFileError(f"{path} is damaged: its header is not what was saved (its checksum differs).")
    if "grouprl_format" not in header:
        raise DamagedFileError(f"{path} is a safetensors file, but holds no state of a run or an agent. {_EXPECTED}")
    version = header["grouprl_format"]
    if version != str(FORMAT_VERSION):
        raise UsageError(
            f"{path} has state format {version!r}, but this grouprl reads format {FORMAT_VERSION}. "
            "Load it with the version of grouprl that saved it."
        )
    if "header" not in header:
        raise DamagedFileError(f"{path} is damaged: its header has lost its checksum.")
    try:
        meta = json.loads(header.get("meta", ""))
        checksums = json.loads(header.get("checksums", ""))
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"{path} is damaged: its meta data is not JSON ({error}). {_EXPECTED}") from error
    if not isinstance(meta, dict):
        raise DamagedFileError(f"{path} is damaged: its meta data is not a mapping. {_EXPECTED}")
    return meta, checksums


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
        if dtype_name(tensor) is None:
            raise UsageError(f"Cannot store {name!r}: safetensors files hold no {tensor.dtype}.")
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        if memory in seen:
            plain = plain.clone()
            memory = plain.untyped_storage().data_ptr()
        seen.add(memory)
        stored[name] = plain
    return stored
