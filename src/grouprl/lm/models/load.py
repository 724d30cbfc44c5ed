"""Language models and their tokenizers, loaded from the hub, a folder or a GGUF file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from grouprl.errors import UsageError, first_line
from grouprl.lm.models.adapters import adapter_places, base_of, put_adapters_on
from grouprl.lm.models.explain import explained
from grouprl.lm.models.find import HUB_KEYS, SMOLLM2, SMOLLM2_HUB_ID, find
from grouprl.lm.models.gguf import load_gguf_model, load_gguf_tokenizer
from grouprl.lm.models.weight_files import are_sharded
from grouprl.runs.manifest import check_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_log = logging.getLogger("grouprl")


def load(
    source: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = torch.float32,
    model_init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model that can be trained, on the CPU, and its tokenizer.

    The input embedding's `padding_idx` is set to None: PyTorch gives that row no gradient, and where the padding token
    is the end-of-sequence token, as in SmolLM2, that row matters. Nothing else of a model given in memory is changed.

    Args:
        source: a hub id, a folder (of a model, or of a PEFT adapter, which is put on its base), a `.gguf` file,
            ``"smollm2"``, or a model in memory.
        tokenizer: used instead of the one that belongs to `source`.
        dtype: of the weights; a name such as ``"bfloat16"`` or ``"auto"`` (that of the checkpoint) will do. Ignored for
            a model in memory.
        model_init_kwargs: further arguments of `from_pretrained`; a `dtype` or `trust_remote_code` here wins.
        trust_remote_code: run Python files that come with the model.

    Weights that have checksums beside them (:func:`grouprl.lm.models.save.save_model` writes them) are verified.

    Raises UsageError if there is no such model, it is damaged, or it is no causal language model.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    if isinstance(source, str | os.PathLike):
        path = find(source, **{key: options[key] for key in HUB_KEYS if key in options})
        name = _name(source, path)
        model = _load_model(name, path, options)
        if path.is_dir():  # afterwards, as a model of another kind that was saved there is no damage
            check_manifest(path, all_files=False)
        if tokenizer is None:
            tokenizer = _load_tokenizer(name, path, options["trust_remote_code"])
    else:
        model = _in_memory(source, model_init_kwargs)
        name = str(getattr(model.config, "_name_or_path", ""))
        if tokenizer is None:
            if not name:
                raise UsageError(
                    "The model was built in memory, so nothing says which tokenizer belongs to it; pass it as well "
                    "(GRPOTrainer calls it processing_class)."
                )
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    embedding: Any = model.get_input_embeddings()
    for layer in embedding.modules():  # an adapter on the embedding is a module around it
        if isinstance(layer, torch.nn.Embedding):
            layer.padding_idx = None
    if len(tokenizer) > (rows := embedding.weight.shape[0]):
        said = f"the model {name}" if name else "the model"
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens, and {said} has embeddings for {rows}. "
            "Pass the tokenizer that belongs to the model, or call model.resize_token_embeddings first."
        )
    return model, tokenizer


def load_tokenizer(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of any `source` that :func:`load` takes by name. Raises UsageError likewise."""
    path = find(source)
    return _load_tokenizer(_name(source, path), path, trust_remote_code)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion, the tokenizer's own first: its `eos_token` and those of `generation_config`.

    Nothing else is ever taken from `generation_config`, whose temperature, top_p and top_k would silently change what
    is sampled. Raises UsageError if there is none.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, list | tuple) else [listed]
    ids = dict.fromkeys(int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None)
    if not ids:
        raise UsageError(
            "Neither the tokenizer nor the model's generation_config names an end-of-sequence token, so no completion "
            "could ever end. Set tokenizer.eos_token."
        )
    return tuple(ids)


# --- loading ----------------------------------------------------------------------------------------------------------


def _name(source: str | os.PathLike[str], path: Path) -> str:
    """What the model is called in its configuration, and in that of an adapter on it: something others can load too."""
    if source == SMOLLM2 and path.is_dir():
        return SMOLLM2_HUB_ID
    return str(path) if str(source).startswith("~") else str(source)


