"""The rules for runs on environments."""

from __future__ import annotations

from grouprl.doctor.signs import (
    ENOUGH_ROWS,
    clipped,
    far_below,
    flat,
    machine_busy,
    memory_grows,
    rate_below_precision,
    risen,
)
from grouprl.doctor.table import Diagnosis, Rule, Table
from grouprl.runs.metrics import reached


def solved(table: Table) -> bool:
    """Whether an evaluation of the last third, or training there, has reached the environment's threshold.

    Returns around a threshold fall below it now and then, which no rule should take for an illness. For some
    environments nobody names a threshold. These are never taken for solved.
    """
    if table.goal is None:
        return False
    return any(reached(value, table.goal) for value in (*table.last("eval_return"), table.late("return_mean")))


def _returns(table: Table) -> str:
    """The column of returns that share no episode, as means over the last 100 episodes do.

    Where each batch begins with new episodes, those that outlast it are in no batch's returns: the better a policy
    is, the fewer of its episodes count. There only evaluations tell whether it has learned.
    """
    return "eval_return" if table.settings.get("reset_each_batch") else "return_batch"


def no_signal(table: Table) -> Diagnosis | None:
    """Nine in ten batches of the last third taught nothing, and the environment is not solved by what was learned.

    A batch without signal is skipped: all rewards are equal and no episode ended early, or all advantages are equal.
    That is right at the end of a solved run, where every episode reaches the time limit. But where no batch of the run
    had a signal, nothing was learned, whatever the returns are. Estimators that compare
    episodes say in `degenerate_groups` how many groups are of equal returns.
    """
    skipped = table.values("skipped_batches")
    equal_groups = table.values("degenerate_groups")
    # The count of an agent that was trained before goes on, and says nothing of this run alone.
    all_skipped = bool(len(skipped)) and skipped[0] == 1 and skipped[-1] == len(skipped)
    never = all_skipped or (len(equal_groups) > 0 and equal_groups.min() == 1)
    if len(skipped) < ENOUGH_ROWS or (solved(table) and not never):
        return None
    third = len(skipped) // 3
    share = float(skipped[-1] - skipped[-1 - third]) / third
    equal = table.late("degenerate_groups")
    if share < 0.9 and not equal >= 0.9:
        return None
    what = f"{share:.0%} of the last {third} batches" if share >= 0.9 else f"{equal:.0%} of the groups"
    return Diagnosis(
        "no-signal",
        f"{what} had nothing to compare: their returns are equal, so no parameter "
        + ("has moved since the run began" if never else "moves"),
        "Give a reward before the end of an episode, or an easier start. Explore more: raise sticky (up to 0.99) or "
        "entropy_coef. Wait for more: raise max_steps, or group_size where episodes are compared.",
    )


def no_episode_ends(table: Table) -> Diagnosis | None:
    """No episode has ended in 50,000 steps or more, of which each environment has done 10,000 or more.

    Environments of Gymnasium end their episodes after at most some thousand steps. Without an end there is no return
    to learn from or to report, and whatever goes wrong is never reset. Many environments side by side do many steps in
    all before the first of them can reach its time limit.
    """
    steps, episodes = table.values("step"), table.values("episodes")
    n_envs = int(table.settings.get("n_envs", 1))
    if not len(steps) or steps[-1] < max(50_000, 10_000 * n_envs) or episodes.sum() > 0:
        return None
    each = f", {steps[-1] / n_envs:,.0f} in each of {n_envs} environments" if n_envs > 1 else ""
    return Diagnosis(
        "no-episode-ends",
        f"no episode has ended in {steps[-1]:,.0f} steps{each}",
        "Give the environment a time limit: max_episode_steps where it is registered, or gymnasium.wrappers.TimeLimit.",
    )


def return_flat(table: Table) -> Diagnosis | None:
    """`signs.flat` of the returns of each batch."""
    return flat(
        table,
        _returns(table),
        solved(table),
        "Look at explained_variance (near 0: the baseline sees nothing that tells good states from bad) and grad_norm. "
        "Raise learning_rate, min_steps or sticky, or try another advantage.",
    )


def entropy_gone(table: Table) -> Diagnosis | None:
    """A policy of discrete actions has hardly any choice left before half of the run, and the return does not rise.

    The line is 2 % of the entropy of the first batch, where a new policy chooses among all actions alike. Nine in ten
    batches of the second half must be below it. A
    deterministic policy is a good end of a run. Early, without a rise since, it has stopped exploring: what it does
    not try it cannot learn. Continuous actions have no entropy of this kind, see `std_collapsed`.
    """
    entropy = table.values("policy_entropy")
    if len(entropy) < ENOUGH_ROWS or "policy_std" in table.columns or entropy[0] <= 0 or solved(table):
        return None
    gone = entropy < 0.02 * entropy[0]
    half = len(entropy) // 2
    if gone[half:].mean() < 0.9:
        return None
    if risen(table.recent(_returns(table), parts=2)):
        return None
    return Diagnosis(
        "entropy-gone",
        f"the policy hardly chooses any more: its entropy fell from {entropy[0]:.3g} to {entropy[-1]:.2g} nats, and "
        "the return has not risen since",
        "Raise entropy_coef, lower learning_rate or kl_target, or take a larger batch (min_steps).",
    )


