"""A run's language model for other programs: adapters are merged, and a whole model is where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.run import export as exporting
from grouprl.lm.run import training
from grouprl.lm.run.chat import Chat
from grouprl.lm.run.export import export
from grouprl.lm.run.recipe import Recipe


def train(out: Path, **changes: Any) -> Path:
    torch.set_num_threads(1)
    given: dict[str, Any] = {
        "task_options": {"length": 3}, "form": "text", "n_train": 8, "n_eval": 4, "eval_every": 0,
        "warm_start": {"steps": 5},
        "config": {
            "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 5, "max_steps": 3,
            "save_strategy": "no", "learning_rate": 0.05, "scale_rewards": "none",
        },
    } | changes  # fmt: skip
    training.train(Recipe("short", "tiny", "reverse", **given), out, track=("none",), progress_bar=False)
    return out


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("adapted") / "run", lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})


def test_adapters_are_merged_into_a_model_of_its_own(adapted: Path) -> None:
    said = export(adapted, None, None)
    folder = adapted / "export-merged"
    assert said[1].startswith(f"wrote {folder}, ")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(merged, "peft_config")
    model = Chat.open(str(adapted)).policy.model
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - wanted).abs().max() > 1e-3  # training has moved the adapter
    card = (folder / "README.md").read_text()
    assert "trained on reverse" in card
    assert "accuracy after" in card
    with pytest.raises(UsageError, match="export-merged exists already"):
        export(adapted, None, None)


def test_a_merged_model_that_answers_otherwise_is_not_left(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda model: model.unload(), raising=False)
    monkeypatch.setattr(exporting, "TOLERANCE", 1e-4)
    with pytest.raises(TrainingError, match=r"log-probabilities differ by .*; nothing was written"):
        export(adapted, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_in_that_format_already(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    (said,) = export(run, None, None)
    assert said.startswith(f"{run / 'model'} is a Hugging Face folder already")
    with pytest.raises(UsageError, match=r"--format 'onnx' is for environments; .*optimum-cli for ONNX"):
        export(run, None, "onnx")
    with pytest.raises(UsageError, match="nothing to write to"):
        export(run, tmp_path / "out", None)
