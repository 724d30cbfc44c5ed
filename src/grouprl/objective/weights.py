"""Aggregation as a weight per step [S]: the loss is sum over steps of weight * loss.

Computed once per optimizer step, before the first micro-batch, the weights make the gradient the same for every way of
splitting the batch. Each function says which mean it is and who uses it. All return float32 on the device of `lengths`.

Samples that are not to be learned from, such as overlong ones, are dropped before; denominators count what is given.
Where they should count more, `n_samples` and `n_steps` say so: the samples dropped, or the rest of an optimizer step of
which only a part is present. Which loss uses which: losses.py.
"""

import torch
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.objective.packed import accumulator_dtype, check_packed, segment_ids


def _steps(lengths: Tensor) -> int:
    total = check_packed(lengths)
    if total == 0:
        raise UsageError("there is no step to weigh: all lengths are 0; drop empty batches first.")
    return total


def _denominator(name: str, given: int | None, present: int) -> int:
    if given is None:
        return present
    if given < present:
        raise UsageError(
            f"{name} is {given} but {present} are present; it counts those of the whole optimizer step, these included."
        )
    return given


def sample_mean(lengths: Tensor, n_samples: int | None = None) -> Tensor:
    """[S]: 1 / (N n_i): mean over samples of the mean over their steps (GRPO, arXiv 2402.03300 equation 3).

    N is n_samples, by default the samples given. Raises UsageError if a sample is empty, for it has no mean, or if
    n_samples is below the number given.
    """
    _steps(lengths)
    if bool((lengths == 0).any()):
        empty = int((lengths == 0).nonzero()[0])
        raise UsageError(f"sample {empty} has length 0 and so no mean over its steps; drop empty samples first.")
    samples = _denominator("n_samples", n_samples, lengths.shape[0])
    per_sample = 1.0 / (samples * lengths.to(accumulator_dtype(lengths)))
    return per_sample.float()[segment_ids(lengths)]


def token_mean(lengths: Tensor, n_steps: int | None = None) -> Tensor:
    """[S]: 1 / S: mean over all steps, so long samples weigh more (DAPO, arXiv 2503.14476 section 3.3).

    S in the denominator is n_steps, by default the steps given. Raises UsageError if n_steps is below their number.
    """
    total = _steps(lengths)
    return torch.full((total,), 1.0 / _denominator("n_steps", n_steps, total), device=lengths.device)


def constant_length(lengths: Tensor, length: float, n_samples: int | None = None) -> Tensor:
    """[S]: 1 / (N L): sum over steps over a constant length L, mean over samples (Dr. GRPO, arXiv 2503.20783).

    N is n_samples, by default the samples given. Raises UsageError unless length > 0, or if n_samples is below the
    number given.
    """
    total = _steps(lengths)
    if length <= 0:
        raise UsageError(f"length must be above 0, got {length}; use the longest sample allowed.")
    samples = _denominator("n_samples", n_samples, lengths.shape[0])
    return torch.full((total,), 1.0 / (samples * length), device=lengths.device)


def sample_sum(lengths: Tensor, n_samples: int | None = None) -> Tensor:
    """[S]: 1 / N: sum over the steps of a sample, mean over samples (LUSPO, arXiv 2602.05261).

    N is n_samples, by default the samples given. Raises UsageError if n_samples is below the number given.
    """
    return constant_length(lengths, 1.0, n_samples)
