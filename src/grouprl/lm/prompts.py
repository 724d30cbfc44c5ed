"""Prompts: a dataset read row by row, tokenised on demand, and the order in which a run visits it.

A row is a mapping with a column ``prompt``: text, or a list of messages. Its other columns go to the reward functions.
Tokenising waits until a row is drawn, since reading through a large dataset first would cost minutes. The first 20,000
rows are looked over before, and the longest of them tokenised; any other row that cannot be used is an error when it is
met.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch.utils.data

from grouprl.errors import UsageError, shown
from grouprl.lm.fingerprint import RowsDigest
from grouprl.lm.tokenising import (
    Prompt,
    Tokenising,
    characters,
    check_row,
    no_prompt,
    read_row,
    read_start,
    without_padding,
)

_LOOKED_OVER = 20_000
"""Rows that are checked before training: a second's worth."""
_TRIED = 4
"""The longest of them, which are tokenised."""

__all__ = ["Prompt", "PromptOrder", "PromptSource", "prepare_prompts", "prepare_starts", "room_for_prompts"]


class PromptSource:
    """The prompts of a dataset by row; made by `prepare_prompts`.

    A stream is read forward and begun again at its end; its rows are numbered on without end, and the row of the
    dataset is the number modulo its size, once that is known.
    """

    def __init__(self, rows: Any, read: Callable[[Any, int, str], Prompt], name: str, streamed: bool) -> None:
        self._rows, self._read, self._name, self._streamed = rows, read, name, streamed
        self._size = None if streamed else len(rows)
        self._iterator: Iterator[Any] | None = None
        self._next = 0  # row of the stream that the iterator yields next
        self._last: tuple[int, Any] | None = None
        self._seen = RowsDigest()  # of a stream: what came by, each row once
        self._known: dict[str, Any] | None = None  # of anything else

    @property
    def size(self) -> int | None:
        """Number of rows; None for a stream whose end has not been met."""
        return self._size

    @property
    def streamed(self) -> bool:
        """Whether rows can only be read one after the other."""
        return self._streamed

    @property
    def name(self) -> str:
        """What the dataset is called in messages."""
        return self._name

    @property
    def columns(self) -> list[str] | None:
        """The columns beside ``prompt``; None where only reading all rows would tell."""
        names = getattr(self._rows, "column_names", None)
        if names is None and isinstance(self._rows, list | tuple):
            names = dict.fromkeys(name for row in self._rows if isinstance(row, Mapping) for name in row)
        return None if names is None else [name for name in names if name != "prompt"]

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of row `index`. Raises UsageError if the row cannot be used, naming it and the fix."""
        if index < 0 or (self._size is not None and not self._streamed and index >= self._size):
            raise IndexError(f"row {index} of {self._size}")
        if not self._streamed and len(self._rows) != self._size:
            raise UsageError(
                f"{self._name} had {self._size} rows when it was given and has {len(self._rows)} now; give a copy of it"
            )
        index, row = self._stream_to(index) if self._streamed else (index, self._rows[int(index)])
        return self._read(without_padding(row), index, self._name)

    def look_over(self) -> None:
        """Check the rows of a dataset in memory, and tokenise the longest of them.

        So a row that cannot be used is met before training and not in its middle. Raises UsageError as `read_row`.
        """
        lengths = [characters(check_row(row, i, self._name)) for i, row in self.first_rows("prompt")]
        for i in heapq.nlargest(_TRIED, range(len(lengths)), key=lengths.__getitem__):
            self[i]

    def first_rows(self, *columns: str) -> Iterator[tuple[int, Any]]:
        """The first 20,000 rows with their numbers, and at least these columns; the first alone if reading may be slow.

        Rows may lack a column.
        """
        rows = self._rows
        if hasattr(rows, "select_columns") and not self._streamed:
            there = [name for name in columns if name in rows.column_names]
            rows = rows.select_columns(there) if there else [{}]
        elif not isinstance(rows, list | tuple):
            first = self[0]
            rows = [{**first.columns, "prompt": first.prompt}]
        yield from zip(range(_LOOKED_OVER), rows, strict=False)

    def fingerprint(self, rows: int | None = None) -> dict[str, Any]:
        """Fingerprints by which the same data in the same order are known again.

        Of a dataset with a length, all rows count up to 4,096, and 4,096 evenly spread ones of more.

        Args:
            rows: how many rows of a stream count; default: those that were read so far. A shorter stream counts whole.
        """
        if not self._streamed:
            if self._known is None:
                n = len(self._rows)
                compared = (self._rows[i * n // min(n, _COMPARED)] for i in range(min(n, _COMPARED)))
                self._known = _digest_of(compared) | {"rows": n}
            return self._known
        if rows is None or rows == self._seen.rows:
            return self._seen.state()
        if rows < self._seen.rows:
            return _digest_of(itertools.islice(iter(self._rows), rows))
        self._stream_to(rows - 1)
        return self._seen.state()

    def _stream_to(self, index: int) -> tuple[int, Any]:
        if self._size is not None:
            index %= self._size
        if self._last is not None and self._last[0] == index:
            return self._last
        if self._iterator is None or index < self._next:
            self._iterator, self._next = iter(self._rows), 0
        while True:
            try:
                row = next(self._iterator)
            except StopIteration:
                if self._next == 0:
                    raise UsageError(f"{self._name} is empty; give it at least one row") from None
                self._size = self._next
                self._iterator = None
                return self._stream_to(index)
            self._next += 1
            if self._next > self._seen.rows:
                self._seen.add(row)
            if self._next > index:
                self._last = (index, row)
                return self._last


_COMPARED = 4096


def _digest_of(rows: Iterable[Any]) -> dict[str, Any]:
    seen = RowsDigest()
    for row in rows:
        seen.add(row)
    return seen.state()


class PromptOrder:
    """The endless order in which prompts are drawn: epoch after epoch, each a new permutation drawn from (seed, epoch).

    Without shuffling, and for a stream (size None), rows come one after the other.

    Args:
        batch: rows drawn at once. An epoch holds whole batches, as in TRL: the rows at its end that fill none are left
            out of it. If there are fewer rows than a batch, it runs on into the next epoch.
    """

    def __init__(self, size: int | None, seed: int = 0, shuffle: bool = True, batch: int = 1) -> None:
        if size is not None and size < 1:
            raise UsageError(f"there must be at least one prompt, got {size}")
        self._size, self._seed, self._batch = size, seed, batch
        self._used = None if size is None else size // batch * batch or size
        self._shuffle = shuffle and size is not None
        self._drawn = 0
        self._permutation: tuple[int, np.ndarray] | None = None

    @property
    def drawn(self) -> int:
        """Rows drawn so far."""
        return self._drawn

    def next_rows(self, n: int) -> list[int]:
        """The next `n` rows. A batch may span two epochs, and so hold a row twice."""
        rows = [self._row(self._drawn + i) for i in range(n)]
        self._drawn += n
        return rows

    def state(self) -> dict[str, Any]:
        """What `load` continues from; plain types."""
        return {
            "drawn": self._drawn, "size": self._size, "seed": self._seed, "shuffle": self._shuffle, "used": self._used,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises UsageError if it is that of another order: other data, seed or shuffling."""
        for key, here in (("size", self._size), ("seed", self._seed), ("shuffle", self._shuffle)):
            if state[key] != here:
                raise UsageError(
                    f"the checkpoint was written with {key}={state[key]!r} of the training prompts, here it is "
                    f"{here!r}; resume with the same dataset, data_seed and shuffle_dataset"
                )
        self._drawn = int(state["drawn"])
        used = state["used"]
        if self._used is not None and self._used != used:  # with batches of another size: at the next one's first row
            epoch, place = divmod(self._drawn, int(used))
            self._drawn = epoch * self._used + min(-(-place // self._batch) * self._batch, self._used)

    def _row(self, position: int) -> int:
        if self._size is None or self._used is None:
            return position
        epoch, place = divmod(position, self._used)
        if not self._shuffle:
            return place
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng((self._seed, epoch)).permutation(self._size))
        return int(self._permutation[1][place])


def prepare_prompts(
    dataset: Any,
    tokenizer: Any,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    context_length: int | None = None,
    max_completion_length: int = 0,
    max_prompt_length: int | None = None,
    name: str = "train_dataset",
) -> PromptSource:
    """The prompts of a Hugging Face Dataset or IterableDataset, a list of dicts, or any sequence or iterable of dicts.

    Messages go through the tokenizer's chat template with the given arguments, over which a row's own column
    ``chat_template_kwargs`` takes precedence; a column ``tools`` is handed to the template too. A last message of the
    assistant is continued, after any other one the assistant's turn is opened. Text gets the tokenizer's own special
    tokens. Prompts are never cut: one longer than `max_prompt_length` is an error, and so is, with `context_length`
    given, one longer than it less `max_completion_length`. Rows in memory are looked over at once.

    Raises UsageError if the dataset is none, is empty, has no column ``prompt``, or its first row cannot be used.
    """
    rows, streamed = _rows(dataset, name)
    columns = getattr(rows, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise UsageError(no_prompt(name, columns))
    room, bound = room_for_prompts(context_length, max_completion_length, max_prompt_length)
    how = Tokenising(tokenizer, dict(chat_template_kwargs or {}), room, bound)
    source = PromptSource(rows, lambda row, index, name: read_row(row, index, how, name), name, streamed)
    source[0]
    source.look_over()
    return source


def room_for_prompts(
    context_length: int | None, max_completion_length: int, max_prompt_length: int | None = None
) -> tuple[int | None, str]:
    """The most tokens of a prompt, None for any number, and where that bound comes from, for a message.

    Raises UsageError if there is no room for any.
    """
    if context_length is not None and context_length <= max_completion_length:
        raise UsageError(
            f"max_completion_length={max_completion_length} leaves no room for a prompt in the model's context of "
            f"{context_length} tokens; lower max_completion_length"
        )
    room = None if context_length is None else context_length - max_completion_length
    if max_prompt_length is not None and (room is None or max_prompt_length < room):
        return max_prompt_length, f"max_prompt_length={max_prompt_length}"
    return room, f"the model's context of {context_length} less max_completion_length={max_completion_length}"


def prepare_starts(dataset: Any, name: str = "train_dataset", *, needs_prompt: bool) -> PromptSource:
    """The rows of a dataset as starts of episodes: what the model reads is made of them when an episode begins.

    Args:
        dataset: as in `prepare_prompts`. needs_prompt: whether each row must have a ``prompt``.

    Raises UsageError if the dataset is none, is empty, or its first row cannot be used.
    """
    rows, streamed = _rows(dataset, name)
    columns = getattr(rows, "column_names", None)
    if needs_prompt and columns is not None and "prompt" not in columns:
        raise UsageError(no_prompt(name, columns))
    source = PromptSource(rows, functools.partial(read_start, needs_prompt=needs_prompt), name, streamed)
    source[0]
    for i, row in source.first_rows("prompt"):
        read_start(row, i, name, needs_prompt=needs_prompt)
    return source


def gives_rows_by_number(dataset: Any) -> bool:
    """Whether it has ``__getitem__``, and not only the one of torch's ``Dataset``, which gives nothing."""
    given = getattr(type(dataset), "__getitem__", None)
    return given is not None and given is not torch.utils.data.Dataset.__getitem__


def _size(dataset: Any) -> int | None:
    """The number of rows, if there is one and a row can be asked for."""
    try:
        return len(dataset) if gives_rows_by_number(dataset) else None
    except TypeError:  # a class, a tensor without dimensions
        return None


def _is_iterable(dataset: Any) -> bool:
    try:
        iter(dataset)
    except TypeError:
        return False
    return True


def _rows(dataset: Any, name: str) -> tuple[Any, bool]:
    """The rows and whether they can only be streamed."""
    if isinstance(dataset, Mapping):
        if all(hasattr(part, "column_names") for part in dataset.values()) and dataset:
            raise UsageError(
                f"{name} holds several splits ({', '.join(map(str, dataset))}); give one, such as "
                f"dataset[{next(iter(dataset))!r}]"
            )
        raise UsageError(
            f"{name} is a mapping of columns; give a list of rows such as [{{'prompt': '2 + 2 ='}}], or "
            "datasets.Dataset.from_dict(...)"
        )
    if hasattr(dataset, "iterrows"):
        raise UsageError(f"{name} is a data frame; give datasets.Dataset.from_pandas(...)")
    size = _size(dataset)
    if isinstance(dataset, str | bytes | type) or not (size is not None or _is_iterable(dataset)):
        raise UsageError(
            f"{name} must be a Hugging Face dataset or a list of rows such as [{{'prompt': '2 + 2 ='}}], got "
            f"{type(dataset).__name__}"
            + (f"; give datasets.load_dataset({shown(dataset)})['train']" if isinstance(dataset, str) else "")
        )
    if size is not None:
        if size == 0:
            raise UsageError(f"{name} is empty; give it at least one row")
        return dataset, False
    if isinstance(dataset, Iterator):
        raise UsageError(
            f"{name} is a {type(dataset).__name__}, which can be read only once; give list(...) of it, or "
            "datasets.IterableDataset.from_generator(...)"
        )
    return dataset, True
