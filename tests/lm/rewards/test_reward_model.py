"""Reward models: what they read, what they are worth, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.models.tiny import tiny_tokenizer
from grouprl.lm.rewards import model as reward_models
from grouprl.lm.rewards.model import RewardModel, with_models

CPU = torch.device("cpu")
TEXTS = [("abc", "cba$"), ("a", "b"), ("ponml", ""), ("+12", "3456789")]


def config(labels: int = 1, **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=None, num_labels=labels, **changes,
    )  # fmt: skip


def classifier(labels: int = 1, kind: Any = LlamaForSequenceClassification) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind(config(labels)).eval()


def reward_model(**given: Any) -> RewardModel:
    return RewardModel(given.pop("model", None) or classifier(), tiny_tokenizer(), CPU, **given)


def alone(model: Any, text: str) -> float:
    """The logit at the last token of a text that is not padded."""
    ids = torch.tensor([tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        return float(model.score(hidden))


@pytest.mark.parametrize("at_once", [1, 12, 8192])
def test_a_reward_is_the_logit_behind_prompt_and_completion_however_they_are_batched(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_models, "TOKENS_AT_ONCE", at_once)
    model = classifier()
    got = reward_model(model=model)([prompt for prompt, _ in TEXTS], [said for _, said in TEXTS])
    assert got == pytest.approx([alone(model, prompt + said) for prompt, said in TEXTS], abs=1e-5)
    assert len({round(value, 4) for value in got}) == len(TEXTS)


def test_messages_are_rendered_by_the_models_own_template() -> None:
    model, tokenizer = classifier(), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{{ mark }}{% endfor %}"
    made = RewardModel(model, tokenizer, CPU, {"mark": "+"})
    asked, said = {"role": "user", "content": "12"}, {"role": "assistant", "content": "ab"}
    begun = {"role": "assistant", "content": "a"}  # the completion holds it too
    got = made([[asked], [asked, begun], "c"], [[said], [said], [said]])
    wanted = [alone(model, "u12+aab+"), alone(model, "u12+aab+"), alone(model, "cab")]
    assert got == pytest.approx(wanted, abs=1e-5)


def test_a_model_that_is_in_training_judges_without_dropout_and_is_left_as_it_was() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = LlamaForSequenceClassification(config(attention_dropout=0.5))
    made = reward_model(model=model)
    model.train()
    assert made(["ab"], ["cd"]) == made(["ab"], ["cd"])
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_tokenizer_without_padding_pads_with_its_end_and_is_not_changed() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.pad_token = None
    model = classifier()
    made = RewardModel(model, tokenizer, CPU)
    assert (tokenizer.pad_token_id, model.config.pad_token_id) == (None, tokenizer.eos_token_id)
    assert made(["ab", "abcd"], ["c", "d"]) == pytest.approx([alone(model, "abc"), alone(model, "abcdd")], abs=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "judge"
    classifier().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def made_of(given: Any, tokenizers: Any = None, **options: Any) -> list[Any]:
    return with_models(given, tokenizers, device=CPU, model_init_kwargs=options, chat_template_kwargs=None)


def test_a_folder_is_loaded_with_its_tokenizer_and_named_after_it(folder: Path) -> None:
    def length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    model, function = made_of([str(folder), length], dtype="bfloat16")
    assert (model.__name__, function, model.model.dtype) == ("judge", length, torch.bfloat16)
    assert model(["ab"], ["c"]) == pytest.approx([alone(classifier(), "abc")], abs=0.05)


def test_tokenizers_are_one_for_each_or_the_models_own(folder: Path) -> None:
    own = tiny_tokenizer()
    own.chat_template = "mine"
    first, second = made_of([str(folder), classifier()], [None, own])
    assert (first.tokenizer.chat_template == "mine", second.tokenizer.chat_template) == (False, "mine")
    assert made_of(classifier(), own)[0].tokenizer.chat_template == "mine"
    with pytest.raises(UsageError, match="reward_processing_classes holds 1 for 2 reward functions"):
        made_of([str(folder), classifier()], [own])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: classifier(labels=2), "has 2 labels, and nothing says which is the reward"),
        (lambda: classifier(kind=LlamaForCausalLM), "LlamaForCausalLM, which is no sequence classifier"),
        (lambda: torch.nn.Linear(2, 1), "Linear, which is no sequence classifier"),
        (lambda: classifier(), "built in memory, so nothing says which tokenizer"),
        (lambda: "./nowhere", "There is no folder ./nowhere"),
    ],
)
def test_what_gives_no_rewards_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made_of(given())


def test_a_language_model_in_a_folder_would_judge_at_random_and_is_refused(tmp_path: Path) -> None:
    classifier(kind=LlamaForCausalLM).save_pretrained(tmp_path / "lm")
    with pytest.raises(UsageError, match=r"lm is no reward model: 1 weights are missing and would be random \(score"):
        made_of(str(tmp_path / "lm"), tiny_tokenizer())


def test_a_folder_with_several_labels_or_no_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    classifier(labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(
        UsageError, match=r"score.weight has the shape \[3, 16\], and one label takes \[1, 16\]; give a"
    ):
        made_of(str(tmp_path / "three"), tiny_tokenizer())
    classifier().save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match=r"bare: .*if it has none, give one as reward_processing_classes"):
        made_of(str(tmp_path / "bare"))


def test_texts_beyond_what_the_model_reads_and_templates_that_are_missing_are_errors() -> None:
    made = reward_model()
    with pytest.raises(UsageError, match=r"are 33 tokens for the reward model .* which reads 32 at most"):
        made(["a" * 30], ["bcd"])
    made.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat_template"):
        made([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])


# --- in training -----------------------------------------------------------------------------------------------------


def trainer(folder: Path, judge: Any, rows: Any = small_runs.ROWS, **given: Any) -> GRPOTrainer:
    model, tokenizer = small_runs.warm()
    own = {
        name: given.pop(name) for name in ("reward_processing_classes", "eval_reward_funcs", "eval_dataset")
        if name in given
    }  # fmt: skip
    return GRPOTrainer(
        model, judge, small_runs.config(folder, **given), rows, processing_class=tokenizer, **own
    )  # fmt: skip


def test_a_reward_model_trains_beside_a_function_and_a_run_resumes_with_it(tmp_path: Path, folder: Path) -> None:
    judges = [str(folder), small_runs.REVERSE.reward]
    straight = trainer(tmp_path / "a", judges)
    straight.train()
    assert "rewards/judge/mean" in small_runs.logged(straight)[0]
    assert straight.reward_processing_classes[0] is not None
    stopped = trainer(tmp_path / "b", judges)
    stopped.add_callback(small_runs.Stop(3))
    stopped.train()
    assert not list((tmp_path / "b").rglob("*judge*"))  # a reward model is no part of a checkpoint
    resumed = trainer(tmp_path / "b", judges)
    resumed.train(resume_from_checkpoint=True)
    assert small_runs.same(small_runs.weights(straight), small_runs.weights(resumed))


def test_prompts_that_a_reward_model_cannot_render_are_refused_before_training(tmp_path: Path) -> None:
    plain: Any = tiny_tokenizer()
    plain.chat_template = None
    rows = [{"prompt": [{"role": "user", "content": "ab"}]}]
    with pytest.raises(UsageError, match="has no chat_template to render them"):
        trainer(tmp_path, classifier(), rows, reward_processing_classes=plain)


def test_evaluations_are_judged_by_functions_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def judged(completions: list[str], **kwargs: Any) -> list[float]:
        return [7.0] * len(completions)

    with caplog.at_level(logging.WARNING, "grouprl"):
        made = trainer(
            tmp_path, small_runs.REVERSE.reward, eval_reward_funcs=judged, eval_dataset=small_runs.EVAL_ROWS,
            eval_strategy="steps", eval_steps=3, reward_weights=[2.0], metric_for_best_model="rewards/judged/mean",
        )  # fmt: skip
    made.train()
    evaluated = [entry for entry in made.state.log_history if "eval_reward" in entry]
    assert [entry["eval_reward"] for entry in evaluated] == [7.0, 7.0]
    assert evaluated[0]["eval_rewards/judged/mean"] == 7.0
    assert not any("judged" in name for entry in small_runs.logged(made) for name in entry if "eval" not in name)
