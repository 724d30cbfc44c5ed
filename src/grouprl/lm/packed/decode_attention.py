"""Attention of a decode step: the newest token of each row attends to its prompt and to the tokens of its row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grouprl.lm.packed.attention import AttentionSpec, UnsupportedError
from grouprl.lm.packed.packing import Pack

_ROOM = {"cpu": 32, "cuda": 256}
"""The number of tokens per row for which a cache has room at first. A full cache doubles its room. On a GPU each growth
costs a new recording, so the room is larger there."""
_EVEN = 8
"""The room of a cache is a multiple of this number of tokens, because low-precision products are faster then."""


class _LayerCache:
    """The keys and values of one layer.

    Attributes:
        keys: ``[P K, T, D]``, the keys of the P prompts, with zeros behind the shorter ones.
        values: ``[P K, T, D]``, the values of the P prompts.
        own: ``[2, B, K, C, D]``, the keys and values of each row's own tokens. C is the room for tokens of a row.
    """

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor, rows: int, room: int, dtype: torch.dtype) -> None:
        p, t = index.shape

        def padded(x: Tensor) -> Tensor:
            x = torch.cat([x.to(dtype), x.new_zeros((1, *x.shape[1:]), dtype=dtype)])
            return x[index.reshape(-1)].view(p, t, *x.shape[1:]).transpose(1, 2).reshape(-1, t, x.shape[-1])

        self.k_heads, self.d = keys.shape[1:]
        self.keys, self.values = padded(keys), padded(values)
        self.own = self.keys.new_zeros(2, rows, self.k_heads, room, self.d)  # zeros, as hidden values must not be NaN

    def grow(self, room: int) -> None:
        """Make room for ``room`` more tokens of each row."""
        self.own = torch.cat([self.own, self.own.new_zeros(*self.own.shape[:3], room, self.d)], 3)

    def write(self, k: Tensor, v: Tensor, at: Tensor) -> None:
        """Store the keys and values ``[B, K, D]`` of the first B rows as their token number ``at [1]``."""
        for cache, new in zip(self.own, (k, v), strict=True):
            cache[: len(new)].index_copy_(2, at, new[:, :, None].to(cache.dtype))

    def read(self, rows: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of the own tokens of the first ``rows`` rows, each ``[rows * K, C, D]``."""
        k, v = self.own[:, :rows].flatten(1, 2)
        return k, v

    def select_prompts(self, index: Tensor) -> None:
        """Remove all prompts but the ones with an index in ``index``."""
        self.keys, self.values = (
            x.view(-1, self.k_heads, *x.shape[1:])[index].flatten(0, 1) for x in (self.keys, self.values)
        )


