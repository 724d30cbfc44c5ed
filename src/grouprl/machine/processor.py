"""What Linux says of the processor."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def described_processor() -> dict[str, str]:
    """The entries of the first processor in ``/proc/cpuinfo``, by their names; none where there is no such file."""
    return entries(_CPUINFO.read_text(encoding="utf-8", errors="replace")) if _CPUINFO.exists() else {}


def entries(cpuinfo: str) -> dict[str, str]:
    """The lines ``name : value`` of a text like ``/proc/cpuinfo``; of two with the same name, the first."""
    said: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    return said


def processor_name(said: dict[str, str]) -> str:
    """The name of a processor, with family and model where ``said`` has them: generations share a name."""
    kind = [f"{name.removeprefix('cpu ')} {said[name]}" for name in ("cpu family", "model") if name in said]
    return ", ".join([said.get("model name") or platform.processor(), *kind])
