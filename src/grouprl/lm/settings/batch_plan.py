"""What one generation and one optimizer step hold: TRL's batch arithmetic, translated exactly.

In TRL a *micro-step* is ``per_device_train_batch_size`` completions on each process. ``gradient_accumulation_steps`` of
them make an optimizer step, ``steps_per_generation`` of them are sampled at once. So, over all processes::

    completions per optimizer step = per_device_train_batch_size * gradient_accumulation_steps * processes
    completions per generation     = per_device_train_batch_size * steps_per_generation * processes
    prompts per generation         = completions per generation / num_generations

Here a micro-step has no meaning of its own: ``tokens_per_micro_batch`` bounds the memory, and no number depends on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grouprl.errors import UsageError
from grouprl.lm.settings.config import GRPOConfig


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a generation and of an optimizer step; counts are over all processes together."""

    group_size: int
    """Completions per prompt."""
    samples_per_step: int
    """Completions per optimizer step; a multiple of world_size, but not always of group_size."""
    steps_per_generation: int
    """Optimizer steps that share out one generation among them, in each iteration."""
    num_iterations: int
    """Passes over a generation."""
    world_size: int

    @property
    def samples_per_generation(self) -> int:
        """Completions sampled at once; a multiple of world_size * group_size."""
        return self.samples_per_step * self.steps_per_generation

    @property
    def prompts_per_generation(self) -> int:
        """Prompts sampled at once; a multiple of world_size."""
        return self.samples_per_generation // self.group_size

    @property
    def prompts_per_step(self) -> float:
        """Prompts per optimizer step; whole unless several steps share a generation and cut through its groups."""
        return self.samples_per_step / self.group_size

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps from one generation to the next."""
        return self.steps_per_generation * self.num_iterations


def batch_plan(config: GRPOConfig, world_size: int = 1) -> BatchPlan:
    """The batch that `config` describes on `world_size` processes, each of which holds whole groups.

    Several generations per optimizer step (steps_per_generation below gradient_accumulation_steps) are the same
    completions sampled at once, since the model does not change between them.

    Raises UsageError, with the nearest values that do, if the numbers do not divide.
    """
    if config.prompts_per_step is not None:
        return _native(config, config.prompts_per_step, world_size)
    per_device, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    micro_steps = _micro_steps_per_generation(config, world_size)
    if micro_steps < accumulation and config.num_iterations == 1 and accumulation % micro_steps == 0:
        micro_steps = accumulation
    if micro_steps % accumulation:
        raise UsageError(
            f"a generation of {micro_steps} micro-steps cannot be shared out to optimizer steps of "
            f"gradient_accumulation_steps={accumulation}; set steps_per_generation to "
            f"{_choices(_multiples_near(micro_steps, accumulation))}"
            + (" (with num_iterations above 1 it cannot be less)" if config.num_iterations > 1 else "")
        )
    per_process = per_device * micro_steps
    if per_process % config.num_generations:
        raise UsageError(_indivisible(config, world_size, micro_steps))
    return BatchPlan(
        group_size=config.num_generations,
        samples_per_step=per_device * accumulation * world_size,
        steps_per_generation=micro_steps // accumulation,
        num_iterations=config.num_iterations,
        world_size=world_size,
    )


_COMPLETION = 500
"""Bytes of the smallest completion, as an object with its token and log-probability."""
_TOKEN = 12
"""Bytes of the place for a token and its log-probability, which a group has at once."""


def least_bytes(config: GRPOConfig, plan: BatchPlan) -> dict[str, float]:
    """The least memory that a generation and an evaluation take, by the settings that decide it."""
    held = plan.samples_per_generation
    evaluated = config.num_generations_eval or 1
    longest = config.max_completion_length
    return {
        f"num_generations={plan.group_size} with {plan.prompts_per_generation} prompts at once": _COMPLETION * held,
        f"num_generations_eval={evaluated}": _COMPLETION * evaluated,
        f"max_completion_length={longest} with num_generations={plan.group_size}": _TOKEN * longest * plan.group_size,
    }


def total_steps(config: GRPOConfig, plan: BatchPlan, n_prompts: int | None) -> int:
    """Optimizer steps of the run: max_steps, or as many as num_train_epochs over `n_prompts` prompts hold.

    n_prompts is None for a stream. Raises UsageError if a stream comes without max_steps.
    """
    if config.max_steps > 0:
        return config.max_steps
    if n_prompts is None:
        raise UsageError("the dataset is a stream of unknown length and max_steps is not set; set max_steps")
    # The small subtraction keeps 0.1 * 30 from exceeding 3.
    return math.ceil(config.num_train_epochs * steps_per_epoch(plan, n_prompts) - 1e-9)


def steps_per_epoch(plan: BatchPlan, n_prompts: int) -> int:
    """Optimizer steps on one pass over `n_prompts` prompts.

    As in TRL, prompts at the end of an epoch that fill no generation are left out of it. A generation larger than the
    dataset (for which TRL does nothing) is an epoch.
    """
    return max(1, n_prompts // plan.prompts_per_generation) * plan.updates_per_generation


def interval(steps: float, total: int) -> int:
    """Optimizer steps between two events: `steps` itself, or that share of `total` if it is below 1; at least 1."""
    return max(1, math.ceil(steps * total) if steps < 1 else int(steps))


def _native(config: GRPOConfig, prompts: int, world_size: int) -> BatchPlan:
    if prompts % world_size:
        raise UsageError(
            f"prompts_per_step={prompts} cannot be shared out to {world_size} processes; "
            f"set it to {_choices(_multiples_near(prompts, world_size))}"
        )
    return BatchPlan(
        group_size=config.num_generations,
        samples_per_step=prompts * config.num_generations,
        steps_per_generation=config.steps_per_generation or 1,
        num_iterations=config.num_iterations,
        world_size=world_size,
    )


def _micro_steps_per_generation(config: GRPOConfig, world_size: int) -> int:
    if config.generation_batch_size is None:
        return config.steps_per_generation or config.gradient_accumulation_steps
    per_micro_step = config.per_device_train_batch_size * world_size
    if config.generation_batch_size % per_micro_step:
        raise UsageError(
            f"generation_batch_size={config.generation_batch_size} must be a multiple of per_device_train_batch_size="
            f"{config.per_device_train_batch_size} times {world_size} process(es); set it to "
            f"{_choices(_multiples_near(config.generation_batch_size, per_micro_step))}"
        )
    return config.generation_batch_size // per_micro_step


def _indivisible(config: GRPOConfig, world_size: int, micro_steps: int) -> str:
    per_device, group = config.per_device_train_batch_size, config.num_generations
    per_process = per_device * micro_steps
    where = f" on each of {world_size} processes, which hold whole groups," if world_size > 1 else ""
    unit = group // math.gcd(group, micro_steps)
    divisors = [d for d in range(2, per_process + 1) if per_process % d == 0]
    nearest = sorted(divisors, key=lambda d: abs(d - group))[:2]
    return (
        f"per_device_train_batch_size={per_device} times {micro_steps} micro-step(s) are {per_process} completions "
        f"per generation{where} and not a multiple of num_generations={group}; set "
        + (f"num_generations to {_choices(sorted(nearest))}, or " if nearest else "")
        + f"per_device_train_batch_size to {_choices(_multiples_near(per_device, unit))}, "
        "or give prompts_per_step instead"
    )


def _multiples_near(value: int, unit: int) -> list[int]:
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def _choices(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
