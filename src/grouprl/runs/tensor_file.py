"""Writing a safetensors file together with checksums of its tensors.

The library that writes such files is handed checksums, so each tensor passes from memory to the processor twice: once
for its checksum, and once to be written. Here a piece is written while the processor's cache still holds it from the
checksum, which then costs a third. The format: eight bytes with the length of the header, the header as JSON, and the
tensors one after the other, those of larger numbers first so that all are aligned
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_LENGTH = 16
"""Hexadecimal digits of a checksum."""
_PIECE = 1 << 19
"""Bytes that a processor's cache holds, with what else is in it."""
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def dtype_name(tensor: Tensor) -> str | None:
    """What the format calls the dtype of a tensor, or None if it does not know it."""
    return _DTYPES.get(str(tensor.dtype).removeprefix("torch."))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Callable[[dict[str, Any], Mapping[str, str]], dict[str, str]]
) -> None:
    """Write tensors and the metadata of their header. Equal tensors and metadata give equal files.

    Args:
        tensors: contiguous, on the CPU, of dtypes that have a :func:`dtype_name`.
        metadata: given the rest of the header and the xxh3_64 of each tensor, the metadata. It is asked twice, before
            the tensors are written with zeros for checksums, and must be as long both times.

    Raises OSError.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    size = len(_encoded(header, metadata(header, dict.fromkeys(names, "0" * CHECKSUM_LENGTH))))
    size += -size % 8
    with path.open("wb", buffering=0) as file:
        file.seek(8 + size)
        checksums = {name: _write(file, tensors[name]) for name in names}
        file.seek(0)
        _write_all(file, memoryview(size.to_bytes(8, "little")))
        _write_all(file, memoryview(_encoded(header, metadata(header, checksums)).ljust(size)))


def checksum(tensor: Tensor) -> str:
    """xxh3_64 of the bytes of a contiguous tensor on the CPU."""
    return str(xxh3_64(_bytes(tensor)).hexdigest())


def _encoded(header: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    whole = {"__metadata__": dict(sorted(metadata.items())), **header}
    return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(data)


def _write(file: Any, tensor: Tensor) -> str:
    """Write a tensor; its checksum."""
    found, data = xxh3_64(), _bytes(tensor)
    for begin in range(0, len(data), _PIECE):
        piece = data[begin : begin + _PIECE]
        found.update(piece)
        _write_all(file, piece)
    return str(found.hexdigest())


def _write_all(file: Any, data: memoryview) -> None:
    """Without a buffer the system may write less than it is given."""
    while len(data):
        data = data[file.write(data) :]
