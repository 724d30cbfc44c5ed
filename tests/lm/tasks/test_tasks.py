import itertools
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grouprl.errors import UsageError
from grouprl.lm import tasks
from grouprl.lm.tasks.arithmetic import Arithmetic
from grouprl.lm.tasks.countdown import Countdown
from grouprl.lm.tasks.letter_count import LetterCount
from grouprl.lm.tasks.multi_digit import MultiDigit
from grouprl.lm.tasks.nth_word import NthWord
from grouprl.lm.tasks.strings import Reverse, Sort
from grouprl.lm.tasks.task import held_out
from grouprl.lm.tasks.words import EVAL_WORDS, TRAIN_WORDS

ALL = [tasks.get(name) for name in tasks.names()]
BY_NAME = pytest.mark.parametrize("task", ALL, ids=tasks.names())


def answers_of(task, rows):
    """The rewards of `rows` for their own answers."""
    columns = {name: [row[name] for row in rows] for name in task.needs}
    return task.reward([row["prompt"] for row in rows], [row["answer"] for row in rows], **columns)


# --- the answers, each found in another way than by the task ----------------------------------------------------------


def test_nth_word_asks_for_the_word_in_that_place():
    for row in tasks.dataset(NthWord(), "train", 300):
        words, ordinal = re.fullmatch(r"Words: (.*)\. What is the (\w+) word\?", row["question"]).groups()
        assert words.split(", ")[{"first": 0, "second": 1, "third": 2, "fourth": 3}[ordinal]] == row["answer"]
        assert len(set(words.split(", "))) == 4


def test_arithmetic_gives_the_result_and_keeps_to_its_ranges():
    seen = set()
    for row in tasks.dataset(Arithmetic(), "train", 2000):
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+x]) (\d+)\?", row["question"]).groups()
        a, b = int(a), int(b)
        seen.add(sign)
        (a_low, a_high), (b_low, b_high) = {
            "+": ((2, 50), (2, 50)),
            "-": ((10, 60), (2, 9)),
            "x": ((2, 12), (2, 12)),
        }[sign]
        assert a_low <= a <= a_high
        assert b_low <= b <= b_high
        by_counting = {"+": len([*range(a), *range(b)]), "-": len(range(b, a)), "x": len([*range(a)] * b)}
        assert int(row["answer"]) == by_counting[sign]
    assert seen == {"+", "-", "x"}


def test_multi_digit_gives_the_result_of_numbers_of_that_many_digits():
    seen = set()
    for row in tasks.dataset(MultiDigit(digits=4), "train", 300):
        a, sign, b = re.fullmatch(r"What is (\d{4}) ([-+*]) (\d{4})\?", row["question"]).groups()
        seen.add(sign)
        assert int(a) >= int(b)
        assert int(row["answer"]) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    assert seen == {"+", "-", "*"}


def test_letter_count_counts_and_no_count_is_much_more_frequent_than_another():
    counts = Counter()
    for row in tasks.dataset(LetterCount(), "train", 800):
        letter, words = re.fullmatch(
            r'How many times does the letter "(.)" occur in "(.*)"\?', row["question"]
        ).groups()
        assert int(row["answer"]) == sum(character == letter for character in words)
        counts[row["answer"]] += 1
    assert set(counts) == {"0", "1", "2", "3"}
    assert max(counts.values()) < 250


def test_reverse_and_sort_give_the_characters_in_the_other_order():
    for row in tasks.dataset(Reverse(), "train", 200, form="text"):
        assert [*reversed(row["prompt"])] == [*row["answer"]]
        assert re.fullmatch("[a-p]{6}", row["prompt"])
    for row in tasks.dataset(Sort(), "train", 200, form="text"):
        assert re.fullmatch("[0-9]{6}", row["prompt"])
        assert Counter(row["prompt"]) == Counter(row["answer"])
        assert all(a <= b for a, b in itertools.pairwise(row["answer"]))


