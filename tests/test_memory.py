"""What the allocator is asked for, seen from the side of the kernel; each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's")


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@linux
@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the kernel gives no large pages")
def test_large_tensors_lie_in_large_pages() -> None:
    code = """
import torch
from grouprl.memory import use_huge_pages
use_huge_pages(1 << 30)
x = torch.ones(64 << 20)
print(open("/proc/self/smaps").read())
"""
    heap = printed(code).split("[heap]")[1:]
    assert sum(int(n) for part in heap for n in re.findall(r"AnonHugePages: +(\d+) kB", part)[:1]) > 200 << 10


@linux
def test_naming_addresses_takes_no_memory() -> None:
    code = """
import resource, torch
from grouprl.memory import use_huge_pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
use_huge_pages(2 << 30)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(printed(code)) < 20 << 10
