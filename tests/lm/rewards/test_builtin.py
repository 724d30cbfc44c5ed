import math

import pytest

from grouprl.errors import UsageError
from grouprl.lm.rewards.builtin import (
    accuracy,
    completion_text,
    cosine_length,
    matches,
    repetition_penalty,
    soft_overlong,
    think_answer_format,
)


def ids(*lengths):
    return [[7] * length for length in lengths]


def as_messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# --- the text of a completion -----------------------------------------------------------------------------------------


def test_the_text_of_a_completion_is_that_of_its_assistant_messages():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": "a"}]) == "a"
    assert completion_text([]) == ""
    call = {"role": "assistant", "content": None, "tool_calls": []}
    assert completion_text([call, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]) == "c"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"


@pytest.mark.parametrize("wrong", [None, 5, ["a"], {"role": "assistant", "content": "a"}, [{"content": 5}]])
def test_what_is_no_completion_is_refused(wrong):
    with pytest.raises(UsageError, match="got"):
        completion_text(wrong)


@pytest.mark.parametrize(
    "reward",
    [
        matches("a+"),
        think_answer_format(),
        accuracy(),
        soft_overlong(8, 4),
        cosine_length(accuracy(), 8),
        repetition_penalty(1),
    ],
    ids=lambda reward: reward.__name__,
)
def test_messages_and_strings_are_rewarded_alike_and_an_empty_batch_is_none(reward):
    texts = ["a", "a a a", "<think>x</think><answer>a</answer>", ""]
    columns = {"completion_ids": ids(1, 5, 7, 9), "answer": ["a", None, "b", ""], "trainer_state": object()}
    got = reward(prompts=["p"] * 4, completions=texts, **columns)
    assert len(got) == 4
    assert got == reward(prompts=[[]] * 4, completions=as_messages(texts), **columns)
    assert reward(prompts=[], completions=[], completion_ids=[], answer=[]) == []


def test_the_names_are_those_of_the_metrics():
    rewards = [think_answer_format(), accuracy("gold"), soft_overlong(8, 4), cosine_length(accuracy(), 8)]
    names = [reward.__name__ for reward in [*rewards, repetition_penalty(), matches("a"), matches("a", "only_a")]]
    assert names == [
        "think_answer_format",
        "accuracy",
        "soft_overlong",
        "cosine_length",
        "repetition_penalty",
        "matches",
        "only_a",
    ]


# --- format -----------------------------------------------------------------------------------------------------------


def test_a_pattern_must_match_the_whole_completion():
    assert matches("[0-9]+")(None, ["12", "12 ", "a12", "", "1\n"]) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert matches("a.b")(None, ["a\nb"]) == [0.0]
    assert matches("(?s)a.b")(None, ["a\nb"]) == [1.0]
    with pytest.raises(UsageError, match="is no regular expression"):
        matches("(")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\nb\n</think>\n\n<answer>\nc < d\n</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<answer>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think>b", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> done", 0.0),
        ("Well. <think>a</think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer></think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer_format_wants_each_tag_once_and_nothing_around(text, right):
    assert think_answer_format()(None, [text]) == [right]


def test_a_long_completion_that_does_not_fit_is_no_trouble():
    assert think_answer_format()(None, ["<think>" + "a" * 200_000, "<think>" * 20_000]) == [0.0, 0.0]


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_compares_text_and_leaves_out_what_has_no_answer():
    got = accuracy()(None, [" Paris\n", "paris", "x", "42"], answer=["Paris", "Paris", None, 42])
    assert got == [1.0, 0.0, None, 1.0]
    assert accuracy("label")(None, ["a"], label=["a"], answer=["b"]) == [1.0]


def test_accuracy_names_the_column_it_misses():
    with pytest.raises(UsageError, match="accuracy needs the column 'answer'; it was given: label"):
        accuracy()(None, ["a"], label=["a"])
    with pytest.raises(UsageError, match="must be a list of 2 entries, got 3 entries"):
        accuracy()(None, ["a", "b"], answer=["a", "b", "c"])


# --- length -----------------------------------------------------------------------------------------------------------


def test_soft_overlong_falls_over_the_cache_and_stays_at_minus_1():
    got = soft_overlong(max_completion_length=100, cache=20)(
        None, [""] * 7, completion_ids=ids(0, 80, 85, 90, 99, 100, 300)
    )
    assert got == pytest.approx([0.0, 0.0, -0.25, -0.5, -0.95, -1.0, -1.0])


def test_soft_overlong_needs_sensible_lengths_and_token_ids():
    for length, cache in ((0, 0), (10, 11), (10, -1)):
        with pytest.raises(UsageError, match="cache"):
            soft_overlong(length, cache)
    with pytest.raises(UsageError, match="soft_overlong needs the column 'completion_ids'"):
        soft_overlong(10, 5)(None, ["a"])


def test_cosine_length_prefers_short_right_answers_and_long_wrong_ones():
    reward = cosine_length(accuracy(), 90)
    got = reward(None, ["r"] * 4 + ["w"] * 4, answer=["r"] * 8, completion_ids=ids(0, 45, 60, 90, 0, 45, 60, 95))
    # (1 + cos(pi/2)) / 2 = 1/2 and (1 + cos(2 pi / 3)) / 2 = 1/4
    assert got == pytest.approx([2.0, 1.5, 1.25, -10.0, -10.0, -5.0, -2.5, -10.0])


def test_cosine_length_takes_other_values_and_passes_none_on():
    reward = cosine_length(
        accuracy(), 4, correct_short=1, correct_long=0.5, wrong_short=-1, wrong_long=-0.5, exceeded=-3
    )
    got = reward(None, ["r", "w", "r", "r"], answer=["r", "r", "r", None], completion_ids=ids(1, 2, 4, 1))
    assert got == pytest.approx([0.5 + 0.5 * (1 + math.sqrt(0.5)) / 2, -0.75, -3.0, None])


def test_cosine_length_takes_a_partial_reward_for_wrong():
    def partial(completions, **columns):
        return [0.99, 1.0]

    assert cosine_length(partial, 10)(None, ["", ""], completion_ids=ids(0, 0)) == [-10.0, 2.0]
    with pytest.raises(UsageError, match="max_completion_length >= 1"):
        cosine_length(partial, 0)


# --- repetition -------------------------------------------------------------------------------------------------------


def test_repetition_penalty_is_the_share_of_ngrams_seen_before():
    texts = ["a b c d", "a a a a", "a b a b a", "A a", "a", ""]
    # pairs: 3 of 3 | 1 of 3 | 2 of 4 | 1 of 1 | none | none
    assert repetition_penalty(2, -1.0)(None, texts) == pytest.approx([0.0, -2 / 3, -0.5, 0.0, 0.0, 0.0])
    # words: 4 of 4 | 1 of 4 | 2 of 5 | 1 of 2 | 1 of 1 | none
    assert repetition_penalty(1, -2.0)(None, texts) == pytest.approx([0.0, -1.5, -1.2, -1.0, 0.0, 0.0])


@pytest.mark.parametrize(("ngram_size", "max_penalty"), [(0, -1.0), (2, 0.5)])
def test_repetition_penalty_refuses_a_reward(ngram_size, max_penalty):
    with pytest.raises(UsageError, match="repetition_penalty needs"):
        repetition_penalty(ngram_size, max_penalty)
