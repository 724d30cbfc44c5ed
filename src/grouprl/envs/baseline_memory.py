"""Earlier batches that the regression of the baseline sees again, so that no one batch's noise rules it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from grouprl.objective import BaselineBatch

Features = Callable[[Tensor, Tensor], Tensor]
"""From what is seen ``[m, D]`` and the steps since the start of the episode ``[m]`` to features ``[m, F]``."""


@dataclass(frozen=True)
class Seen:
    """What the features and targets of ``S`` steps in ``N`` samples are made of.

    Attributes:
        steps: what was seen at each step, ``[S, D]``, normalised as it was then; last: after each sample, ``[N, D]``.
        elapsed, last_elapsed: steps since the start of the episode, ``[S]`` and ``[N]``.
        rewards ``[S]``, lengths ``[N]``, terminated ``[N]`` bool: as in a rollout.
    """

    steps: Tensor
    elapsed: Tensor
    last: Tensor
    last_elapsed: Tensor
    rewards: Tensor
    lengths: Tensor
    terminated: Tensor

    def batch(self, features: Features) -> BaselineBatch:
        """The batch as the regression takes it."""
        return BaselineBatch(
            features(self.steps, self.elapsed), features(self.last, self.last_elapsed), self.rewards, self.lengths,
            self.terminated,
        )  # fmt: skip


class BaselineMemory:
    """The last whole batches of at most ``rows`` steps in all, oldest first, with their features and Gram matrices."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._kept: deque[tuple[Seen, BaselineBatch]] = deque()
        self._warned = False

    def __iter__(self) -> Iterator[BaselineBatch]:
        return (batch for _, batch in self._kept)

    def add(self, seen: Seen, batch: BaselineBatch) -> None:
        """Keep a batch, and forget the oldest ones that are too many then; warn once if it is too large itself."""
        if len(batch.phi) > self.rows and not self._warned:
            self._warned = True
            warnings.warn(
                f"baseline_memory={self.rows} has no effect on a batch of {len(batch.phi)} steps: it holds whole ones; "
                f"set some batches, such as {10 * len(batch.phi)}",
                stacklevel=2,
            )
        self._kept.append((seen, batch))
        while sum(len(batch.phi) for _, batch in self._kept) > self.rows:
            self._kept.popleft()

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: what the features are made of, a small part of what they take."""
        return {f"{i}.{f.name}": getattr(seen, f.name) for i, (seen, _) in enumerate(self._kept) for f in fields(Seen)}

    def load(self, state: Mapping[str, Tensor], features: Features) -> None:
        """The inverse of :meth:`state`. Raises KeyError, or an error of the features, for what it cannot have given."""
        self.clear()
        while f"{len(self._kept)}.steps" in state:
            seen = Seen(**{f.name: state[f"{len(self._kept)}.{f.name}"] for f in fields(Seen)})
            self._kept.append((seen, seen.batch(features)))


def parts_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
