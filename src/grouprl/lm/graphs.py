"""Work on a GPU, recorded once and launched as a whole (CUDA graphs).

A decode step of a small model is a thousand kernels of two microseconds each. Launching them one by one from Python
takes ten times as long as running them; a recording is launched at once. It runs the same kernels on the same
addresses: what it reads and writes must stay where it is, and numbers that Python knows are those of the time of
recording.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

Work = Callable[[], object]


class Recorder(Protocol):
    """What makes recordings."""

    def prepare(self, work: Work) -> None:
        """Do ``work`` once, as it will be recorded."""

    def record(self, work: Work) -> Work:
        """What does ``work`` again, faster. ``work`` itself is not done. Raises RuntimeError if that cannot be."""


class CudaRecorder:
    """Records CUDA graphs, on a stream of its own and in memory that each takes over from the one before.

    Raises RuntimeError if nothing can be recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._newest: torch.cuda.CUDAGraph | None = None
        # As long as it is there, so is the memory.
        self._keeper = self._trivial()

    def prepare(self, work: Work) -> None:
        """See :class:`Recorder`. What libraries set up at their first call does not get into a recording."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """See :class:`Recorder`. The recording made before must not be used any more."""
        self._newest = None  # with it goes a workspace that a new one must not rely on
        try:
            self._newest = self._capture(work, self._keeper.pool())
        except torch.cuda.OutOfMemoryError:  # meanwhile torch may not take back what it only keeps
            torch.cuda.empty_cache()
            self._newest = self._capture(work, self._keeper.pool())
        return self._newest.replay

    def _trivial(self) -> torch.cuda.CUDAGraph:
        return self._capture(lambda: torch.zeros(1, device=self.device), None)

    def _capture(self, work: Work, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        collecting = gc.isenabled()
        gc.disable()  # what a collection frees would get into the recording
        try:
            with torch.cuda.stream(self._stream):
                # not torch.cuda.graph(): that gives all cached memory back to the driver each time
                graph.capture_begin(pool, "thread_local")
                try:
                    work()
                    graph.capture_end()
                except Exception:
                    self._abandon(graph, pool)
                    raise
        finally:
            if collecting:
                gc.enable()
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Leave a capture that failed. Torch up to 2.11 believes it goes on: its allocator, and its random numbers."""
        with suppress(RuntimeError):
            graph.capture_end()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, pool)
        if hasattr(self, "_keeper"):
            with suppress(RuntimeError):  # one that succeeds puts the random numbers right
                self._trivial()


class Repeated:
    """Work done again and again: as it is the first time, then from a recording.

    Args:
        work: what to do. recorder: what records it, or None to do it as it is every time.
        failed: told why, if it cannot be recorded; it is then done as it is.
    """

    def __init__(self, work: Work, recorder: Recorder | None, failed: Callable[[RuntimeError], None]) -> None:
        self._work, self._recorder, self._failed = work, recorder, failed
        self._recording: Work | None = None
        self._prepared = False

    def moved(self) -> None:
        """Tensors that ``work`` uses are other ones from now on."""
        self._recording, self._prepared = None, False

    def __call__(self) -> None:
        if self._recorder is None:
            self._work()
        elif not self._prepared:
            self._recorder.prepare(self._work)
            self._prepared = True
        else:
            try:
                self._recording = self._recording or self._recorder.record(self._work)
            except RuntimeError as error:
                self._recorder, self._recording = None, self._work
                self._failed(error)
            self._recording()
