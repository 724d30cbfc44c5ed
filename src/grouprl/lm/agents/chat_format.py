"""From messages to tokens, and from what the model wrote back to a message, by the tokenizer's chat template.

A conversation is rendered once, when it begins. After that only what is new is rendered, behind a short conversation
that is always the same, and cut off at the token that ends the assistant's turn in it. So nothing that the model wrote
is rendered or tokenised again, and the cost of a message does not grow with the conversation. Whether a template allows
that is tried when the format is made.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grouprl.errors import TrainingError, UsageError, error_text, first_line, shown
from grouprl.lm.agents import tool_calls
from grouprl.lm.agents.interaction import Message
from grouprl.lm.agents.responses import has_response_template, read_response, without_special
from grouprl.lm.agents.tool_calls import NotACallError, Schema
from grouprl.lm.messages import call_text, said_text, text_of
from grouprl.lm.prompts import Prompt
from grouprl.lm.tokenising import Tokenising, read_row

_log = logging.getLogger("grouprl")

_MARK = "0391720458"  # what a trial looks for; digits, which every tokenizer keeps
_USER: Message = {"role": "user", "content": "1"}
_SAID: Message = {"role": "assistant", "content": _MARK}
_ANSWERED = "7513086"  # another such, for what is said to the assistant
_NEXT: Message = {"role": "user", "content": _ANSWERED}
_RESULT: Message = {"role": "tool", "name": "probe", "content": _ANSWERED}
_PROBE = {"type": "function", "function": {"name": "probe", "description": "Probe.", "parameters": {
    "type": "object", "properties": {"x": {"type": "string", "description": "X."}}, "required": ["x"]}}}  # fmt: skip


class ChatFormat:
    """How a model reads conversations, and how what it says is read.

    Args:
        tokenizer: the tokenizer, with or without a chat template.
        options: arguments of the chat template.
        end_ids: the tokens that end a turn of the model.
        room: the most tokens of a prompt, or None. room_is: where that bound comes from, for a message.
        skip_special_tokens: leave all special tokens out of what the model is said to have said.

    Attributes:
        knows_tools: whether the chat template shows tools, calls and results, and what it shows of a call can be read.
            Otherwise they are text of :mod:`grouprl.lm.agents.tool_calls`.
        fault: why conversations of several turns cannot be appended to, and what to do; None if they can.
        rewrites: what the template changes of earlier turns when it renders a conversation anew; None if nothing.
        unread: why tools are text although the chat template shows them, and what to do; None if they are not.
        skips_special_tokens: as given.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None, end_ids: Sequence[int], room: int | None = None,
        room_is: str = "", *, skip_special_tokens: bool = False,
    ) -> None:  # fmt: skip
        self.skips_special_tokens = skip_special_tokens
        self._tokenizer, self._options, self._ends = tokenizer, dict(options or {}), set(end_ids)
        self._how = Tokenising(tokenizer, self._options, room, room_is)
        self.fault: str | None = None
        self.rewrites: str | None = None
        self.knows_tools = False
        self.unread: str | None = None
        template = str(getattr(tokenizer, "chat_template", None))  # of all templates, where there are several
        self._knows_thoughts, self._reads_thoughts = "</think>" in template, "reasoning_content" in template
        self._opening = ""
        self._end: list[int] = []
        if getattr(tokenizer, "chat_template", None) is None:
            self.fault = "the tokenizer has no chat template; set tokenizer.chat_template, or give prompts as text"
        else:
            self._try()

    # --- rendering ----------------------------------------------------------------------------------------------------

    def first(
        self, prompt: str | Sequence[Message], schemas: Sequence[Schema], row: Prompt, where: str, *,
        limited: bool = True,
    ) -> Prompt:  # fmt: skip
        """The prompt of an episode, or of a new sample of it, in tokens.

        Args:
            prompt: text, which is tokenised alone, behind the token that begins every text if the tokenizer has one; or
                messages. schemas: the tools. row: the row of the dataset. where: what the prompt is called in errors.
            limited: whether a prompt that is too long is an error.

        Raises:
            UsageError: it is empty, too long, or cannot be rendered.
        """
        columns = {key: value for key, value in row.columns.items() if key != "tools"}
        if isinstance(prompt, str):
            text = prompt if not schemas else f"{tool_calls.described(schemas)}\n\n{prompt}"
            ids = self._begin_ids() + self._text_ids(text)
            self._check_length(len(ids), prompt, where, limited)
            return Prompt(row.index, prompt, row.columns, tuple(ids))
        try:
            messages = self._as_model_reads([*prompt])
        except (AttributeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{where} has tool calls that cannot be read ({error_text(error)}); give "
                "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}} for each"
            ) from None
        if schemas and self.knows_tools:
            columns["tools"] = list(schemas)
        elif schemas:
            messages = self._with_described(messages, schemas)
        how = self._how if limited else replace(self._how, max_tokens=None)
        read = read_row({"prompt": messages, **columns}, row.index, how, where)
        return Prompt(row.index, [dict(message) for message in prompt], row.columns, read.ids, read.begun)

    def following(
        self, messages: str | Sequence[Message], schemas: Sequence[Schema] = (), *, finished: bool = True
    ) -> list[int]:
        """The tokens that follow a turn of the model: what is said to it, and the opening of its next turn.

        Args:
            schemas: the tools. A tokenizer may have another template for conversations with tools.
            finished: whether the model ended its turn with the end token; otherwise the end is the first of the tokens.

        Raises:
            TrainingError: the chat template cannot render the messages.
        """
        if isinstance(messages, str):
            return self._text_ids(messages)
        try:
            ids = self._behind(_USER, _SAID, messages, tools=schemas)
        except Exception as error:  # templates raise what they like
            raise TrainingError(f"the chat template cannot render {shown(messages)}: {first_line(error)}") from error
        return ids if finished else self._end + ids

    def text(self, ids: Sequence[int], finished: bool, *, raw: bool = False) -> str:
        """What the model wrote in a turn, without the token that ended it.

        Args:
            raw: keep special tokens in any case: calls of tools may be written with them.
        """
        padding = getattr(self._tokenizer, "pad_token_id", None)
        kept = [token for token in (ids[:-1] if finished else ids) if token != padding]
        return str(self._tokenizer.decode(kept, skip_special_tokens=self.skips_special_tokens and not raw))

    def end(self, ids: Sequence[int], finished: bool) -> str:
        """The token that ended a turn, as text; "" if none did."""
        return str(self._tokenizer.decode(ids[-1:], skip_special_tokens=False)) if finished else ""

    # --- reading ------------------------------------------------------------------------------------------------------

    def opening(self, ids: Sequence[int]) -> str:
        """What the model read before a turn, as text."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def parse(
        self, text: str, schemas: Sequence[Schema], end: str = "", opening: str | None = None
    ) -> tuple[dict[str, Any], str | None]:
        """A turn as a message, with its tool calls, and what is wrong with something that was meant as one, or None.

        A response template makes the message if the tokenizer has one. Else, where there are tools, the thoughts of a
        model whose chat template knows thoughts are the message's ``reasoning_content``, and nothing in them is a call.

        Args:
            text: with its special tokens. They are no part of the message where ``skip_special_tokens`` says so.
            end: the token that ended the turn, as text: a response template may wait for it.
            opening: what the model read before: it may begin the thoughts. Default: as a conversation begins.
        """
        opening = self._opening if opening is None else opening
        plain = self._message(text)
        try:
            if has_response_template(self._tokenizer) and (self.knows_tools or not schemas):
                skip = self.skips_special_tokens
                read = read_response(self._tokenizer, text, end, opening, schemas, skip_special_tokens=skip)
                return read, None
            if not schemas:
                return plain, None
            if self._knows_thoughts:
                begun = "<think>" if opening.rstrip().endswith("<think>") else ""
                text, thoughts = tool_calls.without_thoughts(begun + text)
                plain = self._message(text, thoughts)
            content, calls = tool_calls.parse(text, schemas)
        except NotACallError as error:
            return plain, str(error) if schemas else None
        except Exception as error:  # of a response template
            return plain, f"the tool call cannot be read: {first_line(error)}" if schemas else None
        return {**plain, "content": self._without_special(content), "tool_calls": calls} if calls else plain, None

    def to_render(self, message: Message) -> Message:
        """A turn that was read, as the template is given it: thoughts are content where it does not ask for them."""
        if self._reads_thoughts or "reasoning_content" not in message:
            return message
        rest = {name: value for name, value in message.items() if name != "reasoning_content"}
        return {**rest, "content": said_text(message)}

    def _message(self, content: str, thoughts: str = "") -> dict[str, Any]:
        apart = {"reasoning_content": self._without_special(thoughts)} if thoughts else {}
        return {"role": "assistant", **apart, "content": self._without_special(content)}

    def _without_special(self, text: str) -> str:
        return without_special(self._tokenizer, text) if self.skips_special_tokens else text

    # --- how it is done -----------------------------------------------------------------------------------------------

    def _begin_ids(self) -> list[int]:
        bos = getattr(self._tokenizer, "bos_token_id", None)
        begins = list(self._tokenizer("1")["input_ids"][:1])
        return [int(bos)] if bos is not None and begins == [bos] else []

    def _text_ids(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _check_length(self, n: int, prompt: str, where: str, limited: bool) -> None:
        if n == 0:
            raise UsageError(f"{where} has the empty prompt {prompt!r}; give the model something to read")
        if limited and self._how.max_tokens is not None and n > self._how.max_tokens:
            raise UsageError(
                f"{where} has a prompt of {n} tokens, but {self._how.max_tokens_is} leaves {self._how.max_tokens}; "
                "shorten it, or change that setting"
            )

    def _render(self, messages: Sequence[Message], *, opened: bool, tools: Sequence[Schema] = ()) -> str:
        given = [dict(message) for message in messages]
        return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            given, tools=list(tools) or None, tokenize=False, add_generation_prompt=opened, **self._options
        )

    def _behind(self, *conversation: Any, tools: Sequence[Schema]) -> list[int]:
        """The tokens behind the assistant's last turn before the messages that end ``conversation``.

        Args:
            conversation: messages, the last of them the assistant's with the mark; then the messages that follow.
        """
        text, place = self._with_mark(*conversation, tools=tools)
        ids = self._text_ids(text)
        ends = [i for i, token in enumerate(ids) if token in self._ends]
        return ids[ends[self._n_ends(text[:place])] + 1 :]

    def _n_ends(self, text: str) -> int:
        return sum(token in self._ends for token in self._text_ids(text))

    def _with_mark(self, *conversation: Any, tools: Sequence[Schema]) -> tuple[str, int]:
        """A conversation rendered, and where what the assistant said last in it ends.

        Raises:
            ValueError: it is left out.
        """
        *before, said, messages = conversation
        messages = self._as_model_reads(list(messages))
        called = [message for message in messages if message.get("role") == "tool"]
        if called:
            arguments: Any = {"x": _MARK}
            calls = [tool_calls.as_call(str(message.get("name", "probe")), arguments) for message in called]
            said = {"role": "assistant", "content": "", "tool_calls": calls}
        text = self._render([*before, said, *messages], opened=True, tools=tools if self.knows_tools else ())
        if _MARK not in text:
            raise ValueError(f"it leaves out {'the calls' if called else 'what the assistant said'} before them")
        return text, text.rindex(_MARK) + len(_MARK)

    def _as_model_reads(self, messages: list[Message]) -> list[Message]:
        """Calls and results as text, if the template does not know them; several results in a row as one message."""
        if self.knows_tools:
            return messages
        read: list[Message] = []
        after_result = False
        for message in messages:
            is_result = message.get("role") == "tool"
            if is_result:
                said = tool_calls.response(text_of(message.get("content")))
                if after_result:
                    said = f"{read.pop()['content']}\n{said}"
                message = {"role": "user", "content": said}
            elif message.get("tool_calls"):
                text = "".join(map(call_text, message["tool_calls"]))
                message = {"role": message["role"], "content": text_of(message.get("content")) + text}
            read.append(message)
            after_result = is_result
        return read

    def _with_described(self, messages: list[Message], schemas: Sequence[Schema]) -> list[Message]:
        """The tools are described in the system's message, or in the first one where there can be none."""
        said = tool_calls.described(schemas)
        place = 0 if messages and (messages[0].get("role") == "system" or not self._has_system) else None
        if place is None:
            return [{"role": "system", "content": said}, *messages]
        first = dict(messages[0])
        content = text_of(first.get("content"))
        first["content"] = f"{content}\n\n{said}" if first.get("role") == "system" else f"{said}\n\n{content}"
        return [first, *messages[1:]]

    # --- the trial ----------------------------------------------------------------------------------------------------

    def _try(self) -> None:
        """Find out what the template can do."""
        self._has_system = self._renders([{"role": "system", "content": _MARK}, _USER])
        self.knows_tools = self._tools_are_read()
        try:
            whole = self._render([_USER, _SAID, _NEXT], opened=True)
            self._opening = self._render([_USER], opened=True)
        except Exception as error:
            self.fault = f"the chat template cannot render a conversation of several turns: {first_line(error)}"
            return
        if _MARK not in whole:
            self.fault = "the chat template leaves out what the assistant said"
            return
        self.fault = self._fault_behind("the assistant's turn", _NEXT)
        if self.fault is not None:
            return
        if self.knows_tools and (fault := self._fault_behind("a turn with tool calls", _RESULT, [_PROBE])) is not None:
            self.knows_tools, self.unread = False, f"{fault}; give the tokenizer another chat_template"
        place = whole.rindex(_MARK) + len(_MARK)
        tail = self._text_ids(whole[place:])
        self._end = tail[: next(i for i, token in enumerate(tail) if token in self._ends) + 1]
        thought = "<think>8520</think>"
        if "8520" not in self._render([_USER, {**_SAID, "content": thought + _MARK}, _NEXT], opened=True):
            self.rewrites = "leaves thoughts of earlier turns out"
        elif not whole.startswith(self._opening):
            self.rewrites = "changes how earlier turns begin"

    def _fault_behind(self, turn: str, message: Message, tools: Sequence[Schema] = ()) -> str | None:
        """Why a message cannot be appended to a turn of the assistant; None if it can."""
        try:
            behind = self._behind(_USER, _SAID, [message], tools=tools)
            later = self._behind(_USER, {"role": "assistant", "content": "3"}, _USER, _SAID, [message], tools=tools)
            text, place = self._with_mark(_USER, _SAID, [message], tools=tools)
            ends = self._n_ends(text[: text.rindex(_ANSWERED)]) - self._n_ends(text[:place])
        except IndexError:
            behind, later, ends = [], [], 0
        except Exception as error:  # templates raise what they like
            return f"the chat template cannot render what follows {turn}: {first_line(error)}"
        if not ends:  # the first one behind the turn would be another message's, which would be lost
            names = self._tokenizer.convert_ids_to_tokens(sorted(self._ends))
            return f"the chat template ends {turn} with none of the tokens {', '.join(names)}"
        if behind != later:
            return f"the chat template renders what follows {turn} differently in a longer conversation"
        return None

    def _renders(self, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> bool:
        try:
            text = self._render(messages, opened=True, tools=tools)
        except Exception:  # a template that cannot render this raises what it likes, and that is the answer here
            return False
        return _MARK in text

    def _tools_are_read(self) -> bool:
        """Whether the template shows tools, a call and its result, and the call can be read from what it shows."""
        call = tool_calls.as_call("probe", {"x": "86420"})
        said: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result: Message = {"role": "tool", "name": "probe", "content": _MARK}
        try:
            shown_tools = "probe" in self._render([_USER], opened=True, tools=[_PROBE])
            text = self._render([_USER, said, result], opened=True, tools=[_PROBE])
            opening = self._render([_USER], opened=False, tools=[_PROBE])
        except Exception:  # as above: then our own protocol serves the tools
            return False
        if not shown_tools or _MARK not in text or "86420" not in text:
            return False
        if has_response_template(self._tokenizer):
            return True
        written = text[len(opening) if text.startswith(opening) else 0 :]
        is_read = self.parse(written, [_PROBE], opening="")[0].get("tool_calls") == [call]
        if not is_read:
            self.unread = "the tokenizer does not say how calls are read; set tokenizer.response_template for them"
        return is_read
