"""Settings of environments that another setting leaves without effect."""

from __future__ import annotations

from grouprl.envs.config import GRPOConfig
from grouprl.settings.unread import OF_DISCOUNT, OF_LOSS, OF_SCALE, Unread

_FIELDS = tuple(GRPOConfig.model_fields)

RULES: tuple[Unread, ...] = (
    Unread(
        ("n_steps", "max_steps", "min_signals"), lambda c, _: c.whole_episodes,
        "a batch holds whole episodes, at least min_steps in all",
    ),
    Unread(
        ("min_steps", "max_steps", "min_signals"), lambda c, _: not c.whole_episodes and c.collect == "segments",
        "collect is 'segments', and a batch holds n_steps per environment",
    ),
    Unread(
        ("n_steps",), lambda c, _: not c.whole_episodes and c.collect != "segments",
        "it counts with collect='segments'; set that, or min_steps, the least steps of a batch",
    ),
    Unread(
        (*(name for name in _FIELDS if name.startswith("baseline_")), "gae_lambda"),
        lambda c, about: not about["fits_baseline"],
        "no baseline is fitted; set advantage='baseline', or let advantage_function ask for values",
    ),
    Unread(
        ("baseline_ridge", "baseline_sweeps"), lambda c, about: about["fits_baseline"] and c.baseline_pull is not None,
        "baseline_pull takes the place of the ridge, and its fit is a single one",
    ),
    Unread(
        ("scale_rewards", "gigpo_weight"), lambda c, about: about["own_advantage"],
        "advantage_function computes the advantages; leave one of the two out",
    ),
    Unread(
        ("advantage",),  # it says whether a batch holds whole episodes
        lambda c, about: about["own_advantage"] and (c.collect == "episodes" or not c.whole_episodes),
        "advantage_function computes the advantages; leave one of the two out",
    ),
    OF_SCALE,
    OF_DISCOUNT,
    Unread(
        ("log_std_init", "log_std_min"), lambda c, about: not about["continuous"],
        "only continuous actions, of a Box, have a standard deviation",
    ),
    Unread(
        ("vectorization",), lambda _, about: about["one_object"],
        "the environment was given as an object, which is stepped as it is; give an id, or a callable that makes one",
    ),
    Unread(
        ("warmup_steps",), lambda c, _: c.warmup_steps > 0 and not c.normalize_observations,
        "steps of warm-up start the statistics of observations, and normalize_observations=False has none",
    ),
    Unread(
        ("sticky",), lambda c, about: c.sticky > 0 and about["one_environment"],
        "half of the environments repeat actions, and there is only one; give an id or a callable, and set n_envs",
    ),
    *OF_LOSS,
    Unread(
        ("kl_estimator", "reference", "reference_every"), lambda c, _: c.beta == 0,
        "beta=0 gives the divergence to a reference no weight; set beta, or leave it out",
    ),
    Unread(
        ("reference_every",), lambda c, _: c.reference != "periodic",
        "only reference='periodic' is refreshed; set that, or leave it out",
    ),
    Unread(
        ("lr_max",), lambda c, _: c.lr_schedule != "adaptive",
        "only lr_schedule='adaptive' reads it; set that, or leave it out",
    ),
    Unread(
        ("kl_target",), lambda c, _: c.lr_schedule != "adaptive",
        "only lr_schedule='adaptive' reads it; kl_stop ends the epochs of an update",
    ),
    Unread(
        ("lr_final",), lambda c, _: c.lr_schedule == "constant",
        "lr_schedule='constant' has no end; set 'linear' or 'adaptive', or leave it out",
    ),
    Unread(
        ("hidden_sizes", "activation", "hidden_gain", "output_gain"), lambda c, about: about["own_network"],
        "the network is one of your own; build this into it",
    ),
)  # fmt: skip
"""All that hold of a new agent. They know, beside the settings: ``fits_baseline``, whether the closed-form baseline is;
``continuous``, whether actions are drawn around a mean; ``own_network``, ``own_advantage`` and ``own_surrogate``,
whether it was given; ``one_object``, whether the environment was given as an object; ``one_environment``, whether there
is one alone.
"""

OF_LOADED: tuple[Unread, ...] = (
    Unread(
        ("hidden_gain", "output_gain", "log_std_init"), lambda _, about: True,
        "only a new policy begins by it, and this one was loaded with its weights; leave it out",
    ),
    Unread(
        ("warmup_steps",), lambda _, about: about["begun"],
        "only the first steps of an agent are a warm-up, and this one has gone beyond them; leave it out",
    ),
)  # fmt: skip
"""What holds of a loaded agent beside. They know ``begun``, whether it was trained before."""
