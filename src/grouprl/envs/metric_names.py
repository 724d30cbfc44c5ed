"""What metrics are called in trackers: in groups, as in Stable-Baselines3. The metrics file has the bare names."""

from __future__ import annotations

from collections.abc import Mapping

_ROLLOUT = frozenset(
    ("return_mean", "return_batch", "length_mean", "episodes", "batch_steps", "reward_mean", "avg_reward", "sticky")
)
_TIME = frozenset(("step", "update", "train_seconds", "steps_per_second", "memory_gb", "cpu_wait"))

NOW_AND_THEN = frozenset(
    (
        "eval_return", "gamma", "policy_std", "explained_variance", "reuse_effective", "shared_states",
        "degenerate_groups", "policy_loss", "kl", "approx_kl", "clip_fraction", "grad_norm", "agreement", "epochs",
        "optimizer_steps", "time_advantages", "time_update", "memory_gb", "cpu_wait",
    )
)  # fmt: skip
"""Metrics that not every update has: those of an evaluation, of learning from a batch, and of some settings."""


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
