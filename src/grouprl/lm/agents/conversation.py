"""Running episodes, between a sampler that knows tokens and interactions that know text."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from grouprl.errors import GrouprlError, TrainingError, error_text, line_of_fault, shown, with_type
from grouprl.lm.agents.chat_format import ChatFormat
from grouprl.lm.agents.interaction import Answer, Interaction, Message, Said
from grouprl.lm.agents.tool_use import reward_of
from grouprl.lm.agents.tools import bounded
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.arguments import copied
from grouprl.lm.rewards.call import is_own_metric
from grouprl.lm.rewards.returned import plain_float
from grouprl.lm.sample.turns import Partner, Reply, Turn
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.runs.time_limit import within
from grouprl.runs.watchdog import Watch

_log = logging.getLogger("grouprl")
_OVER = Reply(over=True)
MOST_TURNS = 64
"""Turns after which a history is not rewritten any more: no budget of tokens would end the episode."""


@dataclass(frozen=True)
class Rules:
    """What bounds an episode, beside tokens.

    Attributes:
        turns: most turns, or None. anew: whether each turn begins a sample of its own, with the first prompt and the
            last exchange. timeout: seconds of an answer, or None. most: characters that are said at once.
        counted: metrics that every episode has.
    """

    turns: int | None
    anew: bool
    timeout: float | None
    most: int
    counted: tuple[str, ...] = ()


class Conversation:
    """One episode: its interaction, and what was said.

    Args:
        interaction: the other side, which has begun. row: the row of the dataset.
        start: the prompt that it began with. The first turn continues a message of the assistant at its end.

    Attributes:
        interaction, row, start: as given. messages: the whole conversation, the prompt first.
        spoken: where among them each turn of the model is.
        rewards, states: of each turn. terminated, truncated: how it ended.
        metrics: sums over its turns. late: whether an answer took too long.
    """

    def __init__(
        self, interaction: Interaction, row: Prompt, start: Prompt, form: ChatFormat, rules: Rules
    ) -> None:  # fmt: skip
        self.interaction, self.row, self.start = interaction, row, start
        self._form, self._rules = form, rules
        opening = start.prompt
        self._is_text = isinstance(opening, str)
        self._opening: list[Message] = [{"role": "user", "content": opening}] if self._is_text else list(opening)  # type: ignore[arg-type]
        self._begun = ""
        if self._opening and self._opening[-1]["role"] == "assistant":  # the first turn continues it
            self._begun = str(start.completion("")[0]["content"])  # type: ignore[index]
            del self._opening[-1]
        self._schemas = list(interaction.tools)
        self.messages: list[Message] = list(self._opening)
        self.spoken: list[int] = []
        self.rewards: list[float] = []
        self.states: list[Hashable | None] = []
        self.terminated = self.truncated = False
        self.metrics: dict[str, float] = dict.fromkeys((*rules.counted, *getattr(interaction, "counted", ())), 0.0)
        self.late = False
        self._newest = 0
        self._read: Sequence[int] = start.ids  # last, before the turn that comes next

    @property
    def completion(self) -> str | list[dict[str, Any]]:
        """The conversation behind the first prompt, as reward functions read it: text, if it began with text."""
        said = [dict(message) for message in self.messages[len(self._opening) :]]
        return "".join(str(message["content"]) for message in said) if self._is_text else said

    @property
    def broken(self) -> bool:
        """Whether the interaction cannot play another episode."""
        return self.late or bool(getattr(self.interaction, "broken", False))

    @property
    def name(self) -> str:
        """The other side, for messages."""
        return str(getattr(self.interaction, "name", f"the environment {type(self.interaction).__name__}"))

    def reply(self, turn: Turn) -> Reply:
        """What follows a turn of the model, in tokens.

        Raises:
            GrouprlError: the interaction is at fault.
        """
        begun = "" if self.spoken else self._begun
        raw = begun + self._form.text(turn.ids, turn.closed, raw=True)
        text = begun + self._form.text(turn.ids, turn.closed) if self._form.skips_special_tokens else raw
        opening = self._form.opening(self._read).removesuffix(begun)
        message, fault = self._form.parse(raw, self._schemas, self._form.end(turn.ids, turn.closed), opening)
        spoken: Message = {"role": "assistant", "content": text} if self._is_text else message
        self.spoken.append(len(self.messages))
        self.messages.append(spoken)
        answer = self._answer(Said(text, turn.finished, copied(message), fault))  # which may be changed
        reward = reward_of(answer.reward, f"the reward of turn {len(self.rewards) + 1} of {self.name}")
        self.rewards.append(reward if self.interaction.gives_rewards else 0.0)
        self.states.append(answer.state)
        for name, value in answer.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + self._metric(name, value)
        said = self._messages(answer.messages, whole=answer.anew)
        self._check_end(answer, said)
        self.terminated = bool(answer.terminated)
        over = answer.terminated or answer.truncated
        anew = answer.anew or self._rules.anew
        most = self._rules.turns or (MOST_TURNS if anew else None)
        if not over and most is not None and len(self.rewards) >= most:
            over, said = True, []  # no turn is left to read it
        self.truncated = over and not answer.terminated
        self._newest = len(said)
        self.messages += said
        if over:
            return _OVER
        if not anew:
            self._read = self._form.following(self._as_given(said), self._schemas, finished=turn.closed)
            return Reply(self._read)
        prompt = self._as_given(said if answer.anew else [*self._opening, self._form.to_render(spoken), *said])
        where = f"the prompt after {self._turn()}"
        self._read = self._form.first(prompt, self._schemas, self.start, where, limited=False).ids
        return Reply(self._read, anew=True)

    def cut(self) -> None:
        """The sampler has ended the episode, for want of room: what was said last has not been read."""
        if not self.terminated and not self.truncated:
            self.truncated = True
            del self.messages[len(self.messages) - self._newest :]

    def _answer(self, said: Said) -> Answer:
        interaction, seconds = self.interaction, self._rules.timeout
        limit = None if interaction.keeps_time else seconds
        # What has no limit is named at least.
        named = Watch(f"turn {len(self.rewards) + 1} of {self.name}") if seconds is None else nullcontext()
        try:
            with torch_defaults(), named:
                answer = within(limit, lambda: interaction.answer(said))
        except GrouprlError:
            raise
        except TimeoutError as error:
            if error.args or seconds is None:
                raise self._failed(error) from error
            self.late = True
            _log.warning("%s had not answered after %g seconds; it is replaced by a new one", self.name, seconds)
            return Answer(truncated=True, metrics={"environment/timeouts": 1.0})
        except (Exception, SystemExit) as error:  # an environment that exits is no end of the program
            raise self._failed(error) from error
        if not isinstance(answer, Answer) or not isinstance(answer.metrics, Mapping):
            raise TrainingError(
                f"{self._turn()} was answered with {shown(answer)}; answer must return an Answer, its metrics a dict"
            )
        return answer

    def _failed(self, error: BaseException) -> TrainingError:
        return TrainingError(
            f"{self.name} raised {error_text(error)} in turn {len(self.rewards) + 1} of an episode"
            f"{line_of_fault(error)}; let it say in "
            "its answer what is wrong, for the model to read, and end the episode if it must"
        )

    def _check_end(self, answer: Answer, said: Sequence[Message]) -> None:
        for name, given in (("terminated", answer.terminated), ("truncated", answer.truncated)):
            if plain_float(given) not in (0.0, 1.0):
                raise TrainingError(f"{name} of {self._turn()} is {with_type(given)}; give True or False")
        if answer.anew and not said and not answer.terminated and not answer.truncated:
            raise TrainingError(f"{self._turn()} was answered anew without a message; give the whole new prompt")

    def _turn(self) -> str:
        """The turn that was taken last, for messages."""
        return f"turn {max(1, len(self.rewards))} of an episode of {self.name}"

    def _metric(self, name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if is_own_metric(name) and not str(name).startswith(("tools/", "environment/")):
            raise TrainingError(
                f"{self._turn()} has a metric called {shown(name)}, which is no name or that of a number that grouprl "
                "logs itself; choose another name"
            )
        if not math.isfinite(number):
            raise TrainingError(f"the metric {name!r} of {self._turn()} is {shown(value)}; give a finite number")
        return number

    def _messages(self, given: Any, *, whole: bool) -> list[Message]:
        """What the interaction said, as messages of bounded length; a ``whole`` new prompt is of any length."""
        if given is None:
            return []
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        if not isinstance(given, Sequence):
            raise self._not_text(given)
        messages: list[Message] = []
        for message in given:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise self._not_text(message)
            content = message.get("content", "")
            if not isinstance(content, str):
                raise self._not_text(content)
            self._check_plain(message)
            messages.append({**message, "content": bounded(content, len(content) if whole else self._rules.most)})
        return messages

    def _check_plain(self, message: Message) -> None:
        """What a message has beside its text goes into checkpoints, and must be what JSON can hold."""
        for name, value in message.items():
            if name in ("role", "content"):
                continue
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                raise TrainingError(
                    f"{self._turn()} was answered with a message whose {name!r} is {with_type(value)}; leave it "
                    "out, or give text, numbers, lists and dicts"
                ) from None

    def _not_text(self, given: Any) -> TrainingError:
        return TrainingError(
            f"{self._turn()} was answered with {shown(given)} of type {type(given).__name__}, which is not text; give "
            "text, or messages such as {'role': 'user', 'content': '...'}"
        )

    def _as_given(self, messages: Sequence[Message]) -> str | Sequence[Message]:
        """Messages as the format renders them: text, if the episode began with text."""
        return "".join(str(message["content"]) for message in messages) if self._is_text else messages


class Conversations(Partner):
    """All episodes that are sampled together.

    Args:
        running: the episodes, in the order of their numbers.
    """

    def __init__(self, running: Sequence[Conversation]) -> None:
        self.running = running
        self._errors: dict[int, BaseException] = {}
        self._lock = threading.Lock()

    def reply(self, episode: int, turn: Turn) -> Reply:
        """Answer a turn; an error ends all episodes soon, and :meth:`check` raises it."""
        if self._errors:
            self.running[episode].cut()
            return _OVER
        try:
            return self.running[episode].reply(turn)
        except BaseException as error:
            with self._lock:
                self._errors[episode] = error
            return _OVER

    def check(self) -> None:
        """Raise what went wrong in the first of the episodes in which something did."""
        if self._errors:
            raise self._errors[min(self._errors)]
