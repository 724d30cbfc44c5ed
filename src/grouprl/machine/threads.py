"""How many threads the kernels of torch and BLAS may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from grouprl.machine.memory import keep_freed_memory


@contextmanager
def single_threaded_kernels() -> Iterator[None]:
    """Within the context, every torch and BLAS call runs on the thread that makes it.

    This pays where arrays are small: waking a kernel's helper threads costs more than they save, while half a minibatch
    is enough work for one thread of the caller's own. Memory that is freed stays with the process from then on
    (:func:`~grouprl.machine.memory.keep_freed_memory`).
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
