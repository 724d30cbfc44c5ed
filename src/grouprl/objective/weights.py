"""Aggregation as a weight per step [S]: the loss is sum over steps of weight * loss.

Computed once per optimizer step, before the first micro-batch, the weights make the gradient the same for every way of
splitting the batch. Each function says which mean it is and who uses it. All return float32 on the device of `lengths`.
"""

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import accumulator_dtype, check_packed, check_per_sample, segment_ids


def _steps(lengths: Tensor) -> int:
    total = check_packed(lengths)
    if total == 0:
        raise UsageError("there is no step to weigh: all lengths are 0; drop empty batches first.")
    return total


def sample_mean(lengths: Tensor) -> Tensor:
    """[S]: 1 / (N n_i): mean over samples of the mean over their steps (GRPO, arXiv 2402.03300 equation 3).

    Raises UsageError if a sample is empty, for it has no mean.
    """
    _steps(lengths)
    if bool((lengths == 0).any()):
        empty = int((lengths == 0).nonzero()[0])
        raise UsageError(f"sample {empty} has length 0 and so no mean over its steps; drop empty samples first.")
    per_sample = 1.0 / (lengths.shape[0] * lengths.to(accumulator_dtype(lengths)))
    return per_sample.float()[segment_ids(lengths)]


def token_mean(lengths: Tensor) -> Tensor:
    """[S]: 1 / S: mean over all steps, so long samples weigh more (DAPO, arXiv 2503.14476 section 3.3)."""
    total = _steps(lengths)
    return torch.full((total,), 1.0 / total, device=lengths.device)


def constant_length(lengths: Tensor, length: float) -> Tensor:
    """[S]: 1 / (N L): sum over steps over a constant length L, mean over samples (Dr. GRPO, arXiv 2503.20783).

    Raises UsageError unless length > 0.
    """
    total = _steps(lengths)
    if length <= 0:
        raise UsageError(f"length must be above 0, got {length}; use the longest sample allowed.")
    return torch.full((total,), 1.0 / (lengths.shape[0] * length), device=lengths.device)


def group_mean(lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: 1 / (P sum_{i in g} n_i): mean over the P groups of the mean over all steps of a group.

    group [N] holds integer ids. Raises UsageError if all samples of a group are empty.
    """
    _steps(lengths)
    check_per_sample(lengths, group=group)
    names, index = torch.unique(group, return_inverse=True)
    steps = torch.zeros(names.shape[0], dtype=torch.int64, device=lengths.device).index_add(0, index, lengths.long())
    if bool((steps == 0).any()):
        empty = int(names[int((steps == 0).nonzero()[0])])
        raise UsageError(f"group {empty} has no steps and so no mean over them; drop empty groups first.")
    per_group = 1.0 / (names.shape[0] * steps.to(accumulator_dtype(lengths)))
    per_sample: Tensor = per_group.float()[index]
    return per_sample[segment_ids(lengths)]
