import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from grouprl.errors import UsageError
from grouprl.lm.prompts import Prompt, PromptOrder, PromptSource, prepare_prompts

WORDS = ["<s>", "</s>", "<user>", "<assistant>", "<tool>", "<think>", "one", "two", "three", "plus", "is"]
BOS, EOS, USER, ASSISTANT, TOOL, THINK, ONE, TWO, THREE, PLUS, IS = range(len(WORDS))
TEMPLATE = (
    "<s>{% for tool in tools or [] %} <tool>{% endfor %}{% if think %} <think>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    " <{{ m.role }}> {{ m.content }}{% if 'tool_calls' in m %} <tool>{% endif %}"
    "{% if not loop.last or m.role == 'user' %} </s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per word; a text begins with <s>, which the template writes itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_text_gets_the_special_tokens_of_the_tokenizer_and_keeps_its_other_columns(tokenizer: Any) -> None:
    source = prepare_prompts([{"prompt": "one plus two is", "answer": 3}], tokenizer)
    assert source[0] == Prompt(0, "one plus two is", {"answer": 3}, (BOS, ONE, PLUS, TWO, IS))


def test_messages_open_the_turn_of_the_assistant_and_begin_with_one_bos(tokenizer: Any) -> None:
    messages = [user("one"), assistant("two"), user("three")]
    prompt = prepare_prompts([{"prompt": messages}], tokenizer)[0]
    assert prompt.ids == (BOS, USER, ONE, EOS, ASSISTANT, TWO, EOS, USER, THREE, EOS, ASSISTANT)
    assert prompt.prompt == messages


def test_text_that_went_through_the_template_already_has_one_bos_too(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template([user("one")], tokenize=False, add_generation_prompt=True)
    source = prepare_prompts([{"prompt": text}, {"prompt": [user("one")]}], tokenizer)
    assert source[0].ids == source[1].ids == (BOS, USER, ONE, EOS, ASSISTANT)


def test_a_last_message_of_the_assistant_is_continued(tokenizer: Any) -> None:
    prompt = prepare_prompts([{"prompt": [user("one"), assistant("two plus")]}], tokenizer)[0]
    assert prompt.ids == (BOS, USER, ONE, EOS, ASSISTANT, TWO, PLUS)
    assert prompt.completion(" three") == [assistant("two plus three")]


def test_a_completion_is_text_to_text_and_a_message_to_messages() -> None:
    assert Prompt(0, "one", {}, (ONE,)).completion("two") == "two"
    assert Prompt(0, [user("one")], {}, (ONE,)).completion("two") == [assistant("two")]
    begun = [{"role": "assistant", "content": [{"type": "text", "text": "one "}]}]
    assert Prompt(0, begun, {}, (ONE,)).completion("two") == [assistant("one two")]


def test_template_arguments_come_from_the_call_and_a_row_overrules_them(tokenizer: Any) -> None:
    rows = [
        {"prompt": [user("one")]},
        {"prompt": [user("one")], "chat_template_kwargs": {"think": False}},
        {"prompt": [user("one")], "tools": [{"type": "function", "function": {"name": "add"}}]},
    ]
    source = prepare_prompts(rows, tokenizer, chat_template_kwargs={"think": True})
    assert source[0].ids[:2] == (BOS, THINK)
    assert source[1].ids[:2] == (BOS, USER)
    assert source[2].ids[:3] == (BOS, TOOL, THINK)
    assert source[2].columns == {"tools": rows[2]["tools"]}


def test_none_in_the_template_arguments_of_a_row_says_nothing(tokenizer: Any) -> None:
    from datasets import Dataset

    given = [{"think": True}, {"other": 1}]
    dataset = Dataset.from_list([{"prompt": [user("one")], "chat_template_kwargs": own} for own in given])
    assert dataset[1]["chat_template_kwargs"]["think"] is None
    assert prepare_prompts(dataset, tokenizer, chat_template_kwargs={"think": True})[1].ids[:2] == (BOS, THINK)


def test_parts_of_text_are_text_to_the_template_and_to_a_prefill(tokenizer: Any) -> None:
    def parts(*texts: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "image": None} for text in texts]

    messages = [user("one two"), assistant("three plus")]
    in_parts = [user(parts("one ", "two")), assistant(parts("three ", "plus"))]  # type: ignore[arg-type]
    plain, made = (prepare_prompts([{"prompt": p}], tokenizer)[0] for p in (messages, in_parts))
    assert plain.ids == made.ids == (BOS, USER, ONE, TWO, EOS, ASSISTANT, THREE, PLUS)
    assert made.prompt == in_parts
    assert made.completion(" is") == [assistant("three plus is")]


@pytest.mark.parametrize("trimmed", ["m.content | trim", "m.content"])
def test_the_completion_begins_with_what_the_model_read_of_the_prefill(tokenizer: Any, trimmed: str) -> None:
    template = copy.copy(tokenizer)
    template.chat_template = TEMPLATE.replace("m.content", trimmed)
    prompt = prepare_prompts([{"prompt": [user("one"), assistant("two\n")]}], template)[0]
    begun = "two" if "trim" in trimmed else "two\n"
    assert prompt.completion(" three") == [assistant(begun + " three")]


def test_the_end_that_a_tokenizer_puts_behind_every_text_is_left_out_of_prompts(tokenizer: Any) -> None:
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    source = prepare_prompts([{"prompt": "one two"}, {"prompt": "one </s>"}], ending)
    assert source[0].ids == (BOS, ONE, TWO)
    assert source[1].ids[:3] == (BOS, ONE, EOS)


def test_a_call_of_a_tool_needs_no_content(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert prepare_prompts([{"prompt": [user("one"), call, user("two")]}], tokenizer)[0].ids.count(TOOL) == 1


def test_keys_that_a_dataset_filled_up_with_none_do_not_reach_the_template(tokenizer: Any) -> None:
    from datasets import Dataset

    first = {"role": "assistant", "content": "one", "tool_calls": [{"name": "add"}]}
    dataset = Dataset.from_list([{"prompt": [first, user("two")]}])
    assert "tool_calls" in dataset[0]["prompt"][1]
    assert prepare_prompts(dataset, tokenizer)[0].ids.count(TOOL) == 1


def test_arguments_and_parameters_that_a_dataset_filled_up_do_not_reach_the_template(tokenizer: Any) -> None:
    from datasets import Dataset

    def row(name: str, **arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        parameters = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
        return {"prompt": [{"role": "assistant", "content": "one", "tool_calls": [call]}, user("two")], "tools": [tool]}

    shows = copy.copy(tokenizer)
    shows.chat_template = "{{ tools | tojson }}{{ messages[0].tool_calls | tojson }}"
    given = [row("add", a=[1, None], b={"x": "2"}), row("look", city="Rome", b={"y": "3"})]
    dataset = Dataset.from_list(given)
    assert dataset[1]["prompt"][0]["tool_calls"][0]["function"]["arguments"]["a"] is None
    plain, made = prepare_prompts(given, shows), prepare_prompts(dataset, shows)
    for i, wanted in enumerate(given):
        assert made[i].prompt[0]["tool_calls"] == wanted["prompt"][0]["tool_calls"]  # type: ignore[index]
        assert made[i].columns == {"tools": wanted["tools"]}
        assert made[i].ids == plain[i].ids


@pytest.mark.parametrize("tools", ['[{"type": "function"}]', ['{"type": "function"}'], {"type": "function"}])
def test_tools_that_are_no_schemas_are_named_with_their_column(tokenizer: Any, tools: Any) -> None:
    with pytest.raises(UsageError, match=r"row 0 of train_dataset has .*in column 'tools'; give a list of JSON"):
        prepare_prompts([{"prompt": [user("one")], "tools": tools}], tokenizer)


# --- datasets --------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": word, "n": i} for i, word in enumerate(("one", "two", "three"))]


def numbers(source: PromptSource, n: int) -> list[Any]:
    return [source[i].columns["n"] for i in range(n)]


def test_a_dataset_of_any_kind_gives_the_same_prompts(tokenizer: Any) -> None:
    from datasets import Dataset

    class Torchlike:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> dict[str, Any]:
            return ROWS[i]

    expected = [prepare_prompts(ROWS, tokenizer)[i] for i in range(3)]
    dataset = Dataset.from_list(ROWS)
    for given_ in (dataset, dataset.to_iterable_dataset(), tuple(ROWS), dict(enumerate(ROWS)).values(), Torchlike()):
        source = prepare_prompts(given_, tokenizer)
        assert [source[i] for i in range(3)] == expected


def test_a_stream_learns_its_size_at_its_end_and_begins_again(tokenizer: Any) -> None:
    from datasets import Dataset

    source = prepare_prompts(Dataset.from_list(ROWS).to_iterable_dataset(), tokenizer)
    assert source.streamed
    assert numbers(source, 3) == [0, 1, 2]
    assert source.size is None
    assert source[3].index == 0
    assert source.size == 3
    assert [source[i].columns["n"] for i in (4, 5, 6, 7)] == [1, 2, 0, 1]


def test_a_stream_can_be_entered_anywhere_and_read_back(tokenizer: Any) -> None:
    from datasets import Dataset

    source = prepare_prompts(Dataset.from_list(ROWS).to_iterable_dataset(), tokenizer)
    assert [source[i].columns["n"] for i in (8, 8, 1, 0)] == [2, 2, 1, 0]


def test_a_stream_is_read_once_per_epoch_and_each_row_once(tokenizer: Any) -> None:
    read: list[int] = []

    class Stream:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for row in ROWS:
                read.append(row["n"])
                yield row

    source = prepare_prompts(Stream(), tokenizer)
    assert numbers(source, 6) == [0, 1, 2, 0, 1, 2]
    assert read == [0, 1, 2, 0, 1, 2]


def test_rows_in_memory_are_looked_over_and_the_longest_are_tokenised_before_one_is_drawn(tokenizer: Any) -> None:
    from datasets import Dataset

    seen: list[str] = []

    class Counting:
        bos_token_id = eos_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": [1] * len(text.split())}

    rows = [{"prompt": " ".join(["one"] * n), "n": n} for n in (1, 7, 2, 9, 3, 8, 4, 6)]
    for dataset in (rows, tuple(rows), Dataset.from_list(rows)):
        seen.clear()
        prepare_prompts(dataset, Counting())
        assert sorted(len(text.split()) for text in seen) == [1, 6, 7, 8, 9]  # the first row, and the longest
    with pytest.raises(UsageError, match="row 3 of train_dataset has a prompt of 9 tokens"):
        prepare_prompts(rows, Counting(), context_length=10, max_completion_length=2)
    for bad, said in ((None, "the prompt None"), ("", "an empty prompt ''"), ([], "an empty list")):
        with pytest.raises(UsageError, match=f"row 8 of train_dataset has {said}"):
            prepare_prompts([*rows, {"prompt": bad}], Counting())


def test_rows_that_others_read_are_checked_when_they_are_drawn(tokenizer: Any) -> None:
    class Slow:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> dict[str, Any]:
            return [ROWS[0], {"prompt": None}, ROWS[2]][i]

    source = prepare_prompts(Slow(), tokenizer)
    assert source[2].columns["n"] == 2
    with pytest.raises(UsageError, match="row 1 of train_dataset has the prompt None"):
        source[1]
    with pytest.raises(IndexError):
        source[3]


def test_rows_that_came_or_went_after_they_were_given_are_missed(tokenizer: Any) -> None:
    rows = list(ROWS)
    source = prepare_prompts(rows, tokenizer)
    rows.append(ROWS[0])
    with pytest.raises(UsageError, match=f"had {len(ROWS)} rows when it was given and has {len(ROWS) + 1} now"):
        source[0]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "eval is empty"),
        ("gsm8k", r"got str; give datasets\.load_dataset\('gsm8k'\)"),
        (7, "got int"),
        ({"prompt": ["one"]}, r"a mapping of columns; give a list of rows.*Dataset\.from_dict"),
        ((row for row in ROWS), r"a generator, which can be read only once; give list\(\.\.\.\)"),
        (["one"], "row 0 of eval is 'one'; give a mapping"),
        ([{"question": "one", "answer": "two"}], "row 0 of eval has no column 'prompt', only 'question', 'answer'"),
        ([{"prompt": " "}], "row 0 of eval has an empty prompt ' '"),
        ([{"prompt": []}], "empty list of messages"),
        ([{"prompt": 7}], "row 0 of eval has the prompt 7; give text, or messages"),
        ([{"prompt": ["one"]}], "row 0 of eval has the message 'one'"),
        ([{"prompt": [{"from": "user", "value": "one"}]}], "has the message {'from'"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "prompts are text alone"),
        ([{"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}]}], "prompts are text alone"),
        ([{"prompt": [{"role": "user"}]}], r"message {'role': 'user'}, which says nothing; remove the row"),
        ([{"prompt": [{"role": "user", "content": None}]}], "which says nothing"),
        ([{"prompt": [{"role": "assistant", "content": None}, user("one")]}], "which says nothing"),
        ([{"prompt": [{"role": "user", "content": " "}]}], "has the empty message"),
        ([{"prompt": [{"role": "user", "content": []}]}], "has the empty message"),
        ([{"prompt": [{"role": "user", "content": 7}]}], "a message with the content 7; give text"),
        ([{"prompt": [{"role": 7, "content": "one"}]}], "has the message {'role': 7"),
        ([{"prompt": "one \ud800 two"}], r"row 0 of eval has '\\ud800' at character 4, which is no text in UTF-8"),
        ([{"prompt": [user("\ud800")]}], "which is no text in UTF-8"),
        ([{"prompt": torch.tensor(3.0)}], r"row 0 of eval has the prompt tensor\(3\.\); give text"),
        ([{"prompt": torch.ones(2)}], "row 0 of eval has the prompt tensor"),
        ([{"prompt": np.array(["one"])}], "row 0 of eval has the prompt array"),
        ([{"prompt": [user("one")], "chat_template_kwargs": "think"}], "has 'think' in column 'chat_template_kwargs'"),
        ([{"prompt": [user("one")], "chat_template_kwargs": {"tokenize": 1}}], "cannot render row 0.*tokenize"),
        ([{"prompt": "one", "image": object()}], "has an image in column 'image'"),
        ([{"prompt": [{"role": "system", "content": "one"}]}], "the chat template cannot render row 0.*no system role"),
    ],
)
def test_data_that_cannot_be_used_is_a_usage_error(tokenizer: Any, dataset: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_prompts(dataset, tokenizer, name="eval")


def test_the_columns_of_a_dataset_without_prompts_are_named(tokenizer: Any) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list([{"question": "one", "answer": "two"}])
    with pytest.raises(UsageError, match=r"no column 'prompt', only 'question', 'answer'; rename .*rename_column"):
        prepare_prompts(dataset, tokenizer)
    with pytest.raises(UsageError, match=r"several splits \(train, test\); give one, such as dataset\['train'\]"):
        prepare_prompts(DatasetDict(train=dataset, test=dataset), tokenizer)


def test_an_empty_stream_is_a_usage_error(tokenizer: Any) -> None:
    from datasets import Dataset

    stream = Dataset.from_list(ROWS).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(UsageError, match="train_dataset is empty"):
        prepare_prompts(stream, tokenizer)


def test_messages_without_a_chat_template_are_a_usage_error() -> None:
    class Bare:
        chat_template = None

    with pytest.raises(
        UsageError, match=r"no chat template; set tokenizer\.chat_template, or give the prompts as text"
    ):
        prepare_prompts([{"prompt": [user("one")]}], Bare())


def test_a_prompt_may_fill_what_the_completion_leaves_and_no_more(tokenizer: Any) -> None:
    rows = [{"prompt": "one two"}, {"prompt": "one two three"}]
    source = prepare_prompts(rows[:1], tokenizer, context_length=10, max_completion_length=7)
    assert len(source[0].ids) == 3
    with pytest.raises(
        UsageError, match=r"row 1 .* 4 tokens, but the model's context of 10 less .*=7 leaves 3; shorten"
    ):
        prepare_prompts(rows, tokenizer, context_length=10, max_completion_length=7)
    assert len(prepare_prompts(rows, tokenizer, max_prompt_length=4)[1].ids) == 4
    for context in (None, 10):
        with pytest.raises(UsageError, match=r"row 1 .* 4 tokens, but max_prompt_length=3 leaves 3; shorten"):
            prepare_prompts(rows, tokenizer, context_length=context, max_completion_length=5, max_prompt_length=3)
    with pytest.raises(UsageError, match="leaves no room for a prompt"):
        prepare_prompts(rows, tokenizer, context_length=10, max_completion_length=10)


# --- order -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 30), seed=st.integers(0, 2**32), takes=st.lists(st.integers(0, 40), max_size=8))
def test_every_epoch_visits_every_row_once_however_it_is_drawn(size: int, seed: int, takes: list[int]) -> None:
    order = PromptOrder(size, seed)
    rows = [row for n in takes for row in order.next_rows(n)]
    assert rows == PromptOrder(size, seed).next_rows(sum(takes))
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = PromptOrder(100, seed=1).next_rows(200)
    assert rows[:100] != rows[100:]
    assert rows[:100] != PromptOrder(100, seed=2).next_rows(100)


def test_without_shuffling_rows_come_as_they_are_and_a_stream_is_never_shuffled() -> None:
    assert PromptOrder(3, shuffle=False).next_rows(7) == [0, 1, 2, 0, 1, 2, 0]
    stream = PromptOrder(None, shuffle=True)
    assert stream.next_rows(4) + stream.next_rows(1) == [0, 1, 2, 3, 4]


def test_an_epoch_holds_whole_batches_of_rows_that_differ() -> None:
    order = PromptOrder(11, seed=3, batch=4)
    epochs = [order.next_rows(8) for _ in range(20)]
    assert all(len(set(rows)) == 8 for rows in epochs)
    assert set(itertools.chain(*epochs)) == set(range(11))  # what is left out is another row each time
    assert PromptOrder(11, shuffle=False, batch=4).next_rows(9) == [*range(8), 0]
    few = PromptOrder(3, seed=3, batch=4).next_rows(6)
    assert set(few[:3]) == set(few[3:]) == {0, 1, 2}


def test_an_order_goes_on_with_batches_of_another_size_at_the_next_whole_one() -> None:
    first = PromptOrder(11, seed=3, batch=4)
    first.next_rows(12)  # the second epoch, four rows of it
    second = PromptOrder(11, seed=3, batch=5)
    second.load(first.state())
    assert second.next_rows(5) == PromptOrder(11, seed=3, batch=5).next_rows(20)[15:]


def test_a_loaded_order_continues_where_the_other_stopped() -> None:
    first = PromptOrder(7, seed=3)
    first.next_rows(10)
    second = PromptOrder(7, seed=3)
    second.load(first.state())
    assert second.next_rows(20) == first.next_rows(20)
    assert second.drawn == 30


@pytest.mark.parametrize("other", [PromptOrder(8, 3), PromptOrder(7, 4), PromptOrder(7, 3, shuffle=False)])
def test_the_state_of_another_order_is_refused(other: PromptOrder) -> None:
    with pytest.raises(UsageError, match="resume with the same dataset, data_seed and shuffle_dataset"):
        other.load(PromptOrder(7, 3).state())


def test_an_order_of_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="at least one prompt, got 0"):
        PromptOrder(0)
