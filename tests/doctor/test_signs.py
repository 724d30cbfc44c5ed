"""Each rule on numbers made ill in its way, and on numbers just on the healthy side of its line."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from grouprl.doctor import Diagnosis, Table, Watch, environments, language, signs
from grouprl.doctor.table import Rule
from grouprl.envs.config import GRPOConfig
from grouprl.lm import GRPOConfig as LanguageConfig
from grouprl.lm.run.recipe import settable

RNG = np.random.default_rng(0)
N = 40
NOISE = RNG.normal(size=N)
RISING = np.linspace(0, 10, N) + NOISE * 0.3
ONES = np.ones(N)


def table(goal: float | None = None, settings: dict[str, Any] | None = None, **columns: Any) -> Table:
    made = {name.replace("__", "/"): np.broadcast_to(np.asarray(v, float), N) for name, v in columns.items()}
    return Table(made, settings or {}, goal)


STEPS = np.arange(1, N + 1)
CASES: list[tuple[Rule, Table, Table]] = [
    # rule, ill, healthy
    (environments.no_signal, table(skipped_batches=STEPS), table(skipped_batches=STEPS // 2)),
    (
        environments.no_signal,
        table(skipped_batches=STEPS, return_mean=1),
        table(9.0, skipped_batches=STEPS - 1, return_mean=9),
    ),
    (  # solved by nothing that was learned
        environments.no_signal,
        table(9.0, skipped_batches=STEPS, return_mean=9),
        table(9.0, skipped_batches=STEPS - 1, return_mean=9),
    ),
    (  # an agent that was trained before goes on counting: it is solved, and had signals
        environments.no_signal,
        table(9.0, skipped_batches=STEPS, return_mean=9),
        table(9.0, skipped_batches=STEPS + 500, return_mean=9),
    ),
    (
        environments.no_signal,
        table(9.0, skipped_batches=0, degenerate_groups=1, return_mean=9),
        table(9.0, skipped_batches=0, degenerate_groups=STEPS > 3, return_mean=9),
    ),
    (
        environments.no_signal,
        table(skipped_batches=0, degenerate_groups=1),
        table(skipped_batches=0, degenerate_groups=0.5),
    ),
    (environments.no_episode_ends, table(step=STEPS * 2000, episodes=0), table(step=STEPS * 2000, episodes=STEPS == 9)),
    (  # each of 64 environments has done 1,000 steps, or 10,000
        environments.no_episode_ends,
        table(settings={"n_envs": 64}, step=STEPS * 640_000 / STEPS[-1], episodes=0),
        table(settings={"n_envs": 64}, step=STEPS * 64_000 / STEPS[-1], episodes=0),
    ),
    (environments.return_flat, table(return_batch=NOISE), table(return_batch=RISING)),
    (environments.return_flat, table(return_batch=-RISING), table(9.0, return_batch=NOISE, eval_return=9)),
    (
        environments.return_flat,
        table(settings={"reset_each_batch": True}, return_batch=RISING, eval_return=NOISE),
        table(settings={"reset_each_batch": True}, return_batch=NOISE, eval_return=RISING),
    ),
    (
        environments.entropy_gone,
        table(policy_entropy=np.where(STEPS < 9, 1.0, 0.001), return_batch=NOISE),
        table(policy_entropy=np.where(STEPS < 9, 1.0, 0.001), return_batch=RISING),
    ),
    (
        environments.entropy_gone,
        table(policy_entropy=np.where(STEPS < 9, 1.0, 0.001), return_batch=NOISE),
        table(policy_entropy=np.where(STEPS < 30, 1.0, 0.001), return_batch=NOISE),
    ),
    (
        environments.std_collapsed,
        table(policy_std=np.geomspace(1, 1e-3, N)),
        table(policy_std=np.geomspace(1, 0.05, N)),
    ),
    (
        environments.kl_spike,
        table(approx_kl=np.where(STEPS % 5, 0.01, 2)),
        table(approx_kl=np.where(STEPS == 9, 2, 0.01)),
    ),
    (environments.all_clipped, table(clip_fraction=0.55), table(clip_fraction=0.45)),
    (
        environments.evaluation_far_below,
        table(return_batch=RISING, eval_return=1.0),
        table(return_batch=RISING, eval_return=RISING - 2),
    ),
    (
        environments.evaluation_far_below,
        table(return_batch=RISING, eval_return=1.0),
        table(return_batch=NOISE, return_mean=np.cumsum(NOISE) / STEPS, eval_return=-3.0),  # nothing was gained
    ),
    (
        environments.rate_on_its_floor,
        table(settings={"lr_schedule": "adaptive"}, learning_rate=1e-4, approx_kl=0.05),
        table(settings={"lr_schedule": "adaptive"}, learning_rate=1e-4, approx_kl=0.01),
    ),
    (environments.precision, table(learning_rate=1e-10), table(learning_rate=1e-6)),
    (
        language.no_signal,
        table(reward=0.1, frac_reward_zero_std=1, frac_duplicates=0.2),
        table(reward=0.1, frac_reward_zero_std=0.9, frac_duplicates=0.2),
    ),
    (
        language.no_signal,
        table(reward=0.1, frac_reward_zero_std=1),
        table(reward=0.1, frac_reward_zero_std=1, eval_accuracy=0.95),
    ),
    (  # a reward that is 1 whatever is written
        language.no_signal,
        table(reward=1, frac_reward_zero_std=1, grad_norm=0, frac_duplicates=1),
        table(reward=1, frac_reward_zero_std=1, grad_norm=STEPS < 3, frac_duplicates=1),
    ),
    (
        language.no_signal,
        table(reward=0.1, frac_reward_zero_std=1, eval_accuracy=np.where(STEPS == 1, 0.95, np.nan)),
        table(reward=0.95, frac_reward_zero_std=1, eval_accuracy=np.where(STEPS == 1, 0.03, np.nan)),  # long ago
    ),
    (
        language.duplicates,
        table(reward=0.1, frac_reward_zero_std=1, frac_duplicates=1),
        table(reward=0.99, frac_reward_zero_std=1, frac_duplicates=1),
    ),
    (
        language.all_truncated,
        table(reward=0.1, completions__clipped_ratio=0.95),
        table(reward=0.1, completions__clipped_ratio=0.8),
    ),
    (
        language.all_truncated,
        table(reward=0.1, completions__clipped_ratio=1),
        table(reward=0.1, completions__clipped_ratio=1, episodes__truncated=1),
    ),
    (language.reward_flat, table(reward=NOISE), table(reward=RISING)),
    (
        language.entropy_gone,
        table(entropy=np.geomspace(1, 1e-4, N), reward=0.2),
        table(entropy=np.geomspace(1, 1e-4, N), reward=0.95),
    ),
    (language.kl_spike, table(kl=np.where(STEPS == 30, 5.0, 0.1)), table(kl=np.geomspace(0.01, 5, N))),
    (language.all_clipped, table(clip_ratio__region_mean=0.6), table(clip_ratio__region_mean=0.3)),
    (language.evaluation_far_below, table(reward=RISING, eval_reward=1.0), table(reward=RISING, eval_reward=RISING)),
    (
        language.reward_with_length,
        table(reward=RISING, length_reward_correlation=0.8, completions__mean_length=STEPS + 10),
        table(reward=RISING, length_reward_correlation=0.8, completions__mean_length=10),
    ),
    (
        language.reward_with_length,
        table(reward=RISING, length_reward_correlation=0.8, completions__mean_length=STEPS + 10),
        table(reward=RISING, length_reward_correlation=0.2, completions__mean_length=STEPS + 10),
    ),
    (
        language.precision,
        table(settings={"master_dtype": "bfloat16"}, learning_rate=1e-6),
        table(settings={"master_dtype": "float32"}, learning_rate=1e-6),
    ),
    (
        signs.rate_spent,
        table(learning_rate=np.where(STEPS < 30, 1.0, 1e-3)),
        table(learning_rate=0.5 + 0.5 * np.cos(np.pi * STEPS / N)),
    ),
    (signs.rate_spent, table(learning_rate=0), table(learning_rate=1 - STEPS / N)),
    (signs.memory_grows, table(memory_gb=1 + STEPS / N), table(memory_gb=np.where(STEPS < 12, 1.0, 2.0))),
    (signs.machine_busy, table(cpu_wait=0.5), table(cpu_wait=0.1)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "ill", "healthy"), CASES, ids=[rule.__name__ for rule, *_ in CASES])
def test_a_rule_speaks_on_one_side_of_its_line(rule: Rule, ill: Table, healthy: Table) -> None:
    found = rule(ill)
    assert isinstance(found, Diagnosis)
    assert found.advice
    assert rule(healthy) is None


@pytest.mark.parametrize("rules", [environments.RULES, language.RULES], ids=["environments", "language models"])
def test_every_rule_has_a_case(rules: tuple[Rule, ...]) -> None:
    assert set(rules) <= {rule for rule, *_ in CASES}


@pytest.mark.parametrize("rules", [environments.RULES, language.RULES], ids=["environments", "language models"])
def test_no_rule_speaks_on_a_table_without_what_it_reads(rules: tuple[Rule, ...]) -> None:
    for made in (Table({}), Table({"step": np.arange(3.0)}), Table({"step": np.full(50, np.nan)})):
        assert [rule(made) for rule in rules] == [None] * len(rules)


def test_settings_that_advice_names_exist() -> None:
    own, languages = set(GRPOConfig.model_fields), set(settable()) | set(LanguageConfig.model_fields)
    known = {environments: own, language: languages, signs: own | languages}
    others = {"max_episode_steps", "explained_variance", "grad_norm", "eos_token", "dr_grpo"}  # not settings
    for rule, ill, _ in CASES:
        found = rule(ill)
        assert found is not None
        words = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", found.advice)) - others
        module = {m.__name__: m for m in known}[rule.__module__]
        assert words <= known[module], (found.name, words - known[module])


def test_the_rise_of_a_line_is_two_thirds_of_it_and_of_noise_about_nothing() -> None:
    gain, error = signs.rise(np.linspace(0, 3, 300))
    assert gain == pytest.approx(2.0, abs=0.01)
    assert error < 0.01
    noise = np.random.default_rng(1).normal(size=3000)
    gain, error = signs.rise(noise)
    assert error == pytest.approx((2 / 1000) ** 0.5, rel=0.1)
    assert abs(gain) < 3 * error


def test_a_reward_that_falls_is_not_called_chance() -> None:
    found = [environments.return_flat(table(return_batch=values)) for values in (-RISING, NOISE)]
    assert [one.finding[:22] for one in found if one] == ["return_batch has falle", "return_batch has not r"]


def test_an_illness_is_told_once_while_a_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch({}, language_model=False)
    told = [watch.note({"step": i, "clip_fraction": 0.9}, i / 100) for i in range(1, 101)]
    assert [names for names in told if names] == [["all-clipped"]]
    assert told[9] == ["all-clipped"]  # the first of ten looks, which has enough rows
    assert len(caplog.records) == 1
    assert "kl_stop" in caplog.text


def test_a_long_run_is_looked_at_long_before_a_tenth_of_it() -> None:
    watch = Watch({}, language_model=False)
    told = [watch.note({"step": i, "clip_fraction": 0.9 * (i > 40)}, i / 10_000) for i in range(1, 1000)]
    assert [i for i, names in enumerate(told, 1) if names] == [64]


def test_a_column_that_comes_late_is_blank_before() -> None:
    watch = Watch({}, language_model=True)
    rows = [{"reward": 0.1} | ({"frac_reward_zero_std": 1.0} if i > 20 else {}) for i in range(1, 41)]
    told = [watch.note(row, i / 40) for i, row in enumerate(rows, 1)]
    assert [i for i, names in enumerate(told, 1) if names] == [24]
