"""Packs: prompts and completions end to end in one row, each prompt once for its whole group.

A pack of P groups holds ``prompt | completion 1 | completion 2 | ...`` per group. The last token of a completion is
predicted but never an input, so it is no part of the row. Nothing is padded except inside attention, which works on
blocks of a few groups at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18
"""Attention scores per head held at once, about; larger blocks fall out of the cache, smaller ones cost calls."""
ACCELERATOR_SCORES = 1 << 22
"""The same on an accelerator, where calls cost more and there is no cache to fall out of."""


@dataclass(frozen=True)
class Group:
    """One prompt ``[p]`` and the completions sampled from it, ``[n_1], [n_2], ...``, as token ids; none is empty."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]

    @property
    def n_inputs(self) -> int:
        """Tokens of the group in a pack."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)


@dataclass(frozen=True)
class Block:
    """Where P groups of at most R completions lie in the row: what attention pads to a rectangle.

    Attributes:
        prompt: ``[P, T]`` index into the row; padded places point one past its end, at a row of zeros.
        completion: ``[P, R, r]`` likewise, or None if there is no completion input at all.
        prompt_lengths: ``[P]``.
    """

    prompt: Tensor
    completion: Tensor | None
    prompt_lengths: Tensor
    _hidden: dict[int | None, tuple[Tensor, Tensor | None]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Padded places."""
        return self.prompt.numel() + (0 if self.completion is None else self.completion.numel())

    def hidden(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """What may not be seen: ``[T, T]`` by prompts, ``[P, 1, 1, r, T + r]`` by completions (prompt, then own)."""
        if window not in self._hidden:
            self._hidden[window] = self._find_hidden(window)
        return self._hidden[window]

    def _find_hidden(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        def of_future(n: int) -> Tensor:
            i = torch.arange(n, device=self.prompt.device)
            distance = i[:, None] - i
            return distance < 0 if window is None else (distance < 0) | (distance >= window)

        t = self.prompt.shape[1]
        if self.completion is None:
            return of_future(t), None
        groups, _, r = self.completion.shape
        places = torch.arange(t, device=self.prompt.device)
        prompt = (places >= self.prompt_lengths[:, None])[:, None, :].expand(groups, r, t)
        if window is not None:
            position = self.prompt_lengths[:, None] + torch.arange(r, device=places.device)
            prompt = prompt | (position[:, :, None] - places >= window)
        own = of_future(r).expand(groups, r, r)
        return of_future(t), torch.cat([prompt, own], -1)[:, None, None]


@dataclass(frozen=True)
class Pack:
    """One row of S_in input tokens and the m completion tokens predicted from it.

    Attributes:
        ids, positions: ``[S_in]``; positions count from the start of each sample's own prompt.
        predictors: ``[m]`` index into the row of the token each target is predicted from.
        targets: ``[m]`` token ids, sample after sample, in the order the groups were given.
        lengths: ``[N]`` completion lengths; they add up to m.
        blocks: the attention layout. back: ``[S_in]`` where each token lies in the blocks' padded places.
        starts, counts: where each stretch of the row begins and how many tokens it has, int32 on the CPU: of each group
            its prompt, then its completions. group_starts: ``[P + 1]`` where each group's stretches begin.
    """

    ids: Tensor
    positions: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    blocks: tuple[Block, ...]
    back: Tensor
    starts: Tensor
    counts: Tensor
    group_starts: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device | str = "cpu") -> Pack:
        """Pack ``groups`` in the order given."""
        ids: list[int] = []
        positions: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        places: list[tuple[range, list[range]]] = []
        for group in groups:
            p = len(group.prompt)
            prompt = range(len(ids), len(ids) + p)
            ids += group.prompt
            positions += range(p)
            own = []
            for completion in group.completions:
                start = len(ids)
                ids += completion[:-1]
                positions += range(p, p + len(completion) - 1)
                own.append(range(start, len(ids)))
                predictors.append(prompt[-1])
                predictors += own[-1]
                targets += completion
                lengths.append(len(completion))
            places.append((prompt, own))
        back = torch.empty(len(ids), dtype=torch.int64)
        blocks, offset = [], 0
        scores = BLOCK_SCORES if torch.device(device).type == "cpu" else ACCELERATOR_SCORES
        for part in _split(places, scores):
            blocks.append(_block(part, back, offset, device))
            offset += blocks[-1].size

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        stretches = [stretch for prompt, own in places for stretch in (prompt, *own)]
        sizes = [1 + len(own) for _, own in places]
        return cls(
            tensor(ids), tensor(positions), tensor(predictors), tensor(targets), tensor(lengths),
            tuple(blocks), back.to(device),
            torch.tensor([s.start for s in stretches], dtype=torch.int32),
            torch.tensor([len(s) for s in stretches], dtype=torch.int32),
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32),
        )  # fmt: skip


