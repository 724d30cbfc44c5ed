"""TextArena, GEM and OpenEnv with Gymnasium's five-tuple, for :func:`~grouprl.lm.agents.environments.text_environment`.

    text_environment(lambda: TextArena("GuessTheNumber-v0"))
    text_environment(lambda: Gem("game:GuessTheNumber-v0-easy"))
    text_environment(lambda: OpenEnv(EchoEnv(base_url=address).sync()), obs_to_text=..., action_parser=...)

Each package is imported where its adapter is made.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from grouprl.errors import TrainingError, UsageError, with_type

Info = dict[str, Any]
_one_at_a_time = threading.Lock()


class OwnRandom:
    """Random streams of a package that seeds and reads those of the whole process: kept apart for each environment.

    Within :meth:`here` the streams of Python and NumPy are the environment's own. Only one environment is within
    at a time, and outside everything is as if it had not been there.
    """

    def __init__(self) -> None:
        self._state: Any = None

    @contextmanager
    def here(self) -> Iterator[None]:
        """Use the environment's own streams."""
        with _one_at_a_time:
            outside = _get_streams()
            if self._state is not None:
                _set_streams(self._state)
            try:
                yield
            finally:
                self._state = _get_streams()
                _set_streams(outside)


def _get_streams() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _set_streams(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


class TextArena:
    """A game of TextArena (https://github.com/LeonGuertler/TextArena), in which the model is player 0.

    Args:
        game: its id, such as ``"GuessTheNumber-v0"``. The texts are those of the game itself, without TextArena's
            wrappers, which repeat the whole history at every turn.
        opponent: for a game of two: the other player, a function from what it reads to what it does.
        options: the game's own arguments.
    """

    def __init__(self, game: str, opponent: Callable[[str], str] | None = None, **options: Any) -> None:
        arena = _package("textarena", "textarena")
        self._random, self._opponent = OwnRandom(), opponent
        with self._random.here():
            env = arena.make(game, **options)
            while isinstance(env, arena.Wrapper):
                env = env.env
        self._env, self._own = env, arena.ObservationType.PLAYER_ACTION

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[str, Info]:
        """Begin a game."""
        with self._random.here():
            self._env.reset(num_players=1 if self._opponent is None else 2, seed=seed)
            self._let_opponent_play(False)
            return self._read(0), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Play, and let the opponent play."""
        with self._random.here():
            done, info = self._env.step(action=action)
            done = self._let_opponent_play(done)
            if not done:
                return self._read(0), 0.0, False, False, dict(info)
            rewards, games = self._env.close()
            text = self._read(0)
        return text, float((rewards or {}).get(0, 0.0)), True, False, {**info, **(games or {}).get(0, {})}

    def _let_opponent_play(self, done: bool) -> bool:
        while not done and self._env.state.current_player_id != 0:
            if self._opponent is None:
                raise UsageError("this game of TextArena has several players; give an opponent, a function of text")
            move = self._opponent(self._read(self._env.state.current_player_id))
            done, _ = self._env.step(action=move)
        return bool(done)

    def _read(self, player: int) -> str:
        """What a player has not read yet, without what it said itself."""
        seen = self._env.state.observations[player]
        self._env.state.observations[player] = []
        return "\n".join(text for sender, text, kind in seen if not (kind is self._own and sender == player))


class Gem:
    """An environment of GEM (https://github.com/axon-rl/gem): its texts, with the prefix and suffix in its infos.

    Args:
        env_id: such as ``"game:GuessTheNumber-v0-easy"``. options: its own arguments.
    """

    def __init__(self, env_id: str, **options: Any) -> None:
        gem = _package("gem", "gem-llm")
        self._random = OwnRandom()
        with self._random.here():
            self._env = gem.make(env_id, **options)

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[str, Info]:
        """Begin an episode."""
        with self._random.here():
            observation, info = self._env.reset(seed=seed)
        return _framed(observation, info), info

    def step(self, action: str) -> tuple[str, Any, bool, bool, Info]:
        """Take a turn."""
        with self._random.here():
            observation, reward, terminated, truncated, info = self._env.step(action)
        return _framed(observation, info), reward, terminated, truncated, info


def _framed(observation: str, info: Mapping[str, Any]) -> str:
    return "\n".join(part for part in (info.get("prefix"), observation, info.get("suffix")) if part)


class OpenEnv:
    """A client of OpenEnv (https://github.com/huggingface/OpenEnv): its ``StepResult`` as a five-tuple.

    Observations and actions are objects of the environment's own classes, so ``text_environment`` needs ``obs_to_text``
    and ``action_parser`` beside it.

    Args:
        client: a synchronous client, such as ``EchoEnv(base_url=...).sync()``; one for each environment.
    """

    def __init__(self, client: Any) -> None:
        if not all(callable(getattr(client, name, None)) for name in ("reset", "step")):
            raise UsageError(f"OpenEnv takes a client with reset and step, got {with_type(client)}")
        self._client = client

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, Info]:
        """Begin an episode; the server is given the seed and the options."""
        result = self._checked(self._client.reset(seed=seed, **(options or {})), "reset")
        return result.observation, dict(getattr(result, "metadata", None) or {})

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        """Take a turn. A reward of None, as servers send before the end, is 0."""
        result = self._checked(self._client.step(action), "step")
        reward, info = result.reward, dict(getattr(result, "metadata", None) or {})
        cut = bool(info.get("truncated", False))
        return result.observation, 0.0 if reward is None else reward, bool(result.done) and not cut, cut, info

    def close(self) -> None:
        """Close the connection."""
        if callable(getattr(self._client, "close", None)):
            self._client.close()

    @staticmethod
    def _checked(result: Any, method: str) -> Any:
        if not hasattr(result, "observation"):
            how = ""
            if hasattr(result, "__await__"):
                how = "; it is awaitable: give a synchronous client, client.sync()"
                getattr(result, "close", int)()  # of a coroutine, which would complain that nobody awaited it
            raise TrainingError(f"{method} of the client of OpenEnv returned {with_type(result)}, no StepResult{how}")
        return result


def _package(name: str, distribution: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"it needs {distribution}; run: pip install {distribution} ({error})") from error
