"""How a row of a dataset becomes the tokens that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grouprl.errors import UsageError, first_line, shown
from grouprl.lm.messages import text_of

TEMPLATE_COLUMN = "chat_template_kwargs"
TOOLS_COLUMN = "tools"
_IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Prompt:
    """One row of the dataset, tokenised."""

    index: int
    """Its row in the dataset."""
    prompt: str | list[dict[str, Any]]
    """As the dataset has it."""
    columns: dict[str, Any]
    """The other columns."""
    ids: tuple[int, ...]
    """What the model reads."""
    begun: str | None = None
    """What the assistant's message began with, if the prompt ends in one that is to be continued, else None."""

    def completion(self, text: str) -> str | list[dict[str, Any]]:
        """A completion's text as reward functions expect it: as it is, or as the assistant's message.

        A prompt that ends in the assistant's message is continued, so there the message holds both parts.
        """
        if isinstance(self.prompt, str):
            return text
        last = self.prompt[-1]
        begun = self.begun
        if begun is None:
            begun = text_of(last.get("content")) if last["role"] == "assistant" else ""
        return [{"role": "assistant", "content": begun + text}]


@dataclass(frozen=True)
class Tokenising:
    """How a row becomes token ids."""

    tokenizer: Any
    chat_template_kwargs: Mapping[str, Any]
    max_tokens: int | None
    """Most tokens of a prompt."""
    max_tokens_is: str
    """Where that bound comes from, for the message."""


def no_prompt(name: str, columns: Iterable[Any]) -> str:
    """What to say of a dataset or row that has these columns and no prompt."""
    return (
        f"{name} has no column 'prompt', only {', '.join(map(repr, columns)) or 'none at all'}; rename the right one: "
        "dataset.rename_column(..., 'prompt')"
    )


def read_row(row: Any, index: int, how: Tokenising, name: str) -> Prompt:
    """Row ``index`` of the dataset ``name``, tokenised. Raises UsageError, naming it, if it cannot be used."""
    where = f"row {index} of {name}"
    prompt = check_row(row, index, name)
    columns = {key: value for key, value in row.items() if key != "prompt"}
    begun = None
    if isinstance(prompt, str):
        ids = _text_ids(prompt, how.tokenizer, where)
    else:
        ids, begun = _message_ids(prompt, columns, how, where)
    if not ids:
        raise UsageError(f"{where} has no tokens: {shown(prompt)} is empty to the tokenizer; remove the row")
    if how.max_tokens is not None and len(ids) > how.max_tokens:
        raise UsageError(
            f"{where} has a prompt of {len(ids)} tokens, but {how.max_tokens_is} leaves {how.max_tokens}; shorten or "
            "filter the prompts, or change that setting"
        )
    return Prompt(index, prompt, columns, tuple(ids), begun)


def read_start(row: Any, index: int, name: str, *, needs_prompt: bool) -> Prompt:
    """Row ``index`` of the dataset ``name`` as the start of an episode, without tokens; "" stands for no prompt.

    Raises UsageError, naming it, if it cannot be used.
    """
    prompt: Any = ""
    if needs_prompt or not isinstance(row, Mapping) or row.get("prompt") is not None:
        prompt = check_row(row, index, name)
    return Prompt(index, prompt, {key: value for key, value in row.items() if key != "prompt"}, ())


def without_padding(row: Any) -> Any:
    """A row of a dataset without the None that stands in its calls of tools and in its ``tools`` for what is not there.

    Arrow gives each of them the keys of all: arguments and parameters of other functions, which a model must not read.
    """
    if not isinstance(row, Mapping):
        return row
    tidied = {TOOLS_COLUMN: _without_none(row[TOOLS_COLUMN])} if TOOLS_COLUMN in row else {}
    if isinstance(row.get("prompt"), list):
        tidied["prompt"] = [
            {**message, "tool_calls": _without_none(message["tool_calls"])}
            if isinstance(message, Mapping) and message.get("tool_calls")
            else message
            for message in row["prompt"]
        ]
    return {**row, **tidied}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def check_row(row: Any, index: int, name: str) -> str | list[dict[str, Any]]:
    """The prompt of a row, before it is tokenised. Raises UsageError as `read_row`."""
    where = f"row {index} of {name}"
    if not isinstance(row, Mapping):
        raise UsageError(f"{where} is {shown(row)}; give a mapping such as {{'prompt': '2 + 2 ='}}")
    if "prompt" not in row:
        raise UsageError(no_prompt(f"{where}", row))
    for column in _IMAGE_COLUMNS:
        if row.get(column) is not None and not _is_empty_list(row[column]):
            raise UsageError(f"{where} has an image in column {column!r}; prompts are text alone, remove the column")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UsageError(f"{where} has an empty prompt {prompt!r}; remove the row")
        _check_text(prompt, where)
        return prompt
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        prompt = list(prompt)
        _check_messages(prompt, where)
        return prompt
    raise UsageError(
        f"{where} has the prompt {shown(prompt)}; give text, or messages such as "
        "[{'role': 'user', 'content': '2 + 2 ='}]"
    )


