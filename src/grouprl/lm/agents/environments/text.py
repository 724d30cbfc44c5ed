"""Any environment as a text environment: Gymnasium's, games of ours, or one's own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

from grouprl.lm.agents.environments.text_episodes import Episodes
from grouprl.lm.agents.environments.text_settings import TextSettings


class TextEnvironment(TextSettings):
    """An environment in text, for ``environment_factory``: each call gives the other side of episodes in a new one.

    :func:`text_environment` makes it, and has the arguments described.
    """

    def __call__(self) -> Episodes:
        """The other side of one episode after the other."""
        return Episodes(self)


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
