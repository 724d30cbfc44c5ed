"""What scripts read of a trainer and assign to it: it is heard, or refused in a line."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import EVAL_ROWS, REVERSE, ROWS, config, trainer, warm
from transformers import TrainerCallback

from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer


def asked(made: GRPOTrainer) -> set[str]:
    assert made.last_samples is not None
    return {str(prompt.prompt) for prompt in made.last_samples.prompts}


def test_datasets_that_are_assigned_are_trained_and_evaluated_on(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, eval_dataset=EVAL_ROWS)
    made.train()
    rows = [{**ROWS[0], "prompt": "ppp"}] * 4
    made.train_dataset = rows
    made.train()
    assert asked(made) == {"ppp"}
    assert made.train_dataset is rows
    made.eval_dataset = {"few": EVAL_ROWS[:2]}
    assert "eval_few_reward" in made.evaluate()
    assert made.eval_dataset == {"few": EVAL_ROWS[:2]}
    with pytest.raises(UsageError, match="row 0 of train_dataset has no column 'prompt'"):
        made.train_dataset = [{"question": "x"}]
    assert made.train_dataset is rows


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("beta", r"GRPOConfig\(beta=\.\.\.\)"),
        ("temperature", r"GRPOConfig\(temperature=\.\.\.\)"),
        ("num_generations", "GRPOConfig"),
        ("epsilon_low", "nothing reads it"),
        ("args", "make a new GRPOTrainer"),
        ("model", "make a new GRPOTrainer"),
        ("processing_class", "make a new GRPOTrainer"),
        ("tokenizer", "make a new GRPOTrainer"),
        ("reward_funcs", "give them to a new GRPOTrainer"),
        ("reward_weights", r"GRPOConfig\(reward_weights"),
        ("ref_model", "nothing reads it"),
        ("optimizer", "optimizers="),
        ("lr_scheduler", "optimizers="),
        ("callback_handler", "use add_callback"),
        ("state", "change its fields"),
        ("control", "in a callback"),
        ("compute_metrics", "nothing reads it"),
        ("compute_loss", "surrogate_function"),
        ("_generate", "nothing reads it"),
        ("_metrics", "log_history"),
        ("train_datasset", "nothing reads it"),
    ],
)
def test_what_nothing_would_read_cannot_be_assigned(shared: GRPOTrainer, name: str, advice: str) -> None:
    before = dict(vars(shared))
    with pytest.raises(UsageError, match=rf"^trainer\.{name} = 3 would change nothing: .*{advice}"):
        setattr(shared, name, 3)
    assert vars(shared) == before


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return trainer(tmp_path_factory.mktemp("shared"), beta=0.25, temperature=0.5, epsilon=0.1)


def test_what_trl_calls_by_a_name_can_be_read_under_it(shared: GRPOTrainer) -> None:
    read: Any = shared
    assert (read.beta, read.temperature, read.loss_type, read.use_vllm) == (0.25, 0.5, "dapo", False)
    assert (read.epsilon_low, read.epsilon_high, read.num_generations) == (0.1, 0.1, 4)
    assert read.reward_funcs == [shared.rewards.functions[0]]
    assert read.reward_func_names == ["reverse"]
    assert read.reward_weights.tolist() == [1.0]
    assert read.tokenizer is shared.processing_class
    assert read.model_wrapped is shared.model
    assert read.eos_token_id == shared.processing_class.eos_token_id
    assert (read.compute_metrics, read.is_in_train) == (None, False)
    assert read.eos_token_ids == [shared.processing_class.eos_token_id]
    assert (read.aux_loss_enabled, read._total_train_tokens) == (False, shared.state.num_input_tokens_seen)
    assert read._tokenizer is shared.processing_class
    with pytest.raises(AttributeError, match=r"trainer\.policy\.reference"):
        _ = read.ref_model
    with pytest.raises(AttributeError, match="log_history"):
        _ = read._metrics
    assert not hasattr(read, "push_to_hub")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("environments", "reward functions are given theirs as `environments`"),
        ("environment_factories", "a variable of your own"),
        ("tools", "a variable of your own"),
        ("rollout_func", "a variable of your own"),
        ("llm", r"trainer\.policy\.sample"),
        ("vllm_generation", r"trainer\.policy\.sample"),
        ("_step", r"trainer\.state\.global_step"),
        ("_buffered_inputs", r"trainer\.last_samples"),
    ],
)
def test_what_trl_has_and_is_not_here_says_what_is(shared: GRPOTrainer, name: str, advice: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}': .*{advice}"):
        getattr(shared, name)


def test_without_a_reference_there_is_no_reference_model(tmp_path: Path) -> None:
    assert trainer(tmp_path).ref_model is None


def test_a_subclass_has_attributes_of_its_own(tmp_path: Path) -> None:
    class Mine(GRPOTrainer):
        beta = 3.0
        loss_type: str

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.before = [1]
            super().__init__(*args, **kwargs)
            self.after, self._own, self.beta, self.loss_type = 2, 3, 4.0, "mine"

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            self.after += 1
            return super().evaluate(*args, **kwargs)

    model, tokenizer = warm()
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    made = Mine(model, REVERSE.reward, args, ROWS, EVAL_ROWS, tokenizer)
    made.train()
    assert (made.before, made.after, made._own, made.beta, made.loss_type) == ([1], 4, 3, 4.0, "mine")
    made.note = "of mine"
    with pytest.raises(UsageError, match=r"temperature = 0\.1 would change nothing"):
        made.temperature = 0.1
    made.evaluate = lambda *a, **k: {}  # type: ignore[method-assign]  # a method may be replaced, as by a test
    assert made.evaluate() == {}


def test_while_it_trains_the_datasets_stay(tmp_path: Path) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert made.is_in_train
            made.train_dataset = ROWS

    made = trainer(tmp_path, callbacks=[Change()])
    with pytest.raises(UsageError, match="train_dataset cannot be changed while it is trained on"):
        made.train()
    assert not made.is_in_train


def test_settings_that_are_changed_after_the_trainer_was_made_are_not_ignored(tmp_path: Path) -> None:
    model, tokenizer = warm()
    args = config(tmp_path)
    args.max_steps = 1
    made = GRPOTrainer(model, REVERSE.reward, args, ROWS, EVAL_ROWS, tokenizer)
    args.learning_rate = 0.5
    for run in (made.train, made.evaluate):
        with pytest.raises(UsageError, match=r"args\.learning_rate was 0\.001 when this trainer was made.*is 0\.5 now"):
            run()
    args.learning_rate = 1e-3
    made.train()
    assert made.state.global_step == 1


# --- what a tokenizer may be -----------------------------------------------------------------------------------------


class Processor:
    """As models with images have one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = "{{ messages[0].content }}"


