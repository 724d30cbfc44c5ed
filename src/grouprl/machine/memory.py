"""Memory that is used again and again stays with the process, and lies in large pages."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
ROOM = 8 << 30


def _libc() -> Any:
    """glibc, or None where the C library is another."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") else None
    except OSError:
        return None


@cache
def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning every large block to the kernel.

    Each micro-batch allocates and frees the same blocks; handing them back costs page faults worth a third of the
    update's time. Blocks are never mapped one by one: the threshold for that cannot be raised above 32 MB. A no-op
    where the C library is not glibc.
    """
    libc = _libc()
    if libc is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 64 << 20)


@cache
def use_huge_pages(room: int = ROOM) -> None:
    """Let the next ``room`` bytes of the heap, at most a third of the machine's memory, be made of pages of 2 MB.

    Passing over hundreds of megabytes of weights again and again, a processor spends some of its time looking up where
    pages of 4 KB are. The kernel gives larger ones only to ranges a program names (the usual setting, "madvise"), so
    the heap is extended by addresses that nothing uses yet, and these are named. No memory is taken by that. Implies
    :func:`keep_freed_memory`. A no-op where the C library is not glibc or there is no room.
    """
    keep_freed_memory()
    libc = _libc()
    if libc is None:
        return
    room = min(room, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(room)
    if block:
        _name(libc, block, block + room)
        libc.free(block)  # stays at the end of the heap, where the next blocks are taken from


def return_freed_memory() -> None:
    """Ask glibc to return what is freed to the kernel, for a process that must stay small: each block of 64 KB or more.

    Otherwise layers that are gathered and let go of, one after another, would hold as much as all of them together.
    Undoes :func:`keep_freed_memory`. A no-op where the C library is not glibc.
    """
    libc = _libc()
    if libc is not None:
        m_trim_threshold, m_mmap_threshold, m_mmap_max, m_arena_max = -1, -3, -4, -8
        for setting, value in (
            (m_mmap_max, 65536), (m_mmap_threshold, 65536), (m_trim_threshold, 65536), (m_arena_max, 1),
        ):  # fmt: skip
            libc.mallopt(setting, value)


def renew_freed_memory() -> None:
    """Give what is free within the heap back to the kernel, to be made of pages of 2 MB when it is used again.

    After something large was freed that came before :func:`use_huge_pages`, such as a model that has been copied.
    """
    libc = _libc()
    if libc is None or not use_huge_pages.cache_info().currsize:
        return
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.malloc_trim(ROOM)  # the end of the heap stays
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:  # not mounted: pages stay small
        return
    for line in maps.splitlines():
        if line.endswith("[heap]"):
            _name(libc, *(int(at, 16) for at in line.split()[0].split("-")))


def _name(libc: Any, start: int, end: int) -> None:
    start, end = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if end > start:
        libc.madvise(start, end - start, _MADV_HUGEPAGE)


def peak_memory_gb(device: Any) -> float:
    """The most memory used so far, in 10^9 bytes: of the accelerator, or resident in this process.

    Args:
        device: a torch device.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
