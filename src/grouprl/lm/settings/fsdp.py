"""What ``fsdp`` and ``fsdp_config`` mean, in the names of transformers, accelerate and TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grouprl.errors import first_line, shown
from grouprl.lm.settings.trl import mapping_of, same


@dataclass(frozen=True)
class Sharding:
    """How a model is shared out.

    Attributes:
        reshard: let go of a layer after each pass. Otherwise the whole model stays gathered between a forward and its
            backward pass, and while completions are sampled.
        whole: checkpoints hold the model as ``from_pretrained`` reads it, and not in parts.
        wrap: gather layer by layer, and not the whole model at once. layers: the names of their classes; default: as
            the model says.
        recompute: activations of each layer in the backward pass.
        lean_start: it was asked that one process alone loads the weights, which is not offered.
    """

    reshard: bool = True
    whole: bool = True
    wrap: bool = True
    layers: tuple[str, ...] = ()
    recompute: bool = False
    lean_start: bool = False


_OFF = (None, False, "", "no")
_OLD: dict[str, tuple[str, Any]] = {
    "full_shard": ("reshard_after_forward", True), "shard_grad_op": ("reshard_after_forward", False),
    "offload": ("cpu_offload", True), "auto_wrap": ("auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
}  # fmt: skip
"""Words of the former ``fsdp``, and the entries of fsdp_config that took their place."""

_NO_NUMBER = (
    "forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers",
    "min_num_params", "xla_fsdp_settings", "xla_fsdp_v2", "xla_fsdp_grad_ckpt",
)  # fmt: skip
"""Entries that change no number, and that FSDP2 or this trainer has no use for."""


def switch(value: Any) -> bool | str:
    """``fsdp`` as a switch, or as the words that transformers took before it was one.

    Raises ValueError, with what is allowed, for anything else.
    """
    if isinstance(value, str) and value.lower() in ("true", "false"):  # as a command line gives it
        value = value.lower() == "true"
    if value is True or any(same(value, off) for off in _OFF):
        return value is True
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(_is_old(word) for word in words):
        raise ValueError(f"must be true or false, got {shown(value)}; fsdp_config says how to shard")
    return " ".join(str(getattr(word, "value", word)) for word in words) or False


def _is_old(word: Any) -> bool:
    text = getattr(word, "value", word)
    return isinstance(text, str) and text in _OLD


def of_words(switched: bool | str) -> dict[str, Any]:
    """The entries of ``fsdp_config`` that the words in ``fsdp`` stand for, as :func:`switch` gave them."""
    return dict(_OLD[word] for word in switched.split()) if isinstance(switched, str) else {}


def mapping(value: Any) -> dict[str, Any] | None:
    """``fsdp_config`` as a mapping without the prefix that accelerate gives its entries.

    Raises ValueError if it is none, nor one as JSON text, nor the path of a JSON file of one.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = mapping_of(value)
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"names no JSON file of a mapping: {first_line(error)}") from None
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("must be a mapping, or the path of a JSON file of one")
    return None if value is None else {str(key).removeprefix("fsdp_"): entry for key, entry in value.items()}


def read_sharding(switched: bool | str, config: Mapping[str, Any] | None) -> Sharding:
    """What ``fsdp`` and ``fsdp_config`` say, as :func:`switch` and :func:`mapping` gave them.

    Raises ValueError, with what to do, for what cannot be served.
    """
    values = {**of_words(switched), **(config or {})}
    reshard = values.pop("reshard_after_forward", True)
    kind = values.pop("state_dict_type", "FULL_STATE_DICT")
    policy = values.pop("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    layers = values.pop("transformer_layer_cls_to_wrap", None) or ()
    version = values.pop("version", 2)
    found = Sharding(
        reshard=_flag("reshard_after_forward", {"full_shard": True, "shard_grad_op": False}.get(str(reshard), reshard)),
        whole=_one_of("state_dict_type", kind, ("FULL_STATE_DICT", "SHARDED_STATE_DICT")) == "FULL_STATE_DICT",
        wrap=_one_of("auto_wrap_policy", policy, ("TRANSFORMER_BASED_WRAP", "NO_WRAP")) != "NO_WRAP",
        layers=(layers,) if isinstance(layers, str) else tuple(map(str, layers)),
        recompute=_flag("activation_checkpointing", values.pop("activation_checkpointing", False)),
        lean_start=_flag("cpu_ram_efficient_loading", values.pop("cpu_ram_efficient_loading", False)),
    )
    if str(version) != "2":
        raise ValueError(f"fsdp_config: version={shown(version)} is not offered; leave it out, which means FSDP2")
    for name, instead in (
        ("cpu_offload", "start more processes, or train an adapter (peft_config)"),
        ("activation_checkpointing_offload", "set activation_checkpointing=True, which needs no room for them"),
        ("xla", "there is no TPU here"),
    ):
        if _flag(name, values.pop(name, False)):
            raise ValueError(f"fsdp_config: {name}=True is not offered; {instead}, and leave it out")
    for name in _NO_NUMBER:
        values.pop(name, None)
    if values:
        raise ValueError(
            f"fsdp_config has no entry {shown(next(iter(values)))}; it has reshard_after_forward, state_dict_type, "
            "auto_wrap_policy, transformer_layer_cls_to_wrap and activation_checkpointing"
        )
    return found


def _flag(name: str, value: Any) -> bool:
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None:
        raise ValueError(f"fsdp_config: {name}={shown(value)} must be true or false")
    return found


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    said = str(getattr(value, "value", value)).upper()
    if said not in allowed:
        raise ValueError(f"fsdp_config: {name}={shown(value)} must be one of {', '.join(allowed)}")
    return said
