"""Packs: prompts and completions end to end in one row, each prompt once for its whole group.

A pack of P groups holds ``prompt 1 | prompt 2 | ... | completions of 1 | completions of 2 | ...``. The last token of a
completion is predicted but never an input, so it is no part of the row. Nothing is padded except inside attention where
that works on rectangles: on blocks of a few groups at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from grouprl.lm.kernels.attention import Stretches

BLOCK_SCORES = 1 << 18
"""Attention scores per head held at once, about; larger blocks fall out of the cache, smaller ones cost calls."""
ACCELERATOR_SCORES = 1 << 22
"""The same on an accelerator, where calls cost more and there is no cache to fall out of."""


Places = tuple[range, list[range]]
"""Where a prompt and its completions lie in a row."""


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
        places: where each group's prompt and its completions lie in the row.
        ids, positions: ``[S_in]``; positions count from the start of each sample's own prompt.
        predictors: ``[m]`` index into the row of the token each target is predicted from.
        targets: ``[m]`` token ids, sample after sample, in the order the groups were given.
        lengths: ``[N]`` completion lengths; they add up to m.
        prompt_lengths: ``[P]``.
    """

    places: Sequence[Places]
    ids: Tensor
    positions: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device | str = "cpu") -> Pack:
        """Pack ``groups`` in the order given."""
        ids: list[int] = []
        positions: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        prompts: list[range] = []
        places: list[Places] = []
        for group in groups:
            prompts.append(range(len(ids), len(ids) + len(group.prompt)))
            ids += group.prompt
            positions += range(len(group.prompt))
        for group, prompt in zip(groups, prompts, strict=True):
            own = []
            for completion in group.completions:
                own.append(range(len(ids), len(ids) + len(completion) - 1))
                ids += completion[:-1]
                positions += range(len(prompt), len(prompt) + len(own[-1]))
                predictors.append(prompt[-1])
                predictors += own[-1]
                targets += completion
            places.append((prompt, own))
        lengths = [len(completion) for group in groups for completion in group.completions]
        lists = (ids, positions, predictors, targets, lengths, [len(prompt) for prompt in prompts])
        # in one piece, as a GPU stops for each
        whole = torch.tensor([i for values in lists for i in values], dtype=torch.int64).to(device)
        return cls(places, *torch.split(whole, [len(values) for values in lists]))

    @cached_property
    def stretches(self) -> Stretches:
        """Where the prompts and completions lie in the row, as compiled attention takes it."""
        all_of_them = [stretch for prompt, own in self.places for stretch in (prompt, *own)]
        return Stretches(
            torch.tensor([s.start for s in all_of_them], dtype=torch.int32),
            torch.tensor([len(s) for s in all_of_them], dtype=torch.int32),
            torch.tensor([0, *accumulate(1 + len(own) for _, own in self.places)], dtype=torch.int32),
        )

    @cached_property
    def rectangles(self) -> tuple[Sequence[Block], Tensor]:
        """The blocks of groups that attention pads, and where each token of the row lies in their padded places:
        ``[S_in]``."""
        device = self.ids.device
        back = torch.empty(len(self.ids), dtype=torch.int64)
        blocks: list[Block] = []
        offset = 0
        for part in _split(self.places, BLOCK_SCORES if device.type == "cpu" else ACCELERATOR_SCORES):
            blocks.append(_block(part, back, offset, device))
            offset += blocks[-1].size
        return blocks, back.to(device)


def _split(places: Sequence[Places], scores: int) -> list[list[Places]]:
    """Consecutive groups whose padded attention scores stay within ``scores`` (or one group, whatever its size)."""
    parts: list[list[Places]] = []
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


def _block(places: Sequence[Places], back: Tensor, offset: int, device: torch.device | str) -> Block:
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


def split_into_packs(
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
