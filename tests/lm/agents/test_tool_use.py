"""TRL's shape of tools and environments, and what may be wrong with them."""

import asyncio
import random
import string
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from test_chat_format import CHATML, OPENS_THOUGHTS, tokenizer

from grouprl.errors import GrouprlError, TrainingError, UsageError
from grouprl.lm.agents.chat_format import ChatFormat
from grouprl.lm.agents.conversation import Conversation, Rules
from grouprl.lm.agents.interaction import Answer, Interaction, Said
from grouprl.lm.agents.interactions import Interactions
from grouprl.lm.agents.tool_calls import as_call
from grouprl.lm.agents.tool_use import Limits, reward_of
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.sample.turns import Turn

ASKED = [{"role": "user", "content": "Go. "}]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Counter(string.Formatter):
    """Counts to a number. Its base stands for a framework's, whose public methods are no tools."""

    def reset(self, start: int = 0, seed: int = 0, **row):
        self.count, self.seed, self.row = start, seed, row
        self.closed = False
        return f"Count from {start}."

    def up(self, by: int) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.count += by
        return self.count

    async def up_later(self, by: int) -> int:
        """Count up, later.

        Args:
            by: How far.
        """
        await asyncio.sleep(0)
        return self.up(by)

    def _helper(self) -> None: ...

    def get_reward(self) -> float:
        return float(self.count)

    def close(self) -> None:
        self.closed = True


class Ends(Counter):
    """Ends at 3, with a reward for each turn."""

    done = False

    def reset(self, **row):
        super().reset(**row)
        self.done = False

    def up(self, by: int) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.done = self.count + by >= 3
        return super().up(by)

    def get_turn_reward(self) -> float:
        return self.count / 10


def made(factory=None, tools=None, timeout=5.0, iterations=None) -> Interactions:
    return Interactions(factory, tools, Limits(timeout, 200, iterations), timeout)


def row(prompt=ASKED, **columns) -> Prompt:
    return Prompt(0, prompt, columns, ())


def calling(*calls, text="", finished=True) -> Said:
    given = {"role": "assistant", "content": text, "tool_calls": [as_call(name, of) for name, of in calls]}
    return Said(text, finished, given)


def test_public_methods_of_the_class_are_tools_and_nothing_else() -> None:
    interactions = made(Counter, [add])
    playing, prompt = interactions.begin(row(start=2, label="x"), 7, "row 0")
    assert [schema["function"]["name"] for schema in playing.tools] == ["add", "up", "up_later"]
    assert prompt == [{"role": "user", "content": "Go. Count from 2."}]
    assert playing.environment.seed == 7
    assert playing.environment.row == {"prompt": ASKED, "label": "x"}
    answer = playing.answer(calling(("up", {"by": 2}), ("up_later", {"by": 3}), ("add", {"a": 1, "b": 2})))
    assert [(m["role"], m["name"], m["content"]) for m in answer.messages] == [
        ("tool", "up", "4"), ("tool", "up_later", "7"), ("tool", "add", "3"),
    ]  # fmt: skip
    assert not answer.terminated
    assert answer.metrics == {"tools/calls": 3.0, "tools/failures": 0.0, "tools/timeouts": 0.0}
    assert playing.answer(Said("Done.", True)) == Answer(terminated=True)
    assert playing.answer(Said("Do", False)) == Answer(truncated=True)
    (reward,) = interactions.rewards
    assert (reward.__name__, reward([playing.environment, object()])) == ("Counter", [7.0, None])


def test_a_reset_is_given_what_it_takes() -> None:
    class Plain:
        def reset(self):
            self.began = True

    playing, prompt = made(Plain).begin(row(label="x"), 1, "row 0")
    assert playing.environment.began
    assert prompt == ASKED


def test_without_tools_nothing_is_called() -> None:
    class Plain:
        def reset(self): ...

    playing, _ = made(Plain).begin(row(), 1, "row 0")
    assert playing.answer(calling(("up", {"by": 1}))) == Answer(terminated=True)


