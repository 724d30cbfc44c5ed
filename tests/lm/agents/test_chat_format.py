"""Conversations in tokens: only what is new is rendered, and it is what rendering everything would give."""

import re

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.agents.chat_format import ChatFormat
from grouprl.lm.agents.tool_calls import as_call
from grouprl.lm.agents.tools import schema_of
from grouprl.lm.models.tiny import tiny_tokenizer
from grouprl.lm.prompts import Prompt, prepare_starts

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
KNOWS_TOOLS = (
    "{% if tools %}{{ '<|start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
THINKS = (  # as Qwen3's: thoughts are a field of a message, and are written where the user has not spoken since
    "{% if tools %}{{ '<|start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content is string and messages[-1].role != 'user' %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
OPENS_THOUGHTS = THINKS.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
NO_SYSTEM = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
ALTERNATES = (
    "{% for m in messages %}{{ raise_exception('roles') if (m.role == 'user') != (loop.index0 % 2 == 0) }}{% endfor %}"
    + CHATML
)
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: "
ONE_END = CHATML.replace("m.content + '<|end|>\n'", "m.content + ('\n' if m.role == 'assistant' else '<|end|>\n')")
COUNTS = "{% for m in messages %}{{ '<|start|>' + loop.index | string + m.content + '<|end|>' }}{% endfor %}"
DROPS = "{% for m in messages if m.role == 'user' %}{{ '<|start|>' + m.content + '<|end|>' }}{% endfor %}"
ROW = Prompt(3, "", {}, ())


def tokenizer(template: str | None):
    """One token a byte, and two special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=["<|start|>"], pad_token="<|end|>"
    )
    made.chat_template = template
    return made


def form(template: str | None, **more) -> ChatFormat:
    made = tokenizer(template)
    return ChatFormat(made, {}, [made.eos_token_id], **more)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


ADD = schema_of(add)
TALK = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "One moment.", "tool_calls": [as_call("add", {"a": 3, "b": 4})]},
    {"role": "tool", "name": "add", "content": "7"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "Thanks <|end|>"},
]


@pytest.mark.parametrize("template", [CHATML, KNOWS_TOOLS, STRIPS, NO_SYSTEM, ALTERNATES])
def test_what_is_appended_is_what_rendering_the_whole_conversation_gives(template: str) -> None:
    """With the model's own tokens in between. The user writes an end token too, which is not taken for the end."""
    made, f = tokenizer(template), form(template)
    assert f.fault is None
    whole = f._as_model_reads(TALK)
    ids = list(f.first(TALK[:1], [], ROW, "a row").ids)
    for said, answer in ((TALK[1], [TALK[2]]), (TALK[3], [TALK[4]])):
        (model,) = f._as_model_reads([said])
        calls = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'
        written = model["content"] + (calls if f.knows_tools and said.get("tool_calls") else "")
        ids += made(written, add_special_tokens=False)["input_ids"] + [made.eos_token_id]
        ids += f.following(answer)
    wanted = made.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert made.decode(ids).replace(" ", "") == wanted.replace(" ", "")


def test_one_template_renders_a_conversation_with_tools_where_the_tokenizer_has_several() -> None:
    marked = KNOWS_TOOLS.replace("(m.content or '')", "(m.role == 'tool') * '[result]' + (m.content or '')")
    plain = CHATML.replace("m.content", "(m.content or '')")  # leaves the calls out
    made = tokenizer({"default": plain, "tool_use": marked})
    f = ChatFormat(made, {}, [made.eos_token_id])
    assert f.knows_tools
    assert made.decode(f.following([TALK[2]], [ADD])) == "\n<|start|>tool\n[result]7<|end|>\n<|start|>assistant\n"
    assert made.decode(f.following([TALK[4]], [ADD])).startswith("\n<|start|>user\nThanks")
    with pytest.raises(TrainingError, match=r"cannot render \[.*'7'.*: it leaves out the calls before them"):
        f.following([TALK[2]])


@pytest.mark.parametrize("template", [CHATML, KNOWS_TOOLS])
def test_examples_of_a_dataset_show_the_arguments_that_they_have_and_what_a_model_wrote_stays(template: str) -> None:
    from datasets import Dataset

    shots = [as_call("add", {"a": 1, "b": 2}), as_call("weather", {"city": "Rome"})]
    talk = [{"role": "assistant", "content": "", "tool_calls": [shot]} for shot in shots]
    f = form(template)
    row = prepare_starts(Dataset.from_list([{"prompt": [*talk, TALK[0]]}]), needs_prompt=True)[0]
    read = tokenizer(template).decode(f.first(row.prompt, [], row, "row 0").ids)
    assert "None" not in read
    assert "null" not in read
    wrote = {"role": "assistant", "content": "", "tool_calls": [as_call("add", {"a": None})]}
    read = tokenizer(template).decode(f.first([wrote, TALK[0]], [], ROW, "row 0").ids)
    assert "None" in read or "null" in read


def test_a_turn_that_was_cut_off_is_ended_first() -> None:
    f = form(CHATML)
    made = tokenizer(CHATML)
    assert f.following([], finished=False) == [made.eos_token_id, *f.following([])]
    assert made.decode(f.following([])) == "\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (NO_END, r"ends the assistant's turn with none of the tokens <\|end\|>"),
        (ONE_END, r"ends the assistant's turn with none of the tokens <\|end\|>"),
        (COUNTS, "renders what follows the assistant's turn differently in a longer conversation"),
        (DROPS, "leaves out what the assistant said"),
        (None, "the tokenizer has no chat template"),
        ("{{ raise_exception('one turn only') if messages | length > 1 }}" + CHATML, "cannot render .*one turn only"),
    ],
)
def test_a_template_that_cannot_be_appended_to_is_found_at_once(template: str | None, fault: str) -> None:
    assert re.search(fault, str(form(template).fault))


