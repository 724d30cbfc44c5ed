"""Work on a GPU, recorded once and launched as a whole (CUDA graphs).

A decode step of a small model is a thousand kernels of two microseconds each. Launching them one by one from Python
takes ten times as long as running them; a recording is launched at once. It runs the same kernels on the same
addresses: what it reads and writes must stay where it is, and numbers that Python knows are those of the time of
recording.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

Work = Callable[[], object]


class Recorder(Protocol):
    """What makes recordings."""

    known: set[Hashable]
    """Kinds of work that have been prepared."""

    def prepare(self, work: Work) -> None:
        """Do ``work`` once, as it will be recorded."""

    def record(self, work: Work) -> Work:
        """What does ``work`` again, faster. ``work`` itself is not done. Raises RuntimeError if that cannot be."""


class CudaRecorder:
    """Records CUDA graphs, on a stream of its own and in memory that each takes over from the one before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: set[Hashable] = set()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._newest: torch.cuda.CUDAGraph | None = None

    def prepare(self, work: Work) -> None:
        """See :class:`Recorder`. What libraries set up at their first call does not get into a recording."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """See :class:`Recorder`. The recording made before must not be used any more."""
        graph, before = torch.cuda.CUDAGraph(), self._newest
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        collecting = gc.isenabled()
        gc.disable()  # what a collection frees would get into the recording
        try:
            with torch.cuda.stream(self._stream):
                # not torch.cuda.graph(): that gives all cached memory back to the driver each time
                graph.capture_begin(None if before is None else before.pool(), "thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        self._newest = graph
        return graph.replay


class Repeated:
    """Work done again and again: from a recording, but as it is where it is the first of its kind.

    Args:
        work: what to do. recorder: what records it, or None to do it as it is every time.
        failed: told why, if it cannot be recorded; it is then done as it is.
        kind: what kind of work it is now: which kernels it runs.
    """

    def __init__(
        self, work: Work, recorder: Recorder | None, failed: Callable[[RuntimeError], None],
        kind: Callable[[], Hashable] = lambda: None,
    ) -> None:  # fmt: skip
        self._work, self._recorder, self._failed, self._kind = work, recorder, failed, kind
        self._recording: Work | None = None

    def moved(self) -> None:
        """Tensors that ``work`` uses are other ones from now on."""
        self._recording = None

    def __call__(self) -> None:
        if self._recorder is None:
            self._work()
            return
        if self._recording is None:
            kind = self._kind()
            if kind not in self._recorder.known:
                self._recorder.prepare(self._work)
                self._recorder.known.add(kind)
                return
            try:
                self._recording = self._recorder.record(self._work)
            except RuntimeError as error:
                self._recorder, self._recording = None, self._work
                self._failed(error)
        self._recording()