def test_an_environment_may_end_the_episode_and_reward_each_turn() -> None:
    playing, _ = made(Ends).begin(row(), 1, "row 0")
    assert playing.gives_rewards
    first, second = (playing.answer(calling(("up", {"by": by}))) for by in (1, 2))
    assert (first.reward, first.terminated, second.reward, second.terminated) == (0.1, False, 0.3, True)


def test_calls_end_after_the_iterations_that_are_allowed() -> None:
    playing, _ = made(None, [add], iterations=1).begin(row(), 1, "row 0")
    call = calling(("add", {"a": 1, "b": 2}))
    assert not playing.answer(call).truncated
    assert playing.answer(call) == Answer(truncated=True)
    playing.begin({"prompt": ASKED}, 1)
    assert not playing.answer(call).truncated


def test_what_cannot_be_read_as_a_call_is_a_step_with_an_answer() -> None:
    playing, _ = made(None, [add]).begin(row(), 1, "row 0")
    answer = playing.answer(Said("add(3", True, fault="the call 'add(3' cannot be read"))
    assert answer.messages == [
        {"role": "tool", "name": "error", "content": "{'error': \"the call 'add(3' cannot be read\"}"}
    ]
    assert answer.metrics["tools/parse_failures"] == answer.metrics["tools/failures"] == 1.0


def test_members_of_a_group_start_equal_even_from_the_random_generators_of_the_process() -> None:
    class Draws:
        def reset(self):
            return f"{random.random()} {np.random.rand()}"

    random.seed(5)
    before = random.getstate()
    interactions = made(Draws)
    first, again, other = (interactions.begin(row(), seed, "row 0")[1] for seed in (1, 1, 2))
    assert first == again != other
    assert random.getstate() == before


def test_an_episode_owns_the_columns_of_its_row_and_may_change_them() -> None:
    class Takes(Counter):
        def reset(self, prompt, board, **row):
            prompt[0]["content"] = "Changed. "
            self.taken = board["cards"].pop(), board["pair"][0].pop(), board["array"][0]
            board["array"][0] = 7

    given = row(board={"cards": [1, 2], "pair": ([3, 4],), "array": np.array([5])})
    interactions = made(Takes)
    for _ in range(2):
        playing, prompt = interactions.begin(given, 7, "row 0")
        assert playing.environment.taken == (2, 4, 5)
        assert prompt == given.prompt == [{"role": "user", "content": "Go. "}]


def test_a_tool_that_changes_its_arguments_does_not_change_what_the_model_said() -> None:
    def ordered(values: list[int]) -> str:
        """Order numbers.

        Args:
            values: The numbers.
        """
        values.sort()
        return str(values)

    text = tokenizer(CHATML)
    form = ChatFormat(text, {}, [text.eos_token_id])
    playing, prompt = made(None, [ordered]).begin(row(), 1, "row 0")
    start = form.first(prompt, playing.tools, row(), "row 0")
    c = Conversation(playing, row(), start, form, Rules(None, False, 5.0, 100))
    said = text("<tool_call>ordered([2, 1])</tool_call>", add_special_tokens=False)["input_ids"]
    c.reply(Turn([*said, text.eos_token_id], True))
    assert c.messages[-2]["tool_calls"] == [as_call("ordered", {"values": [2, 1]})]
    assert c.messages[-1]["content"] == "[1, 2]"


def test_a_column_seed_is_the_seed() -> None:
    playing, _ = made(Counter).begin(row(seed=3), 7, "row 0")
    assert playing.environment.seed == 3


def test_interactions_are_used_again_closed_at_the_end_and_replaced_if_broken() -> None:
    interactions = made(Counter)
    playing, _ = interactions.begin(row(), 1, "row 0")
    interactions.give_back(row(), playing, broken=False)
    assert interactions.begin(row(), 1, "row 0")[0] is playing
    other, _ = interactions.begin(row(), 1, "row 0")
    assert other is not playing
    interactions.give_back(row(), playing, broken=False)
    interactions.give_back(row(), other, broken=True)
    interactions.close()
    assert (playing.environment.closed, other.environment.closed) == (True, False)


