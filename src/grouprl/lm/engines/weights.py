"""The weights of a model as vLLM loads them: by the names and in the layout of the hub, adapters merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.learning.shards import is_sharded, whole
from grouprl.lm.models.adapters import has_adapters
from grouprl.lm.models.core import core_of

_BASE = ".base_layer."


def check_weights(model: Any) -> None:
    """Raise UsageError if the model has adapters other than LoRA, which cannot be merged into its weights."""
    if not has_adapters(model):
        return
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        strange = [
            option
            for option in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias")
            if getattr(config, option, None)
        ]
        if kind != "LORA" or strange:
            said = " with ".join([kind, *strange[:1]])
            raise UsageError(
                f"use_vllm=True: the adapter {name!r} is {said}, and only plain LoRA is merged for vLLM; set "
                "use_vllm=False"
            )


def hub_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight; also of each that is tied to another one, as vLLM lays out both for itself.

    Merged weights are new tensors, and the model's own stay as they are, bit for bit. A sharded model is gathered one
    weight at a time, so all processes must take all of its weights.
    """
    core = core_of(model)
    state = dict(core.state_dict())
    if has_adapters(model):
        state = _merged(core, state)
    for name, value in _as_on_the_hub(core, state).items():
        yield name, whole(value)


def gathers(model: nn.Module) -> bool:
    """Whether the processes must take the model's weights together, as each holds a part of them.

    Parameters do not tell: between two passes they may be whole for a while, and the state dict is sharded even then.
    """
    return any(map(is_sharded, model.state_dict().values()))


def _merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        layer = next((layers[at] for at in _above(name) if at in layers), None)
        if layer is None:
            found[name] = value
        elif _BASE in name:
            merged: Any = layer
            if name.endswith(f"{_BASE}weight") and not merged.disable_adapters:
                for adapter in merged.active_adapters:
                    if adapter in merged.lora_A or adapter in merged.lora_embedding_A:
                        value = value + merged.get_delta_weight(adapter).to(value.dtype)
            found[name.replace(_BASE, ".")] = value
    return found


def _above(name: str) -> Iterator[str]:
    """The names of the modules that a weight lies in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _as_on_the_hub(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # it is no public function
        return state
    converted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return converted
