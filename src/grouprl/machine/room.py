"""Whether what settings ask for can fit into this machine at all, said before anything is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from grouprl.errors import UsageError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may have; "max" or a huge number where there is no limit."""


def memory_of_machine() -> int | None:
    """Bytes of memory that this machine has, or a container of this process; None where nobody says."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in _LIMITS:
        with suppress(OSError, ValueError):
            found = min(found, int(Path(limit).read_text()))
    return found


def check_room(needs: Mapping[str, float]) -> None:
    """Refuse settings that no run on this machine could hold.

    Args:
        needs: the least number of bytes that each setting asks for, by what is given: ``{"n_envs=1000000000": 2e11}``.

    Raises UsageError that names the setting which asks for most, if it asks for more than there is.
    """
    has = memory_of_machine()
    if has is None or not needs:
        return
    worst = max(needs, key=lambda name: needs[name])
    if needs[worst] > has:
        raise UsageError(
            f"{worst} needs at least {_said(needs[worst])} of memory, and this machine has {_said(has)}; set less"
        )


def _said(size: float) -> str:
    """Bytes in a unit that a person reads."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB")):
        if size >= 10 * unit or unit == 1e9:
            return f"{size / unit:,.0f} {name}" if size / unit < 1e6 else f"{size / unit:.0e} {name}"
    return ""
