"""The rules for runs of language models."""

from __future__ import annotations

import numpy as np

from grouprl.doctor.signs import (
    ENOUGH_ROWS,
    clipped,
    far_below,
    flat,
    machine_busy,
    memory_grows,
    rate_below_precision,
    rate_spent,
    risen,
)
from grouprl.doctor.table import Diagnosis, Rule, Table

GOOD = 0.9
"""Greedy accuracy, or mean reward, from which a task counts as solved; a right answer is worth 1 in the tasks here."""


def solved(table: Table) -> bool:
    """Whether the last evaluation is right nine times in ten; where there is no recent one, whether the mean reward is.

    An evaluation says nothing of what was learned after it: one from before the last third of the run counts no more.
    """
    accuracy = table.recent("eval_accuracy")
    return bool(accuracy[-1] >= GOOD) if len(accuracy) else table.late("reward") >= GOOD


def _copies(table: Table) -> bool:
    return table.late("frac_duplicates") >= 0.95


def _cut(table: Table) -> bool:
    """Whether nine of ten completions are cut. Episodes may end so by the time limit of their environment."""
    if len(table.values("episodes/truncated")):
        return False
    return table.late("completions/clipped_ratio") >= 0.9


def _never_moved(table: Table) -> bool:
    """Whether no step of the run had a gradient."""
    norms = table.values("grad_norm")
    return len(norms) > 0 and not norms.any()


def _without_signal(table: Table) -> bool:
    """Whether 95 % of the groups have equal rewards, in the median over the last third, and the task is unsolved.

    The line is high because runs learn well from few groups: of answers that are right or wrong, most groups of a good
    run are all right, or all wrong still. A run whose weights never moved has solved nothing, whatever its reward is.
    """
    return (
        len(table.values("reward")) >= ENOUGH_ROWS
        and table.late("frac_reward_zero_std") >= 0.95
        and (not solved(table) or _never_moved(table))
        and not _cut(table)
    )


def no_signal(table: Table) -> Diagnosis | None:
    """In 95 % of the groups all rewards are equal, and the task is not solved, or no weight has ever moved.

    A group teaches by what tells its samples apart. `duplicates` and `all_truncated` name reasons for this. Where one
    of them holds, it speaks alone.
    """
    if not _without_signal(table) or (_copies(table) and not solved(table)):
        return None
    moved = "" if not _never_moved(table) else ", and no weight has moved since the run began"
    if solved(table):
        return Diagnosis(
            "no-signal",
            f"in {table.late('frac_reward_zero_std'):.0%} of the groups all rewards are equal (mean reward "
            f"{table.late('reward'):.3g}){moved}",
            "Read transcripts.html: either the model can do the task already, or the reward says the same of every "
            "completion. Take harder prompts, or a reward that tells good completions from bad ones.",
        )
    return Diagnosis(
        "no-signal",
        f"in {table.late('frac_reward_zero_std'):.0%} of the groups all rewards are equal (mean reward "
        f"{table.late('reward'):.3g}), so they teach nothing{moved}",
        "Take an easier task or a graded reward, raise num_generations, or set temperature=1 or dynamic_sampling=true.",
    )


def duplicates(table: Table) -> Diagnosis | None:
    """95 % of the completions are copies of another one in their group, which is why the groups have no signal.

    Copies alone are no illness: short answers of a good model repeat.
    """
    if not _without_signal(table) or not _copies(table) or solved(table):
        return None
    settings = table.settings
    usual = settings.get("temperature", 1.0) >= 1 and settings.get("top_p", 1.0) == 1 and not settings.get("top_k")
    sampling = "" if usual and not settings.get("min_p") else "Set temperature=1, top_p=1, top_k=0 and min_p=null. "
    return Diagnosis(
        "duplicates",
        f"{table.late('frac_duplicates'):.0%} of the completions are copies of another one in their group, so there is "
        "nothing to compare",
        f"{sampling}Lower learning_rate, raise prompts_per_step, set advantage=maxrl (for rewards of 0 and 1), which "
        "weighs rare successes more, or set beta=0.01, which stays near the first model.",
    )


def all_truncated(table: Table) -> Diagnosis | None:
    """Nine of ten completions were cut at the longest length, in the median over the last third.

    A cut completion has no end for the model to learn, and often no answer for the reward to find. Episodes of several
    turns are left alone: there the same number counts those that their environment's time limit ends.
    """
    share, longest = table.late("completions/clipped_ratio"), table.settings.get("max_completion_length")
    if len(table.values("reward")) < ENOUGH_ROWS or not _cut(table):
        return None
    return Diagnosis(
        "all-truncated",
        f"{share:.0%} of the completions were cut at max_completion_length={longest}",
        "Raise max_completion_length, or make the model end: check that its tokenizer's eos_token is what it ends a "
        "turn with, ask for short answers in the prompt, or set soft_overlong_cache.",
    )


