"""One vocabulary: what both configurations share, and what is said of names from elsewhere."""

import pytest

from grouprl.envs.config import GRPOConfig as EnvsConfig
from grouprl.envs.config import make_config
from grouprl.errors import UsageError
from grouprl.lm.settings.config import GRPOConfig as LanguageConfig
from grouprl.settings.names import ALIASES
from grouprl.settings.objective import ObjectiveSettings

BOTH = [make_config, lambda values: LanguageConfig(**values)]


def test_what_both_have_means_the_same_and_has_one_default() -> None:
    shared = set(EnvsConfig.model_fields) & set(LanguageConfig.model_fields)
    assert set(ObjectiveSettings.model_fields) < shared
    assert {"loss_type", "advantage", "kl_estimator", "max_grad_norm", "learning_rate", "seed", "native"} <= shared
    for name in ObjectiveSettings.model_fields:
        assert EnvsConfig.model_fields[name].default == LanguageConfig.model_fields[name].default
    assert EnvsConfig.model_fields["loss_type"].default == LanguageConfig.model_fields["loss_type"].default == "dapo"


@pytest.mark.parametrize("make", BOTH, ids=["environments", "language models"])
@pytest.mark.parametrize(
    ("elsewhere", "here"),
    [("lr", "learning_rate"), ("kl_coef", "beta"), ("dual_clip", "delta"), ("adam_eps", "adam_epsilon")],
)
def test_the_error_for_a_name_of_another_library_says_ours(make, elsewhere: str, here: str) -> None:
    with pytest.raises(UsageError, match=f"^{elsewhere!r} is called {here!r} here$"):
        make({elsewhere: 0.2})


def test_every_name_of_another_library_stands_for_a_setting_and_is_none_itself() -> None:
    known = set(EnvsConfig.model_fields) | set(LanguageConfig.model_fields)
    assert set(ALIASES.values()) <= known
    assert known.isdisjoint(ALIASES)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (BOTH[0], {"advantage": "grpo"}, "'grpo' is called 'outcome' here"),
        (BOTH[1], {"advantage": "rloo"}, "'rloo' is called 'leave_one_out' here"),
        (BOTH[0], {"advantage": "gae"}, "'gae' is called 'baseline' here"),
        (BOTH[0], {"loss_type": "luspo"}, "must be one of 'grpo', 'dapo'"),
        (BOTH[1], {"loss_type": "gspo"}, "is called \"grpo with importance_sampling_level='sequence'\" here"),
        (BOTH[1], {"loss_type": "lusp"}, "did you mean 'luspo'"),
        (BOTH[0], {"loss_type": "cispo"}, "epsilon_high=None: .* must exceed 1; 5.0 is usual"),
        (BOTH[1], {"loss_type": "sapo", "delta": 3.0}, "delta=3.0 is for loss_type 'grpo' or"),
        (BOTH[0], {"dppo_threshold": 0.1}, "dppo_threshold=0.1 is for loss_type 'dppo_tv' or 'dppo_kl'"),
        (BOTH[0], {"loss_type": "spo", "epsilon_high": 0.5}, "epsilon_high=0.5 .* for its width set epsilon"),
        (BOTH[0], {"sapo_temperature_pos": 3.0}, "sapo_temperature_pos=3.0 is for loss_type 'sapo'"),
        (BOTH[1], {"vespo_k_pos": 3.0}, "vespo_k_pos=3.0 is for loss_type 'vespo'"),
        (BOTH[1], {"advantage": "gae"}, "must be one of 'outcome'"),
        (BOTH[0], {"gigpo_weight": 0.5}, "is for advantage='gigpo', and advantage is 'baseline'; leave it out"),
        (BOTH[1], {"pass_k": 2}, "is for advantage='pass_at_k', and advantage is 'outcome'; leave it out"),
        (
            BOTH[1],
            {"advantage": "opo", "scale_rewards": "batch"},
            "is for advantage='outcome', and advantage is 'opo'; leave one of them out",
        ),
        (
            BOTH[1],
            {"advantage": "opo", "multi_objective_aggregation": "normalize_then_sum"},
            "needs advantage='outcome', and advantage is 'opo'; leave one of them out",
        ),
        (BOTH[1], {"loss_type": "luspo"}, "set importance_sampling_level='sequence'"),
        (
            BOTH[1],
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
            "set importance_sampling_level='token'",
        ),
    ],
)
def test_what_is_not_allowed_is_an_error_that_says_what_is(make, values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(values)


@pytest.mark.parametrize("make", BOTH, ids=["environments", "language models"])
def test_scaling_may_be_said_with_a_truth_value(make) -> None:
    assert make({"scale_rewards": False}).scale_rewards == "none"
    assert make({"scale_rewards": True}).scale_rewards == "group"
