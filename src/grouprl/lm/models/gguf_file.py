"""The format of GGUF files: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

A file is foreign data. So each number in it is held against the bytes that are there before anything is made of it:
reading takes time and memory in proportion to the file, whatever the file says.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grouprl.errors import UsageError, shown

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_DEEPEST = 4  # arrays in arrays
_DIMENSIONS = 4


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file: its shape in PyTorch's order, its ggml type and its bytes."""

    shape: tuple[int, ...]
    kind: int
    raw: NDArray[np.uint8]


@dataclass(frozen=True)
class GGUF:
    """What a GGUF file holds; the tensors are mapped, not read."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def read_gguf(path: Path) -> GGUF:
    """The metadata and the mapped tensors of a GGUF file. Raises UsageError if it is none, cut short or damaged."""
    try:
        if not path.is_file():
            raise UsageError(f"There is no file {path}. Give the path of a .gguf file, a folder or a hub id.")
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(data[:4]) != b"GGUF":
            raise UsageError(f"{path} is no GGUF file: it does not begin with the letters GGUF.")
        return _parse(data)
    except UsageError:
        raise
    except (struct.error, ValueError, KeyError) as error:
        raise damaged_gguf(path, error) from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error


def damaged_gguf(path: Path, why: object) -> UsageError:
    """The error to raise for a file that cannot be what it says it is."""
    return UsageError(f"{path} is an empty, cut short or damaged GGUF file ({why}). Download it again.")


class _Reader:
    """Little-endian values one after another."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def check_room(self, count: int, size: int) -> None:
        """Raise ValueError unless so many values of at least so many bytes can follow."""
        if count * size > len(self.data) - self.position:
            raise ValueError(f"{count} values run past the end of the file")

    def scalars(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + codes, self.data, self.position)
        self.position += struct.calcsize("<" + codes)
        return values

    def string(self) -> str:
        (length,) = self.scalars("Q")
        self.check_room(length, 1)
        start, self.position = self.position, self.position + length
        return str(self.data[start : self.position], "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalars("IQ")
            if depth == _DEEPEST:
                raise ValueError(f"arrays lie in arrays more than {_DEEPEST} deep")
            if element in _SCALARS:
                self.check_room(count, struct.calcsize(_SCALARS[element]))
                return list(self.scalars(f"{count}{_SCALARS[element]}"))
            self.check_room(count, 8)  # a text begins with its length, an array with more
            return [self.value(element, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of the unknown type {kind}")
        return self.scalars(_SCALARS[kind])[0]


def _parse(data: memoryview) -> GGUF:
    reader = _Reader(data)
    _, version, n_tensors, n_metadata = reader.scalars("4sIQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3")
    reader.check_room(n_metadata, 13)  # the length of a name, a type and a byte
    metadata = {}
    for _ in range(n_metadata):
        key = reader.string()
        metadata[key] = reader.value(*reader.scalars("I"))
    reader.check_room(n_tensors, 24)
    table = []
    for _ in range(n_tensors):
        name = reader.string()
        (dimensions,) = reader.scalars("I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = reader.scalars(f"{dimensions}Q")[::-1]  # ggml counts the fastest dimension first
        table.append((name, shape, *reader.scalars("IQ")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not is_number(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"an alignment of {shown(alignment)}")
    start = -(-reader.position // alignment) * alignment
    raw = np.frombuffer(data, np.uint8)
    sizes = _block_sizes()
    tensors = {}
    for name, shape, kind, offset in table:
        if kind not in sizes:
            raise ValueError(f"tensor {name} is of the unknown type {kind}")
        numel, (block, size) = math.prod(shape), sizes[kind]
        begin, end = start + offset, start + offset + -(-numel // block) * size
        if end > len(raw):
            raise ValueError(f"tensor {name} runs past the end of the file")
        if numel == 0 or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {list(shape)} holds no whole blocks of {block}")
        if name in tensors:
            raise ValueError(f"there are two tensors {name}")
        tensors[name] = Stored(shape, kind, raw[begin:end])
    return GGUF(metadata, tensors)


def is_number(value: Any, kind: type) -> bool:
    """Whether a value of the metadata is a finite number of this kind; truth values are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(float(value))  # type: ignore[arg-type]


def _block_sizes() -> dict[int, tuple[int, int]]:
    """The values and bytes of a block of each type: of all types if llama.cpp's package is there, else of ours."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        return _BLOCKS
    return {int(kind): (int(block), int(size)) for kind, (block, size) in GGML_QUANT_SIZES.items()} | _BLOCKS


# --- de-quantisation: bytes of whole blocks [blocks, bytes] -> float32 [blocks, values], ggml-quants.c ----------------


def _half(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _q4_1(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """32 values of 4 bits: scale, minimum, the first sixteen in the low halves of the bytes, the others in the high."""
    scale, least, packed = _half(raw[:, :2]), _half(raw[:, 2:4]), raw[:, 4:]
    return scale * np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32) + least


def _q8_0(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """32 values of 8 bits: scale, then the signed values."""
    return _half(raw[:, :2]) * np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.float32)


_F32, _F16, _Q4_1, _Q8_0 = 0, 1, 3, 8
_BLOCKS = {_F32: (1, 4), _F16: (1, 2), _Q4_1: (32, 20), _Q8_0: (32, 34)}  # values and bytes of a block
DEQUANTIZE: Mapping[int, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    _F32: lambda raw: np.ascontiguousarray(raw).view(np.float32),
    _F16: _half,
    _Q4_1: _q4_1,
    _Q8_0: _q8_0,
}


def dequantize(stored: Stored) -> torch.Tensor:
    """The tensor in float32, a copy."""
    values = DEQUANTIZE[stored.kind](stored.raw.reshape(-1, _BLOCKS[stored.kind][1]))
    return torch.tensor(values.reshape(stored.shape), dtype=torch.float32)
