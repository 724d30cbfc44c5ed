"""Memory that is used again and again stays with the process."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning every large block to the kernel.

    Each micro-batch allocates and frees the same blocks; handing them back costs page faults worth a third of the
    update's time. A no-op where the C library is not glibc.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            return
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)
