"""Packs: prompts and completions end to end in one row of tokens. Each prompt appears once for its whole group.

A pack of P groups holds ``prompt 1 | prompt 2 | ... | completions of 1 | completions of 2 | ...``. The model predicts
the last token of a completion but never reads it, so the row does not contain it. The row has no padding. Attention may
pad a few groups at a time to a rectangle (a *block*).
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
"""The approximate number of attention scores per head in a block, on a CPU. The scores of larger blocks do not fit into
the processor's cache, and smaller blocks need more calls."""
ACCELERATOR_SCORES = 1 << 22
"""The approximate number of attention scores per head in a block, on an accelerator. Calls cost more there than on a
CPU."""


Spans = Sequence[tuple[int, int]]
"""``(start, stop)`` of each turn of the model in a completion, in order. The model predicts these tokens alone."""

Places = tuple[range, list[range]]
"""The indices of a prompt's tokens in the row, and the indices of each of its completions' tokens."""


@dataclass(frozen=True)
class Group:
    """A prompt and the completions sampled from it.

    Attributes:
        prompt: the token ids of the prompt, at least one.
        completions: the token ids of each completion, at least one each.
        turns: the turns of the model in each completion, if tokens of its partner lie between them. The last token of a
            completion belongs to a turn. None: each completion is one turn.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    turns: Sequence[Spans] | None = None

    def spans(self, j: int) -> Spans:
        """The turns of the model in completion ``j``."""
        return ((0, len(self.completions[j])),) if self.turns is None else self.turns[j]

    def only(self, which: Sequence[int]) -> Group:
        """The group with some of its completions."""
        turns = None if self.turns is None else [self.turns[j] for j in which]
        return Group(self.prompt, [self.completions[j] for j in which], turns)

    @property
    def n_inputs(self) -> int:
        """The number of input tokens of the group in a pack: the prompt, and each completion without its last token."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)


