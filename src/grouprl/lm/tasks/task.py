"""What a task is: it draws questions, asks them, reads the replies and scores them."""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grouprl.errors import UsageError
from grouprl.lm.rewards.text import Completion, RewardFunction, column, completion_text, named

Message = dict[str, str]
Split = Literal["train", "eval"]
RESULT_ONLY = "You answer with the result only."

_HELD_OUT = 10  # one question in so many is held out
_PATIENCE = 2000  # draws without a new question before the supply counts as exhausted


@dataclass(frozen=True)
class Example:
    """A question with its answer.

    `text` is the bare form for models of characters (default: the question); `columns` is what the reward needs beside
    the answer.
    """

    question: str
    answer: str
    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A procedural task; its options are the fields of the frozen dataclass that each one is.

    Attributes:
        system: the system message, if any.
        shots: questions with answers that go before every question, as turns of the conversation.
        needs: columns that the reward reads.
    """

    system: str | None = None
    shots: Sequence[tuple[str, str]] = ()
    needs: Sequence[str] = ("answer",)

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called."""

    @property
    @abstractmethod
    def max_completion_length(self) -> int:
        """Tokens that a reply needs at most."""

    @abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """Any example, of either split."""

    @abstractmethod
    def parse(self, text: str) -> str | None:
        """The answer in a reply, None if there is none."""

    def score(self, reply: str, row: Mapping[str, Any]) -> float:
        """The reward of one reply, at most 1; `row` holds the columns of `needs`. Here: 1 if the answer is right."""
        return float(self.parse(reply) == row["answer"])

    def generate(self, rng: random.Random, split: Split) -> Example:
        """An example of `split`: no question of one split can occur in the other, whatever the seeds.

        Raises UsageError for another split, or if the options leave no question in it.
        """
        if split not in ("train", "eval"):
            raise UsageError(f"split must be 'train' or 'eval', got {split!r}.")
        for _ in range(_PATIENCE):
            example = self.draw(rng)
            if held_out(example.question) == (split == "eval"):
                return example
        raise UsageError(f"task {self.name}: these options leave too few questions to hold any out; ask for more.")

    def messages(self, example: Example) -> list[Message]:
        """The conversation that asks `example`: system message, shots, question."""
        turns = [{"role": "system", "content": self.system}] if self.system is not None else []
        for question, answer in self.shots:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": example.question}]

    def text(self, example: Example) -> str:
        """The bare characters that ask `example` of a model made for this task alone, e.g. "abcdef"."""
        return example.text or example.question

    @property
    def reward(self) -> RewardFunction:
        """The reward function: f(prompts, completions, answer, ...) -> one number per completion.

        It raises UsageError if a column of `needs` is missing.
        """

        def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
            wanted = {name: column(name, columns, len(completions), self.name) for name in self.needs}
            rows = [{name: values[i] for name, values in wanted.items()} for i in range(len(completions))]
            return [self.score(completion_text(reply), row) for reply, row in zip(completions, rows, strict=True)]

        return named(reward, self.name.replace("-", "_"))


def held_out(question: str) -> bool:
    """Whether a question belongs to the eval split: one in ten, by its CRC-32, so in every process alike."""
    return zlib.crc32(question.encode()) % _HELD_OUT == 0


def dataset(
    task: Task, split: Split, n: int, seed: int = 0, form: Literal["messages", "text"] = "messages"
) -> list[dict[str, Any]]:
    """`n` rows of `task`: prompt (messages, or bare text), question, answer, and the columns its reward reads.

    The same arguments give the same rows. Those of the eval split are distinct; none of them is in any train split.

    Raises UsageError for n < 1, an unknown split or form, or if the eval split holds fewer than `n` questions.
    """
    if n < 1 or form not in ("messages", "text"):
        raise UsageError(f"dataset needs n >= 1 and form 'messages' or 'text', got n={n!r} and form={form!r}.")
    rng = random.Random(f"{task.name} {split} {seed}")  # text is hashed alike in every process
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    repeated = 0
    while len(rows) < n:
        example = task.generate(rng, split)
        if split == "eval":
            if example.question in seen:
                repeated += 1
                if repeated > _PATIENCE:
                    raise UsageError(
                        f"task {task.name} found only {len(rows)} distinct eval questions; ask for that many at most, "
                        f"got n={n}."
                    )
                continue
            seen.add(example.question)
            repeated = 0
        prompt = task.messages(example) if form == "messages" else task.text(example)
        rows.append({"prompt": prompt, "question": example.question, "answer": example.answer, **example.columns})
    return rows


def check_option(task: str, option: str, value: Any, low: int, high: int) -> None:
    """Raises UsageError unless `value` is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"task {task}: {option} must be an integer from {low} to {high}, got {value!r}.")
