"""Two numbers about the groups of a generation that say whether a reward and a sampler do what they should."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from grouprl.lm.generate.samples import Samples


def describe_groups(samples: Samples) -> dict[str, float]:
    """``length_reward_correlation`` and ``frac_duplicates`` of a generation.

    The first is the correlation of length and reward within groups, in [-1, 1]: both are measured from the mean of
    their group, so a prompt that asks for long answers and is easy does not count. It is missing where no group has
    both. The second is the share of completions that are equal, token by token, to another one of their group.
    """
    found = {"frac_duplicates": _duplicates(samples)}
    groups = samples.group
    lengths, returns = _centred(samples.lengths.double(), groups), _centred(samples.returns.double(), groups)
    size = float(lengths.norm() * returns.norm())
    if size > 1e-9:  # neither is constant but for rounding
        found["length_reward_correlation"] = float((lengths * returns).sum()) / size
    return found


def _duplicates(samples: Samples) -> float:
    of_group = list(zip(samples.group.tolist(), map(tuple, samples.completions), strict=True))
    counts = Counter(of_group)
    return sum(counts[sample] > 1 for sample in of_group) / max(1, len(of_group))


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    """``[N]`` values less the mean of their group."""
    n = int(groups.max()) + 1
    sums = values.new_zeros(n).index_add_(0, groups, values)
    counts = values.new_zeros(n).index_add_(0, groups, values.new_ones(len(values)))
    return values - (sums / counts)[groups]
