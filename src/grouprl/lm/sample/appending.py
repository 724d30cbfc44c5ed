"""Decoders to which any row can append any number of tokens: what episodes of several turns are sampled with.

Rows live in *slots*. A slot begins with a prompt, which rows may share, gets one token or a stretch of them at a time,
and is used again when its row is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from grouprl.lm.llama.decode_c import NativeCache, NativeModel, Where
from grouprl.lm.packed.attention import AttentionPlan, PackedAttention
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.turn_attention import TurnAttention


class AppendingDecoder(Protocol):
    """Holds rows in slots, and computes the logits of the token after each."""

    independent: bool
    """Whether a row's logits are the same bit for bit, whichever rows share a step and however its tokens were cut."""

    def begin(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """Read P prompts, and begin a row behind prompt i in each of ``slots[i]``.

        Returns the logits ``[P, V]`` float32 behind each prompt.
        """

    def append(self, slots: Sequence[int], stretches: Sequence[Sequence[int]]) -> Tensor:
        """Append a stretch of at least one token to each of n rows.

        Returns the logits ``[n, V]`` float32 behind each stretch.
        """

    def end(self, slot: int) -> None:
        """Free a slot."""


class _Stretches(NamedTuple):
    """The S tokens of n stretches: ids, slot, place in its row and position in its sequence of each, and the last."""

    ids: Tensor
    slots: list[int]
    at: list[int]
    positions: Tensor
    last: list[int]


class _Slots:
    """Which prompt is in each slot and how many tokens behind it; releases prompts that no row has any more."""

    def __init__(self, forget: Callable[[int], None]) -> None:
        self._forget = forget
        self._rows_of: Counter[int] = Counter()
        self.prompt: dict[int, int] = {}
        self.length: dict[int, int] = {}
        self.at: dict[int, int] = {}

    def begin(self, slot: int, prompt: int, length: int) -> None:
        """Begin a row in a slot, behind the prompt of that number and length."""
        self._rows_of[prompt] += 1
        if slot in self.prompt:
            self.end(slot)
        self.prompt[slot], self.length[slot], self.at[slot] = prompt, length, 0

    def end(self, slot: int) -> None:
        """Free a slot."""
        prompt = self.prompt.pop(slot)
        self._rows_of[prompt] -= 1
        if not self._rows_of[prompt]:
            del self._rows_of[prompt]
            self._forget(prompt)

    def append(self, slots: Sequence[int], stretches: Sequence[Sequence[int]]) -> _Stretches:
        """Count the tokens of stretches, and say where each belongs."""
        ids: list[int] = []
        of: list[int] = []
        at: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for slot, stretch in zip(slots, stretches, strict=True):
            n, first = len(stretch), self.at[slot]
            ids += stretch
            of += [slot] * n
            at += range(first, first + n)
            positions += range(self.length[slot] + first, self.length[slot] + first + n)
            last.append(len(ids) - 1)
            self.at[slot] = first + n
        return _Stretches(torch.tensor(ids), of, at, torch.tensor(positions), last)


class NativeRows:
    """Compiled code on a CPU.

    Args:
        model: the model. slots: the most rows. longest: the most tokens of a row behind its prompt.
    """

    independent = True

    def __init__(self, model: NativeModel, slots: int, longest: int) -> None:
        self._cache = NativeCache(model, slots, longest)
        self._slots = _Slots(self._cache.forget)

    def begin(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """As :class:`AppendingDecoder` says."""
        numbers, logits = self._cache.read(prompts)
        for number, prompt, some in zip(numbers, prompts, slots, strict=True):
            for slot in some:
                self._slots.begin(slot, number, len(prompt))
        return logits

    def append(self, slots: Sequence[int], stretches: Sequence[Sequence[int]]) -> Tensor:
        """As :class:`AppendingDecoder` says."""
        new = self._slots.append(slots, stretches)
        where = Where.of(torch.tensor(new.slots), torch.tensor([self._slots.prompt[slot] for slot in new.slots]))
        at, last = (torch.tensor(values, dtype=torch.int32) for values in (new.at, new.last))
        return self._cache.step(new.ids, new.positions, where, at, last)

    def end(self, slot: int) -> None:
        """As :class:`AppendingDecoder` says."""
        self._slots.end(slot)


class TorchRows:
    """Torch operations, for any packed model.

    Args:
        hidden: a function of token ids ``[S]``, their positions ``[S]`` and an attention plan. It returns the last
            hidden states ``[S, d]``.
        head: the linear layer that maps hidden states to logits. dtype: of matrix products. device: the model's.
        slots: the most rows. longest: the most tokens of a row behind its prompt.
    """

    independent = False

    def __init__(
        self,
        hidden: Callable[[Tensor, Tensor, AttentionPlan], Tensor],
        head: nn.Linear,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
        longest: int,
    ) -> None:
        self._hidden, self._head, self._dtype, self._device = hidden, head, dtype, device
        # On a CPU small products are faster in float32, as in torch_decoder.py.
        self._plan = TurnAttention(slots, longest, torch.float32 if device.type == "cpu" else dtype, device)
        self._slots = _Slots(self._plan.forget)

    def begin(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """As :class:`AppendingDecoder` says."""
        pack = Pack.of([Group(prompt, ()) for prompt in prompts], self._device)
        numbers, keep = self._plan.room_for([len(prompt) for prompt in prompts])
        hidden = self._hidden(pack.ids, pack.positions, PackedAttention(pack, self._dtype, keep, native=False))
        for number, prompt, some in zip(numbers, prompts, slots, strict=True):
            for slot in some:
                self._slots.begin(slot, number, len(prompt))
        return self._logits(hidden[pack.prompt_lengths.cumsum(0) - 1])

    def append(self, slots: Sequence[int], stretches: Sequence[Sequence[int]]) -> Tensor:
        """As :class:`AppendingDecoder` says."""
        before = [self._slots.at[slot] for slot in slots]
        new = self._slots.append(slots, stretches)
        self._plan.begin(slots, [self._slots.prompt[slot] for slot in slots], before, [len(s) for s in stretches])
        hidden = self._hidden(new.ids.to(self._device), new.positions.to(self._device), self._plan)
        return self._logits(hidden if len(new.last) == len(new.ids) else hidden[new.last])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits.float()

    def end(self, slot: int) -> None:
        """As :class:`AppendingDecoder` says."""
        self._slots.end(slot)


class ReadAgain:
    """Reads every row from its beginning at each step, for models that nothing else serves.

    Args:
        logits: a function of sequences of one length ``[n, T]``. It returns the logits ``[n, V]`` float32 behind each.
        device: of the sequences. at_once: the most sequences of a call.
    """

    independent = False

    def __init__(self, logits: Callable[[Tensor], Tensor], device: torch.device, at_once: int) -> None:
        self._logits, self._device, self._at_once = logits, device, at_once
        self._sequences: dict[int, list[int]] = {}

    def begin(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Tensor:
        """As :class:`AppendingDecoder` says."""
        for prompt, some in zip(prompts, slots, strict=True):
            for slot in some:
                self._sequences[slot] = list(prompt)
        return self._after(prompts)

    def append(self, slots: Sequence[int], stretches: Sequence[Sequence[int]]) -> Tensor:
        """As :class:`AppendingDecoder` says."""
        for slot, stretch in zip(slots, stretches, strict=True):
            self._sequences[slot] += stretch
        return self._after([self._sequences[slot] for slot in slots])

    def _after(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        by_length: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            by_length.setdefault(len(sequence), []).append(i)
        order = [some[i : i + self._at_once] for some in by_length.values() for i in range(0, len(some), self._at_once)]
        found = [self._logits(torch.tensor([list(sequences[i]) for i in some], device=self._device)) for some in order]
        return torch.cat(found)[torch.tensor([i for some in order for i in some]).argsort().to(self._device)]

    def end(self, slot: int) -> None:
        """As :class:`AppendingDecoder` says."""
        del self._sequences[slot]
