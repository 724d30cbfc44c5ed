"""Environments closed, whatever their own ``close`` raises."""

from __future__ import annotations

import warnings
from typing import Any

from gymnasium import Env
from gymnasium.vector import VectorEnv

from grouprl.errors import error_text


def close(env: Env[Any, Any] | VectorEnv[Any, Any, Any]) -> None:
    """Close ``env``. A RuntimeWarning names one that cannot be closed, and nothing is raised.

    What was learned or counted with an environment is good whether it can be closed or not, and an error that is under
    way says more than one of closing.
    """
    try:
        env.close()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        warnings.warn(
            f"the environment {_name(env)} could not be closed: {error_text(error)}. What was done with it is kept; "
            "what it holds, such as a window or a file, may stay open. The fault is in its close()",
            RuntimeWarning,
            stacklevel=2,
        )


def _name(env: Any) -> str:
    """The id that the environment is registered by, or else the name of its class."""
    named = getattr(getattr(env, "spec", None), "id", None)
    return str(named or type(env.unwrapped).__name__)
