"""How an environment is played in text: what makes it, what turns it into words, and what an invalid action means."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grouprl.errors import GrouprlError, UsageError, error_text, shown, with_type
from grouprl.importing import load_function
from grouprl.lm.agents.environments.games import GAMES
from grouprl.lm.agents.interaction import in_use
from grouprl.lm.rewards.returned import plain_float
from grouprl.runs.watchdog import Watch


@dataclass(frozen=True)
class TextSettings:
    """How an environment is made and told in text; ``text_environment`` describes each argument.

    Raises UsageError for a value that cannot be used.
    """

    env: str | Callable[..., Any]
    env_kwargs: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None
    obs_to_text: Callable[..., str] | None = None
    action_parser: Callable[..., Any] | None = None
    instructions: str | None = None
    form: Literal["messages", "text"] = "messages"
    cue: str = ""
    invalid_action: Any = None
    invalid_reward: float = 0.0
    max_turns: int | None = None
    success: float | None = None
    state: Callable[[Any], Hashable] | None = None
    timeout: float | None = 60.0
    _in_use: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        env: Any = self.env
        if not isinstance(env, str) and not callable(env):
            name = type(env).__name__
            hint = f"; every row needs its own environment: give {name} itself" if hasattr(env, "step") else ""
            raise UsageError(f"env={with_type(env)} must be an id of Gymnasium or a callable that makes one{hint}")
        if self.form not in ("messages", "text"):
            raise UsageError(f"form={self.form!r} must be 'messages' or 'text'")
        for name in ("obs_to_text", "action_parser", "state"):
            if not callable(getattr(self, name)) and getattr(self, name) is not None:
                raise UsageError(f"{name}={with_type(getattr(self, name))} must be a function")
        for name, value in (("invalid_reward", self.invalid_reward), ("success", self.success)):
            number = 0.0 if value is None and name == "success" else plain_float(value)
            if isinstance(value, bool) or number is None or not math.isfinite(number):
                raise UsageError(f"{name}={with_type(value)} must be a finite number")
        if self.max_turns is not None and (isinstance(self.max_turns, bool) or self.max_turns < 1):
            raise UsageError(f"max_turns={self.max_turns!r} must be at least 1, or None")
        if self.timeout is not None and not self.timeout > 0:
            raise UsageError(f"timeout={self.timeout!r} must be a number of seconds above 0, or None")

    @property
    def name(self) -> str:
        """What the environment is called in messages."""
        return self.env if isinstance(self.env, str) else getattr(self.env, "__name__", type(self.env).__name__)

    def make(self, seed: int) -> Any:
        """A fresh environment, in use until it is released. Raises UsageError if it cannot be made."""
        kwargs = dict((self.env_kwargs(seed) if callable(self.env_kwargs) else self.env_kwargs) or {})
        maker = _maker(self.env) if isinstance(self.env, str) else self.env
        if maker is None:
            from grouprl.lm.agents.environments import of_gymnasium

            env = of_gymnasium.make(str(self.env), kwargs)
        else:
            try:
                with Watch(f"making environment {self.name}"):
                    env = maker(**kwargs)
            except GrouprlError:
                raise
            except Exception as error:  # whatever its constructor raises
                given = f" with {shown(kwargs)}" if kwargs else ""
                raise UsageError(f"environment {self.name} cannot be made{given}: {error_text(error)}") from error
        lacking = [method for method in ("reset", "step") if not callable(getattr(env, method, None))]
        if lacking:
            raise UsageError(
                f"{self.name} makes {with_type(env)}, which has no {' and no '.join(lacking)}; an environment has "
                "reset(seed=...) -> (observation, info) and step(action) -> (observation, reward, terminated, "
                "truncated, info)"
            )
        if id(env) in self._in_use:
            raise in_use(self.name, env)
        self._in_use[id(env)] = env
        return env

    def release(self, env: Any) -> None:
        """Nobody plays in an environment any more."""
        self._in_use.pop(id(env), None)


def _maker(name: str) -> Callable[..., Any] | None:
    """What ``module:Class`` or a name of ours makes; None for an id of Gymnasium, such as ``module:Env-v0``."""
    if name in GAMES:
        return GAMES[name]
    return load_function(name) if ":" in name and name.rpartition(":")[2].isidentifier() else None
