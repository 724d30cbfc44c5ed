"""Texts that end a completion, whichever tokens they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MARGIN = 16
"""Tokens that are decoded beyond those that can hold a string: the first of them may lose a space."""


class Stops:
    """Says whether a token completes one of some strings in the text that a model writes.

    The token may begin before the string and go on behind it. It is the model's last token: the string stays in the
    text, and what the token holds behind it too, because that is what was sampled.

    Args:
        strings: the texts, none of them empty. tokenizer: decodes.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        self._longest = max(map(len, self.strings))
        self._may: Tensor | None = None

    def may_end(self, vocabulary: int) -> Tensor:
        """``[V]`` bool, on the CPU: False for tokens that complete none of the strings, wherever they stand."""
        if self._may is None or len(self._may) != vocabulary:
            known = min(vocabulary, len(self._tokenizer))
            self._may = torch.ones(vocabulary, dtype=torch.bool)
            self._may[:known] = torch.tensor([self._could(text) for text in self._texts(known)], dtype=torch.bool)
        return self._may

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether the last of the tokens completes a string."""
        tail = list(ids[-(4 * self._longest + _MARGIN) :])
        before, text = self._tokenizer.batch_decode([tail[:-1], tail])
        same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        return any(string in text[max(0, same - len(string) + 1) :] for string in self.strings)

    def _texts(self, n: int) -> list[str]:
        """What each token says behind another one, where it keeps its space."""
        base = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        (begun,) = self._tokenizer.batch_decode([base])
        return [
            text[len(begun) :] if text.startswith(begun) else ""
            for text in self._tokenizer.batch_decode([[*base, token] for token in range(n)])
        ]

    def _could(self, text: str) -> bool:
        """Whether a token of this text, of which an incomplete character is not known, can complete a string."""
        if not text or "\ufffd" in text:
            return True
        return any(
            string in text or any(text.startswith(string[i:]) for i in range(1, len(string))) for string in self.strings
        )