@dataclass(frozen=True)
class Block:
    """P groups that attention pads to a rectangle.

    Prompts are padded to T tokens. Groups are padded to R completions, and completions to r input tokens.

    Attributes:
        prompt: ``[P, T]`` int64 indices of prompt tokens in the row. Padded places have the index S_in, one past the
            end of the row, where attention appends a row of zeros.
        completion: ``[P, R, r]`` int64 indices of completion tokens in the row, padded in the same way. It is None if
            no group has completion tokens in the row.
        prompt_lengths: ``[P]``, the number of tokens of each prompt.
    """

    prompt: Tensor
    completion: Tensor | None
    prompt_lengths: Tensor
    _hidden: dict[int | None, tuple[Tensor, Tensor | None]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        """The number of places in the rectangle, with padding."""
        return self.prompt.numel() + (0 if self.completion is None else self.completion.numel())

    def hidden(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Compute the attention masks, which are True where a token must not see a key.

        Args:
            window: the number of tokens that a token sees, itself included, or None.

        Returns:
            The mask ``[T, T]`` of prompt tokens, and the mask ``[P, 1, 1, r, T + r]`` of completion tokens or None. The
            last axis of the second mask has the T keys of the prompt first and the r keys of the completion next.
        """
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
        completion = of_future(r).expand(groups, r, r)
        return of_future(t), torch.cat([prompt, completion], -1)[:, None, None]


@dataclass(frozen=True)
class Pack:
    """One row of S_in input tokens, and the m tokens of the model's turns that it predicts from it.

    The row holds P groups with N completions in total. All tensors are int64.

    Attributes:
        places: for each group, the indices of its prompt and of its completions in the row.
        ids: ``[S_in]`` token ids.
        positions: ``[S_in]``, the position of each token in its sequence. A sequence is a prompt and one completion.
        predictors: ``[m]``, for each target the index in the row of the token before it, from which the model predicts
            the target.
        targets: ``[m]`` token ids of the model's turns, one completion after the other, in the order of the groups.
        lengths: ``[N]`` the number of targets in each completion. Their sum is m.
        prompt_lengths: ``[P]`` lengths of the prompts.
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
        """Pack ``groups`` in their order into one row on ``device``."""
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
            completions = []
            for j, completion in enumerate(group.completions):
                completions.append(range(len(ids), len(ids) + len(completion) - 1))
                ids += completion[:-1]
                positions += range(len(prompt), len(prompt) + len(completions[-1]))
                before = [prompt[-1], *completions[-1]]
                for start, stop in group.spans(j):
                    predictors += before[start:stop]
                    targets += completion[start:stop]
            places.append((prompt, completions))
        lengths = [
            sum(stop - start for start, stop in group.spans(j))
            for group in groups
            for j in range(len(group.completions))
        ]
        lists = (ids, positions, predictors, targets, lengths, [len(prompt) for prompt in prompts])
        # One copy for all tensors, because each copy to a GPU makes the CPU wait.
        whole = torch.tensor([i for values in lists for i in values], dtype=torch.int64).to(device)
        return cls(places, *torch.split(whole, [len(values) for values in lists]))

    @cached_property
    def stretches(self) -> Stretches:
        """The ranges of the prompts and completions in the row, in the form that compiled attention expects."""
        ranges = [stretch for prompt, completions in self.places for stretch in (prompt, *completions)]
        return Stretches(
            torch.tensor([s.start for s in ranges], dtype=torch.int32),
            torch.tensor([len(s) for s in ranges], dtype=torch.int32),
            torch.tensor([0, *accumulate(1 + len(completions) for _, completions in self.places)], dtype=torch.int32),
        )

    @cached_property
    def rectangles(self) -> tuple[Sequence[Block], Tensor]:
        """The blocks of groups that attention pads to rectangles, and a map from the row to their places.

        The map ``[S_in]`` int64 has for each token of the row its index among the padded places of all blocks.
        """
        device = self.ids.device
        back = torch.empty(len(self.ids), dtype=torch.int64)
        blocks: list[Block] = []
        offset = 0
        for part in _split(self.places, BLOCK_SCORES if device.type == "cpu" else ACCELERATOR_SCORES):
            blocks.append(_block(part, back, offset, device))
            offset += blocks[-1].size
        return blocks, back.to(device)


def _split(places: Sequence[Places], scores: int) -> list[list[Places]]:
    """Split the groups into consecutive parts with at most ``scores`` padded attention scores, or with one group."""
    parts: list[list[Places]] = []
    t = r = n = 0
    for prompt, completions in places:
        t2, r2 = max(t, len(prompt)), max([r, *map(len, completions)])
        n2 = max(n, len(completions))
        size = len(parts[-1]) + 1 if parts else 1
        if not parts or size * (t2 * t2 + n2 * r2 * (t2 + r2)) > scores:
            parts.append([])
            t2, r2, n2 = len(prompt), max([0, *map(len, completions)]), len(completions)
        parts[-1].append((prompt, completions))
        t, r, n = t2, r2, n2
    return parts


def _block(places: Sequence[Places], back: Tensor, offset: int, device: torch.device | str) -> Block:
    """Compute the padded layout of some groups, and write their part of the map ``back`` from the row to places."""
    n_groups, t = len(places), max(len(prompt) for prompt, _ in places)
    n = max(len(completions) for _, completions in places)
    r = max((len(c) for _, completions in places for c in completions), default=0)
    prompt_index = torch.full((n_groups, t), back.shape[0])
    completion_index = torch.full((n_groups, n, r), back.shape[0])
    for i, (prompt, completions) in enumerate(places):
        prompt_index[i, : len(prompt)] = torch.arange(prompt.start, prompt.stop)
        back[prompt.start : prompt.stop] = offset + i * t + torch.arange(len(prompt))
        for j, c in enumerate(completions):
            completion_index[i, j, : len(c)] = torch.arange(c.start, c.stop)
            start = offset + n_groups * t + (i * n + j) * r
            back[c.start : c.stop] = start + torch.arange(len(c))
    lengths = torch.tensor([len(prompt) for prompt, _ in places], device=device)
    return Block(prompt_index.to(device), completion_index.to(device) if r else None, lengths)


def split_into_packs(
    groups: Sequence[Group], budget: int, together: int | None = None
) -> list[list[tuple[int, list[int]]]]:
    """Split groups into packs of at most ``budget`` input tokens.

    The function takes the groups with the longest completions first. So the groups of a block have similar lengths, and
    the largest pack comes first: a run that needs too much memory fails at once.

    The function divides a group only if the group alone exceeds the budget. Each part then contains the prompt. A
    completion that exceeds the budget together with its prompt becomes a pack of its own.

    Args:
        groups: the groups.
        budget: the most input tokens of a pack.
        together: the most input tokens of a pack with several groups, or None if ``budget`` is the only limit.

    Returns:
        For each pack a list of pairs: the index of a group, and the indices of its completions in the pack.
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
