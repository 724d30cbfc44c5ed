"""The mathematics of group-relative policy optimisation: pure functions on packed tensors.

Packed means: N samples of lengths n_1..n_N are stored end to end. Every per-step quantity is a tensor [S], S = sum n_i,
beside `lengths` [N] (int64 step counts) and `group` [N] (int64 ids of the groups that may be compared). There is no
padding and so no mask. A sample is one contiguous run of steps: a completion of a prompt, an episode or a piece of it.

    rewards -> rewards [S]                    shaping
    rewards [S] -> advantages [S]             returns, advantages, outcomes, baseline
    log-probabilities [S] -> losses [S]       surrogates, sequence, divergences
    lengths [N] -> weights [S]                weights
    all of it -> the loss                     loss: policy_loss, the one function that both arenas minimise

What a configuration can name stands in three tables: LOSSES, ESTIMATORS and DIVERGENCES.

Since a weight belongs to its step, any split of the steps into micro-batches adds up to the same gradient.
"""

from grouprl.objective.advantages import (
    batch_returns,
    degenerate_fraction,
    gigpo,
    leave_one_out,
    outcome,
    shared_states,
    standardise,
    timestep,
)
from grouprl.objective.baseline import BaselineBatch, BaselineFit, fit_baseline
from grouprl.objective.correction import sampler_correction
from grouprl.objective.divergences import (
    DIVERGENCES,
    bernoulli_kl,
    categorical_kl,
    gaussian_kl,
    k1,
    k2,
    k3,
    sampled_kl_loss,
)
from grouprl.objective.estimators import ESTIMATORS
from grouprl.objective.features import RandomFeatures, Sketch
from grouprl.objective.importance import effective_share, importance_weights, standardise_weighted
from grouprl.objective.level import Level, fit_level
from grouprl.objective.loss import Fixed, LossTerms, policy_loss
from grouprl.objective.losses import LOSSES, Objective
from grouprl.objective.outcomes import gdpo, maxrl, opo, pass_at_k, reinforce_pp
from grouprl.objective.packed import (
    discounted_suffix_sum,
    last_index,
    position,
    remaining,
    segment_ids,
    segment_sum,
)
from grouprl.objective.pulled_baseline import fit_pulled_baseline
from grouprl.objective.returns import gae, returns_to_go
from grouprl.objective.sequence import gspo_log_ratio, gspo_token_log_ratio, importance_logp, off_policy_mask
from grouprl.objective.shaping import kl_in_reward, soft_overlong
from grouprl.objective.surrogates import beyond, cispo, clipped, dppo, dppo_mask, ratio, sapo, spo, vespo
from grouprl.objective.weights import constant_length, sample_mean, sample_sum, token_mean

__all__ = [
    "DIVERGENCES",
    "ESTIMATORS",
    "LOSSES",
    "BaselineBatch",
    "BaselineFit",
    "Fixed",
    "Level",
    "LossTerms",
    "Objective",
    "RandomFeatures",
    "Sketch",
    "batch_returns",
    "bernoulli_kl",
    "beyond",
    "categorical_kl",
    "cispo",
    "clipped",
    "constant_length",
    "degenerate_fraction",
    "discounted_suffix_sum",
    "dppo",
    "dppo_mask",
    "effective_share",
    "fit_baseline",
    "fit_level",
    "fit_pulled_baseline",
    "gae",
    "gaussian_kl",
    "gdpo",
    "gigpo",
    "gspo_log_ratio",
    "gspo_token_log_ratio",
    "importance_logp",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "kl_in_reward",
    "last_index",
    "leave_one_out",
    "maxrl",
    "off_policy_mask",
    "opo",
    "outcome",
    "pass_at_k",
    "policy_loss",
    "position",
    "ratio",
    "reinforce_pp",
    "remaining",
    "returns_to_go",
    "sample_mean",
    "sample_sum",
    "sampled_kl_loss",
    "sampler_correction",
    "sapo",
    "segment_ids",
    "segment_sum",
    "shared_states",
    "soft_overlong",
    "spo",
    "standardise",
    "standardise_weighted",
    "timestep",
    "token_mean",
    "vespo",
]
