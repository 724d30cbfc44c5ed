"""Models in GGUF files, the format of llama.cpp.

Two ways lead to the same plain model. Transformers reads every architecture it knows, but parses the vocabulary over
and over in Python: 13 s for SmolLM2-135M. The SmolLM family, to which grouprl falls back without a network, is read
here directly, in about 2 s; a test holds one against the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from grouprl.errors import UsageError, first_line, shown
from grouprl.lm.models.explain import explained
from grouprl.lm.models.gguf_file import DEQUANTIZE, GGUF, damaged_gguf, dequantize, is_number, read_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTROL = 3  # the type of a token that text never spells, such as <|im_end|>


def load_gguf_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, de-quantised into an ordinary model of `dtype` that can be trained and saved.

    Raises UsageError if the file is missing, damaged, or of an architecture that nobody reads.
    """
    gguf = read_gguf(path)
    if _is_smollm(gguf) and all(tensor.kind in DEQUANTIZE for tensor in gguf.tensors.values()):
        return _smollm(gguf, path, dtype)
    return _model_through_transformers(gguf, path, dtype)


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its special tokens and chat template. Raises as `load_gguf_model`."""
    gguf = read_gguf(path)
    return _byte_level_tokenizer(gguf, path) if _is_smollm(gguf) else _tokenizer_through_transformers(gguf, path)


# --- the SmolLM family -----------------------------------------------------------------------------------------------

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = ("attn_norm", "ffn_norm")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _is_smollm(gguf: GGUF) -> bool:
    meta = gguf.metadata
    return (
        (meta.get("general.architecture"), meta.get("tokenizer.ggml.pre")) == ("llama", "smollm")
        and not any(key.startswith("llama.rope.scaling") for key in meta)
        and all(_translate(name) for name in gguf.tensors)
    )


def _translate(name: str) -> str | None:
    """The Transformers name of a weight of a Llama, None if a Llama has no such weight."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _NAMES:
            return f"model.layers.{layer}.{_NAMES[part]}.weight"
        case [part, "weight"] if part in _OUTER:
            return f"{_OUTER[part]}.weight"
    return None


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of a query or key projection, which interleaves a head's two rotary halves."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _smollm(gguf: GGUF, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    with _held_against_the_file(path):
        meta = gguf.metadata
        layers = _number(meta, "llama.block_count")
        heads, kv_heads = _number(meta, "llama.attention.head_count"), _number(meta, "llama.attention.head_count_kv")
        width, inner = _number(meta, "llama.embedding_length"), _number(meta, "llama.feed_forward_length")
        vocabulary, ids = len(_tokens(meta)), _special_ids(meta)
        _check_shapes(gguf, layers, heads, kv_heads, width, inner, vocabulary)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=_number(meta, "llama.context_length"),
            rms_norm_eps=float(f"{_number(meta, 'llama.attention.layer_norm_rms_epsilon', float):.6g}"),  # a float32
            rope_parameters={"rope_type": "default", "rope_theta": _number(meta, "llama.rope.freq_base", float)},
            tie_word_embeddings="output.weight" not in gguf.tensors,
            bos_token_id=ids.get("bos"),
            eos_token_id=ids.get("eos"),
            pad_token_id=ids.get("padding"),
        )
    weights: dict[str, torch.Tensor] = {}
    for name, stored in gguf.tensors.items():
        weight = dequantize(stored)
        if ".attn_q." in name or ".attn_k." in name:
            weight = _unpermute(weight, heads if ".attn_q." in name else kv_heads)
        weights[str(_translate(name))] = weight.to(dtype)
    return _with_weights(LlamaForCausalLM, config, weights, path, dtype)


