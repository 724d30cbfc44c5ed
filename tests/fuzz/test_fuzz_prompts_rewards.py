"""Rows of any shape as prompts, and anything as what a reward function returns."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from odd import result_or_clear_error, values

from grouprl.lm.models.tiny import tiny_tokenizer
from grouprl.lm.prompts import prepare_prompts
from grouprl.lm.rewards.returned import numbers_of
from grouprl.lm.tokenising import Prompt

roles = st.sampled_from(["user", "system", "assistant", "tool", "", None, 1])
contents = st.one_of(
    st.text(max_size=5),
    values,
    st.lists(st.dictionaries(st.sampled_from(["type", "text", "image"]), values, max_size=2)),
)
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": contents})
    | st.dictionaries(st.text(max_size=7), values, max_size=2) | values,
    max_size=3,
)  # fmt: skip
prompts = messages | values | st.text(max_size=8)
rows = st.lists(st.fixed_dictionaries({"prompt": prompts}, optional={"answer": values}) | values, max_size=3)
TOKENIZER = tiny_tokenizer()


@given(rows | values | st.just([]))
def test_any_rows_are_prompts_or_refused(dataset: Any) -> None:
    source = result_or_clear_error(lambda: prepare_prompts(dataset, TOKENIZER))
    if source is not None:
        for i in range(min(source.size or 1, 3)):
            prompt = result_or_clear_error(lambda i=i: source[i])
            assert prompt is None or all(type(token) is int for token in prompt.ids)


returned = st.one_of(
    values, st.lists(values, max_size=3), st.lists(st.floats() | st.none() | st.integers(), max_size=3)
)


@given(returned)
def test_what_a_reward_function_returns(output: Any) -> None:
    asked = [Prompt(i, "p", {}, (0,)) for i in range(2)]
    numbers = result_or_clear_error(lambda: numbers_of(output, "reward", asked))
    if numbers is not None:
        assert len(numbers) == 2
        assert all(type(number) is float and not math.isinf(number) for number in numbers)