@pytest.mark.parametrize("n_numbers", [2, 3, 6])
def test_every_countdown_puzzle_has_the_solution_it_gives(n_numbers):
    task = Countdown(n_numbers)
    for row in tasks.dataset(task, "train", 100):
        # The rows are made by the test's own task, not by a model, so Python may do the sum.
        assert eval(row["answer"]) == row["target"]
        assert sorted(int(number) for number in re.findall(r"\d+", row["answer"])) == row["numbers"]
        assert 1 <= row["target"] <= 100
        assert f"reach {row['target']}." in row["question"]
        assert re.search(r"numbers ([\d, ]+) exactly", row["question"])[1] == ", ".join(map(str, row["numbers"]))


@BY_NAME
def test_the_answer_of_every_row_earns_the_full_reward(task):
    for split in ("train", "eval"):
        assert answers_of(task, tasks.dataset(task, split, 50)) == [1.0] * 50


@BY_NAME
def test_every_shot_is_answered_rightly_and_is_a_question_of_the_train_split(task):
    for question, answer in task.shots:
        if isinstance(task, NthWord):
            assert {*re.findall(r"\b[a-z]+\b", question)} & {*EVAL_WORDS} == set()
        else:
            assert not held_out(question)
        if isinstance(task, Countdown):
            *numbers, target = map(int, re.findall(r"\d+", question))
            assert task.score(answer, {"numbers": numbers, "target": target}) == 1.0
        elif isinstance(task, NthWord):
            words, ordinal = re.fullmatch(r"Words: (.*)\. What is the (\w+) word\?", question).groups()
            assert words.split(", ")[{"first": 0, "third": 2}[ordinal]] == answer
        elif isinstance(task, LetterCount):
            letter, words = re.findall(r'"(.*?)"', question)
            assert words.count(letter) == int(answer)
        else:
            assert task.solve(question.split()[-1]) == answer


# --- splits and seeds -------------------------------------------------------------------------------------------------


@BY_NAME
def test_no_question_is_in_both_splits(task):
    train = {row["question"] for seed in range(5) for row in tasks.dataset(task, "train", 1000, seed)}
    evaluation = {row["question"] for seed in range(5) for row in tasks.dataset(task, "eval", 150, seed)}
    assert len(train) > 500
    assert train & evaluation == set()


def test_the_words_of_nth_word_are_either_for_training_or_for_evaluation():
    assert {*TRAIN_WORDS} & {*EVAL_WORDS} == set()
    asked = " ".join(row["question"] for row in tasks.dataset(NthWord(), "eval", 200))
    assert {*re.findall(r"\b[a-z]+\b", asked)} & {*TRAIN_WORDS} == set()


@BY_NAME
def test_the_seed_decides_about_the_rows(task):
    assert tasks.dataset(task, "train", 20, 3) == tasks.dataset(task, "train", 20, 3)
    assert tasks.dataset(task, "train", 20, 3) != tasks.dataset(task, "train", 20, 4)
    assert tasks.dataset(task, "train", 40, 3)[:20] == tasks.dataset(task, "train", 20, 3)


def test_the_rows_are_the_same_in_every_process():
    code = "from grouprl.lm import tasks; print([tasks.dataset(tasks.get(n), 'eval', 5) for n in tasks.names()])"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{[tasks.dataset(task, 'eval', 5) for task in ALL]}\n"}


def test_about_one_question_in_ten_is_held_out():
    assert 850 < sum(held_out(f"What is {i}?") for i in range(10_000)) < 1150


@BY_NAME
def test_eval_rows_are_distinct(task):
    questions = [row["question"] for row in tasks.dataset(task, "eval", 200)]
    assert len(set(questions)) == 200


def test_asking_for_more_eval_questions_than_there_are_says_how_many_there_are():
    with pytest.raises(UsageError, match=r"found only \d+ distinct eval questions"):
        tasks.dataset(Reverse(length=2), "eval", 256)


# --- the form of the rows ---------------------------------------------------------------------------------------------


@BY_NAME
def test_a_prompt_is_a_conversation_that_ends_with_the_question(task):
    for row in tasks.dataset(task, "train", 3):
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["system", *["user", "assistant"] * len(task.shots), "user"]
        assert row["prompt"][-1]["content"] == row["question"]
        assert {"prompt", "question", "answer", *task.needs} <= row.keys()


