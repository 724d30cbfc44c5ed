"""PEFT's adapters on disk: written as PEFT writes them, and loaded, each from its place, into the model they are of.

PEFT keeps the adapter called "default" in the folder itself, and any other in a folder of its name inside. What PEFT's
files cannot hold is in one more file: which adapter is active, and trained weights that its format leaves out, such as
the encoder of P-tuning, of which PEFT writes the result.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import UsageError, first_line
from grouprl.learning.shards import held, is_sharded, place_of, put, sharded_like
from grouprl.lm.models.core import is_in_peft
from grouprl.lm.models.find import find_local
from grouprl.lm.models.gguf_file import read_gguf
from grouprl.lm.models.weight_files import difference, read, some

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
REST = "grouprl_adapters.safetensors"
_PREFIX = "base_model.model."
_PROMPT_ENCODER = "prompt_encoder."
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def has_adapters(model: Any) -> bool:
    """Whether a model in memory has adapters."""
    return getattr(model, "peft_config", None) is not None


def adapter_places(folder: Path, *, beside_model: bool = False) -> dict[str, Path]:
    """The folders of the adapters in ``folder``, by name; none if it holds nothing, or a whole model.

    Args:
        beside_model: those that lie beside a whole model too.
    """
    if not folder.is_dir() or ((folder / "config.json").exists() and not beside_model):
        return {}
    places = {"default": folder} if (folder / CONFIG).is_file() else {}
    inner = sorted(path for path in folder.iterdir() if not _CHECKPOINT.fullmatch(path.name))
    return places | {path.name: path for path in inner if (path / CONFIG).is_file()}


def base_of(folder: Path) -> str:
    """The name of the model that the adapters in a folder belong to. Raises UsageError if they name none."""
    place = next(iter(adapter_places(folder).values()), folder)
    try:
        base = json.loads((place / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place} is no adapter's folder: its {CONFIG} names no base model.") from error
    if not base:
        raise UsageError(
            f"The adapter in {place} does not say which model it belongs to; load that, then PeftModel on it."
        )
    return str(base)


# --- saving -----------------------------------------------------------------------------------------------------------


def save_adapters(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    """Write all adapters of ``model`` into ``folder``.

    Args:
        state: the state dict, of which no two tensors share memory unless they are tied.
    """
    from safetensors.torch import save_file

    embeddings = _embeddings_differ(model)
    options = {"save_embedding_layers": embeddings} if is_in_peft(model) else {}
    model.save_pretrained(folder, state_dict=dict(state), **options)
    own = model.state_dict()
    kept = {id(value) for name in _saved(model) for value in _in_peft_format(model, name, state, embeddings).values()}
    written = {place_of(own[name]) for name in own if id(state[name]) in kept}
    rest = {
        name: state[name].contiguous()
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or name.startswith(_PROMPT_ENCODER)) and place_of(parameter) not in written
    }
    strange = [name for name in rest if not name.startswith(_PROMPT_ENCODER)]
    if strange:
        warnings.warn(
            f"{some(strange)} is trained and belongs to no adapter, so PEFT does not save it. grouprl loads it from "
            f"{REST}, other programs do not; list it in modules_to_save to have it everywhere",
            stacklevel=2,
        )
    names, active = [*model.peft_config], _active(model)
    if rest or names != ["default"]:
        save_file(rest, folder / REST, {"adapters": json.dumps(names), "active": json.dumps(active)})


def saved_names(model: Any, state: Mapping[str, Tensor]) -> set[str]:
    """Which weights in the state dict of a model with adapters :func:`save_adapters` writes."""
    embeddings = _embeddings_differ(model)
    chosen = {id(value) for name in _saved(model) for value in _in_peft_format(model, name, state, embeddings).values()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name for name, value in state.items() if id(value) in chosen}


def _saved(model: Any) -> list[str]:
    """The adapters that are in files: all, but of a model of transformers' own the active one alone."""
    return [*model.peft_config] if is_in_peft(model) else _active(model)


def _active(model: Any) -> list[str]:
    active = model.active_adapters
    active = active() if callable(active) else active
    return [active] if isinstance(active, str) else list(active)


