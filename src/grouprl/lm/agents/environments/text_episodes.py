"""An episode played in text: from the model's words to an action, and from an observation to words."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grouprl.errors import TrainingError, UsageError, shown
from grouprl.lm.agents.environments.returned import Calls, Step
from grouprl.lm.agents.environments.text_settings import TextSettings
from grouprl.lm.agents.environments.words import Words
from grouprl.lm.agents.interaction import Answer, Message, Said
from grouprl.lm.rewards.arguments import copied

_MOST_TURNS = 64
"""Turns of an episode where neither ``max_turns`` nor the environment says."""
_QUOTED = 60
_DRAWS = 100
"""Most draws of a random action until one is allowed."""
_log = logging.getLogger("grouprl")


class Episodes:
    """One environment, which plays one episode after the other: an :class:`~grouprl.lm.agents.interaction.Interaction`.

    Args:
        settings: how it is played.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    gives_rewards = True
    keeps_time = True
    reads: Sequence[str] | None = ("options",)
    counted = ("success", "environment/invalid_actions", "environment/timeouts")

    def __init__(self, settings: TextSettings) -> None:
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
