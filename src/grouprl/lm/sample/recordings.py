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


class GraphRecorder(Protocol):
    """What makes recordings."""

    def prepare(self, work: Work) -> None:
        """Do ``work`` once, as it will be recorded."""

    def record(self, work: Work) -> Work:
        """What does ``work`` again, faster. ``work`` itself is not done. Raises RuntimeError if that cannot be."""


class CudaGraphRecorder:
    """Records CUDA graphs, on a stream of its own and in memory that each takes over from the one before.

    Raises RuntimeError if nothing can be recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._newest: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []  # torch's allocators may go on asking them
        self._keeper = self._trivial()

    def prepare(self, work: Work) -> None:
        """See :class:`GraphRecorder`. What libraries set up at their first call does not get into a recording."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """See :class:`GraphRecorder`. The recording made before must not be used any more."""
        self._newest = None  # with it goes a workspace that a new one must not rely on
        try:
            graph = self._capture(work, self._keeper.pool())
        except torch.cuda.OutOfMemoryError:
            graph = None
        except BaseException:
            self._renew()
            raise
        if graph is None:  # while it captured, torch could not take back what it only keeps
            self._renew()
            torch.cuda.empty_cache()
            graph = self._capture(work, self._keeper.pool())
        self._newest = graph
        return graph.replay

    def _trivial(self) -> torch.cuda.CUDAGraph:
        """A recording of next to nothing. As long as it is there, so is the memory that others take over."""
        return self._capture(lambda: torch.zeros(1, device=self.device), torch.cuda.graph_pool_handle())

    def _renew(self) -> None:
        """After a capture that failed: torch up to 2.11 believes that it goes on, its allocators for the memory it was
        for, its random numbers until another one succeeds."""
        with suppress(RuntimeError):
            self._keeper = self._trivial()

    def _capture(self, work: Work, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        collecting = gc.isenabled()
        gc.disable()  # what a collection frees would get into the recording
        try:
            with torch.cuda.stream(self._stream):
                try:
                    # not torch.cuda.graph(): that gives all cached memory back to the driver each time
                    graph.capture_begin(pool, "thread_local")
                    work()
                    graph.capture_end()
                except BaseException:
                    self._failed.append(graph)
                    with suppress(RuntimeError):
                        graph.capture_end()
                    index = torch.cuda.current_device() if self.device.index is None else self.device.index
                    with suppress(RuntimeError, AttributeError):
                        torch._C._cuda_endAllocateToPool(index, pool)
                    raise
        finally:
            if collecting:
                gc.enable()
        return graph


class Repeated:
    """Work done again and again: as it is the first time, then from a recording.

    Args:
        work: what to do. recorder: what records it, or None to do it as it is every time.
        failed: told why, if it cannot be recorded; it is then done as it is.
    """

    def __init__(self, work: Work, recorder: GraphRecorder | None, failed: Callable[[RuntimeError], None]) -> None:
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
