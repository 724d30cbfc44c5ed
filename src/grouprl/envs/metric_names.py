"""What metrics are called in trackers: in groups, as in Stable-Baselines3. The metrics file has the bare names."""

from __future__ import annotations

from collections.abc import Mapping

_ROLLOUT = frozenset(
    ("return_mean", "return_batch", "length_mean", "episodes", "batch_steps", "reward_mean", "avg_reward", "sticky")
)
_TIME = frozenset(("step", "update", "train_seconds", "steps_per_second", "memory_gb", "cpu_wait"))


def tracked_name(metric: str) -> str:
    """The name of ``metric`` in trackers: ``rollout/``, ``time/``, ``eval/`` or ``train/`` and its own."""
    if metric.startswith("eval_"):
        return f"eval/{metric.removeprefix('eval_')}"
    if metric in _TIME or metric.startswith("time_"):
        return f"time/{metric.removeprefix('time_')}"
    return f"{'rollout' if metric in _ROLLOUT else 'train'}/{metric}"


def tracked(metrics: Mapping[str, float]) -> dict[str, float]:
    """``metrics`` under their names in trackers."""
    return {tracked_name(name): value for name, value in metrics.items()}
