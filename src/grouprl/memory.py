"""Memory that is used again and again stays with the process."""

from __future__ import annotations

import ctypes
import sys
from functools import cache


@cache
def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning every large block to the kernel.

    Each micro-batch allocates and frees the same blocks; handing them back costs page faults worth a third of the
    update's time. Blocks are never mapped one by one: the threshold for that cannot be raised above 32 MB. A no-op
    where the C library is not glibc.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            return
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 64 << 20)
