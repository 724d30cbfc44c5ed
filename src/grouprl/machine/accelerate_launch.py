"""What ``accelerate launch`` asks of a script besides its processes: variables that accelerate and transformers read.

The names are those of accelerate 1.15 (accelerate/utils/launch.py). The launcher sets most of them always, at values
that ask for nothing. FSDP_* say something only beside ACCELERATE_USE_FSDP, as do those of DeepSpeed beside theirs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from grouprl.errors import refuse

_NEVER = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
_FSDP = {
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_STATE_DICT_TYPE": "state_dict_type",
    "FSDP_AUTO_WRAP_POLICY": "auto_wrap_policy",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "transformer_layer_cls_to_wrap",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activation_checkpointing_offload",
    "FSDP_OFFLOAD_PARAMS": "cpu_offload",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "cpu_ram_efficient_loading",
    "FSDP_IGNORED_MODULES": "ignored_modules",
}
"""Variables that FSDP2 reads, and the entries of transformers' ``fsdp_config`` of the same meaning."""

_UNLESS_SAID = {"state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "NO_WRAP"}
"""What accelerate does where the launcher says nothing."""


def never_offered(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the launcher asks for that no training here can do, and what to do about it, one sentence each."""
    found = [_problem(name, environ[name], option) for name, option in _NEVER.items() if _on(environ, name)]
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "")
    if backend.strip().lower() not in ("", "no"):
        found.append(_problem("ACCELERATE_DYNAMO_BACKEND", backend, "--dynamo_backend"))
    if mixed_precision(environ) not in ("no", "bf16"):
        found.append(_problem("ACCELERATE_MIXED_PRECISION", mixed_precision(environ), "--mixed_precision"))
    return found


def mixed_precision(environ: Mapping[str, str] = os.environ) -> str:
    """``no``, or the type of numbers that products are to be computed in."""
    return environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() or "no"


def asks_for_cpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to stay on the CPU where there is a GPU."""
    return _on(environ, "ACCELERATE_USE_CPU")


def fsdp_version(environ: Mapping[str, str] = os.environ) -> str | None:
    """Which FSDP is to shard weights, or None if that is not asked for. The launcher means 1 unless it is told."""
    return (environ.get("FSDP_VERSION", "").strip() or "1") if _on(environ, "ACCELERATE_USE_FSDP") else None


def fsdp_config(environ: Mapping[str, str] = os.environ) -> dict[str, str | list[str]]:
    """How FSDP2 is to shard weights, as transformers' ``fsdp_config`` has it."""
    found: dict[str, str | list[str]] = dict(_UNLESS_SAID)
    for name, entry in _FSDP.items():
        value = environ.get(name, "").strip()
        if value:
            found[entry] = value.split(",") if entry == "transformer_layer_cls_to_wrap" else value
    return found


def refuse_all_of_it(what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError if the launcher asks ``what`` for more than processes: sharding, low precision and the like."""
    found = never_offered(environ)
    if fsdp_version(environ) is not None:
        found.append(_problem("ACCELERATE_USE_FSDP", environ["ACCELERATE_USE_FSDP"], "--use_fsdp", what))
    if mixed_precision(environ) == "bf16":
        found.append(_problem("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision", what))
    refuse(found)


def _problem(name: str, value: str, option: str, what: str = "") -> str:
    return (
        f"accelerate launch {option} ({name}={value}) is not offered{f' for {what}' if what else ''}; leave it out, on "
        "the command line and in accelerate's configuration file"
    )


def _on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in ("1", "true", "yes", "y", "t", "on")
