"""Log-probabilities of a whole generation, where its rewards depend on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grouprl.lm.packed.packing import Spans
from grouprl.lm.policy.log_probs import MicroBatch
from grouprl.lm.policy.policy import Policy


def old_and_reference(
    policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], group: Sequence[int],
    lengths: Tensor, turns: Sequence[Spans] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities ``[S]`` in nats of all samples, by the policy as it learns and by the reference.

    Processes that train together share out the samples.

    Args:
        prompts, completions, group, turns: as of :meth:`LogProbs.micro_batches`.
        lengths: ``[N]`` int64, the numbers of the model's tokens in the samples.

    Raises TrainingError if some are not finite.
    """
    assert policy.reference is not None
    own = policy.share([len(c) for c in completions], group)
    of_own = policy.log_probs.micro_batches(
        prompts, [completions[i] for i in own], [group[i] for i in own],
        None if turns is None else [turns[i] for i in own],
    )  # fmt: skip
    batches = [MicroBatch(batch.groups, torch.tensor(own)[batch.samples]) for batch in of_own]
    with policy.together():
        logp_old = policy.log_probs.without_gradient(batches, lengths)
    with policy.reference.in_place(), policy.together():
        logp_ref = policy.reference.log_probs(batches, lengths)
    policy.ranks.add(logp_old, logp_ref)  # each is 0 where another process has it
    return logp_old, logp_ref
