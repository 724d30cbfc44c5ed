"""Environments shared out among processes: each steps its own, and all see all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from grouprl.envs.workers import close_vector
from grouprl.machine.ranks import Place, Ranks

T = TypeVar("T")


class Shared(VectorEnv[Any, Any, Any]):
    """``n`` environments of which this process holds the block ``ranks.share(n)``; each step is an exchange.

    Environment i is seeded as it is beside all others in one process, and everything that comes of them is the same in
    each process. So whoever collects from them need not know of processes.

    Args:
        own: those of this process. n: how many there are in all processes. ranks: the processes.
    """

    def __init__(self, own: VectorEnv[Any, Any, Any], n: int, ranks: Ranks) -> None:
        self.own, self.num_envs, self._ranks = own, n, ranks
        self.metadata, self.spec = own.metadata, own.spec
        self.single_observation_space, self.single_action_space = own.single_observation_space, own.single_action_space
        self.observation_space = batch_space(own.single_observation_space, n)
        self.action_space = batch_space(own.single_action_space, n)
        if hasattr(own, "envs"):
            self.envs = own.envs
        self._share = ranks.share(n)
        self._waiting = False

    @property
    def waited(self) -> int:
        """A number that grows while this process waits for the others, whose steps have a time limit of their own."""
        return time.monotonic_ns() if self._waiting else 0

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all of them, from one seed or from one for each."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        own = None if seeds is None else [seeds[i] for i in self._share]
        parts = self._gather(self.own.reset(seed=own, options=options))  # type: ignore[arg-type]  # a list is allowed
        return self._observations([part[0] for part in parts]), self._infos([part[1] for part in parts])

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all of them, each process its own."""
        own = _rows(self.single_action_space, actions, slice(self._share.start, self._share.stop))
        parts = self._gather(self.own.step(own))
        observations, rewards, terminated, truncated, infos = zip(*parts, strict=True)
        return (
            self._observations(observations), np.concatenate(rewards), np.concatenate(terminated),
            np.concatenate(truncated), self._infos(infos),
        )  # fmt: skip

    def close_extras(self, **kwargs: Any) -> None:
        """Close those of this process."""
        close_vector(self.own)

    def _gather(self, own: T) -> list[T]:
        self._waiting = True
        try:
            return self._ranks.gather(own)
        finally:
            self._waiting = False

    def _observations(self, parts: Sequence[Any]) -> Any:
        return _joined(self.single_observation_space, parts)

    def _infos(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The masks of actions, which are all that environments made here leave in an info."""
        if not any("action_mask" in info for info in infos):
            return {}
        masks = np.empty(self.num_envs, object)
        named = np.zeros(self.num_envs, bool)
        for rank, info in enumerate(infos):
            place = Ranks(Place(rank, self._ranks.world)).share(self.num_envs)
            if "action_mask" in info:
                given = info.get("_action_mask", np.ones(len(place), bool))
                for i, mask, has in zip(place, info["action_mask"], given, strict=True):
                    masks[i], named[i] = mask, has
        if all(isinstance(mask, np.ndarray) and mask.dtype != object for mask in masks):
            return {"action_mask": np.stack(list(masks)), "_action_mask": named}
        return {"action_mask": masks, "_action_mask": named}


def _joined(space: spaces.Space[Any], parts: Sequence[Any]) -> Any:
    """Batches of observations of ``space``, one after the other as one batch."""
    if isinstance(space, spaces.Dict):
        return {key: _joined(inner, [part[key] for part in parts]) for key, inner in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_joined(inner, [part[i] for part in parts]) for i, inner in enumerate(space))
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return tuple(one for part in parts for one in part)


def _rows(space: spaces.Space[Any], batch: Any, rows: slice) -> Any:
    """Some of a batch of actions of ``space``."""
    if isinstance(space, spaces.Dict):
        return {key: _rows(inner, batch[key], rows) for key, inner in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_rows(inner, batch[i], rows) for i, inner in enumerate(space))
    return batch[rows]
