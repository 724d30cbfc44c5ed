import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.fingerprint import digest
from grouprl.lm.models.load import load
from grouprl.lm.models.tiny import tiny_tokenizer
from grouprl.lm.prompts import PromptSource, prepare_prompts
from grouprl.lm.train import checkpoint
from grouprl.runs.transcripts import read_transcripts
from lm.small_runs import ROWS, same, trainer, warm, weights

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def other(completions: list[str], **_: Any) -> list[float]:
    return [0.0 for _ in completions]


class Forgetful:
    """A stream that is another one each time it is begun."""

    begun = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        Forgetful.begun += 1
        return iter(ROWS[Forgetful.begun :])


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"rows": ROWS}, {"rows": [*ROWS[1:], ROWS[0]]}, "other prompts, or the same in another order"),
        ({"rows": ROWS}, {"rows": ROWS[:-1]}, "has 40 rows, here it has 39"),
        ({"rows": Dataset.from_list(ROWS)}, {"rows": ROWS[::-1]}, "other prompts"),
        ({"rows": stream(ROWS)}, {"rows": stream(ROWS[::-1])}, "other prompts"),
        ({"rows": stream(ROWS)}, {"rows": stream([*ROWS[:2], *ROWS])}, "other prompts"),
        ({"rows": stream(ROWS)}, {"rows": stream(ROWS[:2])}, "has 4 rows, here it has 2"),
        ({"rows": Forgetful()}, {"rows": Forgetful()}, "other prompts"),
        ({"reward": length}, {"reward": other}, "its reward functions are length, here they are other"),
        ({"reward": [length, other]}, {"reward": [other, length]}, "are length, other, here they are other, length"),
    ],
)
def test_a_checkpoint_of_other_data_or_rewards_is_refused(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], said: str
) -> None:
    trainer(tmp_path, **SAVED, **before).train()
    with pytest.raises(UsageError, match=said) as raised:
        trainer(tmp_path, **SAVED, **after).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "checkpoint-2") in str(raised.value)


def test_a_checkpoint_of_another_model_tokenizer_or_adapter_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "a", **SAVED).train()
    model, tokenizer = warm()
    model.config.rope_parameters["rope_theta"] = 50.0
    with pytest.raises(UsageError, match=r"the model's rope_parameters was .*1000.* here it is .*50"):
        trainer(tmp_path / "a", **SAVED, model=(model, tokenizer)).train(resume_from_checkpoint=True)
    model, tokenizer = warm()
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UsageError, match="the tokenizer has another chat template"):
        trainer(tmp_path / "a", **SAVED, model=(model, tokenizer)).train(resume_from_checkpoint=True)
    model, tokenizer = warm()
    model.resize_token_embeddings(50)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UsageError, match=r"vocab_size was 32, here it is 50; the tokenizer has another vocabulary"):
        trainer(tmp_path / "a", **SAVED, model=(model, tokenizer)).train(resume_from_checkpoint=True)
    trainer(tmp_path / "b", **SAVED, peft_config=LORA).train()
    scaled = LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match=r"the adapter default's lora_alpha was 8, here it is 32"):
        trainer(tmp_path / "b", **SAVED, peft_config=scaled).train(resume_from_checkpoint=True)


def test_other_columns_are_said_and_other_containers_are_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, **SAVED).train()
    caplog.set_level(logging.WARNING, "grouprl")
    trainer(tmp_path, **SAVED, rows=Dataset.from_list(ROWS)).train(resume_from_checkpoint=True)
    assert "other columns" not in caplog.text
    rows = [{**row, "answer": "x"} for row in ROWS]
    trainer(tmp_path, **SAVED, rows=rows).train(resume_from_checkpoint=True)
    assert "other columns of the dataset are not" in caplog.text


def test_half_a_generation_goes_on_with_the_prompts_that_were_read(tmp_path: Path) -> None:
    model, tokenizer = warm()
    dated = "{{ bos_token }}{{ strftime_now('%f') }}{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    tokenizer.chat_template = dated
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    settings = {**SAVED, "steps_per_generation": 2, "rows": rows, "reward": length}
    made = trainer(tmp_path, model=(model, tokenizer), **settings)
    made.train()
    read = [prompt.ids for prompt in made.last_samples.prompts]  # type: ignore[union-attr]
    model, tokenizer = warm()
    tokenizer.chat_template = dated
    again = trainer(tmp_path, model=(model, tokenizer), **settings)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert [prompt.ids for prompt in again.last_samples.prompts] == read  # type: ignore[union-attr]
    assert same(weights(made), weights(again))


def test_the_newest_checkpoint_is_that_of_the_newest_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, **{**SAVED, "max_steps": 3}, log_completions=True).train()
    caplog.set_level(logging.WARNING, "grouprl")
    second = trainer(tmp_path, **SAVED, save_total_limit=1, reward=other, log_completions=True)
    second.train()
    assert "holds checkpoint-1, checkpoint-2, checkpoint-3 of an earlier run" in caplog.text
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert {sample.step for sample in read_transcripts(tmp_path / "transcripts.jsonl")} == {1, 2}
    assert {sample.step for sample in read_transcripts(tmp_path / "transcripts-1.jsonl")} == {1, 2, 3}
    longer = trainer(tmp_path, **{**SAVED, "max_steps": 3}, reward=other)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3
    assert checkpoint.existing(tmp_path)[-1] == tmp_path / "checkpoint-3"