def test_a_factory_must_not_return_an_environment_that_is_in_use() -> None:
    class Own(Interaction):
        def begin(self, row, seed):
            return "Go."

    for one in (Counter(), Own()):
        said = f"returned a {type(one).__name__} that is in use already; .* return a new object each time"
        interactions = made(lambda one=one: one)
        for _ in range(2):  # one episode after the other
            playing, _ = interactions.begin(row(), 1, "row 0")
            interactions.give_back(row(), playing, broken=False)
            interactions.close()
        interactions.begin(row(), 1, "row 0")
        with pytest.raises(UsageError, match=f"environment_factory {said}"):
            interactions.begin(row(), 1, "row 0")
        with pytest.raises(UsageError, match=rf"environment_factory\['b'\] {said}"):
            made({"a": lambda one=one: one, "b": lambda one=one: one})


@pytest.mark.parametrize("method", ["__init__", "reset", "up", "close"])
def test_what_an_environment_sets_torch_to_ends_with_the_call(method: str) -> None:
    class Sets(Counter):
        pass

    def sets(self, by: int = 0) -> None:
        """Count up.

        Args:
            by: How far.
        """
        called.append(method)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)

    called: list[str] = []
    sets.__name__ = method
    setattr(Sets, method, sets)
    text = tokenizer(CHATML)
    form = ChatFormat(text, {}, [text.eos_token_id])
    try:
        interactions = made(Sets)
        playing, prompt = interactions.begin(row(), 1, "row 0")
        start = form.first(prompt, playing.tools, row(), "row 0")
        c = Conversation(playing, row(), start, form, Rules(None, False, 5.0, 100))
        said = text("<tool_call>up(1)</tool_call>", add_special_tokens=False)["input_ids"]
        c.reply(Turn([*said, text.eos_token_id], True))
        interactions.give_back(row(), playing, broken=False)
        interactions.close()
        assert called == [method]
        assert torch.get_default_dtype() == torch.float32
        assert torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def test_a_method_that_hangs_ends_the_episode_and_the_environment_is_named_and_replaced(caplog) -> None:
    ended = threading.Event()

    class Hangs:
        def reset(self): ...

        def wait(self) -> str:
            """Wait for ever."""
            while not ended.is_set():
                time.sleep(0.01)
            return ""

    playing, _ = made(Hangs, timeout=0.1).begin(row(), 1, "row 0")
    answer = playing.answer(calling(("wait", {})))
    ended.set()
    assert (answer.truncated, answer.metrics["tools/timeouts"], playing.broken) == (True, 1.0, True)
    assert "had not returned after 0.1 seconds" in answer.messages[0]["content"]
    assert "the environment Hangs is replaced by a new one: {'error': 'wait had not returned" in caplog.text


def test_a_reset_that_hangs_is_tried_once_more_with_a_new_environment() -> None:
    tries: list[int] = []

    class Slow:
        def reset(self):
            tries.append(1)
            if len(tries) == 1:
                time.sleep(30)
            return "At last."

    assert made(Slow, timeout=0.1).begin(row(), 1, "row 0")[1][0]["content"] == "Go. At last."
    assert len(tries) == 2


def test_a_mapping_of_environments_is_chosen_from_by_the_column() -> None:
    interactions = made({"count": Counter, "end": Ends})
    playing, _ = interactions.begin(row(environment="end"), 1, "row 0")
    assert type(playing.environment) is Ends
    assert "environment" not in playing.environment.row
    with pytest.raises(UsageError, match=r"row 4 names the environment 'x' in column 'environment'.*'count', 'end'"):
        interactions.begin(row(environment="x"), 1, "row 4")


