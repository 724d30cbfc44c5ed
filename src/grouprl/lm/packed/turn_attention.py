"""Attention of rows that get stretches of tokens: each token sees the prompt of its row and the row up to itself.

:mod:`grouprl.lm.packed.decode_attention` does this for rows that all get one token at a time, and a GPU may record it.
Here rows have different numbers of tokens, and come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grouprl.lm.packed.attention import AttentionSpec, UnsupportedError

_ROOM, _EVEN = 32, 8
"""The tokens for which a row has room at first, and of which the room is a multiple."""


class _Arranged(NamedTuple):
    """How the tokens and rows of a step are arranged in rectangles: B rows, r places for tokens in each, P prompts.

    Attributes:
        place: ``[S]`` the place of each token among ``B * r``, or None if they have the same order.
        slots: ``[B]`` the slot of each row, or None if they are the first B slots in order.
        row_of_place: ``[P * R]`` the row in each of R places of a prompt. Empty ones name an arbitrary row.
        place_of_row: ``[B]`` the inverse.
        at: ``[B]`` the number of tokens that each row had before.
        lengths: ``[B]`` the number of tokens of each row's prompt.
        slot_of_token, at_of_token: ``[S]`` where the keys and values of each token belong.
    """

    place: Tensor | None
    slots: Tensor | None
    row_of_place: Tensor
    place_of_row: Tensor
    at: Tensor
    lengths: Tensor
    slot_of_token: Tensor
    at_of_token: Tensor


class _LayerCache:
    """The keys and values of one layer.

    Attributes:
        prompts: the keys and the values ``[n, K, D]`` of each prompt, by number.
        own: ``[2, slots, K, C, D]``, the keys and values of each row's own tokens.
        padded: keys and values ``[P K, T, D]`` of the prompts of a step, with zeros behind the shorter ones.
    """

    def __init__(self) -> None:
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: Tensor | None = None
        self.padded: tuple[Tensor, Tensor] | None = None


class TurnAttention:
    """The plan of a step that appends a stretch of tokens to each of B rows.

    Args:
        slots: the most rows. longest: the most tokens of a row, its prompt aside.
        dtype: the dtype of the stored keys and values and of matrix products. device: their device.
    """

    def __init__(self, slots: int, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self._slots = dtype, device, slots
        self._longest = -(-longest // _EVEN) * _EVEN
        self._room = min(self._longest, _ROOM)
        self._layers: dict[nn.Module, _LayerCache] = {}
        self._lengths: dict[int, int] = {}
        self._next = count()
        self._numbers: list[int] = []
        self._r = self._t = self._c = 0
        self._step: _Arranged
        self._hidden: dict[int | None, Tensor] = {}

    # --- prompts ------------------------------------------------------------------------------------------------------

    def room_for(self, lengths: Sequence[int]) -> tuple[list[int], Callable[[nn.Module, Tensor, Tensor], None]]:
        """Make room for prompts of these lengths. Returns their numbers, and what stores ``[S, K, D]`` for a layer.

        It raises UnsupportedError if the layer calls attention twice in one pass.
        """
        numbers, seen = [next(self._next) for _ in lengths], set[nn.Module]()
        self._lengths.update(zip(numbers, lengths, strict=True))

        def keep(module: nn.Module, k: Tensor, v: Tensor) -> None:
            if module in seen:
                raise UnsupportedError(f"{type(module).__name__} attends twice in one pass")
            seen.add(module)
            # Copies, because a part of a tensor keeps the whole tensor alive.
            parts = ([x.detach().to(self.dtype, copy=True) for x in torch.split(y, list(lengths))] for y in (k, v))
            layer = self._layers.setdefault(module, _LayerCache())
            layer.prompts.update(zip(numbers, zip(*parts, strict=True), strict=True))

        return numbers, keep

    def forget(self, number: int) -> None:
        """Release a prompt."""
        del self._lengths[number]
        for layer in self._layers.values():
            layer.prompts.pop(number, None)

    # --- steps --------------------------------------------------------------------------------------------------------

    def begin(self, slots: Sequence[int], prompts: Sequence[int], at: Sequence[int], counts: Sequence[int]) -> None:
        """Begin a step.

        Args:
            slots: the slot of each of the B rows. prompts: the number of its prompt.
            at: how many tokens it had before. counts: how many it gets.
        """
        rows, r = len(slots), max(counts)
        numbers = sorted(set(prompts))
        if numbers != self._numbers:
            self._numbers = numbers
            for layer in self._layers.values():
                layer.padded = None
        self._r = r
        self._t = -(-max(self._lengths[n] for n in numbers) // _EVEN) * _EVEN
        most = max(a + n for a, n in zip(at, counts, strict=True))
        while self._room < most:
            self._room = min(2 * self._room, self._longest)
        self._c = -(-most // _EVEN) * _EVEN
        index = [numbers.index(p) for p in prompts]
        members: list[list[int]] = [[] for _ in numbers]
        for row, p in enumerate(index):
            members[p].append(row)
        width = max(map(len, members))
        place_of_row = [0] * rows
        for p, some in enumerate(members):
            for i, row in enumerate(some):
                place_of_row[row] = p * width + i
        row_of_place = [row for some in members for row in (*some, *[some[0]] * (width - len(some)))]
        tokens = [(row, i) for row, n in enumerate(counts) for i in range(n)]
        regular = len(tokens) == rows * r

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        self._step = _Arranged(
            None if regular else tensor([row * r + i for row, i in tokens]),
            None if list(slots) == list(range(rows)) else tensor(slots),
            tensor(row_of_place), tensor(place_of_row), tensor(at), tensor([self._lengths[p] for p in prompts]),
            tensor([slots[row] for row, _ in tokens]), tensor([at[row] + i for row, i in tokens]),
        )  # fmt: skip
        self._hidden = {}

    def hidden(self, window: int | None) -> Tensor:
        """The mask ``[B, 1, r, 1, T + C]`` bool of the places that the tokens of each row do not see.

        The first T places belong to the prompt, the last C places to the row.

        Args:
            window: the number of tokens that a token sees, itself included, or None.
        """
        if window not in self._hidden:
            step = self._step
            rows, r, t, c = len(step.at), self._r, self._t, self._c
            begin, places = torch.arange(t, device=self.device), torch.arange(c, device=self.device)
            last = step.at[:, None] + torch.arange(r, device=self.device)  # [B, r] own place of each token
            beyond = (begin >= step.lengths[:, None])[:, None].expand(rows, r, t)
            hidden = torch.cat([beyond, places > last[:, :, None]], 2)
            if window is not None:
                place = torch.cat([begin.expand(rows, t), step.lengths[:, None] + places], 1)
                hidden |= (step.lengths[:, None] + last)[:, :, None] - place[:, None] >= window
            self._hidden[window] = hidden[:, None, :, None]
        return self._hidden[window]

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Store the keys and values of the tokens and compute the attention of one layer.

        Args:
            module: the attention layer that calls.
            q: ``[S, H, D]`` queries. k, v: ``[S, K, D]`` keys and values.
            spec: the settings of the layer.

        Returns:
            The attended values ``[S, H, D]``.
        """
        layer, step, r, t = self._layers[module], self._step, self._r, self._t
        k_heads, d, g, rows = k.shape[1], q.shape[2], q.shape[1] // k.shape[1], len(self._step.at)
        own_k, own_v = self._own(layer, k, v)
        prompt_k, prompt_v = self._padded(layer)
        q = torch.mul(q, spec.scale, out=q.new_empty(q.shape, dtype=self.dtype))
        if step.place is not None:
            q = q.new_zeros(rows * r, *q.shape[1:]).index_copy_(0, step.place, q)
        q = q.view(rows, r, k_heads, g, d).transpose(1, 2).reshape(rows, k_heads, r * g, d)
        to_prompt = self._by_row(torch.bmm(self._by_prompt(q), prompt_k.transpose(1, 2)), k_heads, r * g)
        to_own = torch.bmm(q.flatten(0, 1), own_k.transpose(1, 2)).view(rows, k_heads, r * g, -1)
        s = torch.cat([to_prompt, to_own], -1)
        if spec.softcap is not None:
            s = torch.tanh(s.float() / spec.softcap) * spec.softcap
        # finite, as in rectangles.py
        s.view(rows, k_heads, r, g, -1).masked_fill_(self.hidden(spec.window), torch.finfo(s.dtype).min)
        p = s.softmax(-1).to(self.dtype)
        out = torch.bmm(p[..., t:].flatten(0, 1), own_v).view(rows, k_heads, r * g, d)
        out += self._by_row(torch.bmm(self._by_prompt(p[..., :t]), prompt_v), k_heads, r * g)
        out = out.view(rows, k_heads, r, g, d).transpose(1, 2).reshape(rows * r, -1, d)
        return out if step.place is None else out[step.place]

    def _own(self, layer: _LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values. Returns those of the rows of this step, each ``[B K, C, D]``."""
        step, before = self._step, layer.own
        if before is None or before.shape[3] < self._room:
            # zeros, as hidden values must not be NaN
            layer.own = torch.zeros(
                2, self._slots, k.shape[1], self._room, k.shape[2], dtype=self.dtype, device=self.device
            )
            if before is not None:
                layer.own[:, :, :, : before.shape[3]] = before
        assert layer.own is not None
        found = []
        for cache, new in zip(layer.own, (k, v), strict=True):
            cache[step.slot_of_token, :, step.at_of_token] = new.detach().to(self.dtype)
            rows = cache[: len(step.at)] if step.slots is None else cache[step.slots]
            found.append(rows[:, :, : self._c].flatten(0, 1))
        return found[0], found[1]

    def _padded(self, layer: _LayerCache) -> tuple[Tensor, Tensor]:
        if layer.padded is None:
            some = [layer.prompts[n] for n in self._numbers]

            def padded(i: int) -> Tensor:
                first = some[0][i]
                out = first.new_zeros(len(some), self._t, *first.shape[1:])
                for to, prompt in zip(out, some, strict=True):
                    to[: len(prompt[i])] = prompt[i]
                return out.transpose(1, 2).flatten(0, 1)

            layer.padded = padded(0), padded(1)
        return layer.padded

    def _by_prompt(self, x: Tensor) -> Tensor:
        """Gather the rows of each prompt: ``[B, K, n, c]`` -> ``[P K, R n, c]``."""
        x = x[self._step.row_of_place]
        x = x.view(len(self._numbers), -1, *x.shape[1:]).transpose(1, 2)
        return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])

    def _by_row(self, x: Tensor, k_heads: int, n: int) -> Tensor:
        """The inverse of :meth:`_by_prompt`: ``[P K, R n, c]`` -> ``[B, K, n, c]``."""
        x = x.view(len(self._numbers), k_heads, -1, n, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x[self._step.place_of_row]
