"""The optimizer of language models: AdamW, its schedule, and its state in a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import UsageError, first_line, shown
from grouprl.learning.parameters import TrainedParameters
from grouprl.learning.shards import held
from grouprl.lm.settings.config import GRPOConfig

_log = logging.getLogger("grouprl")


def make_optimizer(parameters: TrainedParameters, config: GRPOConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused. Weights of two dimensions or more decay, others do not."""
    decayed, others = ([p for p in parameters.tensors if (p.dim() >= 2) is large] for large in (True, False))
    groups: list[dict[str, Any]] = [
        {"params": part, "weight_decay": decay}
        for part, decay in ((decayed, config.weight_decay), (others, 0.0))
        if part
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
        fused=parameters.tensors[0].device.type in ("cpu", "cuda"),
    )  # fmt: skip


_ASKED = 1 << 14
"""Entries of a parameter that are looked at."""


@torch.no_grad()
def warn_if_steps_vanish(parameters: TrainedParameters, learning_rate: float) -> None:
    """Warn if most bfloat16 weights are too large for a step of AdamW to move them.

    A step moves an entry by about the learning rate. It rounds to nothing if that is less than half the distance to the
    next number of bfloat16, which is 2^-7 for numbers from 1 to 2 and in proportion for others.
    """
    low = [held(p).flatten() for p in parameters.tensors if p.dtype == torch.bfloat16]
    if not low:
        return
    entries = torch.cat([x[:: max(1, len(x) // _ASKED)].float().abs() for x in low])
    half = torch.ldexp(torch.ones_like(entries), entries.frexp().exponent - 9) * (entries > 0)
    stuck = float((half > learning_rate).float().mean())
    if stuck > 0.5:
        weight, needed = float(entries.median()), float(half.median())
        _log.warning(
            "learning_rate=%g moves only %.0f %% of the weights that are trained in bfloat16: a step of that size "
            "rounds to nothing where numbers lie further apart, such as %.2g around the weight %.2g. Load the model "
            "with dtype=torch.float32 (products run in bfloat16 even so, where the processor has it), or set "
            "learning_rate above %.1g, which moves half of them",
            learning_rate, 100 * (1 - stuck), 2 * needed, weight, needed,
        )  # fmt: skip


def make_schedule(optimizer: torch.optim.Optimizer, config: GRPOConfig, total_steps: int) -> Any:
    """The learning-rate schedule of transformers that ``lr_scheduler_type`` names."""
    from transformers import get_scheduler

    warmup = config.warmup_steps
    steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    return get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=steps, num_training_steps=total_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )  # fmt: skip


def check_schedule(config: GRPOConfig) -> None:
    """Raises UsageError if ``lr_scheduler_kwargs`` do not fit the schedule that ``lr_scheduler_type`` names."""
    total = max(config.max_steps, int(config.warmup_steps) + 10)
    try:
        schedule = make_schedule(torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), config, total)
        for step in (0, total // 2, total):
            schedule.lr_lambdas[0](step)
    except Exception as error:  # of transformers, which says it in several ways
        given = config.lr_scheduler_kwargs
        raise UsageError(
            f"lr_scheduler_type={config.lr_scheduler_type!r} with lr_scheduler_kwargs={shown(given)} cannot be made: "
            f"{first_line(error)}; give the arguments that transformers.get_scheduler takes for this type"
        ) from error


def follow_settings(schedule: Any, rates: list[float]) -> None:
    """A schedule of :func:`make_schedule` that took up a checkpoint's state has its own rates and length again.

    Args:
        rates: base learning rate of each group of its optimizer.
    """
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = list(rates)
    for group, rate, part in zip(groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * part(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as named tensors and the rest as plain types, without pickle."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                rest[f"{number}.{name}"] = value
    return tensors, {"rest": rest, "groups": state["param_groups"]}


def stepped_by(optimizer: torch.optim.Optimizer) -> Callable[[str], Tensor | None]:
    """For a name in :func:`optimizer_state` the parameter whose state it is, or None."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def find(name: str) -> Tensor | None:
        number = name.partition(".")[0]
        return parameters[int(number)] if number.isdecimal() and int(number) < len(parameters) else None

    return find


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any], *, own_settings: bool
) -> None:
    """The inverse of :func:`optimizer_state`.

    Args:
        own_settings: it is that of :func:`make_optimizer`, and keeps its settings (betas, weight decay, ...), whatever
            those were that were saved.

    Raises ValueError if the state is that of other parameters.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *meta["rest"].items()]:
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    shapes = dict(enumerate(tuple(p.shape) for group in optimizer.param_groups for p in group["params"]))
    for number, entries in state.items():
        for name, value in entries.items():  # torch takes any shape, and writes outside of it
            if own_settings and isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shapes.get(number):
                raise ValueError(f"{name} of parameter {number} is {tuple(value.shape)}, not {shapes.get(number)}")
    groups, own = meta["groups"], [dict(group) for group in optimizer.param_groups]
    for group in groups:
        group.update({k: tuple(v) for k, v in group.items() if k == "betas"})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if own_settings:
        for group, mine in zip(optimizer.param_groups, own, strict=True):
            group.update(mine)