def test_what_has_begin_and_answer_is_played_as_it_is() -> None:
    class Own(Interaction):
        def begin(self, row, seed):
            return f"{row['label']} {seed}"

        def answer(self, said):
            return Answer(terminated=True)

    playing, prompt = made(Own).begin(row("", label="x"), 4, "row 0")
    assert (type(playing), prompt) == (Own, "x 4")
    with pytest.raises(UsageError, match="tools are given beside the environment Own"):
        made(Own, [add])


class NoReset:
    pass


class NoText:
    def reset(self):
        return 3


class Silent:
    def reset(self): ...


class Undescribed:
    def reset(self): ...

    def move(self, to):
        return to


def broken_factory():
    raise OSError("no server")


@pytest.mark.parametrize(
    ("factory", "tools", "prompt", "said"),
    [
        (NoReset, None, ASKED, "makes a NoReset, which has no method reset; give it one"),
        (NoText, None, ASKED, "reset of the environment NoText returned 3 of type int; return text"),
        (Silent, None, "", "returned None, and the row of the dataset has no prompt"),
        (Undescribed, None, ASKED, "method of the environment Undescribed 'move' cannot be described"),
        (broken_factory, None, ASKED, "environment_factory raised OSError: no server"),
        ({"a": 3}, None, ASKED, r"environment_factory\['a'\] is 3, which cannot be called"),
        ({}, None, ASKED, "environment_factory is an empty mapping"),
        (Counter, [add, add], ASKED, "two tools are called 'add'"),
        (None, add, ASKED, r"give a list of functions: tools=\[add\]"),
        (None, "add", ASKED, "tools is 'add'; give a list of functions"),
    ],
)
def test_what_is_wrong_with_tools_and_environments_is_said_in_a_line(factory, tools, prompt, said) -> None:
    with pytest.raises(GrouprlError, match=said):
        made(factory, tools).begin(row(prompt), 1, "row 0")


@pytest.mark.parametrize("given", [None, "1", float("nan"), float("inf"), [1.0]])
def test_a_reward_is_one_finite_number(given) -> None:
    with pytest.raises(TrainingError, match=r"the reward of turn 2 is .*give a"):
        reward_of(given, "the reward of turn 2")


def test_the_reward_of_an_environment_may_be_asynchronous() -> None:
    class Judged:
        def reset(self): ...

        async def get_reward(self):
            return 2.0

    interactions = made({"a": Judged, "b": Counter})
    judge = next(function for function in interactions.rewards if function.__name__ == "Judged")
    playing, _ = interactions.begin(row(environment="a"), 1, "row 0")
    assert asyncio.run(judge([object(), playing.environment])) == [None, 2.0]


def test_methods_about_an_episode_may_be_asynchronous() -> None:
    class Later(Counter):
        async def is_done(self):
            return self.count >= 3

        async def get_turn_reward(self):
            await asyncio.sleep(0)
            return self.count / 10

        async def close(self):
            closed.append(self.count)

    closed: list[int] = []
    interactions = made(Later)
    playing, _ = interactions.begin(row(), 1, "row 0")
    first, second = (playing.answer(calling(("up", {"by": by}))) for by in (1, 2))
    assert (first.reward, first.terminated, second.reward, second.terminated) == (0.1, False, 0.3, True)
    interactions.give_back(row(), playing, broken=False)
    interactions.close()
    assert closed == [3]


@pytest.mark.parametrize("value", [np.True_, np.array(True), 1])
def test_an_environment_is_done_whatever_kind_of_true_it_says(value: Any) -> None:
    playing, _ = made(Ends).begin(row(), 1, "row 0")
    playing.environment.up = None
    playing.environment.done = value
    assert playing.answer(calling(("up_later", {"by": "x"}))).terminated


def test_an_is_done_that_says_neither_is_an_error() -> None:
    class Says(Counter):
        def is_done(self): ...

    playing, _ = made(Says).begin(row(), 1, "row 0")
    with pytest.raises(TrainingError, match=r"is_done of the environment Says returned None.*; return True or False"):
        playing.answer(calling(("up", {"by": 1})))