def _in_peft_format(
    model: Any, name: str, state: Mapping[str, Tensor] | None = None, embeddings: bool = False
) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in files."""
    from peft import get_peft_model_state_dict

    values: dict[str, Tensor] = get_peft_model_state_dict(
        model, None if state is None else dict(state), adapter_name=name, save_embedding_layers=embeddings
    )
    prefix = "" if is_in_peft(model) else _PREFIX
    return {prefix + key: value for key, value in values.items()}


def _embeddings_differ(model: Any) -> bool:
    """Whether the base has other embeddings than it is loaded with, as far as their number says; True if nobody knows.

    Their rows would be lost otherwise: an adapter's file holds none of the base's weights.
    """
    names = {config.base_model_name_or_path or model.name_or_path for config in model.peft_config.values()}
    return any(_rows_by_name(name) != _rows(model) for name in names)


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _rows_by_name(name: str | None) -> int | None:
    """How many embeddings the model of this name has; None if it is not on this machine."""
    place = find_local(name) if name else None
    if place is None:
        return None
    try:
        if place.suffix == ".gguf":
            return read_gguf(place).tensors["token_embd.weight"].shape[0]
        from transformers import AutoConfig  # a file leaves out what is the architecture's default

        return int(AutoConfig.from_pretrained(place, local_files_only=True).get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError):
        return None


# --- loading ----------------------------------------------------------------------------------------------------------


def put_adapters_on(base: Any, folder: Path) -> Any:
    """PEFT's model of ``base`` with the adapters in ``folder``, which can be trained further.

    Raises UsageError if they are damaged or do not fit.
    """
    from peft import PeftConfig, get_peft_model

    places, (order, active) = adapter_places(folder), _recorded(folder)
    names = [name for name in order if name in places] or [*places]
    _resize(base, [read(places[name] / WEIGHTS) for name in names])
    model: Any = None
    for name in names:
        config: Any = PeftConfig.from_pretrained(str(places[name]))
        config.inference_mode = False
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    chosen = [name for name in active if name in names] or names[:1]
    model.set_adapter(chosen[0] if len(chosen) == 1 else chosen)
    load_adapters(model, folder)
    return model


@torch.no_grad()
def load_adapters(model: Any, folder: Path) -> None:
    """Put the adapters in ``folder`` into those of ``model``, in place.

    Raises UsageError if one is missing, damaged or another one.
    """
    stored = {name: read(place / WEIGHTS) for name, place in _places_of(model, folder).items()}
    rest = read(folder / REST) if (folder / REST).is_file() else {}
    own = model.state_dict()
    said = difference(
        [name for name in rest if name not in own or own[name].shape != rest[name].shape],
        [],
        {name: value.shape for name, value in rest.items()},
        {name: value.shape for name, value in own.items()},
    )
    for name, values in stored.items():
        said = said or _difference_of(model, name, values)
    if said:
        raise UsageError(f"{folder} is the checkpoint of another model: {said}")
    for name, values in stored.items():
        if not any(key.startswith(f"{_PROMPT_ENCODER}{name}.") for key in rest):
            _put(model, name, values)
    for name, value in rest.items():
        put(own[name], value)
    for name, values in stored.items():
        now = _in_peft_format(model, name)
        wrong = [key for key, value in now.items() if not _is(value, values[key])]
        if wrong:
            raise UsageError(f"PEFT did not load {some(wrong)} from {folder} into the adapter {name!r}")


def _places_of(model: Any, folder: Path) -> dict[str, Path]:
    """Where in ``folder`` the adapters of ``model`` lie, by name."""
    inside = is_in_peft(model)
    places = {name: folder / name if inside and name != "default" else folder for name in _saved(model)}
    absent = [name for name, place in places.items() if not (place / WEIGHTS).is_file()]
    if absent:
        there = ", ".join(adapter_places(folder)) or "none"
        raise UsageError(
            f"{folder} holds no {WEIGHTS} of the adapter {absent[0]!r} (adapters there: {there}); give a checkpoint "
            "that this trainer wrote, and a model with adapters of the same names"
        )
    return places


def _difference_of(model: Any, name: str, values: Mapping[str, Tensor]) -> str:
    """How the tensors in an adapter's file differ from those that the adapter has here; "" if they do not."""
    here, known = _in_peft_format(model, name), _in_peft_format(model, name, embeddings=True)
    shapes = {key: value.shape for key, value in values.items()}
    wrong = [key for key, value in here.items() if shapes.get(key) != value.shape]
    wrong += [key for key, value in known.items() if key in shapes.keys() - here.keys() and shapes[key] != value.shape]
    return difference(wrong, shapes.keys() - known.keys(), shapes, {key: value.shape for key, value in known.items()})


def _is(weight: Tensor, value: Tensor) -> bool:
    """Whether what this process holds of a weight is that of ``value``, which is whole."""
    return torch.equal(held(weight), held(sharded_like(value.to(weight.device, weight.dtype), weight)))


def _put(model: Any, name: str, values: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    places = _in_peft_format(model, name)
    if any(map(is_sharded, places.values())):  # PEFT copies whole tensors alone
        for key, place in places.items():
            put(place, values[key])
        return
    try:
        set_peft_model_state_dict(model, values, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UsageError(f"the saved adapter {name!r} does not fit: {first_line(error)}") from error


def _recorded(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the adapters in ``folder`` in the order they were made in, and the active ones; none if unknown."""
    from safetensors import safe_open

    if not (folder / REST).is_file():
        return [], []
    with safe_open(folder / REST, "pt") as file:
        about = file.metadata()
    return json.loads(about["adapters"]), json.loads(about["active"])


def _resize(base: Any, stored: list[dict[str, Tensor]]) -> None:
    """Give ``base`` as many embeddings as the adapters' files hold, if they hold them."""
    names = [name for name, module in base.named_modules() if module is base.get_input_embeddings()]
    keys = [f"{_PREFIX}{name}.{inner}weight" for name in names for inner in ("", "base_layer.")]
    for rows in {values[key].shape[0] for values in stored for key in keys if key in values} - {_rows(base)}:
        base.resize_token_embeddings(rows, mean_resizing=False)
