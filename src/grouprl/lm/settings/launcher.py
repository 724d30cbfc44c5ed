"""Settings that ``accelerate launch`` gives in the place of the script, as transformers takes them from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from grouprl.lm.settings.fields import Fields
from grouprl.lm.settings.fsdp import of_words
from grouprl.machine.accelerate_launch import (
    asks_for_cpu,
    fsdp_config,
    fsdp_version,
    mixed_precision,
    never_offered,
)


def of_launcher(c: Fields, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The settings that the launcher asks for. What the script says of how to shard wins over the launcher."""
    found: dict[str, Any] = {}
    if asks_for_cpu(environ):
        found["use_cpu"] = True
    if c.bf16 is None and mixed_precision(environ) == "bf16":
        found["bf16"] = True
    if fsdp_version(environ) == "2":
        found["fsdp"] = c.fsdp or True
        found["fsdp_config"] = {**fsdp_config(environ), **of_words(c.fsdp), **(c.fsdp_config or {})}
    return found


def launcher_problems(c: Fields, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the launcher asks for in vain, and what to do about it, one sentence each."""
    found = never_offered(environ)
    if c.bf16 is False and mixed_precision(environ) == "bf16":
        found.append(
            "accelerate launch --mixed_precision bf16 (ACCELERATE_MIXED_PRECISION) and bf16=False say two things; "
            "leave one of them out"
        )
    version = fsdp_version(environ)
    if version not in (None, "2"):
        found.append(
            f"accelerate launch --use_fsdp asks for version {version} of FSDP (FSDP_VERSION={version}), which is not "
            "offered; launch with --fsdp_version 2"
        )
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip()
    if steps not in ("", "auto", "1", str(c.gradient_accumulation_steps)):
        found.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} and gradient_accumulation_steps="
            f"{c.gradient_accumulation_steps} say two things; set gradient_accumulation_steps, and unset the variable"
        )
    return found
