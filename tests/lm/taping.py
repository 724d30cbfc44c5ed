"""A stand-in for CUDA graphs on a CPU: what torch was asked to do, done again on the same tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique", "unique_", "isin")
"""Operations for which a GPU stops until it has a number or a size."""


class Tape(TorchDispatchMode):
    """Records operations with the numbers that Python gave them. Like a capture, it leaves no trace in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::").startswith(WAITS):
            raise RuntimeError(f"{func._schema.name} cannot be recorded")
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self._made:
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        self._made |= {
            x.untyped_storage().data_ptr() for x in tree_flatten(out)[0] if isinstance(x, Tensor)
        } - set(self._before)  # fmt: skip
        return out

    def rewind(self) -> None:
        """Make every tensor that was there before what it was."""
        for storage, content in self._before.values():
            storage.copy_(content)
        self._before = {}

    def play(self) -> None:
        """Do all operations again. What one of them made, later ones find; all else is where it was."""
        made: dict[int, Tensor] = {}

        def now(x: Any) -> Any:
            return made.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, out in self.operations:
            found = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_flatten(out)[0], tree_flatten(found)[0], strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new


class TapeRecorder:
    """The shape of :class:`grouprl.lm.sample.recordings.CudaGraphRecorder`, counting what it is asked for."""

    def __init__(self) -> None:
        self.prepared = self.recorded = self.played = 0

    def prepare(self, work: Callable[[], object]) -> None:
        """Do ``work``."""
        self.prepared += 1
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        """What does ``work`` again."""
        self.recorded += 1
        tape = Tape()
        try:
            with tape:
                work()
        finally:
            tape.rewind()

        def play() -> None:
            self.played += 1
            with torch.no_grad():
                tape.play()

        return play
