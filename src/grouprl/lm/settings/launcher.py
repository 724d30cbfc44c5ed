"""Settings that ``accelerate launch`` gives in the place of the script, as transformers takes them from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.lm.settings.fsdp import mapping
from grouprl.machine.accelerate_launch import asks_for_cpu, fsdp_config, mixed_precision, never_offered


def with_launcher(
    settings: Mapping[str, Any], default: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> tuple[dict[str, Any], list[str]]:
    """The settings with those that the launcher asks for, and what has to be said of what it asks for in vain.

    What the script says of how to shard wins over the launcher.

    Args:
        settings: those that the script gives. default: the values of those that it does not give.
    """
    found, refused = dict(settings), never_offered(environ)
    if asks_for_cpu(environ):
        found["use_cpu"] = True
    if mixed_precision(environ) == "bf16":
        if found.get("bf16") is None:
            found["bf16"] = True
        elif str(found["bf16"]).lower() == "false":
            refused.append(
                "accelerate launch --mixed_precision bf16 (ACCELERATE_MIXED_PRECISION) and bf16=False say two things; "
                "leave one of them out"
            )
    try:
        if (launched := fsdp_config(environ)) is not None:
            found["fsdp"] = found.get("fsdp") or True
            found["fsdp_config"] = {**launched, **(mapping(found.get("fsdp_config")) or {})}
    except UsageError as error:
        refused.append(str(error))
    except ValueError:  # of a setting that is no mapping, which is said where it is checked
        pass
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip()
    own = found.get("gradient_accumulation_steps", default["gradient_accumulation_steps"])
    if steps not in ("", "auto", "1", str(own)):
        refused.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} and gradient_accumulation_steps={shown(own)} say two "
            "things; set gradient_accumulation_steps, and unset the variable"
        )
    return found, refused