def std_collapsed(table: Table) -> Diagnosis | None:
    """The standard deviation of continuous actions fell below 1 % of its first value, and the return does not rise.

    At that width an action is the mean to two digits: nothing is explored, and log-probabilities become so steep that a
    small step changes them by a lot. Where precision pays, a policy narrows while its return rises, which is well.
    """
    spread = table.values("policy_std")
    if len(spread) < ENOUGH_ROWS or not float(spread[-1]) < 0.01 * float(spread[0]) or solved(table):
        return None
    if risen(table.last(_returns(table))):
        return None
    return Diagnosis(
        "std-collapsed",
        f"the standard deviation of actions fell from {spread[0]:.3g} to {spread[-1]:.2g}: nothing is explored now",
        "Raise entropy_coef, lower learning_rate or kl_target, begin wider with log_std_init, or set a floor with "
        "log_std_min. Look for rewards far larger than the others.",
    )


def kl_spike(table: Table) -> Diagnosis | None:
    """A tenth of the updates, or more, moved the policy by a KL of more than 0.5 nats.

    Healthy updates stay between 0.001 and 0.1. At 0.5 most ratios are outside the clip, whose one-sided bound does not
    bring them back. A single one happens, and an adaptive learning rate answers it.
    """
    moved = table.values("approx_kl")
    far = moved > 0.5
    if len(moved) < ENOUGH_ROWS or far.mean() < 0.1:
        return None
    return Diagnosis(
        "kl-spike",
        f"{far.mean():.0%} of the updates moved the policy by more than 0.5 nats (KL of old and new; up to "
        f"{moved.max():.2g})",
        "Lower learning_rate or epochs, set lr_schedule=adaptive, or set kl_stop=0.05.",
    )


def all_clipped(table: Table) -> Diagnosis | None:
    """`signs.clipped` of the steps of a batch.

    A step counts if it has moved as its advantage asks, and further than the clip. So if all steps moved far and at
    random, half of them would. Healthy runs of the presets stay below 10 % there, also those with ten epochs.
    """
    return clipped(
        table,
        "clip_fraction",
        "steps",
        "Lower learning_rate or epochs, raise epsilon or minibatch_size, or set kl_stop=0.05.",
    )


def evaluation_far_below(table: Table) -> Diagnosis | None:
    """`signs.far_below` of greedy evaluations and training with sampled actions, whose returns are those of batches."""
    return far_below(
        table,
        "eval_return",
        _returns(table),
        "Act as in training (`grouprl evaluate --sampled`, deterministic=False), or make the policy decide: lower "
        "entropy_coef or sticky, or train longer.",
    )


def rate_on_its_floor(table: Table) -> Diagnosis | None:
    """The adaptive learning rate fell to its lowest value, and updates still go further than they should.

    It is lowered where the KL of an update is more than 1.5 times its target, down to 1e-4. The line is more than
    half of the updates of the last third on the lowest rate, with a median KL above 1.5 times kl_target.
    """
    if table.settings.get("lr_schedule") != "adaptive":
        return None
    rates, moved = table.last("learning_rate"), table.late("approx_kl")
    floor = min(1e-4, float(table.settings.get("learning_rate", 1e-4)))
    target = float(table.settings.get("kl_target", 0.02))
    if len(rates) < ENOUGH_ROWS or (rates <= floor * 1.0001).mean() <= 0.5 or not moved > 1.5 * target:
        return None
    return Diagnosis(
        "learning-rate-on-its-floor",
        f"the adaptive learning rate is at its lowest, {floor:.2g}, and updates still move the policy by {moved:.2g} "
        f"nats where {target:g} is asked for",
        "Lower epochs or raise minibatch_size or min_steps. Look for rewards or observations that are very large.",
    )


def precision(table: Table) -> Diagnosis | None:
    """`signs.rate_below_precision` of float32, the type of all weights in this arena."""
    return rate_below_precision(table, "float32", "Raise learning_rate; the default is 1e-3.")


RULES: tuple[Rule, ...] = (
    no_signal, no_episode_ends, return_flat, entropy_gone, std_collapsed, kl_spike, all_clipped, evaluation_far_below,
    rate_on_its_floor, precision, memory_grows, machine_busy,
)  # fmt: skip
"""All of them, in the order in which a report gives them."""

WHILE_RUNNING: tuple[Rule, ...] = (
    no_signal, no_episode_ends, entropy_gone, std_collapsed, kl_spike, all_clipped, rate_on_its_floor, precision,
    memory_grows,
)  # fmt: skip
"""Those whose verdict on the first part of a run holds: the others judge its whole course."""
