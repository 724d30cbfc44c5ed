import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from grouprl.errors import UsageError
from grouprl.lm.models.adapters import _rows_by_name
from grouprl.lm.models.load import load
from grouprl.lm.models.restore import load_weights
from grouprl.lm.models.save import save_model
from grouprl.lm.models.tiny import build_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA = LoraConfig(r=2, target_modules=["q_proj"], **TASK)
KINDS = {
    "lora": LORA,
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, **TASK),
    "on a tied embedding": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], **TASK),
    "tied head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], **TASK),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4, 5], **TASK),
    "changes the base": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora", **TASK),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "encoded prompt": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **TASK),
    "projected prefix": PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **TASK
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "base"
    save_model(*build_tiny(0), path)
    return path


def adapted(config: Any, *names: str, base: Path | None = None) -> Any:
    """The tiny model with an adapter of each name; the last one is active."""
    model: Any = build_tiny(0)[0] if base is None else AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_adapter(names[-1])
    return model.eval()


def train(model: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """Move every trained weight; a copy of the whole state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, expected: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8)[None]).logits


@pytest.mark.parametrize("names", [["default"], ["grpo"], ["default", "grpo"], ["grpo", "default"], ["b", "a"]])
def test_adapters_of_any_name_are_loaded_in_place_and_by_the_folder(
    base: Path, tmp_path: Path, names: list[str]
) -> None:
    model = adapted(LORA, *names, base=base)
    expected = train(model)
    save_model(model, None, tmp_path / "m")
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    train(model, seed=2)
    load_weights(model, tmp_path / "m")
    assert same(model, expected)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places
    loaded, _ = load(tmp_path / "m", tokenizer=build_tiny(0)[1])
    assert same(loaded, expected)
    assert torch.equal(logits(loaded), logits(model))
    place = tmp_path / "m" if names[-1] == "default" else tmp_path / "m" / names[-1]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
    assert torch.equal(logits(theirs), logits(model))
    save_model(model, None, tmp_path / "m")  # an older one of several folders is replaced


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_weight_of_an_adapter_comes_back(base: Path, tmp_path: Path, kind: str) -> None:
    model = adapted(KINDS[kind], "default", base=base)
    expected = train(model)
    save_model(model, build_tiny(0)[1], tmp_path / "m")
    other = adapted(KINDS[kind], "default", base=base)
    load_weights(other, tmp_path / "m")
    assert same(other, expected)
    loaded, _ = load(tmp_path / "m")
    assert same(loaded, expected)
    assert torch.equal(logits(loaded), logits(model))


def test_weights_trained_beside_an_adapter_are_kept_with_a_warning(base: Path, tmp_path: Path) -> None:
    model = adapted(LORA, "default", base=base)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    expected = train(model)
    with pytest.warns(UserWarning, match=r"model.norm.weight is trained and belongs to no adapter"):
        save_model(model, None, tmp_path / "m")
    loaded, _ = load(tmp_path / "m", tokenizer=build_tiny(0)[1])
    assert same(loaded, expected)


@pytest.mark.parametrize("named", [True, False])
def test_embeddings_that_were_resized_are_saved_with_the_adapter(base: Path, tmp_path: Path, named: bool) -> None:
    def resized(seed: int) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        model.resize_token_embeddings(40, mean_resizing=False)
        if not named:
            model.name_or_path = model.config._name_or_path = ""
        return get_peft_model(model, LORA)

    model = resized(0)
    expected = train(model)
    save_model(model, None, tmp_path / "m")
    other = resized(1)
    assert not torch.equal(logits(other), logits(model))
    load_weights(other, tmp_path / "m")
    assert same(other, expected)
    if named:
        loaded, _ = load(tmp_path / "m", tokenizer=build_tiny(0)[1])
        assert torch.equal(logits(loaded), logits(model))


def test_embeddings_of_the_base_are_not_written_again(base: Path, tmp_path: Path) -> None:
    save_model(adapted(LORA, "default", base=base), None, tmp_path / "m")
    assert _rows_by_name(str(base)) == 32
    default = LlamaConfig()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # which leaves out what is the default
    assert _rows_by_name(str(tmp_path)) == default.vocab_size
    assert (tmp_path / "m" / "adapter_model.safetensors").stat().st_size < 8_000
    assert sorted(path.name for path in (tmp_path / "m").glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_an_adapter_inside_a_model_of_transformers_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # not of what is tested
    model: Any = build_tiny(0)[0]
    model.add_adapter(LORA, adapter_name="grpo")
    expected = train(model)
    save_model(model, None, tmp_path / "m")
    train(model, seed=2)
    load_weights(model, tmp_path / "m")
    assert same(model, expected)


@pytest.mark.parametrize(
    ("names", "config", "said"),
    [
        (["grpo"], LORA, r"holds no adapter_model.safetensors of the adapter 'grpo' \(adapters there: default\)"),
        (["default", "b"], LORA, r"holds no adapter_model.safetensors of the adapter 'b'"),
        (["default"], LoraConfig(r=4, target_modules=["q_proj"], **TASK), r"lora_A.weight is \[2, 64\] there"),
        (["default"], LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **TASK), r"it lacks .*v_proj.lora_A.weight"),
        (["default"], LoraConfig(r=2, target_modules=["v_proj"], **TASK), r"besides"),
    ],
)  # fmt: skip
def test_another_adapter_is_refused_in_one_line(tmp_path: Path, names: list[str], config: Any, said: str) -> None:
    save_model(adapted(LORA, "default"), None, tmp_path / "m")
    with pytest.raises(UsageError, match=said) as raised:
        load_weights(adapted(config, *names), tmp_path / "m")
    assert "\n" not in str(raised.value)


def test_a_folder_of_checkpoints_is_no_adapter(base: Path, tmp_path: Path) -> None:
    save_model(adapted(LORA, "default", base=base), None, tmp_path / "runs" / "checkpoint-5")
    with pytest.raises(UsageError, match=r"holds no model"):
        load(tmp_path / "runs")


def test_pefts_own_loader_reads_what_is_saved(base: Path, tmp_path: Path) -> None:
    model = adapted(KINDS["encoded prompt"], "default", base=base)
    train(model)
    save_model(model, None, tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(theirs), logits(model))
