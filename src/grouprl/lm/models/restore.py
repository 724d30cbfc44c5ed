"""Weights of a saved model, put into the model in memory whose they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import DamagedFileError, UsageError, first_line
from grouprl.learning.shards import held, place_of, put
from grouprl.lm.models.adapters import has_adapters, load_adapters
from grouprl.lm.models.save import untied
from grouprl.lm.models.weight_files import are_sharded, damaged, difference, open_all
from grouprl.runs import shards
from grouprl.runs.manifest import check_manifest
from grouprl.runs.shards import SHARDS

_WEIGHTS = "model.safetensors"


@torch.no_grad()
def load_weights(model: Any, path: Path) -> None:
    """Put the weights of a folder that :func:`save_model` wrote into ``model``, in place.

    The model stays the same object with the same parameters and buffers; the values are those that were saved, bit for
    bit. Random streams stay as they are.

    Raises UsageError if the weights are missing, damaged, or those of another model.
    """
    try:
        check_manifest(path, all_files=False)
    except DamagedFileError as error:
        raise damaged(path, error) from error
    if has_adapters(model):
        load_adapters(model, path)
    elif are_sharded(path):
        _load_shards(model, path)
    else:
        _load_plain(model, path)


def _load_shards(model: Any, path: Path) -> None:
    own = untied(model)
    found = shards.read(path / SHARDS, "weights", own.get)
    shapes = {name: value.shape for name, value in found.items()}
    wrong = [name for name, value in own.items() if shapes.get(name) != value.shape]
    if wrong or found.keys() - own.keys():
        said = difference(wrong, found.keys() - own.keys(), shapes, {name: value.shape for name, value in own.items()})
        raise UsageError(f"{path} is the checkpoint of another model: {said}")
    for name, value in own.items():
        held(value).copy_(held(found[name]))


def _load_plain(model: Any, path: Path) -> None:
    """Files hold the names and layouts of the hub, which can be others than the model's own.

    What is only called otherwise there is read weight by weight. What is laid out otherwise too, such as experts that
    are one tensor here and many there, comes from a second model, as Transformers alone knows how to read it.
    """
    own, translated = model.state_dict(), {}
    with ExitStack() as files:
        single = path / _WEIGHTS
        shards = [single] if single.is_file() else sorted(path.glob("model-*.safetensors"))
        if not shards:
            raise UsageError(f"{path} holds no {_WEIGHTS}; give a checkpoint that this trainer wrote")
        stored = open_all(shards, files)
        on_disk = {name: there for name, there in _names_on_disk(model).items() if there in stored}

        def value(name: str) -> Tensor:
            tensor: Tensor = stored[on_disk[name]].get_tensor(on_disk[name])
            return tensor

        shapes = {name: stored[there].get_slice(there).get_shape() for name, there in on_disk.items()}
        fits = [name for name, shape in shapes.items() if shape == list(own[name].shape)]
        additional = stored.keys() - on_disk.values()
        if _left(own, fits):
            read, unknown = _as_transformers_reads(model, path)
            translated = {
                name: read[name] for name in _left(own, fits) if name in read and read[name].shape == own[name].shape
            }
            additional = unknown - own.keys()
        missing = _left(own, [*fits, *translated])
        if missing or additional:
            said = difference(missing, additional, shapes, {name: place.shape for name, place in own.items()})
            raise UsageError(f"{path} is the checkpoint of another model: {said}")
        first: dict[tuple[int, int, torch.Size], str] = {}
        for name in fits:
            other = first.setdefault(place_of(own[name]), name)
            if other != name and not torch.equal(value(other), value(name)):
                raise UsageError(f"{path} is the checkpoint of another model: {other} and {name} are one weight here")
        for name in fits:
            put(own[name], value(name))
        for name, tensor in translated.items():
            put(own[name], tensor)


def _left(own: Mapping[str, Tensor], filled: Iterable[str]) -> list[str]:
    """The names of the weights that are not ``filled``, nor tied to one that is."""
    places = {place_of(own[name]) for name in filled}
    return [name for name, value in own.items() if place_of(value) not in places]


def _names_on_disk(model: Any) -> dict[str, str]:
    """What weights are called in a saved folder, by their names in the model; of those that are stored as they are.

    Transformers is asked to rename tensors without memory: those that come back as the same objects were renamed only.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # it is no public function
        return {}
    weights = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in model.state_dict().items()
    }
    by_identity = {id(value): name for name, value in weights.items()}
    renamed = revert_weight_conversion(model, dict(weights))
    return {by_identity[id(value)]: name for name, value in renamed.items() if id(value) in by_identity}


def _as_transformers_reads(model: Any, path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """The weights in ``path`` by the names of the model's class, and the names of those that have no place there.

    Their type is the widest of the model's, so that no value is rounded.
    """
    from safetensors import SafetensorError

    floats = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
    with torch.random.fork_rng(devices=[]), _quiet():
        try:
            answer: Any = _class_of(model).from_pretrained(
                path, config=copy.deepcopy(model.config), dtype=reduce(torch.promote_types, floats, torch.bfloat16),
                local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        except SafetensorError as error:
            raise damaged(path, error) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{path} cannot be read as a {type(model).__name__}: {first_line(error)}") from error
    loaded, report = answer
    misshaped = {str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]}
    random = set(report["missing_keys"]) | misshaped
    return {n: v for n, v in loaded.state_dict().items() if n not in random}, set(report["unexpected_keys"])


def _class_of(model: Any) -> Any:
    """The model's class: one that fully_shard made is a class of its own, in front of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' progress bar and report of what did not fit, which is ours to say."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
