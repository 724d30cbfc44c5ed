"""Talking to a model: questions are put as those it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import warm

from grouprl.errors import UsageError
from grouprl.lm.models.save import save_model
from grouprl.lm.run import training
from grouprl.lm.run.chat import Chat
from grouprl.lm.run.recipe import Recipe


def recipe(**changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": "tiny", "task": "reverse", "task_options": {"length": 3}, "form": "text", "n_train": 8, "n_eval": 4,
        "eval_every": 0, "warm_start": {"steps": 40, "learning_rate": 3e-3},
        "config": {
            "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 5, "max_steps": 1, "beta": 0.1,
            "save_strategy": "no", "learning_rate": 1e-5,
        },
    } | changes  # fmt: skip
    return Recipe("talking", **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("chat") / "run"
    training.train(recipe(), out, track=("none",), progress_bar=False)
    return out


def test_a_run_answers_as_its_model_generates_greedily(run: Path) -> None:
    chat = Chat.open(str(run))
    assert "reverse" in chat.about
    model, tokenizer = warm()
    model.load_state_dict(load_file(run / "model" / "model.safetensors"), strict=False)
    for question in ("abc", "mop", "hhg"):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert chat.ask(question) == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert chat.ask("abc") == chat.ask("abc")


def test_sampled_replies_differ_and_max_tokens_bounds_them(run: Path) -> None:
    chat = Chat.open(str(run), sampled=True, max_tokens=2)
    replies = [chat.ask("abc") for _ in range(12)]
    assert len(set(replies)) > 1
    assert all(len(reply) <= 2 for reply in replies)


def test_a_question_and_its_reply_stay_within_what_the_model_reads(run: Path) -> None:
    chat = Chat.open(str(run), max_tokens=200)
    assert len(chat.ask("a" * 58)) <= 4  # 60 tokens with those around them, of 64
    with pytest.raises(UsageError, match="the question has 64 tokens, but the model reads 64"):
        chat.ask("a" * 62)


def test_any_model_answers_as_it_is(tmp_path: Path) -> None:
    save_model(*warm(), tmp_path / "model")
    chat = Chat.open(str(tmp_path / "model"), max_tokens=5)
    assert chat.before == []
    assert "as it is" in chat.about
    assert len(chat.ask("abc")) <= 5


def test_a_task_of_messages_is_asked_with_its_own_system_message_and_examples(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = recipe(task="letter-count", task_options={}, form="messages", warm_start=None)
    given.config["max_completion_length"] = 2
    model, tokenizer = warm()
    model.config.max_position_embeddings = 1024  # its shots are longer than what the model is made for
    save_model(model, tokenizer, tmp_path / "long")
    training.train(given.changed({"model": str(tmp_path / "long")}), out, track=("none",), progress_bar=False)
    chat, bare = Chat.open(str(out)), Chat.open(str(out), bare=True)
    assert [m["role"] for m in chat.before][:1] == ["system"]
    assert chat.before[-1]["role"] in ("system", "assistant")
    assert bare.before == []
    assert isinstance(chat.ask("How many?"), str)


def test_an_adapter_on_a_model_without_a_name_is_found_again(tmp_path: Path) -> None:
    training.train(
        recipe(lora={"r": 2, "target_modules": ["q_proj"]}), tmp_path / "run", track=("none",), progress_bar=False
    )
    assert isinstance(Chat.open(str(tmp_path / "run")).ask("abc"), str)


def test_a_run_that_left_no_model_and_a_place_without_any_are_told_apart(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UsageError, match="holds no model yet"):
        Chat.open(str(tmp_path))
    with pytest.raises(UsageError, match="nowhere"):
        Chat.open(str(tmp_path / "nowhere"))