@pytest.mark.parametrize("method", ["is_done", "get_turn_reward"])
def test_an_environment_that_hangs_when_it_is_asked_is_replaced(method: str, caplog) -> None:
    class Hangs(Counter):
        pass

    over = threading.Event()
    setattr(Hangs, method, lambda self: over.wait(60))
    playing, _ = made(Hangs, timeout=0.1).begin(row(), 1, "row 0")
    answer = playing.answer(calling(("up", {"by": 1})))
    over.set()
    assert (answer.terminated, answer.truncated, answer.reward, playing.broken) == (False, True, 0.0, True)
    assert f"the environment Hangs is replaced by a new one: its {method} had not returned after 0.1 s" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_get_reward_that_hangs_gives_0_and_its_environment_is_replaced(is_async: bool, caplog) -> None:
    over = threading.Event()

    class Hangs(Counter):
        def get_reward(self):
            return 1.0 if self.count else over.wait(60)

    class Waits(Counter):
        async def get_reward(self):
            await asyncio.sleep(0.0 if self.count else 60.0)
            return 1.0

    interactions = made(Waits if is_async else Hangs, timeout=0.1)
    hanging, other = (interactions.begin(row(start=start), 1, "row 0")[0] for start in (0, 1))
    judged = RewardCaller(interactions.rewards, alone=False)(
        [row()] * 2, ["", ""], [[], []], environments=[hanging.environment, other.environment]
    )
    over.set()
    assert judged.values.tolist() == [[0.0], [1.0]]
    assert (hanging.broken, other.broken) == (True, False)
    assert "is replaced by a new one: its get_reward had not returned after 0.1 s" in caplog.text


def test_a_close_that_hangs_does_not_hold_up_the_end(caplog) -> None:
    class Hangs(Counter):
        def close(self):
            over.wait(60)

    over = threading.Event()
    interactions = made(Hangs, timeout=0.1)
    interactions.close()
    over.set()
    assert "could not be closed: TimeoutError" in caplog.text


def test_a_seed_of_the_dataset_wins_of_whatever_kind_of_integer() -> None:
    class Draws(Counter):
        def reset(self, **row):
            self.drawn = random.random()

    interactions = made(Draws)
    one, two = (interactions.begin(row(seed=seed), 5, "row 0")[0] for seed in (3, np.int64(3)))
    assert one.environment.drawn == two.environment.drawn


@pytest.mark.parametrize(
    ("given", "seed"), [(None, 5), (3.0, 3), (np.float32(3), 3), (torch.tensor(3), 3), (-1, -1), (2**53 + 1, 2**53 + 1)]
)
def test_a_seed_that_is_none_is_the_groups_and_a_whole_number_of_any_kind_is_a_seed(given: Any, seed: int) -> None:
    class Keeps(Counter):
        def reset(self, **row):
            self.seed, self.drawn = row["seed"], random.random()

    interactions = made({"a": Counter, "b": Keeps})
    for name in ("a", "b"):
        playing, _ = interactions.begin(row(seed=given, environment=name), 5, "row 0")
        assert playing.environment.seed == seed
        assert type(playing.environment.seed) is int
    assert playing.environment.drawn == random.Random(seed).random()


@pytest.mark.parametrize("given", ["3", 2.5, float("nan"), float("inf"), True, [3], 2**63, -(10**30)])
def test_a_seed_that_is_no_whole_number_is_refused_by_the_name_of_its_row(given: Any) -> None:
    with pytest.raises(UsageError, match=r"row 4 has .*in column 'seed', .*; give a whole number, or None"):
        made(Counter).begin(row(seed=given), 5, "row 4")
    made(None, [add]).begin(row(seed=given), 5, "row 4")  # tools alone have no use for it


