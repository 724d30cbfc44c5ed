"""The machine and the versions that computed a run: a checkpoint names them, and a resumed run compares them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from grouprl.machine.processor import described_processor


def describe_machine(*, compiled: bool, device: torch.device | str = "cpu", **others: str) -> dict[str, Any]:
    """What the last digits of a run depend on beside its settings, as plain values.

    Args:
        compiled: whether compiled code of grouprl's own is in use.
        others: further entries, such as versions of packages that take part.
    """
    kind = torch.device(device)
    gpu = torch.cuda.get_device_name(kind) if kind.type == "cuda" else None
    return {
        "compiled code": compiled,
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "processor": gpu or f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_model_name()}".strip(),
        **others,
    }


def other_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs from what was recorded ``before``, in words; None if nothing does."""
    differences = [
        f"{name} is {_said(now[name])} (was {_said(before[name])})"
        for name in now
        if name in before and before[name] != now[name]
    ]
    return ", ".join(differences) or None


def _said(value: Any) -> Any:
    return {True: "in use", False: "not in use"}[value] if isinstance(value, bool) else value


def _model_name() -> str:
    said = described_processor()
    return said.get("model name", "") if said else platform.processor()