_Places = tuple[range, list[range]]


def _split(places: Sequence[_Places], scores: int) -> list[list[_Places]]:
    """Consecutive groups whose padded attention scores stay within ``scores`` (or one group, whatever its size)."""
    parts: list[list[_Places]] = []
    t = r = n = 0
    for prompt, own in places:
        t2, r2 = max(t, len(prompt)), max([r, *map(len, own)])
        n2 = max(n, len(own))
        size = len(parts[-1]) + 1 if parts else 1
        if not parts or size * (t2 * t2 + n2 * r2 * (t2 + r2)) > scores:
            parts.append([])
            t2, r2, n2 = len(prompt), max([0, *map(len, own)]), len(own)
        parts[-1].append((prompt, own))
        t, r, n = t2, r2, n2
    return parts


def _block(places: Sequence[_Places], back: Tensor, offset: int, device: torch.device | str) -> Block:
    """The padded layout of some groups; writes their part of ``back``."""
    n_groups, t = len(places), max(len(prompt) for prompt, _ in places)
    n = max(len(own) for _, own in places)
    r = max((len(c) for _, own in places for c in own), default=0)
    prompt_index = torch.full((n_groups, t), back.shape[0])
    completion_index = torch.full((n_groups, n, r), back.shape[0])
    for i, (prompt, own) in enumerate(places):
        prompt_index[i, : len(prompt)] = torch.arange(prompt.start, prompt.stop)
        back[prompt.start : prompt.stop] = offset + i * t + torch.arange(len(prompt))
        for j, c in enumerate(own):
            completion_index[i, j, : len(c)] = torch.arange(c.start, c.stop)
            start = offset + n_groups * t + (i * n + j) * r
            back[c.start : c.stop] = start + torch.arange(len(c))
    lengths = torch.tensor([len(prompt) for prompt, _ in places], device=device)
    return Block(prompt_index.to(device), completion_index.to(device) if r else None, lengths)


def micro_batches(
    groups: Sequence[Group], budget: int, together: int | None = None
) -> list[list[tuple[int, list[int]]]]:
    """Split groups into packs of at most ``budget`` input tokens: for each pack, (group, its completions) by index.

    A pack of several groups has at most ``together`` tokens, where that is given.

    Groups are taken by length, longest first, so that what lies side by side in a block has similar lengths and the
    largest pack comes first: if memory does not suffice, it shows at once. A group is divided only if it alone exceeds
    the budget; each of its parts then carries the prompt. A completion that alone exceeds it is a pack of its own.
    """
    order = sorted(range(len(groups)), key=lambda i: (-max(map(len, groups[i].completions)), -len(groups[i].prompt), i))
    packs: list[list[tuple[int, list[int]]]] = []
    room = 0
    for i in order:
        group = groups[i]
        whole = group.n_inputs
        if whole <= room:
            packs[-1].append((i, list(range(len(group.completions)))))
            room -= whole
            continue
        by_length = sorted(range(len(group.completions)), key=lambda j: (-len(group.completions[j]), j))
        pieces: list[list[int]] = []
        left = 0
        for j in by_length:
            n = len(group.completions[j]) - 1
            if not pieces or n > left:
                pieces.append([])
                left = budget - len(group.prompt)
            pieces[-1].append(j)
            left -= n
        packs += [[(i, sorted(piece))] for piece in pieces]
        room = left if together is None else left - max(0, budget - together)
    return packs
