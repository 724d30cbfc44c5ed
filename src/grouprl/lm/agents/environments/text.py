"""One environment played in text: from the model's words to an action, and from an observation to words."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text, shown, with_type
from grouprl.importing import load_function
from grouprl.lm.agents.environments.games import GAMES
from grouprl.lm.agents.environments.returned import Calls, Step
from grouprl.lm.agents.environments.words import Words
from grouprl.lm.agents.interaction import Answer, Message, Said
from grouprl.lm.rewards.arguments import copied
from grouprl.lm.rewards.returned import plain_float
from grouprl.runs.watchdog import Watch

_MOST_TURNS = 64
"""Turns of an episode where neither ``max_turns`` nor the environment says."""
_QUOTED = 60
_log = logging.getLogger("grouprl")


@dataclass(frozen=True)
class TextEnvironment:
    """An environment as text, made anew for each row that is sampled: called, it gives the other side of an episode.

    :func:`text_environment` makes it, and has the arguments described.
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

    def __call__(self) -> Episodes:
        """The other side of one episode after the other."""
        return Episodes(self)

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
            raise UsageError(
                f"{self.name} returned a {type(env).__name__} that is in use already; episodes run side by side, so "
                "return a new object each time"
            )
        self._in_use[id(env)] = env
        return env

    def release(self, env: Any) -> None:
        """Nobody plays in an environment any more."""
        self._in_use.pop(id(env), None)


def text_environment(
    env: str | Callable[..., Any],
    *,
    env_kwargs: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None,
    obs_to_text: Callable[..., str] | None = None,
    action_parser: Callable[..., Any] | None = None,
    instructions: str | None = None,
    form: Literal["messages", "text"] = "messages",
    cue: str = "",
    invalid_action: Any = None,
    invalid_reward: float = 0.0,
    max_turns: int | None = None,
    success: float | None = None,
    state: Callable[[Any], Hashable] | None = None,
    timeout: float | None = 60.0,
) -> TextEnvironment:
    """An environment that a language model plays in text, for ``GRPOTrainer(..., environment_factory=...)``.

    Args:
        env: a Gymnasium id, ``"module:Class"``, or a callable that makes an environment. The environment has
            Gymnasium's interface: ``reset(seed=) -> (observation, info)`` and ``step(action) -> (observation, reward,
            terminated, truncated, info)``. It need not be one of Gymnasium's if its observations and actions are text.
        env_kwargs: arguments with which it is made; or a function from a seed to arguments, and then it is made anew
            for each episode, such as with a map of its own.
        obs_to_text: the text of an observation; called with the observation, and with the environment if it takes two
            arguments. Default: the text itself, else words for Gymnasium's spaces, and better ones for FrozenLake,
            CliffWalking, Taxi, Blackjack and MiniGrid.
        action_parser: the action that a text means; called with the text, and with the environment if it takes two
            arguments. It returns None or raises ValueError for a text that means none. Default: as above.
        instructions: what the model is told first; default: what the game is and how to act, where that is known.
        form: the conversation as ``messages`` of a chat, instructions in the role ``system``, or as bare ``text``.
        cue: what stands behind every observation, such as ``"\\nMove:"`` in the form ``text``.
        invalid_action: what happens to a text that means no action, or one that the mask forbids. None: the model is
            told so, and the environment does not move. ``"random"``: it takes a random action. Else: it takes this one.
        invalid_reward: added to the reward of such a turn.
        max_turns: turns after which an episode is truncated, invalid ones included; default: the environment's own
            limit of steps, else 64.
        success: the return from which on an episode counts as solved, where its last info has neither ``is_success``
            nor ``success``; default: 1, or what suits an environment that is known.
        state: the key of a state, for estimators that compare turns in equal states; called with the observation.
            Default: the observation's text.
        timeout: seconds that a reset or a step may take, and a call of obs_to_text, action_parser or state; None for
            any time. What takes longer truncates the episode, and another environment takes the place of this one.

    Raises UsageError for arguments that do not go together, and for an environment that cannot be made.
    """
    factory = TextEnvironment(
        env, env_kwargs, obs_to_text, action_parser, instructions, form, cue, invalid_action, invalid_reward,
        max_turns, success, state, timeout,
    )  # fmt: skip
    tried = factory()  # so that what cannot be made, said or parsed is known before training
    try:
        tried.begin({}, 0)
        tried.try_parser()
    finally:
        tried.close()
    return factory


