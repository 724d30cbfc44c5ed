"""The trackers that a run can be shown in, and how ``report_to`` names them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

from grouprl.errors import shown

OWN_TRACKERS = ("tensorboard", "wandb")
"""Trackers that grouprl writes to itself, in both arenas."""
TrackerName = Literal[
    "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "neptune", "dvclive", "dagshub",
    "codecarbon", "azure_ml", "flyte", "kubeflow",
]  # fmt: skip
TRACKERS: tuple[str, ...] = get_args(TrackerName)
"""All trackers: the others are written to by transformers' callbacks."""
_CALLED = {"comet": "comet_ml", "azureml": "azure_ml"}
_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}


def read_trackers(value: Any) -> tuple[str, ...]:
    """``report_to`` as names of trackers: of one, of several, ``all`` that are installed, or ``none``.

    Raises ValueError, with what is allowed, for anything else.
    """
    allowed = f"choose {', '.join(TRACKERS)}, several in a list, all, or none"
    if value is not None and value is not False and not isinstance(value, str | list | tuple | set | frozenset):
        raise ValueError(f"names no tracker; {allowed}")
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if names == ("all",):
        names = tuple(name for name in TRACKERS if find_spec(_PACKAGES.get(name, name)) is not None)
    for name in names:
        if not isinstance(name, str) or name not in (*TRACKERS, *_CALLED, "none"):
            raise ValueError(f"{shown(name)} is no tracker here; {allowed}")
    return tuple(dict.fromkeys(_CALLED.get(name, name) for name in names if name != "none"))
