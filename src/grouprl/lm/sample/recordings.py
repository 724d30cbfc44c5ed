"""Recordings of GPU work (CUDA graphs).

A decode step of a small model consists of about a thousand kernels that run for two microseconds each. Python needs ten
times as long to launch them one by one. A recording stores these launches, and one call launches all of them.

A recording runs the same kernels on the same memory addresses. So the tensors that the work reads and writes must not
move. Python numbers keep the values they had at the time of recording.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

Work = Callable[[], object]


class GraphRecorder(Protocol):
    """Makes recordings."""

    def prepare(self, work: Work) -> None:
        """Do ``work`` once, under the conditions of a recording. Call this before :meth:`record`."""

    def record(self, work: Work) -> Work:
        """Record ``work`` without doing it. Returns a function that replays the recording.

        Raises:
            RuntimeError: ``work`` cannot be recorded.
        """


class CudaGraphRecorder:
    """Records CUDA graphs.

    It records on its own stream. Each recording reuses the memory of the recording before.

    Args:
        device: a CUDA device.

    Raises:
        RuntimeError: the device cannot record CUDA graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._newest: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []  # torch's allocators may still use them, so keep them alive
        self._keeper = self._trivial()

    def prepare(self, work: Work) -> None:
        """Do ``work`` once on the stream of the recorder.

        Libraries set themselves up at their first call. This call keeps that work out of the recording.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """Record ``work`` without doing it. Returns a function that replays the recording.

        The recording before becomes invalid: do not replay it afterwards.

        Raises:
            RuntimeError: ``work`` cannot be recorded.
        """
        self._newest = None  # the old graph owns a workspace that the new graph must not use
        try:
            graph = self._capture(work, self._keeper.pool())
        except torch.cuda.OutOfMemoryError:
            graph = None
        except BaseException:
            self._renew()
            raise
        if graph is None:  # torch cannot free cached memory during a capture, so free it and try again
            self._renew()
            torch.cuda.empty_cache()
            graph = self._capture(work, self._keeper.pool())
        self._newest = graph
        return graph.replay

    def _trivial(self) -> torch.cuda.CUDAGraph:
        """A recording of a single small operation. While it exists, torch keeps the memory pool of the recordings."""
        return self._capture(lambda: torch.zeros(1, device=self.device), torch.cuda.graph_pool_handle())

    def _renew(self) -> None:
        """Capture a new keeper after a failed capture.

        torch up to 2.11 believes that a failed capture still goes on. Its allocator believes so for the memory pool of
        that capture. Its random generator believes so until another capture succeeds.
        """
        with suppress(RuntimeError):
            self._keeper = self._trivial()

    def _capture(self, work: Work, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        collecting = gc.isenabled()
        gc.disable()  # a garbage collection would record the release of unrelated tensors
        try:
            with torch.cuda.stream(self._stream):
                try:
                    # torch.cuda.graph() would return all cached memory to the driver each time.
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
    """Does the same work many times: directly at the first call, and from a recording at later calls.

    Args:
        work: the function to repeat.
        recorder: records the work, or None to do it directly at every call.
        failed: receives the error if the work cannot be recorded. Later calls then do the work directly.
    """

    def __init__(self, work: Work, recorder: GraphRecorder | None, failed: Callable[[RuntimeError], None]) -> None:
        self._work, self._recorder, self._failed = work, recorder, failed
        self._recording: Work | None = None
        self._prepared = False

    def moved(self) -> None:
        """Discard the recording, because the work uses other tensors from now on."""
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