def _maker(name: str) -> Callable[..., Any] | None:
    """What ``module:Class`` or a name of ours makes; None for an id of Gymnasium, such as ``module:Env-v0``."""
    if name in GAMES:
        return GAMES[name]
    return load_function(name) if ":" in name and name.rpartition(":")[2].isidentifier() else None


class Episodes:
    """One environment, which plays one episode after the other: an :class:`~grouprl.lm.agents.interaction.Interaction`.

    Args:
        settings: how it is played.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    gives_rewards = True
    keeps_time = True
    counted = ("success", "environment/invalid_actions", "environment/timeouts")

    def __init__(self, settings: TextEnvironment) -> None:
        self._settings = settings
        self.name = f"environment {settings.name}"
        self._calls = Calls(self.name, settings.timeout)
        self._env: Any = None
        self._words: Words
        self._seed = self._turn = self._most_turns = 0
        self._return = 0.0
        self._observation = ""
        self._state: Hashable = None
        self._mask: Any = None

    def begin(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | str:
        """Start an episode.

        Args:
            row: its column ``options``, a mapping, goes to the environment's ``reset``.
            seed: of the environment's ``reset``.

        Raises:
            UsageError: the environment cannot be made, or has no words, or the row has a prompt to no use.
            TrainingError: it fails, or hangs twice.
        """
        if row.get("prompt"):
            raise UsageError(
                f"{self.name} begins with its own text, and a row has the prompt {shown(row['prompt'])}; "
                "leave the column out, or give instructions= to text_environment"
            )
        if not any(self._start(seed, copied(row.get("options"))) for _ in range(2)):
            raise TrainingError(
                f"{self._calls.name} had not ended its {self._calls.late} after {self._settings.timeout:g} s, twice; "
                "raise timeout=, or see what it waits for"
            )
        self._seed, self._turn, self._return = seed, 0, 0.0
        rules, first = self._settings.instructions, f"{self._observation}{self._settings.cue}"
        rules = self._words.rules if rules is None else rules
        if self._settings.form == "text":
            return f"{rules}\n{first}" if rules else first
        told = [{"role": "system", "content": rules}] if rules else []
        return [*told, {"role": "user", "content": first}]

    def answer(self, said: Said) -> Answer:
        """React to a turn of the model: parse an action and take it. Raises TrainingError if the environment fails."""
        self._turn += 1
        state = self._state
        try:
            return self._answer(said, state)
        except TimeoutError:
            self._replace(f"{self._calls.late} of turn {self._turn}")
            return Answer(truncated=True, state=state, metrics={"environment/timeouts": 1.0, "success": 0.0})

    def _answer(self, said: Said, state: Hashable) -> Answer:
        when, env = f"at turn {self._turn}", self._env
        action = self._parse(said.text, when)
        forbidden = action is not None and not self._permits(action)
        valid = action is not None and not forbidden
        metrics = {} if valid else {"environment/invalid_actions": 1.0}
        if not valid and self._settings.invalid_action is None:
            text = self._complaint(said.text, forbidden)
            step = Step(None, 0.0, False, False, {})
        else:
            action = action if valid else self._substitute()
            step = self._calls.step(lambda: env.step(action), self._turn)
            self._take(step, when)
            text = self._observation
        reward = step.reward + (0.0 if valid else self._settings.invalid_reward)
        self._return += reward
        truncated = step.truncated or (self._turn >= self._most_turns and not step.terminated)
        over = step.terminated or truncated
        if over:
            metrics["success"] = self._solved(step.info)
        else:
            text += self._settings.cue
        messages = text if self._settings.form == "text" else [{"role": "user", "content": text}]
        return Answer(messages, reward, step.terminated, truncated, state=state, metrics=metrics)

    def parse(self, text: str) -> Any:
        """The action that a text means, or None. Raises UsageError for a space of actions without words."""
        return self._words.parse(text)

    def try_parser(self) -> None:
        """Parse something. Raises UsageError for a space of actions without words, TrainingError if it takes long."""
        try:
            self._parse("0", "when it was tried")
        except TimeoutError:
            raise TrainingError(
                f"action_parser of {self.name} had not ended after {self._settings.timeout:g} s for the text '0'; see "
                "what it waits for, or raise timeout="
            ) from None

    def _parse(self, text: str, when: str) -> Any:
        return self._calls.action(lambda: self.parse(text), when, own=self._settings.action_parser is not None)

    def close(self) -> None:
        """Close the environment."""
        env, self._env = self._env, None
        self._settings.release(env)
        if callable(getattr(env, "close", None)):
            env.close()

    # --- the environment ----------------------------------------------------------------------------------------------

    def _start(self, seed: int, options: Any) -> bool:
        """Reset it, and say its first observation; False if it hangs, after which it is another environment's turn."""
        settings = self._settings
        if self._env is None or callable(settings.env_kwargs):
            self.close()
            self._env = settings.make(seed)
            self._words = self._find_words()
            limit = getattr(getattr(self._env, "spec", None), "max_episode_steps", None)
            self._most_turns = settings.max_turns or limit or _MOST_TURNS
        env, arguments = self._env, {"seed": seed} | ({} if options is None else {"options": options})
        missing = [name for name in arguments if not {name, "**"} & _parameters(env.reset)]
        if missing:
            raise UsageError(
                f"reset of {self._calls.name} takes no {missing[0]}; let it: def reset(self, *, seed=None, "
                "options=None). The members of a group start from the same seed"
            )
        try:
            self._take(self._calls.reset(lambda: env.reset(**arguments)), "in reset")
        except TimeoutError:
            self._replace(self._calls.late)
            return False
        return True

    def _replace(self, what: str) -> None:
        """Leave an environment that hangs alone; another one is made for the next episode."""
        self._settings.release(self._env)
        self._env = None
        _log.warning(
            "%s hangs: its %s had not ended after %g s; another one takes its place", self._calls.name, what,
            self._settings.timeout,
        )  # fmt: skip

    def _solved(self, info: Mapping[str, Any]) -> float:
        """Whether the episode counts as solved, as the last info says, else by its return."""
        for name in ("is_success", "success"):
            if name in info:
                return float(bool(info[name]))
        least = self._words.success if self._settings.success is None else self._settings.success
        return float(self._return >= least)

    # --- words --------------------------------------------------------------------------------------------------------

    def _find_words(self) -> Words:
        settings, env = self._settings, self._env
        if hasattr(env, "action_space") and hasattr(env, "observation_space"):
            from grouprl.lm.agents.environments import of_gymnasium

            words = of_gymnasium.words_of(env, settings.name)
        else:
            words = Words("", "", lambda observation: observation, lambda text: text)
        if settings.obs_to_text is not None:
            words = replace(words, say=_of_one(settings.obs_to_text, env))
        if settings.action_parser is not None:
            words = replace(words, parse=_of_one(settings.action_parser, env))
        return words

    def _take(self, step: Step, when: str) -> None:
        """Say the observation, and remember in which state the next turn is taken."""
        source = "the observation" if self._settings.obs_to_text is None else "obs_to_text"
        words = self._words
        text = self._calls.text(lambda: words.say(step.observation), source, when)
        self._mask = step.info.get("action_mask")
        if self._mask is None and words.masks is not None and not (step.terminated or step.truncated):
            self._mask = self._calls.masks(words.masks, when)
        self._observation = f"{text}{self._possible()}"
        own = self._settings.state
        self._state = self._observation if own is None else self._calls.key(lambda: own(step.observation), when)

    def _possible(self) -> str:
        """What the mask allows, as the end of a text."""
        return (
            "" if self._mask is None or self._words.allowed is None
            else f"\nPossible: {self._words.allowed(self._mask)}."
        )  # fmt: skip

    def _permits(self, action: Any) -> bool:
        allowed = self._words.is_allowed
        return self._mask is None or allowed is None or allowed(self._mask, action)

    def _complaint(self, said: str, forbidden: bool) -> str:
        quoted = shown(said.strip(), _QUOTED)
        if forbidden:
            return f"{quoted} is not possible now.{self._possible()}"
        return f"{quoted} is no action. {self._words.how_to_act}".strip() + self._possible()

    def _substitute(self) -> Any:
        """The action in the place of one that could not be taken."""
        given = self._settings.invalid_action
        if given != "random":
            return given
        if self._words.random is None:
            raise UsageError(f"{self._calls.name} has no space of actions to draw from; give another invalid_action")
        draws = (self._words.random(self._seed + _DRAWS * self._turn + i) for i in range(_DRAWS))
        return next((action for action in draws if self._permits(action)), self._words.random(self._seed))


_DRAWS = 100
"""Most draws of a random action until one is allowed."""


def _parameters(function: Callable[..., Any]) -> set[str]:
    """The names of its parameters, and ``**`` if it takes any."""
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a function in C
        return {"**"}
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in given}


def _of_one(function: Callable[..., Any], env: Any) -> Callable[[Any], Any]:
    """A function of an observation or a text, with the environment filled in if it takes two arguments."""
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function
    needed = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return (lambda value: function(value, env)) if len(needed) >= 2 else function
