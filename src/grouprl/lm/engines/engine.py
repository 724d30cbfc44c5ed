"""What is asked of vLLM, wherever it runs: its two homes are `colocated.py` and `server.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from grouprl.lm.sample.draw import SamplingSettings

Weights = Iterable[tuple[str, Tensor]]
"""Weights by their names on the hub."""


@dataclass(frozen=True)
class Request:
    """One completion that is wanted.

    Attributes:
        prompt: its token ids. seed: of its random numbers. most: how many tokens it may have.
    """

    prompt: list[int]
    seed: int
    most: int


@dataclass(frozen=True)
class Answer:
    """One completion.

    Attributes:
        ids: the ``n`` token ids. logp: of each, as it was drawn. finished: whether an end token ended it.
    """

    ids: list[int]
    logp: list[float]
    finished: bool


class Engine(Protocol):
    """vLLM with a model.

    Attributes:
        context: the most tokens of a prompt and its completion.
        context_setting: what that is set by, for messages.
        where: which vLLM this is, for messages.
        dtype: of its products.
        side_by_side: whether `generate` may be called from several threads at once.
        serves_all: whether one vLLM serves all processes of the training, so that the first hands it the weights.
    """

    context: int
    context_setting: str
    where: str
    dtype: torch.dtype
    side_by_side: bool
    serves_all: bool

    def load(self, weights: Weights) -> None:
        """Sample by these weights from now on, and forget all keys and values. Raises TrainingError."""

    def generate(self, requests: Sequence[Request], options: Mapping[str, Any]) -> list[Answer]:
        """The completions, in order; ``options`` by vLLM's names, the same for all. Raises TrainingError."""


def options_of(settings: SamplingSettings, end_ids: Sequence[int]) -> dict[str, Any]:
    """How to draw tokens, by the names of vLLM's SamplingParams; `drawing` has what each request adds."""
    return {
        "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
        "min_p": settings.min_p, "repetition_penalty": settings.repetition_penalty,
        "min_tokens": settings.min_new_tokens, "stop_token_ids": list(end_ids), "logprobs": 0,
    }  # fmt: skip


def drawing(request: Request, options: Mapping[str, Any]) -> dict[str, Any]:
    """How to draw the tokens of a request, which may have no room for as many as there should be at least."""
    least = min(options["min_tokens"], request.most)
    return {**options, "max_tokens": request.most, "min_tokens": least, "seed": request.seed}