CALLS_WITHOUT_END = KNOWS_TOOLS.replace(
    "{{ '<|end|>\n' }}{% endfor %}{% if add", "{{ '\n' if m.tool_calls else '<|end|>\n' }}{% endfor %}{% if add"
)
ONE_RESULT = "{{ raise_exception('once') if messages | length > 3 and messages[-1].role == 'tool' }}" + KNOWS_TOOLS


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            CALLS_WITHOUT_END,
            r"ends a turn with tool calls with none of the tokens <\|end\|>; give the tokenizer another",
        ),
        (ONE_RESULT, "cannot render what follows a turn with tool calls: once; give"),
    ],
)
def test_tools_are_text_where_results_cannot_be_appended_to_calls(template: str, said: str) -> None:
    made = form(template)
    assert (made.fault, made.knows_tools) == (None, False)
    assert re.search(said, str(made.unread))
    assert made.following([{"role": "tool", "name": "add", "content": "7"}])
    assert form(KNOWS_TOOLS).knows_tools


def test_a_template_that_leaves_thoughts_out_later_is_noticed() -> None:
    assert form(STRIPS).rewrites == "leaves thoughts of earlier turns out"
    assert form(CHATML).rewrites is None


def test_a_template_that_shows_tools_is_given_them_and_its_calls_are_read() -> None:
    f, made = form(KNOWS_TOOLS), tokenizer(KNOWS_TOOLS)
    assert f.knows_tools
    assert '"name": "add"' in made.decode(f.first(TALK[:1], [ADD], ROW, "a row").ids)
    message, fault = f.parse('Hm. <tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>', [ADD])
    assert message == {"role": "assistant", "content": "Hm.", "tool_calls": [as_call("add", {"a": 3, "b": 4})]}
    assert fault is None


THREE_AND_FOUR = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'
THOUGHT = f"I could write {THREE_AND_FOUR}."