@contextmanager
def _held_against_the_file(path: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except (ValueError, KeyError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise damaged_gguf(path, reason) from error


def _number(meta: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """A number above 0 of the metadata. Raises ValueError if it is none, KeyError if it is not there."""
    value = meta[key]
    if not is_number(value, kind) or value <= 0:
        raise ValueError(f"{key} is {shown(value)}, not a number above 0")
    return value


def _tokens(meta: Mapping[str, Any]) -> list[str]:
    tokens = meta["tokenizer.ggml.tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("its vocabulary is no list of texts")
    if len(set(tokens)) != len(tokens):
        raise ValueError("its vocabulary holds a token twice")
    return tokens


def _special_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens that are named, by llama.cpp's name for them."""
    n, ids = len(_tokens(meta)), {}
    for name in ("bos", "eos", "unknown", "padding"):
        value = meta.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            continue
        if not is_number(value, int) or not 0 <= value < n:
            raise ValueError(f"its {name} token is {shown(value)} of {n} tokens")
        ids[name] = value
    return ids


def _check_shapes(gguf: GGUF, layers: int, heads: int, kv_heads: int, width: int, inner: int, vocabulary: int) -> None:
    """Raise ValueError unless the tensors are those of a Llama of these sizes."""
    if layers * len(_NAMES) > len(gguf.tensors):
        raise ValueError(f"it says it has {layers} layers, and holds {len(gguf.tensors)} tensors")
    if width % heads or heads % kv_heads or width // heads % 2:
        raise ValueError(f"{heads} heads, {kv_heads} of keys and values, do not divide a width of {width}")
    keys = width // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"attn_k": (keys, width), "attn_v": (keys, width), "ffn_down": (width, inner)}
    shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (inner, width)) | dict.fromkeys(_NORMS, (width,))
    expected: dict[str, tuple[int, ...]] = {
        f"blk.{layer}.{part}.weight": shapes.get(part, (width, width)) for layer in range(layers) for part in _NAMES
    }
    expected |= {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if "output.weight" in gguf.tensors:
        expected["output.weight"] = (vocabulary, width)
    for name in sorted(expected.keys() | gguf.tensors.keys()):
        shape = gguf.tensors[name].shape if name in gguf.tensors else None
        if shape != expected.get(name):
            raise ValueError(f"tensor {name} has the shape {shape} and not {expected.get(name)}")


def _byte_level_tokenizer(gguf: GGUF, path: Path) -> PreTrainedTokenizerBase:
    with _held_against_the_file(path):
        tokens, ids = _tokens(gguf.metadata), _special_ids(gguf.metadata)
        return _build_tokenizer(gguf.metadata, tokens, ids, _merges(gguf.metadata, tokens))


def _merges(meta: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
    known, merges, stored = set(tokens), [], meta["tokenizer.ggml.merges"]
    for merge in stored if isinstance(stored, list) else [stored]:
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not known.issuperset((*parts, "".join(parts))):
            raise ValueError(f"its vocabulary does not have the merge {shown(merge)}")
        merges.append((parts[0], parts[1]))
    return merges


def _build_tokenizer(
    meta: Mapping[str, Any], tokens: list[str], ids: Mapping[str, int], merges: list[tuple[str, str]]
) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    template, types = meta.get("tokenizer.chat_template"), meta["tokenizer.ggml.token_type"]
    if not isinstance(template, str | None) or not isinstance(types, list):
        raise ValueError("its chat template is no text, or its types of tokens are no list")
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _smollm_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    control = zip(tokens, types, strict=True)
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in control if kind == _CONTROL]
    )
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        model_max_length=_number(meta, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[ids[key]] for name, key in keys.items() if key in ids},
    )
    tokenizer.chat_template = template
    return cast("PreTrainedTokenizerBase", tokenizer)


def _smollm_pre_tokenizer() -> Any:
    """How SmolLM splits text before its merges. Transformers' GGUF reader lacks it and keeps runs of digits whole."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _with_weights(
    kind: type[PreTrainedModel], config: Any, weights: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """A plain model of class `kind` with these weights, all of them given."""
    loaded: Any = kind.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0]
    wrong = sorted([*loaded[1]["missing_keys"], *loaded[1]["unexpected_keys"]])
    if wrong:
        raise UsageError(f"{path} does not hold the weights of a {kind.__name__}: {', '.join(wrong[:3])} ...")
    return model


_NO_SIZES = ("context_length", ".sliding_window", "temperature_length", "chunk_size", "scaling.factor")
"""Ends of keys whose numbers cost nothing, however large they are."""
_SMALL = 256
"""Numbers up to this one are allowed, whatever the file holds."""


# --- everything else -------------------------------------------------------------------------------------------------


def _model_through_transformers(gguf: GGUF, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    unpacked = getattr(transformers, "GgufConfig", None)  # newer versions can leave weights packed, and untrainable
    if unpacked is not None:
        options["quantization_config"] = unpacked(dequantize=True)
    with _explained(gguf, path):
        _check_size(gguf, path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options)
    # The loaded model counts as quantised and refuses to be saved; a plain one takes over its weights.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return _with_weights(type(loaded), config, loaded.state_dict(), path, dtype)


def _tokenizer_through_transformers(gguf: GGUF, path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _explained(gguf, path):
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if gguf.metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = _smollm_pre_tokenizer()
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_size(gguf: GGUF, path: Path) -> None:
    """Raise ValueError if the metadata describe a larger model than the file holds weights for.

    Transformers would make what is missing: layer after layer, or terabytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = sum(math.prod(tensor.shape) for tensor in gguf.tensors.values())
    architecture = gguf.metadata.get("general.architecture")
    given: Any = gguf.metadata.get(f"{architecture}.embedding_length")
    width = int(given) if is_number(given, int) and given > 0 else 1
    for key, value in gguf.metadata.items():
        if not key.startswith(f"{architecture}."):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}")
        if key.endswith(_NO_SIZES):
            continue
        layers, is_width = key.endswith(".block_count"), key.endswith(".embedding_length")
        most = len(gguf.tensors) if layers else 2 * stored // (1 if is_width else width)  # a matrix at the least
        numbers = [one for one in (value if isinstance(value, list) else [value]) if is_number(one, int)]
        if any(abs(number) > max(most, _SMALL) for number in numbers):
            raise ValueError(f"{key} is {shown(value)}, more than the {len(gguf.tensors)} tensors in it can hold")
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    with torch.device("meta"):
        model: Any = cast(Any, AutoModelForCausalLM).from_config(config)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > 1.1 * stored + 1_000_000:
        raise ValueError(f"it describes a model of {needed} weights and holds {stored}")


@contextmanager
def _explained(gguf: GGUF, path: Path) -> Iterator[None]:
    what = f"{path} of the architecture {shown(gguf.metadata.get('general.architecture'))}"
    with explained(
        what,
        lambda error: f"{first_line(error)}. Give the folder or hub id of the original model instead",
        "it needs two more packages: pip install gguf accelerate",
    ):
        yield
