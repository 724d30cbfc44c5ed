"""Segment operations on packed steps: N samples of lengths n_1..n_N stored end to end, no padding.

Notation: S = sum of the lengths; a tensor [S] holds one number per step, a tensor [N] one per sample.
"""

import torch
from torch import Tensor

from grouprl.errors import TrainingError, UsageError


def check_packed(lengths: Tensor, **per_step: Tensor) -> int:
    """Return S after checking that `lengths` [N] describes every tensor given by name (first dimension S).

    Raises UsageError where it does not.
    """
    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise UsageError(
            f"lengths must be a 1-d integer tensor [N], got shape {list(lengths.shape)} of {lengths.dtype}; "
            "pass one step count per sample."
        )
    if lengths.numel() and int(lengths.min()) < 0:
        raise UsageError(f"lengths must not be negative, got {int(lengths.min())}; pass one step count per sample.")
    total = int(lengths.sum())
    for name, x in per_step.items():
        if x.ndim == 0 or x.shape[0] != total:
            raise UsageError(
                f"{name} has shape {list(x.shape)} but the lengths add up to {total} steps; "
                "pass one entry per step of every sample, end to end."
            )
    return total


def check_per_sample(lengths: Tensor, **per_sample: Tensor) -> None:
    """Raise UsageError unless every tensor given by name has one entry per sample (first dimension N)."""
    for name, x in per_sample.items():
        if x.ndim == 0 or x.shape[0] != lengths.shape[0]:
            raise UsageError(
                f"{name} has shape {list(x.shape)} but there are {lengths.shape[0]} samples; pass one entry per sample."
            )


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64, so that sums of float32 are all but exact; float32 on Apple's GPU, which has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def check_floats(**tensors: Tensor) -> None:
    """Raises UsageError for a tensor that holds no floating-point numbers: what is computed of it would be cut off."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UsageError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert with .float().")


def check_finite(advantages: Tensor) -> None:
    """Raises TrainingError unless every advantage is finite."""
    wrong = (~torch.isfinite(advantages)).flatten().nonzero()
    if len(wrong):
        raise TrainingError(
            f"an advantage is {float(advantages.flatten()[wrong[0, 0]])}, and no batch can be centred with it; check "
            "what the rewards are divided by, or scale them"
        )


def segment_ids(lengths: Tensor) -> Tensor:
    """[S] int64: the index of the sample each step belongs to."""
    check_packed(lengths)
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)


def position(lengths: Tensor) -> Tensor:
    """[S] int64: 0-based index of each step within its sample."""
    total = check_packed(lengths)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(total, device=lengths.device) - torch.repeat_interleave(starts, lengths, output_size=total)


def remaining(lengths: Tensor) -> Tensor:
    """[S] int64: how many steps of the same sample come after each step (0 at the last one)."""
    total = check_packed(lengths)
    last = lengths.cumsum(0) - 1
    return torch.repeat_interleave(last, lengths, output_size=total) - torch.arange(total, device=lengths.device)


def last_index(lengths: Tensor) -> Tensor:
    """[N] int64: where in [S] each sample's last step lies. Raises UsageError if a sample has no step."""
    check_packed(lengths)
    if bool((lengths == 0).any()):
        empty = int((lengths == 0).nonzero()[0])
        raise UsageError(f"sample {empty} has length 0 and so no last step; drop empty samples first.")
    return lengths.cumsum(0) - 1


def segment_sum(x: Tensor, lengths: Tensor) -> Tensor:
    """[N]: the sum of x [S] over each sample, added up in float64 and returned in x's dtype; 0 for an empty sample."""
    check_packed(lengths, x=x)
    wide = x.to(accumulator_dtype(x)) if x.is_floating_point() else x
    sums = torch.zeros(lengths.shape[0], dtype=wide.dtype, device=x.device)
    if x.is_cuda:  # there index_add adds in whatever order threads arrive
        return sums.index_put((segment_ids(lengths),), wide, accumulate=True).to(x.dtype)
    return sums.index_add(0, segment_ids(lengths), wide).to(x.dtype)


def discounted_suffix_sum(x: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """[S]: y_t = x_t + discount * y_{t+1} within each sample, and y = x at its last step.

    A doubling scan: after the pass with stride s, y_t holds the discounted sum of the next 2 s steps, so
    log2(longest length) passes over [S] do, and rounding grows with the number of passes, not of steps. The result
    at a step depends on the steps from it to the end of its sample alone, in the same order whatever is packed around.
    Raises UsageError if lengths do not sum to S or discount lies outside [0, 1].
    """
    check_packed(lengths, x=x)
    if not 0.0 <= discount <= 1.0:
        raise UsageError(f"discount must lie in [0, 1], got {discount}.")
    y = x.clone()
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest <= 1:
        return y
    steps_left = remaining(lengths)
    stride = 1
    while stride < longest and (factor := discount**stride) > 0.0:
        # torch.where and not a product with the mask: a neighbour's inf must not become NaN here.
        ahead = torch.where(steps_left[:-stride] >= stride, y[stride:], 0.0)
        y[:-stride].add_(ahead, alpha=factor)
        stride *= 2
    return y