def test_the_bare_form_is_the_characters_alone():
    for row in tasks.dataset(Arithmetic(), "train", 50, form="text"):
        assert re.fullmatch(r"\d+[-+*]\d+", row["prompt"])
        assert re.findall(r"\d+", row["prompt"]) == re.findall(r"\d+", row["question"])
    assert Reverse().text(tasks.Example("Reverse: ab", "ba", text="ab")) == "ab"
    assert NthWord().text(tasks.Example("Which?", "moon")) == "Which?"


@BY_NAME
def test_a_task_says_what_it_is_and_survives_pickling(task):
    assert task.max_completion_length >= 6
    assert pickle.loads(pickle.dumps(task)) == task
    assert tasks.get(task.name) == task
    assert task.reward.__name__ == task.name.replace("-", "_")


# --- rewards ----------------------------------------------------------------------------------------------------------


@BY_NAME
def test_messages_and_strings_are_rewarded_alike(task):
    rows = tasks.dataset(task, "train", 10)
    replies = [row["answer"] for row in rows[:5]] + ["", "no", "7", "?", "a b"]
    columns = {name: [row[name] for row in rows] for name in task.needs}
    messages = [[{"role": "assistant", "content": reply}] for reply in replies]
    assert task.reward(None, messages, **columns) == task.reward(None, replies, **columns)


@BY_NAME
@given(reply=st.text(max_size=60))
@settings(deadline=None, max_examples=50)
def test_any_reply_earns_between_0_and_1(task, reply):
    row = tasks.dataset(task, "train", 1)[0]
    assert 0.0 <= task.score(reply, row) <= 1.0


def test_the_columns_of_the_trainer_do_not_disturb_and_a_missing_one_is_named():
    reward = NthWord().reward
    state = object()
    assert reward(["q"], ["moon"], answer=["moon"], completion_ids=[[1]], trainer_state=state) == [1.0]
    with pytest.raises(UsageError, match="nth-word needs the column 'answer'; it was given: completion_ids"):
        reward(["q"], ["moon"], completion_ids=[[1]], trainer_state=state)
    with pytest.raises(UsageError, match="must be a list of 2 entries, got 1 entries"):
        reward(["q", "q"], ["moon", "sun"], answer=["moon"])
    with pytest.raises(UsageError, match="got a str"):
        reward(["q"], ["moon"], answer="moon")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("moon", 1.0),
        (" moon.\n", 1.0),
        ('"moon"', 1.0),
        ('"moon."', 1.0),
        ('"moon".', 1.0),
        ("\u201cmoon\u201d", 1.0),
        ("**moon**", 1.0),
        ("The moon", 0.0),
        ("moon lamp", 0.0),
        ("moons", 0.0),
        ("", 0.0),
        ("...", 0.0),
    ],
)
def test_nth_word_wants_the_word_and_nothing_else(reply, right):
    assert NthWord().reward(None, [reply], answer=["moon"]) == [right]


def test_arithmetic_reads_the_last_integer():
    replies = ["42", "17 + 25 = 42.", "It is 42, I think", "42 or 43", "forty-two", "-42", "4 2"]
    expected = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert Arithmetic().reward(None, replies, answer=["42"] * 7) == expected


def test_reverse_pays_each_place_its_share_of_the_longer_text():
    replies = ["abcdef", "abcdex", "abc", "abcdefabcdef", "", "fedcba", "xabcde"]
    assert Reverse().reward(None, replies, answer=["abcdef"] * 7) == [1.0, 5 / 6, 0.5, 0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("(3 + 7) * 25", 1.0),
        ("25*(7+3)", 1.0),
        ("25 × (7 + 3) = 250", 1.0),
        ("First 3 + 7 = 10.\nThen:\n(3 + 7) * 25 = 250\n", 1.0),
        ("I add.<answer>(3 + 7) * 25</answer> Done: 9", 1.0),
        ("3 + 7 + 25", 0.1),
        ("250", 0.0),
        ("250 + 3 - 3", 0.0),
        ("(3 + 7) * 25 * 1", 0.0),
        ("(3 + 7) * 5 * 5", 0.0),
        ("3 + 7 + 25 + 25", 0.0),
        ("(3 + 7) * 25 * 7 / 7", 0.0),
        ("25 * 7", 0.0),
        ("3 7 25", 0.0),
        ("37 + 25", 0.0),
        ("25 / (7 - 7) + 3", 0.0),
        ("(3 + 7) * 25)", 0.0),
        ("__import__('os').system('true')", 0.0),
        ("3 + 7 + 25 ** 25 ** 25", 0.0),
        ("(" * 5000 + "3+7)*25", 0.0),
        ("", 0.0),
        ("=", 0.0),
    ],
)
def test_countdown_pays_for_a_solution_and_a_little_for_the_right_numbers(reply, reward):
    assert Countdown().reward(None, [reply], numbers=[[3, 7, 25]], target=[250]) == [reward]