def test_a_call_within_thoughts_is_none_and_thoughts_stand_apart() -> None:
    f = form(THINKS)
    assert f.knows_tools
    thought = {"role": "assistant", "reasoning_content": THOUGHT}
    calls = [as_call("add", {"a": 3, "b": 4})]
    assert f.parse(f"<think>\n{THOUGHT}\n</think>\n\n7", [ADD]) == ({**thought, "content": "7"}, None)
    assert f.parse(f"<think>\n{THOUGHT}", [ADD]) == ({**thought, "content": ""}, None)  # cut off
    said = f"<think>\n{THOUGHT}\n</think>\n\nSo: {THREE_AND_FOUR}"
    assert f.parse(said, [ADD]) == ({**thought, "content": "So:", "tool_calls": calls}, None)
    message, fault = f.parse(f"<think>{THOUGHT}</think><tool_call>add(3</tool_call>", [ADD])
    assert message == {**thought, "content": "<tool_call>add(3</tool_call>"}
    assert "cannot be read" in str(fault)


def test_the_opening_of_a_turn_may_begin_its_thoughts() -> None:
    f, said = form(OPENS_THOUGHTS), f"{THOUGHT}\n</think>\n\n7"
    thought = {"role": "assistant", "reasoning_content": THOUGHT, "content": "7"}
    assert f.parse(said, [ADD])[0] == thought
    assert "tool_calls" in f.parse(said, [ADD], opening="<|start|>user\nA <think> is a tag.<|end|>\n")[0]
    assert form(THINKS).parse(said, [ADD], opening="<|start|>assistant\n<think>\n")[0] == thought


def test_a_template_without_thoughts_has_no_word_for_them() -> None:
    for f in (form(CHATML), form(KNOWS_TOOLS)):
        message = f.parse("<think>3 is known</think>3", [ADD])[0]
        assert message == {"role": "assistant", "content": "<think>3 is known</think>3"}


def test_thoughts_are_rendered_as_content_where_the_template_asks_for_nothing_else() -> None:
    message = {"role": "assistant", "reasoning_content": "Hm", "content": "7"}
    assert form(THINKS).to_render(message) == message
    assert form(STRIPS).to_render(message) == {"role": "assistant", "content": "<think>\nHm\n</think>\n\n7"}


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
def test_a_template_without_tools_gets_them_as_text(template: str) -> None:
    f, made = form(template), tokenizer(template)
    assert not f.knows_tools
    read = made.decode(f.first(TALK[:1], [ADD], ROW, "a row").ids)
    assert read.count("add(a: integer, b: integer) - Add two numbers.") == 1
    assert ("<|start|>system" in read) == (template == CHATML)
    assert read.endswith("What is 3 + 4?<|end|>\n<|start|>assistant\n")
    results = [{"role": "tool", "name": "add", "content": str(i)} for i in (1, 2)]
    assert made.decode(f.following(results)) == (
        "\n<|start|>user\n<tool_response>1</tool_response>\n<tool_response>2</tool_response><|end|>\n"
        "<|start|>assistant\n"
    )


def test_tools_join_a_system_message_that_is_there() -> None:
    f, made = form(CHATML), tokenizer(CHATML)
    read = made.decode(f.first([{"role": "system", "content": "Be brief."}, TALK[0]], [ADD], ROW, "a row").ids)
    assert read.startswith("<|start|>system\nBe brief.\n\nYou can use this tool:")
    assert read.count("<|start|>system") == 1


def test_a_response_template_reads_calls_if_the_tokenizer_has_one() -> None:
    f = form(KNOWS_TOOLS)
    f._tokenizer.response_template = {"anything": 1}
    asked = []

    def parse_response(text, *, prefix, tools):
        asked.append((text, prefix, tools))
        return {"role": "assistant", "thinking": "Hm", "tool_calls": [{"name": "add", "arguments": {"a": 3, "b": 4}}]}

    f._tokenizer.parse_response = parse_response
    message, _ = f.parse("the turn", [ADD])
    assert message == {
        "role": "assistant", "thinking": "Hm", "content": "", "tool_calls": [as_call("add", {"a": 3, "b": 4})],
    }  # fmt: skip
    assert asked == [("the turn", "<|start|>user\n1<|end|>\n<|start|>assistant\n", [ADD])]


