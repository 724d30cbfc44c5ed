"""Models in GGUF files, the format of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Two ways lead to the same plain model. Transformers reads every architecture it knows, but parses the vocabulary over
and over in Python: 13 s for SmolLM2-135M. The SmolLM family, to which grouprl falls back without a network, is read
here directly, in about 2 s; a test holds one against the other.
"""

from __future__ import annotations

import copy
import mmap
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from grouprl.errors import UsageError, first_line
from grouprl.lm.models.explain import explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL = 3  # the type of a token that text never spells, such as <|im_end|>
_ALIGNMENT = 32


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


def load_gguf_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, de-quantised into an ordinary model of `dtype` that can be trained and saved.

    Raises UsageError if the file is missing, damaged, or of an architecture that nobody reads.
    """
    gguf = read_gguf(path)
    if _is_smollm(gguf) and all(tensor.kind in _DEQUANTIZE for tensor in gguf.tensors.values()):
        return _smollm(gguf, path, dtype)
    return _model_through_transformers(gguf, path, dtype)


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its special tokens and chat template. Raises as `load_gguf_model`."""
    gguf = read_gguf(path)
    return _byte_level_tokenizer(gguf, path) if _is_smollm(gguf) else _tokenizer_through_transformers(gguf, path)


def read_gguf(path: Path) -> GGUF:
    """The metadata and the mapped tensors of a GGUF file. Raises UsageError if it is none or is cut short."""
    try:
        if not path.is_file():
            raise UsageError(f"There is no file {path}. Give the path of a .gguf file, a folder or a hub id.")
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(data[:4]) != b"GGUF":
            raise UsageError(f"{path} is no GGUF file: it does not begin with the letters GGUF.")
        return _parse(data)
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is an empty, cut short or damaged GGUF file ({error}). Download it again.") from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error


class _Reader:
    """Little-endian values one after another."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def scalars(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + codes, self.data, self.position)
        self.position += struct.calcsize("<" + codes)
        return values

    def string(self) -> str:
        (length,) = self.scalars("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.data):
            raise ValueError("a text runs past the end of the file")
        return str(self.data[start : self.position], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalars("IQ")
            if element in _SCALARS:
                return list(self.scalars(f"{count}{_SCALARS[element]}"))
            return [self.value(element) for _ in range(count)]
        return self.scalars(_SCALARS[kind])[0]


def _parse(data: memoryview) -> GGUF:
    reader = _Reader(data)
    _, version, n_tensors, n_metadata = reader.scalars("4sIQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3")
    metadata = {}
    for _ in range(n_metadata):
        key = reader.string()
        metadata[key] = reader.value(*reader.scalars("I"))
    table = []
    for _ in range(n_tensors):
        name = reader.string()
        shape = reader.scalars(f"{reader.scalars('I')[0]}Q")[::-1]  # ggml counts the fastest dimension first
        table.append((name, shape, *reader.scalars("IQ")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-reader.position // alignment) * alignment
    raw = np.frombuffer(data, np.uint8)
    tensors = {}
    for name, shape, kind, offset in table:
        numel = int(np.prod(shape))
        block, size = _BLOCKS.get(kind, (1, 0))  # the bytes of an unknown type are nobody's here
        begin, end = start + offset, start + offset + numel // block * size
        if end > len(raw):
            raise ValueError(f"tensor {name} runs past the end of the file")
        tensors[name] = Stored(shape, kind, raw[begin:end])
    return GGUF(metadata, tensors)


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
_DEQUANTIZE: Mapping[int, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    _F32: lambda raw: np.ascontiguousarray(raw).view(np.float32),
    _F16: _half,
    _Q4_1: _q4_1,
    _Q8_0: _q8_0,
}


def dequantize(stored: Stored) -> torch.Tensor:
    """The tensor in float32, a copy."""
    values = _DEQUANTIZE[stored.kind](stored.raw.reshape(-1, _BLOCKS[stored.kind][1]))
    return torch.tensor(values.reshape(stored.shape), dtype=torch.float32)


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

    meta = gguf.metadata
    try:
        heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
        config = LlamaConfig(
            vocab_size=len(meta["tokenizer.ggml.tokens"]),
            hidden_size=meta["llama.embedding_length"],
            intermediate_size=meta["llama.feed_forward_length"],
            num_hidden_layers=meta["llama.block_count"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=meta["llama.context_length"],
            rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32: 9.99999974e-06
            rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
            tie_word_embeddings="output.weight" not in gguf.tensors,
            bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
        )
    except KeyError as error:
        raise UsageError(f"{path} is a damaged GGUF file: it lacks {error}. Download it again.") from error
    weights: dict[str, torch.Tensor] = {}
    for name, stored in gguf.tensors.items():
        weight = dequantize(stored)
        if ".attn_q." in name or ".attn_k." in name:
            weight = _unpermute(weight, heads if ".attn_q." in name else kv_heads)
        weights[str(_translate(name))] = weight.to(dtype)
    return _with_weights(LlamaForCausalLM, config, weights, path, dtype)


def _byte_level_tokenizer(gguf: GGUF, path: Path) -> PreTrainedTokenizerBase:
    try:
        return _build_tokenizer(gguf.metadata)
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is a damaged GGUF file: its vocabulary, {error!r}. Download it again.") from error


def _build_tokenizer(meta: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _smollm_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    control = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in control if kind == _CONTROL]
    )
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
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


# --- everything else -------------------------------------------------------------------------------------------------


def _model_through_transformers(gguf: GGUF, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    unpacked = getattr(transformers, "GgufConfig", None)  # newer versions can leave weights packed, and untrainable
    if unpacked is not None:
        options["quantization_config"] = unpacked(dequantize=True)
    with _explained(gguf, path):
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


def _explained(gguf: GGUF, path: Path) -> AbstractContextManager[None]:
    return explained(
        f"{path} of the architecture {gguf.metadata.get('general.architecture')!r}",
        lambda error: f"{first_line(error)}. Give the folder or hub id of the original model instead",
        "it needs two more packages: pip install gguf accelerate",
    )
