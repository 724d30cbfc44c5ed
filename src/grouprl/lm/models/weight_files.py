"""Files of weights: opened and read, and how they differ from what a model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from grouprl.errors import DamagedFileError
from grouprl.runs.shards import SHARDS


def read(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UsageError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise damaged(file.parent, error) from error
    return values


def open_all(shards: Iterable[Path], files: ExitStack) -> dict[str, Any]:
    """The open file of each tensor of several safetensors files; ``files`` closes them.

    Raises UsageError if one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Any] = {}
    for shard in shards:
        try:
            file: Any = files.enter_context(safe_open(shard, "pt"))
            stored |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise damaged(shard.parent, error) from error
    return stored


def damaged(folder: Path, error: Exception) -> DamagedFileError:
    """The error to raise for weights that cannot be read."""
    return DamagedFileError(f"the weights in {folder} are damaged ({error}); give an older checkpoint")


def difference(
    missing: Iterable[str],
    additional: Iterable[str],
    there: Mapping[str, Sequence[int]],
    here: Mapping[str, Sequence[int]],
) -> str:
    """What to say of weights that do not fit, in one line; "" if all do.

    Args:
        missing: names that a model has and the files do not hold, or hold in another shape.
        additional: names in the files that the model does not have.
        there, here: shapes in the files and in the model, by the model's names.
    """
    missing = list(missing)
    misshaped = [name for name in missing if name in there]
    absent = [name for name in missing if name not in there]
    parts = [f"{name} is {list(there[name])} there and {list(here[name])} here" for name in misshaped[:3]]
    parts += [f"it lacks {some(absent)}"] if absent else []
    parts += [f"it has {some(sorted(additional))} besides"] if additional else []
    return "; ".join(parts)


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def are_sharded(folder: Path) -> bool:
    """Whether the weights in a folder are in parts, each written by a process, and not as Transformers reads them."""
    return (folder / SHARDS).is_dir() and not any(folder.glob("*model*.safetensors"))