# --- looking tasks up -------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_answered_with_the_closest_and_with_all():
    assert tasks.names() == ["arithmetic", "countdown", "letter-count", "multi-digit", "nth-word", "reverse", "sort"]
    with pytest.raises(UsageError, match=r"no task 'nth_word'; did you mean 'nth-word'\? There are: arithmetic, count"):
        tasks.get("nth_word")
    with pytest.raises(UsageError, match="no task 'xyz'; There are"):
        tasks.get("xyz")


def test_options_reach_the_task_and_wrong_ones_are_refused():
    assert tasks.get("reverse", length=9) == Reverse(9)
    assert tasks.get("reverse", length=9).max_completion_length == 11
    assert {*tasks.dataset(Arithmetic("-"), "train", 5, form="text")[0]["prompt"]} & {*"+*"} == set()
    assert tasks.dataset(NthWord(8), "train", 1)[0]["question"].count(",") == 7
    with pytest.raises(UsageError, match="reverse has no option 'size'; it has: length"):
        tasks.get("reverse", size=9)
    for name, option, value in [
        ("reverse", "length", 1),
        ("sort", "length", "6"),
        ("nth-word", "n_words", True),
        ("countdown", "n_numbers", 7),
        ("letter-count", "n_words", 0),
        ("multi-digit", "digits", 1),
        ("arithmetic", "operations", "/"),
        ("arithmetic", "operations", ""),
    ]:
        with pytest.raises(UsageError, match=f"task {name}: {option} must be .*, got"):
            tasks.get(name, **{option: value})


@pytest.mark.parametrize("wrong", [{"n": 0}, {"split": "test"}, {"form": "chat"}])
@BY_NAME
def test_a_dataset_that_cannot_be_is_refused(task, wrong):
    with pytest.raises(UsageError, match="got"):
        tasks.dataset(task, **{"split": "train", "n": 1, **wrong})


def test_drawing_does_not_touch_the_random_stream_of_the_process():
    random.seed(5)
    before = random.getstate()
    for task in ALL:
        tasks.dataset(task, "train", 5)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("tool", "arguments"), [("multiply", {"a": 12, "b": 7}), ("calculate", {"expression": "12 * 7"})]
)
def test_a_task_with_a_tool_begins_with_two_examples_of_calls(tool: str, arguments: dict[str, Any]) -> None:
    task = MultiDigit(digits=3, operations="*", tool=tool)
    rows = tasks.dataset(task, "eval", 20)
    for row in rows:
        calls = [m["tool_calls"][0]["function"] for m in row["prompt"] if m.get("tool_calls")]
        assert calls[0] == {"name": tool, "arguments": arguments}
        assert [m["content"] for m in row["prompt"] if m["role"] == "tool"] == ["84", "7245"]
        a, b = row["question"].removeprefix("What is ").removesuffix("?").split(" * ")
        assert row["answer"] == str(int(a) * int(b))
        assert row["prompt"][-1] == {"role": "user", "content": row["question"]}


def test_a_tool_that_cannot_serve_the_task_is_refused() -> None:
    with pytest.raises(UsageError, match="tool must be 'multiply' or 'calculate', got 'add'"):
        MultiDigit(tool="add")
    with pytest.raises(UsageError, match=r"the tool multiply needs operations='\*'"):
        MultiDigit(tool="multiply")