def test_a_response_template_may_wait_for_the_end_of_the_turn() -> None:
    """As one of transformers' for bare JSON, whose pattern holds the end token."""
    f = form(KNOWS_TOOLS)
    f._tokenizer.response_template = {
        "defaults": {"role": "assistant"}, "start_anchor": "<|start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r"CALL (?P<name>\w+) ", "close_pattern": r"<\|end\|>", "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": r"<\|end\|>", "content": "text"},
        },
    }  # fmt: skip
    ids = f._tokenizer('CALL add {"a": 3, "b": 4}', add_special_tokens=False)["input_ids"]
    ids.append(f._tokenizer.eos_token_id)
    text, end = f.text(ids, True), f.end(ids, True)
    assert (text, end) == ('CALL add {"a": 3, "b": 4}', "<|end|>")
    assert f.parse(text, [ADD], end)[0]["tool_calls"] == [as_call("add", {"a": 3, "b": 4})]
    assert f.parse("Hello", [ADD], end) == ({"role": "assistant", "content": "Hello"}, None)
    assert f.end(ids, False) == ""


def test_a_response_template_reads_turns_without_tools_too() -> None:
    f = form(CHATML)
    f._tokenizer.response_template = {"anything": 1}
    f._tokenizer.parse_response = lambda text, *, prefix: {"content": text.upper() + prefix}
    message = {"role": "assistant", "content": "HELLObefore"}
    assert f.parse("Hello", [], opening="before") == (message, None)
    del f._tokenizer.parse_response  # its own refuses such a template
    assert f.parse("Hello", []) == ({"role": "assistant", "content": "Hello"}, None)


def test_a_call_that_cannot_be_read_is_a_fault_and_no_exception() -> None:
    message, fault = form(CHATML).parse("<tool_call>add(3</tool_call>", [ADD])
    assert message == {"role": "assistant", "content": "<tool_call>add(3</tool_call>"}
    assert "cannot be read" in str(fault)
    assert form(CHATML).parse("<tool_call>add(3</tool_call>", [])[1] is None  # nobody offered tools


def test_text_is_tokenised_alone_behind_the_token_that_begins_a_text() -> None:
    made = tiny_tokenizer()
    f = ChatFormat(made, {}, [made.eos_token_id])
    assert made.decode(f.first("abc", [], ROW, "a row").ids) == "^abc"
    assert made.decode(f.following("de")) == "de"
    assert f.following("") == []


def test_a_prompt_that_is_too_long_names_the_row_and_the_bound() -> None:
    f = form(CHATML, room=10, room_is="the context of 20 less max_completion_length=10")
    for prompt in ("x" * 11, [{"role": "user", "content": "x"}]):
        with pytest.raises(UsageError, match=r"a row has a prompt of .* tokens, but the context of 20 .*leaves 10"):
            f.first(prompt, [], ROW, "a row")
        assert len(f.first(prompt, [], ROW, "a row", limited=False).ids) > 10
    with pytest.raises(UsageError, match="a row has the empty prompt"):
        f.first("", [], ROW, "a row")


def test_calls_in_a_prompt_that_cannot_be_read_are_an_error_that_names_the_row() -> None:
    made = ChatFormat(tokenizer(CHATML), {}, [tokenizer(CHATML).eos_token_id])
    prompt = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": ["press"]}]
    with pytest.raises(UsageError, match=r"row 3 .* has tool calls that cannot be read .*; give {'type': 'function'"):
        made.first(prompt, [], Prompt(3, prompt, {}, ()), "row 3 of the dataset")