def test_a_folder_without_a_state_counts_to_the_run_it_was_written_in(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    (tmp_path / "checkpoint-2" / checkpoint.STATE).unlink()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-9")
    earlier = tmp_path / "checkpoint-9"
    (earlier / checkpoint.STATE).unlink()
    os.utime(earlier, (time.time() - 1000,) * 2)
    names = [path.name for path in checkpoint.existing(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-1", "checkpoint-2"]


def test_a_model_in_the_output_folder_replaces_one_of_the_other_kind(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.save_model()
    before = weights(whole)
    adapter = trainer(tmp_path, peft_config=LORA)
    with torch.no_grad():
        adapter.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.fill_(1.0)
    adapter.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapter.save_model()
    assert not {"config.json", "model.safetensors"} & {path.name for path in tmp_path.iterdir()}
    trainer(tmp_path / "base").save_model()
    loaded, _ = load(tmp_path)
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    whole.save_model()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("adapter")]
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(before, {name: value.detach() for name, value in again.named_parameters()})


class Wander(TrainerCallback):
    """Goes to another folder in the first step."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        os.chdir(self.place)


def test_the_output_folder_stays_where_it_was_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made = trainer(Path("runs/a"), **SAVED, callbacks=[Wander(tmp_path / "elsewhere")], log_completions=True)
    made.train()
    made.save_model()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a"]
    assert {"checkpoint-1", "checkpoint-2", "transcripts.jsonl", "model.safetensors"} <= {
        path.name for path in (tmp_path / "runs" / "a").iterdir()
    }
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_a_tilde_is_the_home_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = trainer(Path("~/runs/a"), **SAVED)
    made.train()
    made.save_model("~/model")
    made.load_weights("~/model")  # type: ignore[arg-type]
    trainer(Path("~/runs/a"), **SAVED).train(resume_from_checkpoint="~/runs/a/checkpoint-1")
    trainer(tmp_path / "b", **SAVED, beta=0.1, ref_model="~/model").train()
    assert load("~/model")[0].name_or_path == str(tmp_path / "home" / "model")
    assert GRPOConfig(output_dir="~/x").output_dir == str(tmp_path / "home" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "home"]


def test_a_fingerprint_is_of_values_and_not_of_objects() -> None:
    assert digest({"a": [1, None], "b": None}) == digest({"a": (1, None)})
    assert digest({"a": torch.tensor([1, 2])}) == digest({"a": [1, 2]})
    assert digest({1: "x", "y": {3, 2}}) == digest({"y": {2, 3}, 1: "x"})
    assert digest("\ud800") != digest("?")
    assert digest(object()) == digest(object())
    assert digest("1") != digest(1)


def test_of_a_large_dataset_rows_all_over_it_are_compared() -> None:
    def source(changed: int | None) -> PromptSource:
        rows = [{"prompt": str(i)} for i in range(10_000)]
        if changed is not None:
            rows[changed : changed + 3] = [{"prompt": "a"}] * 3
        return prepare_prompts(rows, tiny_tokenizer())

    assert source(None).fingerprint() == source(None).fingerprint()
    assert all(source(i).fingerprint() != source(None).fingerprint() for i in (0, 5_000, 9_997))


def test_the_best_model_is_found_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    judged: dict[str, Any] = {
        **SAVED, "eval_dataset": ROWS[:2], "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
    }  # fmt: skip
    trainer(tmp_path / "a", reward=other, **judged).train()  # equal rewards: the first is the best
    (tmp_path / "a").rename(tmp_path / "b")
    again = trainer(tmp_path / "b", reward=other, **{**judged, "max_steps": 3, "save_total_limit": 1})
    again.train(resume_from_checkpoint=True)
    assert Path(again.state.best_model_checkpoint) == tmp_path / "b" / "checkpoint-1"
    assert sorted(path.name for path in (tmp_path / "b").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_of_other_functions_ends_or_another_optimizer_is_refused(tmp_path: Path) -> None:
    def resumed(said: str, **changed: Any) -> None:
        with pytest.raises(UsageError, match=said):
            trainer(tmp_path, **SAVED, **changed).train(resume_from_checkpoint=True)

    def signed(rewards: torch.Tensor, lengths: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        return rewards.sign()

    def sgd(model: Any, step: int) -> tuple[Any, None]:
        return torch.optim.SGD(list(model.parameters())[::step], lr=0.1, momentum=0.9), None

    trainer(tmp_path, **SAVED).train()
    resumed("its advantage_function was None, here it is signed", advantage_function=signed)
    model, tokenizer = warm()
    model.generation_config.eos_token_id = [1, 5]
    resumed(r"end with one of the tokens \[1\], here with one of \[1, 5\]", model=(model, tokenizer))
    model, tokenizer = warm()
    resumed("its optimizer is AdamW, here it is SGD", model=(model, tokenizer), optimizers=sgd(model, 1))
    trainer(tmp_path, **SAVED, model=(model, tokenizer), optimizers=sgd(model, 1)).train()
    resumed("steps other parameters, or the same in another", model=(model, tokenizer), optimizers=sgd(model, -1))
