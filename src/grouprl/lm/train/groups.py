"""Two numbers about the groups of a generation that say whether a reward and a sampler do what they should."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import torch
from torch import Tensor

from grouprl.lm.generate.samples import Samples
from grouprl.objective.packed import last_index, segment_sum


def describe_groups(samples: Samples) -> dict[str, float]:
    """``length_reward_correlation`` and ``frac_duplicates`` of a generation.

    The first is the correlation of length and reward within groups, in [-1, 1]: both are measured from the mean of
    their group, so a prompt that asks for long answers and is easy does not count. It is missing where no group has
    both. The second is the share of completions that are equal, token by token, to another one of their group. An
    episode counts as one completion, however many samples it was divided into.
    """
    _, parts = torch.unique_consecutive(samples.episode, return_counts=True)
    first = last_index(parts) - parts + 1
    groups = samples.group[first]
    found = {"frac_duplicates": _duplicates(samples, parts, groups)}
    lengths = _centred(segment_sum(samples.lengths.double(), parts), groups)
    returns = _centred(samples.returns[first].double(), groups)
    size = float(lengths.norm() * returns.norm())
    if size > 1e-9:  # neither is constant but for rounding
        found["length_reward_correlation"] = float((lengths * returns).sum()) / size
    return found


def _duplicates(samples: Samples, parts: Tensor, groups: Tensor) -> float:
    completions = iter(map(tuple, samples.completions))
    episodes = [tuple(islice(completions, n)) for n in parts.tolist()]
    of_group = list(zip(groups.tolist(), episodes, strict=True))
    counts = Counter(of_group)
    return sum(counts[sample] > 1 for sample in of_group) / max(1, len(of_group))


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    """``[N]`` values less the mean of their group."""
    n = int(groups.max()) + 1
    sums = values.new_zeros(n).index_add_(0, groups, values)
    counts = values.new_zeros(n).index_add_(0, groups, values.new_ones(len(values)))
    return values - (sums / counts)[groups]
