"""Datasets as they are given to a trainer, and the prompts in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.models.context import context_length
from grouprl.lm.prompts import PromptSource, gives_rows_by_number, prepare_prompts
from grouprl.lm.settings.config import GRPOConfig

Read = Callable[[Any, str], PromptSource]
"""Reads the prompts of a dataset, which it is given with the name of the argument."""


def read_prompts(model: Any, tokenizer: Any, config: GRPOConfig, dataset: Any, name: str) -> PromptSource:
    """The prompts of a dataset, as this model reads them. Raises UsageError if it cannot be used."""
    context = context_length(model)
    return prepare_prompts(
        dataset, tokenizer, chat_template_kwargs=config.chat_template_kwargs, context_length=context,
        max_completion_length=config.max_completion_length, max_prompt_length=config.max_prompt_length, name=name,
    )  # fmt: skip


def read_eval_prompts(read: Read, dataset: Any) -> dict[str, PromptSource]:
    """The prompts of one dataset under the name "", or of a mapping of several. Raises UsageError as read_prompts."""
    if dataset is None:
        return {}
    several = isinstance(dataset, dict) and "prompt" not in dataset
    parts = {f"eval_dataset[{name!r}]": name for name in dataset} if several else {"eval_dataset": ""}
    return {name: read(_whole(dataset[name] if several else dataset), said) for said, name in parts.items()}


_MOST_ROWS = 1_000_000


def _whole(dataset: Any) -> Any:
    """A stream read to its end, as an evaluation needs all of it; anything else as it is."""
    at_hand = hasattr(dataset, "__len__") and gives_rows_by_number(dataset)
    if at_hand or isinstance(dataset, Iterator) or not isinstance(dataset, Iterable):
        return dataset
    rows = list(itertools.islice(dataset, _MOST_ROWS + 1))
    if len(rows) > _MOST_ROWS:
        raise UsageError(f"eval_dataset is a stream of more than {_MOST_ROWS} rows; give dataset.take(n)")
    return rows