def _in_memory(model: Any, model_init_kwargs: Mapping[str, Any] | None) -> PreTrainedModel:
    if not all(hasattr(model, name) for name in ("config", "forward", "get_input_embeddings", "save_pretrained")):
        raise UsageError(
            f"Expected a model's hub id, folder or .gguf file, or a Transformers model, got {type(model).__name__}."
        )
    if model_init_kwargs:
        _log.warning("model_init_kwargs are for a model given by name; this one is loaded already, so they do nothing")
    return cast("PreTrainedModel", model)


def _load_model(name: str, path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    if path.suffix == ".gguf":
        model = _load_gguf(path, options)
    elif adapter_places(path):
        return _load_adapter(path, options)
    else:
        model = _load_folder(name, path, options)
    # What a saved adapter names as its base, and whence a copy in memory gets its tokenizer.
    model.config._name_or_path = model.name_or_path = name
    return model


def _load_gguf(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    kept = {"dtype", "trust_remote_code", "attn_implementation", *HUB_KEYS}
    if unknown := sorted(options.keys() - kept):
        raise UsageError(f"model_init_kwargs of a GGUF model can hold dtype and attn_implementation, not {unknown}.")
    dtype = options["dtype"]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32 if dtype in ("auto", None) else getattr(torch, str(dtype), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype={options['dtype']!r} is no type of weights; use float32, bfloat16, float16 or auto.")
    model = load_gguf_model(path, dtype)
    if "attn_implementation" in options:
        model.set_attn_implementation(options["attn_implementation"])
    return model


def _load_folder(name: str, path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if not (path / "config.json").exists():
        raise UsageError(
            f"{path} holds no model: there is no config.json. A model's folder has one beside its weights."
        )
    if are_sharded(path):
        raise UsageError(
            f"{path} is a checkpoint of a sharded model, in parts; give it to train(resume_from_checkpoint=...), and "
            "save_model writes the model whole (as checkpoints do with state_dict_type='FULL_STATE_DICT')"
        )
    kept = {key: value for key, value in options.items() if key not in HUB_KEYS}
    with explained(name, _reason(path)):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kept)
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UsageError(
            f"{name} is no complete causal language model: {len(missing)} weights are missing and would be random "
            f"({', '.join(missing[:3])}). Its config.json says {model.config.architectures}."
        )
    kinds = model.config.architectures or []
    if any("MaskedLM" in kind for kind in kinds):
        raise UsageError(f"{name} is a masked language model ({kinds[0]}), which sees the future. Give a causal one.")
    return model


def _load_adapter(path: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    if find_spec("peft") is None:
        raise UsageError(f"{path} holds a PEFT adapter; loading it needs one more package: pip install peft.")
    base = base_of(path)
    model = _load_model(base, find(base), {key: value for key, value in options.items() if key not in HUB_KEYS})
    with explained(str(path), _reason(path)):
        return cast("PreTrainedModel", put_adapters_on(model, path))


def _load_tokenizer(name: str, path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if adapter_places(path) and not (path / "tokenizer_config.json").exists():
        return load_tokenizer(base_of(path), trust_remote_code=trust_remote_code)
    if path.suffix == ".gguf":
        tokenizer: Any = load_gguf_tokenizer(path)
    else:
        with explained(f"the tokenizer of {name}", _reason(path)):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    tokenizer.name_or_path = name
    return cast("PreTrainedTokenizerBase", tokenizer)


def _reason(path: Path) -> Callable[[Exception], str]:
    """Why Transformers cannot load the model in ``path``, from the error it raised."""

    def describe(error: Exception) -> str:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            return f"it comes with Python files. If you trust them, set trust_remote_code=True; they lie in {path}"
        if reason.startswith("Unrecognized configuration class"):
            return f"it is no causal language model (model_type {_model_type(path)!r})"
        if "does not recognize this architecture" in reason:
            return f"this version of Transformers does not know model_type {_model_type(path)!r}; a newer one may"
        return reason

    return describe


def _model_type(path: Path) -> Any:
    return json.loads((path / "config.json").read_text()).get("model_type")