def reward_flat(table: Table) -> Diagnosis | None:
    """`signs.flat` of the mean reward of each generation."""
    return flat(
        table,
        "reward",
        solved(table),
        "Check that grad_norm is above 0, then raise learning_rate (1e-5 for small models) and prompts_per_step. "
        "Read transcripts.html: does the reward give what is good?",
    )


def entropy_gone(table: Table) -> Diagnosis | None:
    """The entropy of the next token is below 0.01 nats, less than a tenth of what it was, and the task is not solved.

    At 0.01 nats a token is drawn as the greedy one in more than 99.8 % of all places: samples of a prompt are
    copies, or soon will be. Once no group has a signal and beta is 0, nothing is learned from and no entropy is known:
    `no_signal` or `duplicates` speaks then.
    """
    entropy = table.values("entropy")
    if len(entropy) < ENOUGH_ROWS or solved(table):
        return None
    late = table.late("entropy")
    if not late < min(0.01, 0.1 * float(entropy[0])):
        return None
    return Diagnosis(
        "entropy-gone",
        f"the model is sure of every token: entropy fell from {entropy[0]:.3g} to {late:.2g} nats",
        "Lower learning_rate, raise epsilon_high (0.28), set beta=0.01, or raise temperature to 1.",
    )


def kl_spike(table: Table) -> Diagnosis | None:
    """The divergence from the reference jumped to ten times what it was in the steps before, and above 1 nat a token.

    It grows slowly in a healthy run. The steps before are the ten before each, by their median. At 1 nat a token the
    model writes what its reference would hardly ever write.
    """
    kl = table.values("kl")
    jumps = [i for i in range(10, len(kl)) if kl[i] > 1.0 and kl[i] > 10 * float(np.median(kl[i - 10 : i]))]
    if not jumps:
        return None
    at = jumps[0]
    return Diagnosis(
        "kl-spike",
        f"the KL from the reference jumped from {np.median(kl[at - 10 : at]):.2g} to {kl[at]:.2g} nats a token",
        "Lower learning_rate or max_grad_norm, raise beta, and read the transcripts of that step: a few tokens of very "
        "low probability can do this.",
    )


def all_clipped(table: Table) -> Diagnosis | None:
    """`signs.clipped` of the tokens.

    With one optimizer step per generation none does. With several, a few in a hundred do.
    """
    return clipped(
        table,
        "clip_ratio/region_mean",
        "tokens (or completions)",
        "Lower learning_rate, num_iterations or steps_per_generation, or raise epsilon; with "
        "importance_sampling_level=sequence epsilon is far smaller (3e-4).",
    )


def evaluation_far_below(table: Table) -> Diagnosis | None:
    """`signs.far_below` of greedy answers to held-out prompts, and sampled ones to the prompts of training."""
    return far_below(
        table,
        "eval_reward",
        "reward",
        "The model learned what does not carry over: use more and more varied prompts (n_train), fewer epochs, or "
        "beta=0.01. Compare answers with `grouprl evaluate --answers`.",
    )


def reward_with_length(table: Table) -> Diagnosis | None:
    """Longer completions are rewarded more, and completions grow.

    The line is a correlation of 0.5 within groups, in the mean over the last third, while the mean length has
    grown by a quarter and the reward has risen. Some tasks do take longer answers. Others have a reward that can be
    had by writing more.
    """
    correlation, lengths = table.last("length_reward_correlation"), table.values("completions/mean_length")
    if len(lengths) < 30 or len(correlation) < ENOUGH_ROWS or float(correlation.mean()) < 0.5:
        return None
    before, after = float(table.first("completions/mean_length").mean()), table.late("completions/mean_length")
    if after < 1.25 * before or not risen(table.values("reward")):
        return None
    return Diagnosis(
        "reward-with-length",
        f"longer completions get more reward (correlation {correlation.mean():.2f} within groups), and they grew from "
        f"{before:.3g} to {after:.3g} tokens",
        "Read transcripts.html: are the longer ones better? If not, take length out of the reward, set "
        "soft_overlong_cache, or use loss_type=dr_grpo with scale_rewards=none.",
    )


def precision(table: Table) -> Diagnosis | None:
    """`signs.rate_below_precision` of `master_dtype`."""
    dtype = str(table.settings.get("master_dtype", "float32"))
    return rate_below_precision(table, dtype, "Set master_dtype=float32, or raise learning_rate.")


RULES: tuple[Rule, ...] = (
    no_signal, duplicates, all_truncated, reward_flat, entropy_gone, kl_spike, all_clipped, evaluation_far_below,
    reward_with_length, rate_spent, precision, memory_grows, machine_busy,
)  # fmt: skip
"""All of them, in the order in which a report gives them."""

WHILE_RUNNING: tuple[Rule, ...] = (
    no_signal, duplicates, all_truncated, entropy_gone, kl_spike, all_clipped, precision, memory_grows,
)  # fmt: skip
"""Those whose verdict on the first part of a run holds: the others judge its whole course."""
