"""Random batches for estimators of whole samples, and what holds of each such estimator."""

import torch
from hypothesis import strategies as st
from torch.testing import assert_close


@st.composite
def batches(draw, rewards=torch.randn):
    """Rewards ``[S]`` float64, lengths ``[N]`` and groups ``[N]`` of up to 8 samples; ``rewards`` draws the first."""
    samples = draw(st.integers(1, 8))
    lengths = draw(st.lists(st.integers(1, 6), min_size=samples, max_size=samples))
    group = draw(st.lists(st.integers(0, 2), min_size=samples, max_size=samples))
    values = rewards(sum(lengths), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    return values.double(), torch.tensor(lengths), torch.tensor(group)


def check_permuted(estimate, batch, random):
    """Permuting the samples permutes their advantages."""
    rewards, lengths, group = batch
    order = list(range(len(lengths)))
    random.shuffle(order)
    permuted = (torch.cat([rewards.split(lengths.tolist())[i] for i in order]), lengths[order], group[order])
    pieces = estimate(*batch).split(lengths.tolist())
    assert_close(estimate(*permuted), torch.cat([pieces[i] for i in order]), rtol=1e-9, atol=1e-9)