def test_the_tokenizer_of_a_processor_is_taken(tmp_path: Path) -> None:
    model, tokenizer = warm()
    tokenizer.chat_template = None
    args = config(tmp_path, max_steps=1)
    made = GRPOTrainer(model, REVERSE.reward, args, ROWS, processing_class=Processor(tokenizer))
    made.train()
    assert type(made.processing_class) is type(tokenizer)
    assert made.processing_class.chat_template == "{{ messages[0].content }}"
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (lambda tokenizer: "gpt2", r"'gpt2' is a name; give transformers\.AutoTokenizer\.from_pretrained\('gpt2'\)"),
        (lambda tokenizer: Path("folder"), r"AutoTokenizer\.from_pretrained\('folder'\)"),
        (lambda tokenizer: tokenizer.backend_tokenizer, r"PreTrainedTokenizerFast\(tokenizer_object=\.\.\.\)"),
        (lambda tokenizer: type(tokenizer), "is a class; give an instance"),
        (lambda tokenizer: 7, "7 is no tokenizer; give one of transformers'"),
        (lambda tokenizer: Processor(None), "is no tokenizer; give one of transformers'"),
        (lambda tokenizer: tokenizer.encode, "is no tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, given: Any, advice: str) -> None:
    model, tokenizer = warm()
    with pytest.raises(UsageError, match=f"processing_class.*{advice}"):
        GRPOTrainer(model, REVERSE.reward, config(tmp_path), ROWS, processing_class=given(tokenizer))


# --- the number that decides which model is best ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "datasets", "message"),
    [
        ("rewrd", EVAL_ROWS, "did you mean 'reward'"),
        ("eval_rewards/revers/mean", EVAL_ROWS, "did you mean 'rewards/reverse/mean'"),
        ("reward", {"a": EVAL_ROWS, "b": EVAL_ROWS}, "several, such as 'a_reward'"),
        ("eval_c_reward", {"a": EVAL_ROWS, "b": EVAL_ROWS}, "several, such as 'a_reward'"),
    ],
)
def test_a_metric_that_no_evaluation_will_have_is_refused_before_training(
    tmp_path: Path, metric: str, datasets: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=f"metric_for_best_model='{metric}'.*{message}"):
        trainer(tmp_path, eval_dataset=datasets, eval_strategy="steps", metric_for_best_model=metric)


@pytest.mark.parametrize(
    ("metric", "datasets"),
    [
        ("reward", EVAL_ROWS), ("eval_reward", EVAL_ROWS), ("rewards/reverse/mean", EVAL_ROWS), ("share", EVAL_ROWS),
        ("b_reward", {"a": EVAL_ROWS, "b": EVAL_ROWS}), ("eval_a_completions/mean_length", {"a": EVAL_ROWS}),
    ],
)  # fmt: skip
def test_a_metric_that_an_evaluation_may_have_is_accepted(tmp_path: Path, metric: str, datasets: Any) -> None:
    trainer(tmp_path, eval_dataset=datasets, eval_strategy="steps", metric_for_best_model=metric)


@pytest.mark.parametrize("callback", [None, object, "early stopping", lambda: None])
def test_what_is_no_callback_is_refused(tmp_path: Path, callback: Any) -> None:
    with pytest.raises(UsageError, match=r"the callback .* is none"):
        trainer(tmp_path, callbacks=[callback])
    with pytest.raises(UsageError, match=r"the callback .* is none"):
        trainer(tmp_path).add_callback(callback)


def test_other_tokens_that_end_a_completion_than_at_first_are_refused(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.model.generation_config.eos_token_id = [1, 5]
    for go in (one.train, lambda: one.evaluate(ROWS)):
        with pytest.raises(UsageError, match=r"end a completion were \[1\] .* name \[1, 5\] now"):
            go()
