"""Types of weights, and types that a script sets for the process: each trains as float32 does, or is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from peft import LoraConfig
from small_runs import ROWS, config

from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.models.tiny import build_tiny, tiny_tokenizer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
WITH_HEAD = LoraConfig(
    r=4,
    target_modules=["q_proj", "v_proj"],
    modules_to_save=["lm_head"],
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) + 0.1 * i for i, c in enumerate(completions)]


def made(path: Path, model: Any, peft_config: Any = None, **settings: Any) -> GRPOTrainer:
    given = {"max_steps": 1, "learning_rate": 1e-2, "logging_steps": 1, **settings}
    return GRPOTrainer(
        model, reward, config(path, **given), ROWS, processing_class=tiny_tokenizer(), peft_config=peft_config
    )


def keep_norms(model: Any) -> None:
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float()


def trained(path: Path, dtype: torch.dtype, peft_config: Any, mixed: bool, **settings: Any) -> tuple[float, float]:
    """The gradient's first norm, and how far the trained weights moved."""
    model = build_tiny(0)[0].to(dtype)
    if mixed:
        keep_norms(model)
    torch.manual_seed(0)
    one = made(path, model, peft_config, **settings)
    weights = {name: p for name, p in one.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone().double() for name, p in weights.items()}
    one.train()
    moved = {name: (p.detach().double() - before[name]).norm() for name, p in weights.items()}
    assert min(moved.values()) > 0
    assert all(p.dtype in (dtype, torch.float32) for p in weights.values())
    differences = [entry.get("sampling/sampling_logp_difference/max", 0.0) for entry in one.state.log_history]
    assert max(differences) < 0.05
    return one.state.log_history[0]["grad_norm"], float(torch.stack(list(moved.values())).norm())


PATHS = {"compiled": {}, "torch": {"native": False}, "plain": {"attention": "plain"}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("adapter", ["whole", "adapter", "adapter and head"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "bfloat16 with norms in float32", "float16"])
def test_every_type_of_weights_trains_as_float32_does_or_is_refused(
    tmp_path: Path, dtype: str, adapter: str, path: str
) -> None:
    peft_config = {"whole": None, "adapter": LORA, "adapter and head": WITH_HEAD}[adapter]
    kind, mixed = getattr(torch, dtype.split()[0]), "norms" in dtype
    if kind == torch.float16 and adapter != "adapter":
        with pytest.raises(UsageError, match=r"is float16, in which Adam's moments underflow.*dtype=torch\.float32"):
            trained(tmp_path, kind, peft_config, mixed, **PATHS[path])
        return
    found = trained(tmp_path / "one", kind, peft_config, mixed, **PATHS[path])
    wanted = trained(tmp_path / "two", torch.float32, peft_config, False, **PATHS[path])
    # Products may run in bfloat16. A token drawn near a border may be another there, and the gradient with it.
    assert found == pytest.approx(wanted, rel=0.1 if kind == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("spelling", ["float16", "torch.float16", torch.float16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_float16_is_refused_however_it_is_asked_for(tmp_path: Path, name: str, spelling: Any) -> None:
    model, tokenizer = build_tiny(0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises((UsageError, ValueError), match="float16"):
        made(tmp_path, str(tmp_path / "model"), model_init_kwargs={name: spelling}).train()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_script_sets_as_default_changes_nothing(tmp_path: Path, dtype: torch.dtype, path: str) -> None:
    results = []
    for default in (torch.float32, dtype):
        model, _ = build_tiny(0)
        torch.set_default_dtype(default)
        try:
            one = made(tmp_path / str(default), model, beta=0.1, **PATHS[path])
            one.train()
            evaluated = one.evaluate(ROWS[:2])["eval_reward"]
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((one.state.log_history[0]["grad_norm"], evaluated, one.parameters.values()))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


def test_a_default_device_is_not_where_the_trainer_puts_its_numbers(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    with torch.device("meta"):
        one = made(tmp_path, model)
        one.train()
        assert one.evaluate(ROWS[:2])["eval_reward"] > 0


@pytest.mark.parametrize(("rate", "warned"), [(1e-6, True), (1e-5, True), (1e-2, False)])
def test_a_learning_rate_that_moves_few_weights_of_bfloat16_is_told(
    tmp_path: Path, rate: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_tiny(0)[0].to(torch.bfloat16)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    with caplog.at_level(logging.WARNING, "grouprl"):
        one = made(tmp_path, model, learning_rate=rate, max_steps=1, lr_scheduler_type="constant")
    told = [r.getMessage() for r in caplog.records if "moves only" in r.getMessage()]
    assert bool(told) is warned
    one.train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    share = 100 * float((after != before).float().mean())
    if warned:
        assert abs(float(told[0].split("moves only ")[1].split(" %")[0]) - share) < 5
    else:
        assert share > 50


def test_nothing_is_told_about_float32_or_an_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "grouprl"):
        made(tmp_path, build_tiny(0)[0], learning_rate=1e-7)
        made(tmp_path, build_tiny(0)[0].to(torch.bfloat16), LORA, learning_rate=1e-7)
    assert "moves only" not in caplog.text


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_models_with_layer_norm_train_in_bfloat16(tmp_path: Path, name: str) -> None:
    model = build(name).bfloat16()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    made(tmp_path, model).train()
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
