"""Environments of other packages, where these are installed: equal starts, rewards, and random streams kept apart."""

import random
import re

import numpy as np
import pytest

from grouprl.errors import TrainingError, UsageError
from grouprl.lm import text_environment
from grouprl.lm.agents.environments.adapters import Gem, OpenEnv, OwnRandom, TextArena
from grouprl.lm.agents.interaction import Said


def begin(environment, seed):
    episode = environment()
    return episode, episode.begin({}, seed)[-1]["content"]


def guess_by_halving(episode, write, high=20):
    """The answers until the game is over."""
    low, answers = 1, []
    while not answers or not (answers[-1].terminated or answers[-1].truncated):
        guess = (low + high) // 2
        answers.append(episode.answer(Said(write(guess), True)))
        low, high = (guess + 1, high) if "higher" in answers[-1].messages[-1]["content"] else (low, guess - 1)
    return answers


def test_streams_of_the_process_are_an_environments_own_only_within():
    random.seed(0)
    np.random.seed(0)
    outside = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    mine, other = OwnRandom(), OwnRandom()
    with mine.here():
        random.seed(5)
        first = random.random()
    with other.here():
        random.seed(5)
    assert (random.random(), np.random.rand()) == outside
    with mine.here():
        second = random.random()
    random.seed(5)
    assert (first, second) == (random.random(), random.random())


def test_text_arena_is_won_and_members_of_a_group_start_equal():
    pytest.importorskip("textarena")
    game = text_environment(lambda: TextArena("GuessTheNumber-v0"))
    random.seed(1)
    before = random.getstate()
    rewards = []
    for seed in (1, 2):
        (one, first), (two, second) = begin(game, seed), begin(game, seed)
        assert first == second
        assert first.startswith("You are Player 0. You are playing Guess The Number.")
        a, b = guess_by_halving(one, "[{}]".format), guess_by_halving(two, "[{}]".format)
        assert [x.messages for x in a] == [x.messages for x in b]
        assert all("[" not in x.messages[-1]["content"] for x in a)  # its own words are not said to it again
        rewards.append(a[-1].reward)
    assert rewards == [1.0, 1.0]
    assert random.getstate() == before


def test_text_arena_lets_an_opponent_play():
    pytest.importorskip("textarena")
    seen = []

    def opponent(text):
        seen.append(text)
        return "[1]"

    game = text_environment(lambda: TextArena("TicTacToe-v0", opponent=opponent))
    episode, first = begin(game, 0)
    assert "Tic" in first
    episode.answer(Said("[4]", True))
    assert seen
    answer = episode.answer(Said("[4]", True))  # taken: an invalid move of the model's
    assert re.search("invalid|not", answer.messages[-1]["content"], re.IGNORECASE)
    alone = text_environment(lambda: TextArena("GuessTheNumber-v0"))
    with pytest.raises(TrainingError, match="failed in reset"):
        text_environment(lambda: TextArena("TicTacToe-v0"))
    alone().close()


def test_gem_is_won_and_its_suffix_is_said():
    pytest.importorskip("gem")
    game = text_environment(lambda: Gem("game:GuessTheNumber-v0-easy"))
    (one, first), (two, second) = begin(game, 3), begin(game, 3)
    assert first == second
    assert first.endswith("Enter your next guess.")
    a, b = (guess_by_halving(episode, "\\boxed{{{}}}".format, high=10) for episode in (one, two))
    assert [x.messages for x in a] == [x.messages for x in b]
    assert a[-1].terminated
    assert a[-1].metrics["success"] == 1.0


class Client:
    """A client of OpenEnv, without a server: it counts down."""

    def __init__(self, result):
        self._result, self._left = result, 2

    def reset(self, **arguments):
        self._left = 2
        return self._result(observation={"left": 2, **arguments})

    def step(self, action):
        self._left -= action["by"]
        done = self._left <= 0
        return self._result(observation={"left": self._left}, reward=1.0 if done else None, done=done)


def test_open_env_is_played_through_its_clients():
    result = pytest.importorskip("openenv.core.client_types").StepResult
    game = text_environment(
        lambda: OpenEnv(Client(result)), obs_to_text=lambda seen: f"{seen['left']} left",
        action_parser=lambda text: {"by": int(text)},
    )  # fmt: skip
    episode, first = begin(game, 3)
    assert first == "2 left"
    answers = [episode.answer(Said(text, True)) for text in ("1", "one", "1")]
    assert [a.reward for a in answers] == [0.0, 0.0, 1.0]
    assert [a.terminated for a in answers] == [False, False, True]
    assert answers[1].metrics == {"environment/invalid_actions": 1.0}


def test_what_is_no_client_of_open_env_is_refused():
    with pytest.raises(UsageError, match="a client with reset and step"):
        OpenEnv("http://localhost")

    class Waits:
        async def reset(self, **arguments):
            return None

        step = reset

    with pytest.raises(TrainingError, match=r"give a synchronous client, client\.sync"):
        OpenEnv(Waits()).reset()
