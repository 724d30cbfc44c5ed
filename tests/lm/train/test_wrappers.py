"""A model that comes wrapped is trained and saved as what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_runs import ROWS, config, same
from torch import nn
from transformers import AutoModelForCausalLM

from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.models.tiny import build_tiny, tiny_tokenizer

LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def of_layers(model: Any) -> Any:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled(layer)
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
    "parallel": nn.DataParallel,
    "parallel and compiled": lambda model: compiled(nn.DataParallel(model)),
    "layers": of_layers,
    "in place": in_place,
}


def made(path: Path, model: Any, **settings: Any) -> GRPOTrainer:
    ref_model, peft_config = settings.pop("ref_model", None), settings.pop("peft_config", None)
    return GRPOTrainer(
        model, lambda completions, **_: [float(len(c)) + c.count("a") for c in completions],
        config(path, **{"max_steps": 1, "learning_rate": 1e-2, **settings}), ROWS, processing_class=tiny_tokenizer(),
        ref_model=ref_model, peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_saved_and_resumed_under_its_own_names(
    tmp_path: Path, wrapper: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = build_tiny(0)
    names = list(model.state_dict())
    with caplog.at_level(logging.WARNING, "grouprl"):
        one = made(tmp_path, WRAPPERS[wrapper](model), save_strategy="steps", save_steps=1, max_steps=2)
    assert ("it is taken out" in caplog.text) is (wrapper != "in place")
    assert one.model is model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one.train()
    one.save_model(tmp_path / "saved")
    assert list(model.state_dict()) == names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    now = {name: p.detach() for name, p in model.named_parameters()}
    assert same(dict(loaded.named_parameters()), now)
    assert not same(before, now)
    again = made(tmp_path, WRAPPERS[wrapper](build_tiny(1)[0]), max_steps=2)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert same({name: p.detach() for name, p in again.model.named_parameters()}, now)


@pytest.mark.parametrize("order", ["adapter on compiled", "compiled adapter"])
def test_adapters_and_compilers_in_any_order(tmp_path: Path, order: str) -> None:
    model, _ = build_tiny(0)
    adapter_inside = order == "compiled adapter"
    wrapped = compiled(get_peft_model(model, LORA)) if adapter_inside else get_peft_model(compiled(model), LORA)
    one = made(tmp_path, wrapped)
    one.train()
    one.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build_tiny(0)[0], tmp_path / "saved")
    adapter = {name: p for name, p in loaded.named_parameters() if "lora" in name}
    assert adapter
    assert same(adapter, {name: p for name, p in one.model.named_parameters() if "lora" in name})


def test_a_wrapped_model_takes_an_adapter_and_may_be_the_reference(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    one = made(tmp_path, compiled(model), peft_config=LORA, ref_model=nn.DataParallel(build_tiny(0)[0]), beta=0.1)
    assert type(one.model).__name__ == "PeftModelForCausalLM"
    one.train()
    assert not any("_orig_mod" in name for name in one.model.state_dict())


def test_a_model_that_is_sharded_is_refused(tmp_path: Path) -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(UsageError, match="sharded over processes"):
        made(tmp_path, FullyShardedDataParallel())
