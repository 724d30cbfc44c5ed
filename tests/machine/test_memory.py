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
@pytest.mark.skipif(
    not THP.exists() or "[madvise]" not in THP.read_text(), reason="the kernel gives no large pages, or always"
)
def test_large_tensors_lie_in_large_pages() -> None:
    code = """
import torch
from grouprl.machine.memory import use_huge_pages
use_huge_pages(1 << 30)
x = torch.ones(64 << 20)
print(open("/proc/self/smaps").read())
"""
    heap = printed(code).split("[heap]")[1:]
    assert sum(int(n) for part in heap for n in re.findall(r"AnonHugePages: +(\d+) kB", part)[:1]) > 200 << 10


@linux
def test_naming_addresses_takes_no_memory() -> None:
    code = """
import re, torch
from grouprl.machine.memory import renew_freed_memory, use_huge_pages
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = resident()
use_huge_pages(2 << 30)
renew_freed_memory()
print(resident() - before)
"""
    assert int(printed(code)) < 8 << 10


@linux
@pytest.mark.skipif(not THP.exists() or "[madvise]" not in THP.read_text(), reason="no large pages, or always")
def test_what_was_freed_before_is_made_of_large_pages_when_it_is_used_again() -> None:
    code = """
import torch
from grouprl.machine.memory import keep_freed_memory, renew_freed_memory, use_huge_pages
keep_freed_memory()
model, behind = torch.ones(64 << 20), torch.ones(1 << 20)
use_huge_pages(1 << 30)
del model
renew_freed_memory()
x = torch.ones(48 << 20)
print(x.data_ptr() < behind.data_ptr())
print(open("/proc/self/smaps").read())
"""
    said = printed(code)
    assert said.startswith("True")  # it lies in the hole
    assert sum(
        int(n) for part in said.split("[heap]")[1:] for n in re.findall(r"AnonHugePages: +(\d+) kB", part)[:1]
    ) > (150 << 10)
