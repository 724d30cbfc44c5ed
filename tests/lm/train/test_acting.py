"""Training of agents, from the arguments of a trainer to its logs, evaluations and checkpoints."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_agents import ASKED, CALLS, WORDS, Buttons, trainer
from small_runs import TIMES, logged, same, weights

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.agents.environments import text_environment
from grouprl.lm.agents.interaction import Answer, Interaction
from grouprl.lm.policy import policy
from grouprl.lm.train import evaluation
from grouprl.lm.train.transcripts import transcripts_of

ROWS = [{"prompt": ASKED, "right": right} for right in ("a", "b", "a", "b")]


def test_an_agent_learns_which_button_to_press(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, {"max_steps": 20, "prompts_per_step": 4, "num_generations": 8, "learning_rate": 1e-2, "seed": 1}
    )
    made.train()
    rewards = [entry["reward"] for entry in logged(made)]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.8
    last = logged(made)[-1]
    assert last["rewards/Buttons/mean"] == last["reward"]
    assert last["episodes/terminated"] + last["episodes/truncated"] == 1.0
    assert last["tools/call_frequency"] >= 1.5
    assert last["tools/failure_frequency"] < 0.5
    assert {"tools/parse_failures", "episodes/mean_turns", "episodes/max_turns", "tools/timeouts"} <= last.keys()


def test_environments_are_closed_when_the_training_ends(tmp_path: Path) -> None:
    closed: list[int] = []

    class Closes(Buttons):
        def close(self):
            closed.append(1)

    made = trainer(tmp_path, {"max_steps": 1}, environment_factory=Closes)
    made.train()
    assert len(closed) == 8
    made.train()
    assert len(closed) == 16


class Game:
    """As scripts for TRL write them: a reward that a function reads, and an error once the game is over."""

    def __init__(self):
        self.reward, self.done = None, None

    def reset(self, **kwargs) -> str | None:
        self.reward, self.done = 0.0, False
        assert kwargs["right"] in "ab"

    def press(self, key: str) -> str:
        """Press a button.

        Args:
            key: Which one.

        Returns:
            What happened.
        """
        if self.done:
            raise ValueError("Game over.")
        self.reward, self.done = float(key == "a"), key == "a"
        return "yes" if self.done else "no"


def from_environments(environments, **kwargs):
    return [environment.reward for environment in environments]


def test_a_script_for_trl_runs_as_it_is(tmp_path: Path) -> None:
    from datasets import Dataset

    made = trainer(
        tmp_path, {"max_steps": 1, "max_tool_calling_iterations": 3}, environment_factory=Game,
        reward_funcs=from_environments, train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    made.train()
    samples, (entry,) = made.last_samples, logged(made)
    assert entry["rewards/from_environments/mean"] == entry["reward"]
    for said, worth in zip(samples.turns.messages, samples.returns.tolist(), strict=True):
        assert worth == float(any(m["content"] == "yes" and m["role"] == "tool" for m in said))
        assert sum(m["role"] == "assistant" for m in said) <= 4


def press(key: str) -> str:
    """Press a button.

    Args:
        key: Which one.
    """
    return "yes" if key == "a" else "no"


async def wait() -> str:
    """Wait."""
    return "yes"


def test_reward_functions_read_the_messages_of_an_episode(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts, completions, completion_ids, right, environments, **_):
        seen.append((prompts, completions, environments))
        return [float(any(m["role"] == "tool" for m in said)) for said in completions]

    made = trainer(tmp_path, {"max_steps": 1}, tools=[press, wait], reward_funcs=reward, train_dataset=ROWS)
    made.train()
    (entry,) = logged(made)
    assert (entry["rewards/reward/mean"], entry["reward"]) == (entry["reward"], entry["reward"])
    prompts, completions, environments = seen[0]
    assert prompts[0] == ASKED
    assert environments == [None] * 8
    called = [said for said in completions if len(said) > 1]
    assert called
    for said in called:
        assert [m["role"] for m in said[:2]] == ["assistant", "tool"]
        if "tool_calls" in said[0]:
            assert said[0]["tool_calls"][0]["function"]["name"] == "press"
            assert said[1]["name"] == "press"


def test_environments_own_their_rewards_and_their_data(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"max_steps": 1})
    made.train()
    assert made.last_samples.prompts[0].prompt == [{"role": "user", "content": " go"}]
    with pytest.raises(UsageError, match=r"without a train_dataset nothing says how long .*max_steps"):
        trainer(tmp_path, {"max_steps": -1})
    with pytest.raises(UsageError, match="several environments, and there is no train_dataset"):
        trainer(tmp_path, environment_factory={"a": Buttons})
    with pytest.raises(UsageError, match=r"nothing gives rewards; give reward_funcs, or .* get_reward"):
        trainer(tmp_path, tools=[press], train_dataset=ROWS)
    with pytest.raises(UsageError, match="there is no train_dataset"):
        trainer(tmp_path, tools=[press], reward_funcs=lambda completions: [0.0] * len(completions)).train()


@pytest.mark.parametrize("as_dataset", [False, True])
def test_rows_from_which_no_episode_can_begin_are_met_before_training_begins(tmp_path: Path, as_dataset: bool) -> None:
    def named(*names: Any, **others: Any) -> Any:
        rows = [{"environment": name, **others} for name in names]
        return datasets.Dataset.from_list(rows) if as_dataset else rows

    several = {"a": Buttons, "b": Buttons}
    trainer(tmp_path, environment_factory=several, train_dataset=named("a", "b"))
    with pytest.raises(UsageError, match=r"row 2 of train_dataset names the environment 'c' in column 'environment'"):
        trainer(tmp_path, environment_factory=several, train_dataset=named("a", "b", "c"))
    with pytest.raises(UsageError, match=r"row 1 of eval_dataset names the environment None in column"):
        trainer(tmp_path, environment_factory=several, train_dataset=named("a"), eval_dataset=named("a", None))
    bare = named("a", right="a").remove_columns("environment") if as_dataset else [{"right": "a"}]
    with pytest.raises(UsageError, match=r"row 0 of train_dataset names the environment None in column"):
        trainer(tmp_path, environment_factory=several, train_dataset=bare)
    for rows, said in (
        ([{"seed": 1.0}, {"seed": 1.5}], r"row 1 of train_dataset has 1\.5 \(float\) in column 'seed'"),
        ([{"prompt": "Go."}, {"prompt": " "}], "row 1 of train_dataset has an empty prompt ' '"),
    ):
        with pytest.raises(UsageError, match=said):
            trainer(tmp_path, train_dataset=datasets.Dataset.from_list(rows) if as_dataset else rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ValueError("no judge"), "get_reward of the environment Judges raised ValueError: no judge; let it return"),
        ("1", "get_reward of the environment Judges returned '1' of str for completion 0 of 8, of the prompt"),
        (float("nan"), "get_reward of the environment Judges returned nan for completion 0"),
        (
            None,
            "no reward function applies to completion 0 of 8, .*: get_reward of the environment Judges returned None",
        ),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_fault_of_get_reward_is_told_as_such(tmp_path: Path, given: Any, said: str, is_async: bool) -> None:
    class Judges(Buttons):
        def get_reward(self) -> Any:
            if isinstance(given, Exception):
                raise given
            return given

    class Later(Judges):
        async def get_reward(self) -> Any:
            return super().get_reward()

    Later.__name__ = "Judges"
    with pytest.raises((TrainingError, UsageError), match=said):
        trainer(tmp_path, environment_factory=Later if is_async else Judges).train()


def test_a_column_that_a_text_environment_and_no_reward_function_reads_is_warned_of(tmp_path: Path, caplog) -> None:
    class Says:
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict]:
            return " go", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
            return " go", 1.0, True, False, {}

    def judge(completions: list[Any], level: list[int]) -> list[float]:
        return [float(number) for number in level]

    rows = [{"seed": 1, "options": {"hard": True}, "level": 2, "hard": True}] * 2
    factory = text_environment(Says)
    trainer(tmp_path, environment_factory=factory, train_dataset=rows, reward_funcs=judge)
    (said,) = [text for text in caplog.messages if "reads" in text]
    assert said.startswith(
        "train_dataset has columns that neither the environment nor a reward function reads: 'hard';"
    )
    assert "'options', a mapping" in said
    caplog.clear()
    trainer(tmp_path, environment_factory=factory, train_dataset=rows, reward_funcs=lambda completions, **others: [0.0])
    trainer(tmp_path, environment_factory=factory, train_dataset=[{"seed": 1, "options": {}}])
    trainer(tmp_path, environment_factory=Buttons, train_dataset=rows)  # whose reset is given all
    assert not [text for text in caplog.messages if "reads" in text]


def test_an_episode_longer_than_the_context_is_an_error_at_its_start_and_cut_later(tmp_path: Path) -> None:
    class Long(Buttons):
        def reset(self, **row):
            super().reset()
            return " go" * 300

    with pytest.raises(UsageError, match=r"start \d \(seed \d+\) has a prompt of \d+ tokens, but the model's"):
        trainer(tmp_path, environment_factory=Long).train()
    with pytest.raises(UsageError, match=r"row \d of the dataset has a prompt of \d+ tokens, but the model's"):
        trainer(tmp_path, environment_factory=Long, train_dataset=[{"right": "a"}] * 2).train()
    with pytest.raises(UsageError, match="max_completion_length=256 leaves no room for a prompt"):
        trainer(tmp_path, {"max_completion_length": 256})

    class Wordy(Buttons):
        def press(self, key: str) -> str:
            """Press a button.

            Args:
                key: Which one.
            """
            super().press(key)
            return " no" * 300

    made = trainer(tmp_path, {"max_steps": 1}, environment_factory=Wordy)
    made.train()
    turns = made.last_samples.turns
    long = [any(len(m["content"]) == 900 for m in said) for said in turns.messages]
    called = [any("tool_calls" in m for m in said) for said in turns.messages]
    assert any(cut and has for cut, has in zip(turns.truncated.tolist(), called, strict=True))
    assert not any(cut and was_read for cut, was_read in zip(turns.truncated.tolist(), long, strict=True))


def test_members_of_a_group_that_do_not_start_equal_are_an_error(tmp_path: Path) -> None:
    class Different(Buttons):
        made = 0

        def reset(self, **row):
            super().reset()
            Different.made += 1
            return " yes" if Different.made % 2 else " no"

    with pytest.raises(
        UsageError, match=r"Different began start \d \(seed \d+\) with .*yes.* and then .*no.*must start equal: let"
    ):
        trainer(tmp_path, environment_factory=Different).train()


def test_a_template_that_cannot_be_appended_to_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    from small_agents import config, model, tokenizer

    from grouprl.lm import GRPOTrainer

    other = tokenizer()
    other.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    given = {"processing_class": other, "tools": [press], "reward_funcs": lambda completions: [0.0] * len(completions)}
    with pytest.raises(UsageError, match=r"ends the assistant's turn with none of .*; give .* or set history='turn'"):
        GRPOTrainer(model(), args=config(tmp_path), train_dataset=ROWS, **given)
    GRPOTrainer(model(), args=config(tmp_path, history="turn"), train_dataset=ROWS, **given)


@pytest.mark.parametrize("advantage", ["outcome", "leave_one_out"])
def test_each_turn_can_be_a_sample_of_its_own(tmp_path: Path, advantage: str) -> None:
    made = trainer(tmp_path, {"max_steps": 2, "history": "turn", "advantage": advantage})
    made.train()
    samples = made.last_samples
    n_turns = sum(len(spans) for spans in samples.turns.spans)
    assert len(samples) == n_turns > len(samples.turns.messages) == 8
    longest = max(len(ids) for ids in samples.turns.contexts)
    shortest = min(len(ids) for ids in samples.turns.contexts)
    assert shortest < longest < 2 * shortest  # the turn before and what was said to it, whichever turn it is


def test_an_episode_that_nothing_ends_is_cut_where_each_turn_is_a_sample(tmp_path: Path) -> None:
    class Endless(Guess):
        def answer(self, said):
            return Answer(" no")

    class Rewrites(Guess):
        def answer(self, said):
            return Answer("go", anew=True)

    for most, game, settings in (
        (64, Endless, {}),
        (3, Endless, {"max_turns": 3}),
        (64, Rewrites, {"history": "full"}),
    ):
        made = trainer(tmp_path, {"max_steps": 1, "history": "turn", **settings}, environment_factory=game)
        made.train()
        assert logged(made)[0]["episodes/max_turns"] == most
        assert made.last_samples.turns.truncated.all()


def test_groups_without_signal_are_drawn_anew(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"max_steps": 2, "dynamic_sampling": True, "dynamic_sampling_max_batches": 4})
    made.train()
    assert any(entry["dynamic_sampling/batches"] > 1 for entry in logged(made))


def test_an_evaluation_plays_the_same_starts_each_time(tmp_path: Path) -> None:
    seeds: list[int] = []

    class Noted(Buttons):
        def reset(self, seed: int, **row):
            seeds.append(seed)
            return super().reset(seed, **row)

    made = trainer(
        tmp_path, {"max_steps": 1, "num_generations_eval": 2, "eval_strategy": "steps", "eval_steps": 1},
        environment_factory=Noted, eval_dataset=[{"right": "b"}] * 3,
    )  # fmt: skip
    first, training = made.evaluate(), len(seeds)
    assert {"eval_reward", "eval_rewards/Noted/mean", "eval_tools/call_frequency"} <= first.keys()
    before = seeds[:training]
    assert [before[0::2], before[1::2]] == [before[0::2]] * 2
    seeds.clear()
    made.train()
    assert seeds[-6:] == before
    assert not set(seeds[:-6]) & set(before)


def numbers(made: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in logged(made)]


def test_a_run_that_was_killed_in_the_middle_of_an_episode_resumes_exactly(tmp_path: Path) -> None:
    class Random(Buttons):
        """Its answers depend on its seed and on what was done."""

        calls, fatal = 0, None

        def reset(self, seed: int, **row):
            super().reset(seed)
            self.right = "ab"[seed % 2]
            return " yes no"[: 4 + 3 * (seed // 2 % 2)]

        def press(self, key: str) -> str:
            """Press a button.

            Args:
                key: Which one.
            """
            Random.calls += 1
            if Random.calls == Random.fatal:
                raise KeyboardInterrupt
            return super().press(key)

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "steps_per_generation": 1}
    whole = trainer(tmp_path / "whole", settings, environment_factory=Random)
    whole.train()
    calls, Random.calls = Random.calls, 0
    Random.fatal = calls - 2
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", settings, environment_factory=Random).train()
    Random.fatal = None
    resumed = trainer(tmp_path / "cut", settings, environment_factory=Random)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    numbers = [
        [{k: v for k, v in e.items() if not any(t in k for t in TIMES)} for e in logged(t)] for t in (whole, resumed)
    ]
    assert numbers[0] == numbers[1]


def test_a_generation_is_kept_in_a_checkpoint_between_its_steps(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2}
    whole = trainer(tmp_path, settings)
    whole.train()
    resumed = trainer(tmp_path, settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed))


class Guess(Interaction):
    """Answers text with text; a turn is worth something if it says yes."""

    def begin(self, row, seed):
        self.turns = 0
        return "go"

    def answer(self, said):
        self.turns += 1
        return Answer(" no", reward=float("yes" in said.text), terminated=self.turns == 2)

    def close(self):
        self.turns = -1


def test_text_is_played_with_rewards_for_each_turn(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"max_steps": 1}, environment_factory=Guess)
    made.train()
    samples, (entry,) = made.last_samples, logged(made)
    assert samples.turns.rewards.sum() / 8 == entry["rewards/environment/mean"] == entry["reward"]
    assert [m["role"] for m in samples.turns.messages[0]] == ["user", "assistant", "user", "assistant", "user"]


def test_the_episodes_of_a_batch_are_answered_side_by_side(tmp_path: Path) -> None:
    """Each of the eight waits for all others, which would never come if one were answered after the other."""
    barrier = threading.Barrier(8)

    class Meets(Guess):
        def answer(self, said):
            barrier.wait(30)
            return Answer(terminated=True)

    trainer(tmp_path, {"max_steps": 1}, environment_factory=Meets).train()
    assert not barrier.broken


# --- rollout_func -----------------------------------------------------------------------------------------------------

YES, NO, END, CALL = (WORDS.index(word) for word in ("yes", "no", "<end>", CALLS[0]))


def rollout(prompts, trainer, **changed):
    """Says yes to every second prompt, and is told no in between."""
    ids = [[CALL, END, NO, YES if i % 2 else NO, END] for i in range(len(prompts))]
    output = {
        "prompt_ids": [trainer.processing_class(p[-1]["content"])["input_ids"] for p in prompts],
        "completion_ids": ids, "logprobs": [[-1.0] * 5 for _ in ids], "env_mask": [[1, 1, 0, 1, 1]] * len(ids),
        "won": [i % 2 for i in range(len(ids))],
    }  # fmt: skip
    return output | changed


def won(completions, won, **_):
    assert all(said[0]["role"] == "assistant" for said in completions)
    return [float(value) for value in won]


def test_a_rollout_function_samples_in_the_place_of_the_trainer(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"max_steps": 2}, rollout_func=rollout, reward_funcs=won, train_dataset=ROWS)
    made.train()
    samples = made.last_samples
    assert samples.turns.spans == [[(0, 2), (3, 5)]] * 8
    assert samples.returns.tolist() == [0.0, 1.0] * 4
    assert samples.logp_sampled.tolist() == [-1.0] * 32
    assert made.evaluate(ROWS[:2])["eval_reward"] == 0.5


def test_what_a_rollout_function_sets_torch_to_ends_with_it(tmp_path: Path) -> None:
    def sets(prompts, trainer):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return rollout(prompts, trainer)

    made = trainer(tmp_path, {"max_steps": 1}, rollout_func=sets, reward_funcs=won, train_dataset=ROWS)
    made.train()
    assert made.state.log_history[0]["grad_norm"] > 0


def test_rewards_read_what_a_rollout_function_was_told_last_and_nothing_is_learned_from_it(tmp_path: Path) -> None:
    read: list[Any] = []

    def told_last(prompts, trainer):
        return rollout(prompts, trainer, env_mask=[[1, 1, 0, 0, 0]] * len(prompts))

    def noted(completions, completion_ids, won, **_):
        read.append((completions[1][0]["content"], completion_ids[1]))
        return [float(value) for value in won]

    made = trainer(tmp_path, {"max_steps": 1}, rollout_func=told_last, reward_funcs=noted, train_dataset=ROWS)
    made.train()
    ((text, ids),) = read
    assert ids == [CALL, END, NO, YES, END]
    assert text.split()[-2:] == ["no", "yes"]
    samples = made.last_samples
    assert samples.turns.messages[1][-1]["content"] == samples.texts[1] == text
    assert samples.completions[1] == [CALL, END]


def test_log_probabilities_that_a_rollout_function_does_not_give_are_computed(tmp_path: Path) -> None:
    def without(prompts, trainer):
        return rollout(prompts, trainer, logprobs=None)

    made = trainer(
        tmp_path, {"max_steps": 1, "learning_rate": 1e-12}, rollout_func=without, reward_funcs=won, train_dataset=ROWS
    )  # fmt: skip
    made.train()
    samples = made.last_samples
    with torch.no_grad():
        ids = torch.tensor([[*samples.turns.contexts[0], *samples.completions[0]]])
        logp = made.model(input_ids=ids).logits[0].log_softmax(-1)
    n = len(samples.turns.contexts[0])
    wanted = torch.stack([logp[n + t - 1, samples.completions[0][t]] for t in (0, 1, 3, 4)])
    torch.testing.assert_close(samples.logp_sampled[:4], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"completion_ids": [[1]]}, r"as 'completion_ids' for 8 prompts; return a mapping"),
        ({"completion_ids": [[]] * 8}, r"completion_ids of completion 0 of rollout_func is \[\]; give a list of token"),
        ({"logprobs": [[0.0]] * 8}, "logprobs of completion 0 of rollout_func has 1 entries for 5 tokens"),
        ({"env_mask": [[0] * 5] * 8}, "env_mask of completion 0 of rollout_func has 5 entries, 0 of them not 0"),
        (
            {"completion_ids": [[1, 2, 3, 4, 99]] * 8},
            r"completion 0 .* has the token 99; .* 0 to 1",
        ),
        ({"logprobs": [[0.0, "x", 0.0, 0.0, 0.0]] * 8}, "logprobs of completion 0 of rollout_func has 'x' for token 1"),
        ({"logprobs": [[float("-inf")] * 5] * 8}, "logprobs of completion 0 .* has -inf for token 0; give a finite"),
    ],
)
def test_what_a_rollout_function_returns_is_checked(tmp_path: Path, changed: dict, said: str) -> None:
    def wrong(prompts, trainer):
        return rollout(prompts, trainer, **changed)

    with pytest.raises(TrainingError, match=said):
        trainer(tmp_path, rollout_func=wrong, reward_funcs=won, train_dataset=ROWS).train()


def test_a_value_beside_the_columns_goes_to_every_row(tmp_path: Path) -> None:
    seen: list[Any] = []

    def noted(completions, won, tag, score, **_):
        seen.append((tag, score))
        return [float(value) for value in won]

    def tagged(prompts, trainer):
        some = {"tag": "12345678", "score": torch.arange(8), "won": range(8)}  # as many characters as prompts
        return rollout(prompts, trainer, **some)

    trainer(tmp_path, {"max_steps": 1}, rollout_func=tagged, reward_funcs=noted, train_dataset=ROWS).train()
    assert seen == [(["12345678"] * 8, list(range(8)))]

    def one(prompts, trainer):
        return rollout(prompts, trainer, tag=[1])

    with pytest.raises(TrainingError, match=r"return a list of 8 entries as 'tag'"):
        trainer(tmp_path, rollout_func=one, reward_funcs=won, train_dataset=ROWS).train()


def test_the_overlong_punishment_is_part_of_the_reward_that_is_logged(tmp_path: Path) -> None:
    """Of 4 and 2 tokens where 4 are allowed and the punishment begins after 2: -1 and 0."""

    def of_two_lengths(prompts, trainer):
        ids = [[NO, NO, NO, NO] if i % 2 else [NO, END] for i in range(len(prompts))]
        return rollout(
            prompts, trainer, completion_ids=ids, logprobs=None, env_mask=None, won=[0] * len(ids)
        )  # fmt: skip

    made = trainer(
        tmp_path, {"max_steps": 1, "max_completion_length": 4, "soft_overlong_cache": 2, "logging_steps": 1},
        rollout_func=of_two_lengths, reward_funcs=won, train_dataset=ROWS,
    )  # fmt: skip
    made.train()
    assert logged(made)[0]["reward"] == -0.5
    assert logged(made)[0]["frac_reward_zero_std"] == 0.0


def test_what_a_rollout_function_cannot_go_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing would call the tools"):
        trainer(tmp_path, rollout_func=rollout, tools=[press], reward_funcs=won, train_dataset=ROWS)
    with pytest.raises(UsageError, match="rollout_func is 3; give a function"):
        trainer(tmp_path, rollout_func=3, reward_funcs=won, train_dataset=ROWS)


def test_what_is_asynchronous_runs_in_one_loop_from_the_start_to_the_reward(tmp_path: Path) -> None:
    class Client(Buttons):
        async def reset(self, seed: int = 0, **row: Any) -> str:
            self.loop = asyncio.get_running_loop()
            return super().reset(seed, **row)

        async def get_reward(self) -> float:
            return float(asyncio.get_running_loop() is self.loop)

    made = trainer(tmp_path, {"max_steps": 1}, environment_factory=Client)
    made.train()
    assert logged(made)[-1]["reward"] == 1.0


class Summary(Interaction):
    """Puts a summary in the place of the conversation, in the words of the model."""

    def begin(self, row, seed):
        self.turns = 0
        return ASKED

    def answer(self, said):
        self.turns += 1
        messages = [*ASKED, {"role": "assistant", "content": "no"}, {"role": "user", "content": "go"}]
        return Answer(messages, float(self.turns), anew=True, terminated=self.turns == 3)

    def close(self):
        pass


def test_transcripts_show_rewards_beside_the_turns_that_had_them(tmp_path: Path) -> None:
    made = trainer(tmp_path, {"max_steps": 1, "advantage": "timestep"}, environment_factory=Summary)
    made.train()
    (first, *_) = transcripts_of(made.last_samples, ["environment"], 1, 1)
    assert [said.get("reward") for said in first.turns if said["role"] == "assistant"] == [
        1.0,
        None,
        2.0,
        None,
        3.0,
        None,
    ]
    played = trainer(
        tmp_path / "other", {"max_steps": 1}, rollout_func=rollout, reward_funcs=won, train_dataset=ROWS
    )  # fmt: skip
    played.train()
    shown = list(transcripts_of(played.last_samples, ["won"], 1, 8))
    assert [[said["reward"] for said in one.turns] for one in shown] == [[one.reward] for one in shown]
    assert {one.reward for one in shown} == {0.0, 1.0}


def test_an_evaluation_in_parts_has_the_numbers_of_all_its_episodes(tmp_path: Path, monkeypatch) -> None:
    def sampled(self, *, greedy):  # the likeliest tokens of this model are no calls
        return policy.sampling_settings(self.config, greedy=False)

    monkeypatch.setattr(policy.Policy, "sampling", sampled)
    found = []
    for n, at_once in enumerate((8, 3)):
        made = trainer(tmp_path / str(n), {"per_device_eval_batch_size": at_once}, eval_dataset=ROWS * 2)
        found.append(evaluation.evaluate_greedily(made.setup, made.setup.eval_prompts[""]))
    assert found[0] == found[1]
    assert found[0].numbers["tools/failure_frequency"] > 0


def test_a_run_is_gone_on_with_by_the_tools_and_environments_it_began_with(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "reward_funcs": lambda completions: [float(len(said)) for said in completions], "train_dataset": ROWS,
    }  # fmt: skip
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path / "tools", saved, tools=[press, wait], **given).train()
    more = {**saved, "max_steps": 2}
    with pytest.raises(UsageError, match=r"belongs to another run: .* with other tools: \['press', 'wait'\], here"):
        trainer(tmp_path / "tools", more, tools=[press], **given).train(resume_from_checkpoint=True)
    assert trainer(tmp_path / "tools", more, tools=[press, wait], **given).train(resume_from_checkpoint=True)

    class Knobs(Buttons):
        pass

    trainer(tmp_path / "environment", saved, train_dataset=ROWS, reward_funcs=given["reward_funcs"]).train()
    with pytest.raises(UsageError, match=r"other environments: .*Buttons.*, here .*Knobs"):
        trainer(tmp_path / "environment", more, environment_factory=Knobs, **given).train(resume_from_checkpoint=True)


def test_whatever_of_the_users_takes_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With any time taken for long, so that the test need not wait."""
    from grouprl.runs import watchdog

    monkeypatch.setattr(watchdog, "_LEAST", -1.0)
    monkeypatch.setattr(watchdog, "_long", lambda usual: -1.0)
    with caplog.at_level("WARNING", "grouprl"):
        trainer(tmp_path, {"max_steps": 1, "tool_timeout": None}).train()
    for what in ("environment_factory", "the beginning of an episode", "turn 1 of the environment Buttons"):
        assert f"{what} took " in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "grouprl"):
        trainer(tmp_path, {"max_steps": 1}).train()
    assert "turn 1 of" not in caplog.text  # it has a limit, and is named when that is over