def test_an_interaction_that_lacks_something_is_refused() -> None:
    class Bare:
        def begin(self, row, seed): ...

        def answer(self, said): ...

    with pytest.raises(UsageError, match=r"Bare has begin and answer, but no tools and .*; derive its class from"):
        made(Bare)


def test_messages_of_a_beginning_are_lists_whatever_they_were() -> None:
    class Tuples(Interaction):
        def begin(self, row, seed):
            return tuple(given)

    given: list[Any] = [{"role": "user", "content": "Go."}]
    assert made(Tuples).begin(row(), 1, "row 0")[1] == given
    given = ["Go."]
    with pytest.raises(TrainingError, match=r"began row 0 with \('Go.',\) of type tuple; give text or messages"):
        made(Tuples).begin(row(), 1, "row 0")


@pytest.mark.parametrize("method", ["reset", "is_done", "get_turn_reward"])
def test_an_environment_that_exits_does_not_end_the_program_unsaid(method: str) -> None:
    class Exits(Counter):
        pass

    setattr(Exits, method, lambda self, **row: sys.exit(3))
    interactions = made(Exits)
    if method == "reset":
        with pytest.raises(
            TrainingError,
            match=r"SystemExit: 3 when it began row 0; the fault is inside its reset, at line \d+ of .*\.py",
        ):
            interactions.begin(row(), 1, "row 0")
        return
    form = ChatFormat(tokenizer(CHATML), {}, [tokenizer(CHATML).eos_token_id])
    playing, prompt = interactions.begin(row(), 1, "row 0")
    c = Conversation(playing, row(), form.first(prompt, [], row(), "row 0"), form, Rules(None, False, 5.0, 100))
    with pytest.raises(
        TrainingError, match=r"Exits raised SystemExit: 3 in turn 1 of an episode, at line \d+ of .*\.py"
    ):
        c._answer(calling(("up", {"by": 1})))


@pytest.mark.parametrize("anew", [False, True])
def test_what_is_thought_calls_nothing_and_is_read_as_it_was_sampled(anew: bool) -> None:
    """The template opens the thoughts, so the model only closes them."""
    made_with, thought = tokenizer(OPENS_THOUGHTS), "Not <tool_call>add(5, 5)</tool_call>"
    form = ChatFormat(made_with, {}, [made_with.eos_token_id])
    playing, prompt = made(None, [add]).begin(row(), 1, "row 0")
    c = Conversation(playing, row(), form.first(prompt, playing.tools, row(), "row 0"), form, Rules(4, anew, 5.0, 100))

    def turn(text: str) -> Turn:
        return Turn([*made_with(text, add_special_tokens=False)["input_ids"], made_with.eos_token_id], True)

    call = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'
    read = made_with.decode(c.reply(turn(f"{thought}\n</think>\n\n{call}")).ids)
    behind = "<|end|>\n<|start|>tool\n7<|end|>\n<|start|>assistant\n<think>\n"
    assert read.endswith(f"<think>\n{thought}\n</think>\n\n{call}{behind}" if anew else behind.removeprefix("<|end|>"))
    assert anew or read == behind.removeprefix("<|end|>")
    assert c.reply(turn(f"{thought}\n</think>\n\n7")).over
    assert [message.get("reasoning_content") for message in c.completion] == [thought, None, thought]
    assert [message["content"] for message in c.completion] == ["", "7", "7"]
    assert c.metrics["tools/calls"] == 1.0


def test_a_factory_that_exits_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"environment_factory raised SystemExit: 3"):
        made(lambda: sys.exit(3))


def test_a_reward_that_is_none_is_said_with_its_turn() -> None:
    class Forgets(Counter):
        def get_turn_reward(self):
            return None if self.count == 3 else 0.0

    playing, _ = made(Forgets).begin(row(), 1, "row 0")
    playing.answer(calling(("up", {"by": 1})))
    with pytest.raises(TrainingError, match=r"get_turn_reward of the environment Forgets gave turn 2 is None"):
        playing.answer(calling(("up", {"by": 2})))