def characters(prompt: str | list[dict[str, Any]]) -> int:
    """How long a prompt is before it is tokenised."""
    return len(prompt) if isinstance(prompt, str) else sum(len(text_of(message.get("content"))) for message in prompt)


def _is_empty_list(value: Any) -> bool:
    return isinstance(value, list) and not value


def _check_messages(messages: list[Any], where: str) -> None:
    if not messages:
        raise UsageError(f"{where} has an empty list of messages; remove the row")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"{where} has the message {shown(message)}; give mappings such as "
                "{'role': 'user', 'content': '2 + 2 ='}"
            )
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UsageError(f"{where} has the message part {shown(part)}; prompts are text alone")
        if not isinstance(content, str | list | None):
            raise UsageError(f"{where} has a message with the content {shown(content)}; give text")
        says = any(value is not None for key, value in message.items() if key not in ("role", "content", "name"))
        if content is None and not says:
            raise UsageError(f"{where} has the message {shown(message)}, which says nothing; remove the row")
        if message["role"] == "user" and not text_of(content).strip():
            raise UsageError(f"{where} has the empty message {shown(message)}; remove the row")
        _check_text(text_of(content), where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} has {shown(text[error.start : error.end])} at character {error.start}, which is no text in "
            "UTF-8; replace it: prompt.encode('utf-8', 'replace').decode()"
        ) from None


def _text_ids(text: str, tokenizer: Any, where: str) -> list[int]:
    try:
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
    except Exception as error:  # of a tokenizer of the user's
        raise UsageError(f"the tokenizer cannot read {where}, {shown(text)}: {first_line(error)}") from error
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    # The text may begin with the token itself, when a chat template was applied beforehand.
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    # Some tokenizers end every text; a prompt goes on. One that was written at the end stays.
    if len(ids) > 1 and ids[-1] == eos and not text.rstrip().endswith(str(getattr(tokenizer, "eos_token", None))):
        ids = ids[:-1]
    return ids


def _message_ids(
    messages: list[Any], columns: Mapping[str, Any], how: Tokenising, where: str
) -> tuple[list[int], str | None]:
    """The tokens of a conversation, and how the last message of the assistant begins, if it is continued."""
    if getattr(how.tokenizer, "chat_template", None) is None:
        raise UsageError(
            f"{where} is a list of messages, but the tokenizer has no chat template; set tokenizer.chat_template, or "
            "give the prompts as text"
        )
    given = [_plain_message(message) for message in messages]
    continued = given[-1]["role"] == "assistant"
    own = columns.get(TEMPLATE_COLUMN) or {}
    if not isinstance(own, Mapping):
        raise UsageError(f"{where} has {shown(own)} in column {TEMPLATE_COLUMN!r}; give a mapping of arguments")
    tools = columns.get(TOOLS_COLUMN) or None
    if tools is not None and not (
        isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise UsageError(
            f"{where} has {shown(tools)} in column {TOOLS_COLUMN!r}; give a list of JSON schemas, such as json.loads "
            "makes of text, or rename the column"
        )
    options = {
        "tools": tools, "add_generation_prompt": not continued,
        "continue_final_message": continued,
    }  # fmt: skip
    # Here too None stands for a key that the row does not have.
    arguments = {**how.chat_template_kwargs, **{key: value for key, value in own.items() if value is not None}}
    try:
        ids = how.tokenizer.apply_chat_template(given, tokenize=True, return_dict=False, **options, **arguments)
        begun = None
        if continued and given[-1].get("content"):
            rendered = how.tokenizer.apply_chat_template(given, tokenize=False, **options, **arguments)
            begun = _begun(rendered, given[-1]["content"])
    except Exception as error:  # templates raise what they like
        said = f"{shown(messages)}: {first_line(error)}"
        raise UsageError(f"the chat template cannot render {where}, {said}") from error
    return [int(token) for token in ids], begun


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As templates of models for text expect it: text instead of a list of its parts, and no keys without a value.

    Datasets give every message the keys of all, with None for what was not there; templates ask for the keys.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    return {**plain, "content": text_of(plain["content"])} if isinstance(plain.get("content"), list) else plain


def _begun(rendered: str, content: str) -> str:
    """What the model reads of a message that it continues: templates may cut off the space around it."""
    return next(
        (text for text in (content, content.lstrip(), content.rstrip(), content.strip()) if rendered.endswith(text)),
        content,
    )
