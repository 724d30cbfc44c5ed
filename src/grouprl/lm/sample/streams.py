"""Random streams in which each completion has numbers of its own.

A number depends on the seed, on the completion and on the index of the token, and on nothing else. So a completion is
the same whoever samples it: beside whichever other completions, in whichever order, and in whichever process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Words = NDArray[np.uint64]
"""32-bit words, held in 64 bits so that a product of two fits."""

TRAINING, EVALUATION, DROPOUT = range(3)
"""What a stream is for. Streams of one seed with different uses are independent."""

_WORD = 0xFFFFFFFF
_LOW, _HALF = np.uint64(_WORD), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]) -> tuple[Words, ...]:
    """Philox4x32-10 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3): four random words per counter.

    Args:
        counter: four words, each a number or an array; they are broadcast.
        key: two words.
    """
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    for i in range(_ROUNDS):
        first, second = (np.uint64((k + i * more) & _WORD) for k, more in zip(key, _INCREMENTS, strict=True))
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (q >> _HALF) ^ b ^ first, q & _LOW, (p >> _HALF) ^ d ^ second, p & _LOW
    return a, b, c, d


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of N completions.

    Attributes:
        seed: of the stream; its lower 64 bits count.
        use: what the stream is for.
        numbers: ``[N]`` the number of each completion in its stream.
    """

    seed: int
    use: int
    numbers: Words

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, rows: slice | Sequence[int]) -> Draws:
        """The random numbers of some of the completions, by index."""
        return Draws(self.seed, self.use, self.numbers[rows if isinstance(rows, slice) else list(rows)])

    def seeds(self, turn: int = 0) -> list[int]:
        """A seed of 63 bits for each completion, for a sampler with random numbers of its own.

        Args:
            turn: the number of the turn of an episode, whose turns have seeds of their own.
        """
        key = self.seed & _WORD, (self.seed >> 32) & _WORD  # no token has these numbers
        low, high, _, _ = philox((_WORD - turn, self.numbers & _LOW, self.numbers >> _HALF, self.use), key)
        return [int(a) | (int(b) >> 1) << 32 for a, b in zip(low, high, strict=True)]

    def uniform(self, first: int | Sequence[int], n: int) -> Tensor:
        """``[n, N]`` float32 in [0, 1): the numbers for the tokens ``first`` to ``first + n - 1`` of each completion.

        Args:
            first: the index of a token in its completion, for all completions or for each of the N.
        """
        start = np.broadcast_to(np.asarray(first, np.uint64), self.numbers.shape)
        four = np.uint64(4)
        blocks = start // four + np.arange(n // 4 + 2, dtype=np.uint64)[:, None]
        key = self.seed & _WORD, (self.seed >> 32) & _WORD
        words = philox((blocks, self.numbers & _LOW, self.numbers >> _HALF, self.use), key)
        found = np.stack(words, 1).reshape(-1, len(self.numbers))
        found = np.take_along_axis(found, (start % four + np.arange(n, dtype=np.uint64)[:, None]).astype(np.int64), 0)
        return torch.from_numpy((found >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24))


class Stream:
    """A random stream: numbers the completions that draw from it.

    Args:
        seed: any whole number. use: what the stream is for.

    Attributes:
        drawn: the completions that have been numbered.
    """

    def __init__(self, seed: int, use: int = TRAINING) -> None:
        self.seed, self.use, self.drawn = seed, use, 0

    def next(self, n: int) -> Draws:
        """The random numbers of the next n completions."""
        first = self.drawn
        self.drawn += n
        return Draws(self.seed, self.use, np.arange(first, self.drawn, dtype=np.uint64))


def draws_of(source: torch.Generator | Stream | Draws, n: int) -> Draws:
    """The random numbers of n completions, from whatever a caller has.

    A torch.Generator, on the CPU, gives the seed of a new stream, and so other numbers at each call.
    """
    if isinstance(source, torch.Generator):
        source = Stream(int(torch.randint(2**62, (), generator=source)))
    draws = source.next(n) if isinstance(source, Stream) else source
    assert len(draws) == n
    return draws


def seed_for(seed: int, step: int, sample: int) -> int:
    """A seed of 63 bits for the dropout of one pass: from the seed of a run, its step, and the first sample."""
    low, high, _, _ = philox((step, sample, 0, DROPOUT), (seed & _WORD, (seed >> 32) & _WORD))
    return int(low) | (int(high) >> 1) << 32
