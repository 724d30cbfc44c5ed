"""Language models saved as ordinary Hugging Face folders, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grouprl.errors import UsageError
from grouprl.learning.shards import is_sharded, place_of, whole
from grouprl.lm.models.adapters import CONFIG, REST, WEIGHTS, adapter_places, has_adapters, save_adapters, saved_names
from grouprl.lm.models.core import is_in_peft
from grouprl.lm.models.generation_config import writable_generation_config
from grouprl.runs.atomic_folder import atomic_folder
from grouprl.runs.files import user_path
from grouprl.runs.manifest import write_manifest
from grouprl.runs.shards import SHARDS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OURS = (".json", ".safetensors", ".jinja", ".txt", ".model", ".py", ".md", ".tiktoken")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | os.PathLike[str],
    also: Callable[[Path], object] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a folder that `from_pretrained` reads: weights (safetensors), configuration, tokenizer.

    A PEFT model leaves the folder of its adapter, in PEFT's format. Checksums of all files are in one beside them.
    Parameters may be views into one flat tensor. An older model at `path` is replaced once the new one is on the disk.
    `also` may write further files into the folder it is given, before that takes its place. `state` are the weights of
    a sharded model, as :func:`gathered_state` gave them; an empty one leaves them to `also`.

    Raises:
        UsageError: `path` cannot be written, or something else lies there.
        TrainingError: the disk is full or broken.
    """
    with atomic_folder(user_path(path), _check_replaceable) as folder:
        save = save_adapters if has_adapters(model) else _save_plain
        with nullcontext() if is_in_peft(model) else writable_generation_config(model, folder):
            save(model, folder, independent_state(model) if state is None else state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if also is not None:
            also(folder)
        write_manifest(folder)


def independent_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with a copy of each tensor that is a part of a larger one; tied weights stay one tensor.

    Safetensors refuses tensors that share memory, and Transformers would take views into one storage for tied weights.
    The copies are on the CPU, as a GPU may have no room for the model twice.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if not whole or not tensor.is_contiguous():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = tensor.detach().to("cpu", copy=True).contiguous()
            tensor = copies[place]
        state[name] = tensor
    return state


def gathered_state(model: nn.Module, *, first: bool) -> dict[str, Tensor] | None:
    """The state dict of a sharded model, whole and on the CPU; None if it is not sharded. All processes call this.

    One weight after another is gathered. Of a model with adapters, only what is saved is: the rest stays sharded.

    Args:
        first: this is the process that writes. The others keep nothing.
    """
    own = model.state_dict()
    if not any(map(is_sharded, own.values())):
        return None
    wanted = saved_names(model, own) if has_adapters(model) else own.keys()
    state: dict[str, Tensor] = {}
    of_place: dict[tuple[int, int, Any], Tensor] = {}
    for name, value in own.items():
        if name not in wanted:
            state[name] = value
            continue
        if place_of(value) not in of_place:
            gathered = whole(value)
            of_place[place_of(value)] = gathered.cpu() if first else gathered.new_empty(0)
        state[name] = of_place[place_of(value)]
    return state


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, in which of weights that are tied the first alone stands."""
    seen: dict[tuple[int, int, Any], str] = {}
    own = model.state_dict()
    return {name: value for name, value in own.items() if seen.setdefault(place_of(value), name) == name}


def _save_plain(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    if state:
        model.save_pretrained(folder, state_dict=state)
        return
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


_OF_A_MODEL = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin",
    CONFIG, WEIGHTS, REST, "adapter_model.bin",
)  # fmt: skip


def model_files(folder: Path) -> set[Path]:
    """The files in ``folder``, and the folders in it, that make a model or adapters; not those of a tokenizer."""
    inner = {place for place in adapter_places(folder, beside_model=True).values() if place != folder}
    return inner | {file for pattern in _OF_A_MODEL for file in folder.glob(pattern)}


def _check_replaceable(path: Path) -> None:
    """Raise UsageError unless `path` is absent, empty, or a folder of nothing but a model."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"Cannot write a model to {path}: that is a file. Give a folder.")
    names = sorted(entry.name for entry in path.iterdir())
    adapters = [name for name in names if (path / name / CONFIG).is_file()]
    known = {*adapters, "additional_chat_templates", SHARDS}
    foreign = [name for name in names if not name.endswith(_OURS) and name not in known]
    if foreign or (names and not adapters and not {"config.json", CONFIG} & set(names)):
        raise UsageError(
            f"Cannot write a model to {path}: the folder would be replaced, and it holds {(foreign or names)[0]}. "
            "Give another folder, such as one inside it."
        )