class DecodeAttention:
    """The plan of a decode step: the newest token of a row sees its prompt and all tokens of its row.

    The plan stores the keys and values of a prompt once for all its rows. The queries of these rows are rows of one
    matrix product, which has R slots per prompt.

    The plan computes its indices on the CPU, because reading a number from a GPU makes the CPU wait. The number of
    tokens drawn so far is a tensor. So a GPU may replay a step from a recording, until :meth:`reserve` returns True or
    :meth:`drop` removes rows.

    Args:
        pack: the P prompts.
        group_size: the number of rows of each prompt, so that B = P * group_size at first.
        longest: the most new tokens of a row.
        dtype: the dtype of the stored keys and values and of matrix products.

    Attributes:
        lengths: ``[P]``, the number of tokens of each prompt.
        at: ``[1]``, the number of new tokens that each row has.
        slots: ``[P * R]``, the row in each slot. Empty slots name an arbitrary row. It is None if rows and slots have
            the same order.
        place: ``[B]``, the slot of each row, or None if rows and slots have the same order.
        prompt_of_row: ``[B]``, the index of each row's prompt.
        length_of_row: ``[B]``, the number of tokens of each row's prompt.
    """

    def __init__(self, pack: Pack, group_size: int, longest: int, dtype: torch.dtype) -> None:
        self.lengths = pack.prompt_lengths
        self.device = self.lengths.device
        self.dtype = dtype
        self._lengths = lengths = self.lengths.cpu()
        self.t = -(-int(lengths.max()) // _EVEN) * _EVEN
        self.longest = -(-longest // _EVEN) * _EVEN
        self.room = min(self.longest, _ROOM["cuda" if self.device.type == "cuda" else "cpu"])
        ends = lengths.cumsum(0)
        places = torch.arange(self.t)
        index = (ends - lengths)[:, None] + places
        self.index = torch.where(places < lengths[:, None], index, pack.ids.shape[0]).to(self.device)
        self.layers: dict[nn.Module, _LayerCache] = {}
        self._prompt_of_row = torch.arange(len(lengths)).repeat_interleave(group_size)
        self.step = 0
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._hidden: dict[int | None, Tensor] = {}
        self._arrange()

    def keep(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store the keys and values ``[S, K, D]`` of the prompts for one layer.

        :class:`PackedAttention` calls this once per layer while it reads the prompts.

        Raises:
            UnsupportedError: the layer calls attention twice in one pass.
        """
        if module in self.layers:
            raise UnsupportedError(f"{type(module).__name__} attends twice in one pass")
        self.layers[module] = _LayerCache(k, v, self.index, len(self._prompt_of_row), self.room, self.dtype)

    def _arrange(self) -> None:
        """Compute the slots, the places and the mask of the prompts from the prompt of each row."""
        prompt_of_row, rows = self._prompt_of_row, len(self._prompt_of_row)
        order = torch.argsort(prompt_of_row, stable=True)
        counts = torch.bincount(prompt_of_row, minlength=len(self._lengths))
        r = int(counts.max())
        start = counts.cumsum(0) - counts
        within = torch.arange(rows) - start[prompt_of_row[order]]
        place = torch.empty_like(order)
        place[order] = prompt_of_row[order] * r + within
        slots = torch.zeros(len(self._lengths) * r, dtype=torch.int64)
        slots[place] = torch.arange(rows)
        straight = rows == len(slots) and bool((place == torch.arange(rows)).all())
        self.slots: Tensor | None = None if straight else slots.to(self.device)
        self.place: Tensor | None = None if straight else place.to(self.device)
        lengths = self._lengths[prompt_of_row]
        self.prompt_of_row, self.length_of_row = prompt_of_row.to(self.device), lengths.to(self.device)
        self._beyond = (torch.arange(self.t) >= lengths[:, None]).to(self.device)

    def reserve(self) -> bool:
        """Make room for one more token in each row. Call this before each step.

        Returns True if the plan allocated its tensors anew. A recording of earlier steps is then invalid.
        """
        self.step += 1
        if self.step <= self.room:
            return False
        more = min(self.room, self.longest - self.room)
        for layer in self.layers.values():
            layer.grow(more)
        self.room += more
        return True

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove the rows with the indices in ``finished``. The last rows move into the gaps.

        Returns the previous index of each remaining row.
        """
        rows = list(range(len(self._prompt_of_row)))
        for row in sorted(finished, reverse=True):
            rows[row] = rows[-1]
            rows.pop()
        before = torch.tensor(rows, dtype=torch.int64)
        gaps = torch.nonzero(before != torch.arange(len(rows)))[:, 0]
        if len(gaps):
            into, source = gaps.to(self.device), before[gaps].to(self.device)
            for layer in self.layers.values():
                layer.own[:, into] = layer.own[:, source]  # rows that move come after all rows that stay
        self._prompt_of_row = self._prompt_of_row[before]
        alive, renumbered = torch.unique(self._prompt_of_row, return_inverse=True)
        if len(alive) < len(self._lengths):
            index = alive.to(self.device)
            for layer in self.layers.values():
                layer.select_prompts(index)
            self._lengths, self._prompt_of_row = self._lengths[alive], renumbered
        if rows:
            self._arrange()
        return rows

    def begin(self) -> None:
        """Begin a step."""
        self._hidden = {}

    def end(self) -> None:
        """End a step. Every row has one more token from now on."""
        self.at += 1

    def hidden(self, window: int | None) -> Tensor:
        """The mask ``[B, 1, 1, T + C]`` bool of the places that the newest token of each row does not see.

        The first T places belong to the prompt, the last C places to the tokens of the row.

        Args:
            window: the number of tokens that a token sees, itself included, or None.
        """
        if window not in self._hidden:
            places = torch.arange(self.room, device=self.device)
            later = (places > self.at).expand(len(self._beyond), -1)
            hidden = torch.cat([self._beyond, later], 1)
            if window is not None:
                begin = torch.arange(self.t, device=self.device).expand(len(self._beyond), -1)
                place = torch.cat([begin, self.length_of_row[:, None] + places], 1)
                hidden |= (self.length_of_row + self.at)[:, None] - place >= window
            self._hidden[window] = hidden[:, None, None]
        return self._hidden[window]

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Store the keys and values of the newest tokens and compute the attention of one layer.

        Args:
            module: the attention layer that calls.
            q: ``[B, H, D]``, the queries of the newest token of each row.
            k: ``[B, K, D]``, the keys of these tokens.
            v: ``[B, K, D]``, the values of these tokens.
            spec: the settings of the layer.

        Returns:
            The attended values ``[B, H, D]``.
        """
        layer = self.layers[module]
        rows, k_heads, d, t = q.shape[0], k.shape[1], q.shape[2], self.t
        g = q.shape[1] // k_heads
        layer.write(k, v, self.at)
        own_k, own_v = layer.read(rows)
        q = torch.mul(q, spec.scale, out=q.new_empty(q.shape, dtype=self.dtype)).view(rows, k_heads, g, d)
        to_prompt = self._by_row(torch.bmm(self._by_prompt(q), layer.keys.transpose(1, 2)), k_heads, g)
        to_own = torch.bmm(q.view(-1, g, d), own_k.transpose(1, 2)).view(rows, k_heads, g, -1)
        s = torch.cat([to_prompt, to_own], -1)
        if spec.softcap is not None:
            s = torch.tanh(s.float() / spec.softcap) * spec.softcap
        s.masked_fill_(self.hidden(spec.window), torch.finfo(s.dtype).min)  # finite, as in rectangles.py
        p = s.softmax(-1).to(self.dtype)
        out = torch.bmm(p[..., t:].flatten(0, 1), own_v).view(rows, k_heads, g, d)
        out += self._by_row(torch.bmm(self._by_prompt(p[..., :t]), layer.values), k_heads, g)
        return out.view(rows, -1, d)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """Gather the rows of each prompt: ``[B, K, g, c]`` -> ``[P K, R g, c]``."""
        if self.slots is not None:
            x = x[self.slots]
        x = x.view(len(self._lengths), -1, *x.shape[1:]).transpose(1, 2)
        return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])

    def _by_row(self, x: Tensor, k_heads: int, g: int) -> Tensor:
        """The inverse of :meth:`_by_prompt`: ``[P K, R g, c]`` -> ``[B, K, g, c]``."""
        x = x.view(len(self._lengths), k_heads, -1, g, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x if self.place is None else x[self.place]
