"""Files with anything in them: transcripts, states and GGUF models are read as what they are, or refused in words."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from odd import result_or_clear_error

from grouprl.lm.models.gguf import load_gguf_model, load_gguf_tokenizer
from grouprl.runs.state import load_state, read_meta, save_state
from grouprl.runs.transcripts import read_transcripts, write_html

plain: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["</script>", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
GOOD = {
    "step": 1, "group": 0, "prompt_index": 3, "prompt": "p", "completion": "c", "tokens": 1, "finished": True,
    "rewards": {"r": 1.0}, "reward": 1.0, "advantage": 0.5,
}  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from([*GOOD, "other"]), plain, max_size=3), min_size=1, max_size=4))
def test_transcripts_of_any_values(changes: list[dict[str, Any]]) -> None:
    lines = [json.dumps({**GOOD, **changed}) for changed in changes]
    Path("t.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if result_or_clear_error(lambda: list(read_transcripts("t.jsonl"))) is not None:
        result_or_clear_error(lambda: write_html("t.jsonl", "page.html", "a title"))


@given(st.binary(max_size=80) | plain.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_transcripts(content: bytes) -> None:
    Path("t.jsonl").write_bytes(content + b"\n" + json.dumps(GOOD).encode() + b"\n")
    result_or_clear_error(lambda: list(read_transcripts("t.jsonl")))


@given(st.binary(max_size=60), plain, st.integers(0, 2**64 - 1), st.booleans())
def test_any_bytes_as_a_state(content: bytes, header: Any, size: int, right: bool) -> None:
    text = json.dumps(header).encode()
    for data in (content, struct.pack("<Q", len(text) if right else size) + text + content):
        Path("state.safetensors").write_bytes(data)
        result_or_clear_error(lambda: load_state("state.safetensors"))
        result_or_clear_error(lambda: read_meta("state.safetensors"))


@given(st.integers(0, 400), st.integers(0, 7))
def test_a_flipped_bit_in_a_state_is_seen(at: int, bit: int) -> None:
    save_state("state.safetensors", {"x": torch.arange(6.0), "y": torch.ones(2, 3)}, {"kind": "model", "n": 3})
    whole = load_state("state.safetensors")
    data = bytearray(Path("state.safetensors").read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    Path("state.safetensors").write_bytes(data)
    found = result_or_clear_error(lambda: load_state("state.safetensors"))
    if found is not None:  # a space in the header's padding
        assert found[1] == whole[1]
        assert all(torch.equal(found[0][name], whole[0][name]) for name in whole[0])


strings = st.binary(max_size=6).map(lambda b: struct.pack("<Q", len(b)) + b) | st.sampled_from([
    struct.pack("<Q", len(name)) + name
    for name in (b"general.architecture", b"llama", b"llama.block_count", b"tokenizer.ggml.tokens")
])  # fmt: skip
numbers = st.integers(0, 12) | st.integers(0, 2**64 - 1)


@given(
    st.integers(1, 4), numbers, numbers,
    st.lists(st.tuples(strings, st.integers(0, 13), st.binary(max_size=24) | strings)), st.binary(max_size=40),
)  # fmt: skip
def test_any_bytes_as_a_gguf_model(
    version: int, tensors: int, count: int, pairs: list[tuple[bytes, int, bytes]], rest: bytes
) -> None:
    data = b"GGUF" + struct.pack("<IQQ", version, tensors, count)
    data += b"".join(key + struct.pack("<I", kind) + value for key, kind, value in pairs) + rest
    Path("model.gguf").write_bytes(data)
    result_or_clear_error(lambda: load_gguf_model(Path("model.gguf"), torch.float32))
    result_or_clear_error(lambda: load_gguf_tokenizer(Path("model.gguf")))
