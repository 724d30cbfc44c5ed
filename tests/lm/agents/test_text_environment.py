"""Environments played in text: what is said, which action is taken, what is refused, what is cut."""

import logging
import re
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from grouprl.errors import TrainingError, UsageError
from grouprl.lm import text_environment
from grouprl.lm.agents.environments.of_gymnasium import random_lake
from grouprl.lm.agents.environments.words import chosen
from grouprl.lm.agents.interaction import Said
from grouprl.lm.sample.replies import replies_of


def play(environment, *replies, seed=0, row=None):
    """The first prompt and the answers to scripted replies."""
    episode = environment()
    try:
        return episode.begin(row or {}, seed), [episode.answer(Said(text, True)) for text in replies]
    finally:
        episode.close()


def last_text(answer):
    return answer.messages[-1]["content"]


class Echo:
    """An environment on strings, without spaces: it says what was said, and ends at "stop"."""

    result = None

    def __init__(self, **values):
        self.values = values

    def reset(self, seed=None, options=None):
        return f"seed {seed} {options or ''}".strip(), {}

    def step(self, action):
        if self.values:
            step = {"observation": action, "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
            return tuple({**step, **self.values}.values())
        return action, 0.5, action == "stop", False, {}


def test_an_environment_on_strings_is_played_as_it_is():
    first, answers = play(text_environment(Echo), "hello", "stop", seed=7, row={"options": {"hard": True}})
    assert first == [{"role": "user", "content": "seed 7 {'hard': True}"}]
    assert last_text(answers[0]) == "hello"
    assert [(a.reward, a.terminated) for a in answers] == [(0.5, False), (0.5, True)]
    assert [a.state for a in answers] == ["seed 7 {'hard': True}", "hello"]
    assert answers[1].metrics == {"success": 1.0}  # a return of 1


def test_an_environment_may_change_the_options_of_its_row():
    class Takes(Echo):
        def reset(self, seed=None, options=None):
            return (str(options["cards"].pop()) if options else "none"), {}

    row = {"options": {"cards": [1, 2]}}
    firsts = [play(text_environment(Takes), row=row)[0] for _ in range(2)]
    assert firsts == [[{"role": "user", "content": "2"}]] * 2


def test_an_environment_that_is_in_use_is_played_in_by_nobody_else():
    one = Echo()
    factory = text_environment(lambda: one)
    first = factory()
    first.begin({}, 0)
    with pytest.raises(UsageError, match=r"returned a Echo that is in use already; .* a new object each time"):
        factory().begin({}, 0)
    first.close()
    factory().begin({}, 0)


def test_the_language_arena_imports_gymnasium_only_for_such_an_environment():
    code = (
        "import sys; from grouprl.lm import text_environment as t; t('guess-number')().begin({}, 0); "
        "assert 'gymnasium' not in sys.modules; t('FrozenLake-v1'); assert 'gymnasium' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bare_text_has_instructions_cue_and_no_roles():
    lake = text_environment("FrozenLake-v1", form="text", instructions="Walk.", cue="\nMove:")
    first, (answer,) = play(lake, "D")
    assert first == "Walk.\nIce: down, right. Goal: down 3, right 3.\nMove:"
    assert isinstance(answer.messages, str)
    assert answer.messages.endswith("\nMove:")


# --- Gymnasium's environments as they ship ----------------------------------------------------------------------------


def test_frozen_lake_is_solved_by_letters_names_and_numbers():
    lake = text_environment("FrozenLake-v1", env_kwargs={"is_slippery": False})
    first, answers = play(lake, "D", "down", "I go RIGHT!", "2", "1", "r")
    assert first[0]["content"].endswith("Answer with one action: L (left), D (down), R (right), U (up).")
    assert "slippery" not in first[0]["content"]
    assert last_text(answers[0]) == "Ice: down, up. Goal: down 2, right 3."
    assert [a.reward for a in answers] == [0, 0, 0, 0, 0, 1]
    assert answers[-1].terminated
    assert not answers[-1].truncated
    assert answers[-1].metrics == {"success": 1.0}


def test_arguments_that_depend_on_the_seed_make_another_environment_for_each_start():
    lake = text_environment(
        "FrozenLake-v1", env_kwargs=lambda seed: {"desc": generate_random_map(4, seed=seed), "is_slippery": False}
    )
    episode = lake()
    maps = {}
    for seed in (1, 2, 3, 1, 2, 3):
        episode.begin({}, seed)
        found = "".join("".join(row) for row in episode._env.unwrapped.desc.astype(str))
        assert maps.setdefault(seed, found) == found
    assert len(set(maps.values())) > 1


def test_what_taxi_allows_reaches_the_text_and_the_rest_is_refused():
    taxi = text_environment("Taxi-v4", env_kwargs={"max_episode_steps": 50})
    first, (refused, moved) = play(taxi, "dropoff", "s", seed=3)
    allowed = first[1]["content"].rsplit("Possible: ", 1)[1]
    assert "south" in allowed
    assert "dropoff" not in allowed
    assert last_text(refused) == f"'dropoff' is not possible now.\nPossible: {allowed}"
    assert (refused.reward, refused.metrics) == (0.0, {"environment/invalid_actions": 1.0})
    assert moved.reward == -1.0
    assert moved.state == first[1]["content"]


def test_an_invalid_turn_takes_the_action_and_the_reward_that_were_asked_for():
    given = {"env_kwargs": {"is_slippery": False}, "invalid_reward": -0.25}
    _, (answer,) = play(text_environment("FrozenLake-v1", invalid_action=2, **given), "hm")
    assert last_text(answer).endswith("Goal: down 3, right 2.")
    assert answer.reward == -0.25
    drawn = {
        last_text(play(text_environment("FrozenLake-v1", invalid_action="random", **given), "hm", seed=seed)[1][0])
        for seed in range(8)
    }
    assert len(drawn) > 1


def test_a_random_action_is_one_that_the_mask_allows():
    taxi = text_environment("Taxi-v4", invalid_action="random")
    for seed in range(12):
        first, (answer,) = play(taxi, "hm", seed=seed)
        assert answer.reward == -1.0, first  # -10 for picking up or dropping nobody


def test_cliff_walking_and_blackjack_have_words():
    first, (answer,) = play(text_environment("CliffWalking-v1"), "R")
    assert first[1]["content"] == "Ground: up. Goal: right 11."
    assert answer.reward == -100
    first, (answer,) = play(text_environment("Blackjack-v1"), "s", seed=3)
    assert first[1]["content"] == "Your cards: 7. The dealer shows: 10."
    assert answer.terminated


def test_minigrid_says_what_the_agent_sees():
    pytest.importorskip("minigrid")
    grid = text_environment("minigrid:MiniGrid-Empty-5x5-v0")
    first, answers = play(grid, "forward", "forward", "right", "f", "f")
    assert first[1]["content"] == (
        "Task: get to the green goal square. Before you: nothing. You see: goal 2 ahead, 2 right."
    )
    assert last_text(answers[1]).startswith("Task: get to the green goal square. Before you: wall.")
    assert answers[-1].terminated
    assert answers[-1].metrics["success"] == 1.0


class Spaces(gym.Env):
    """Shows what it was given, in spaces of one's own."""

    def __init__(self, action_space, observation_space=None, observation=0, mask=None):
        self.action_space, self.observation_space = action_space, observation_space or spaces.Discrete(1)
        self.observation, self.mask, self.taken = observation, mask, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation, {}

    def step(self, action):
        self.taken.append(action)
        return self.observation, 0.0, False, False, {}


def taken(space, text, **others):
    episode = text_environment(lambda: Spaces(space, **others))()
    episode.begin({}, 0)
    episode.answer(Said(text, True))
    return episode._env.taken


PAIR = spaces.Dict({"throttle": spaces.Box(-1, 1, (1,)), "gear": spaces.Discrete(3, start=1)})


@pytest.mark.parametrize(
    ("space", "text", "wanted"),
    [
        (spaces.Discrete(3, start=5), "take 6", 6),
        (spaces.MultiDiscrete([3, 2]), "2 and 1", [2, 1]),
        (spaces.MultiDiscrete([3, 2], start=[-1, 5]), "-1 and 6", [-1, 6]),
        (spaces.MultiBinary(2), "0, 1", [0, 1]),
        (spaces.Box(-2.0, 2.0, (2,)), "0.5; -1e1", [0.5, -2.0]),
        (spaces.Box(-2.0, 2.0, (2, 1)), ".5, 1.", [[0.5], [1.0]]),
        (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(4)]), "[1, 3]", (1, 3)),
        (spaces.Text(5), "hello", "hello"),
    ],
)
def test_a_text_becomes_an_action_of_the_space(space, text, wanted):
    (action,) = taken(space, text)
    assert space.contains(action)
    assert np.array_equal(action, wanted)


def test_a_json_object_becomes_a_dict_of_actions():
    (action,) = taken(PAIR, 'I choose {"throttle": 0.5, "gear": 2}')
    assert action["throttle"] == np.float32(0.5)
    assert action["gear"] == 2


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (spaces.Discrete(3, start=5), "4"),
        (spaces.Discrete(3), "none"),
        (spaces.MultiDiscrete([3, 2]), "2 2"),
        (spaces.MultiDiscrete([3, 2], start=[-1, 5]), "2 5"),
        (spaces.MultiDiscrete([3, 2]), "1"),
        (spaces.Box(-2.0, 2.0, (2,)), "0.5"),
        (PAIR, '{"throttle": 0.5}'),
        (PAIR, '{"throttle": 0.5, "gear": 9}'),
        (PAIR, "{"),
        (spaces.Tuple([spaces.Discrete(2)]), "[1, 1]"),
    ],
)
def test_a_text_that_means_no_action_moves_nothing(space, text):
    assert taken(space, text) == []


@pytest.mark.parametrize(
    ("space", "value", "text"),
    [
        (spaces.Discrete(9), np.int64(4), "4"),
        (spaces.MultiDiscrete([3, 5]), np.array([2, 4]), "2 4"),
        (spaces.Box(-9, 9, (3,)), np.array([0.02514, -1.25, 3.0], np.float32), "0.0251 -1.25 3"),
        (spaces.Box(0, 9, (2, 2), np.uint8), np.array([[1, 2], [3, 4]], np.uint8), "1 2\n3 4"),
        (spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Discrete(2)}), {"a": 1, "b": 0}, "a: 1\nb: 0"),
        (spaces.Tuple([spaces.Discrete(2), spaces.Text(4)]), (1, "hi"), "1; hi"),
    ],
)
def test_an_observation_becomes_text(space, value, text):
    first, _ = play(text_environment(lambda: Spaces(spaces.Discrete(2), space, value)))
    assert first[1]["content"] == text


def test_masks_of_a_method_and_of_several_components_reach_the_text():
    class Masked(Spaces):
        def action_masks(self):
            return [1, 0, 1, 1, 0]

    pair = spaces.MultiDiscrete([3, 2])
    masked = text_environment(lambda: gym.wrappers.OrderEnforcing(Masked(pair)))
    first, (refused, taken) = play(masked, "1 0", "2 0")
    assert first[1]["content"] == "0\nPossible: 0 or 2; 0."
    assert refused.metrics
    assert not taken.metrics
    shifted = text_environment(lambda: Masked(spaces.MultiDiscrete([3, 2], start=[1, 5])))
    first, (refused, taken) = play(shifted, "2 5", "3 5")
    assert "2 whole numbers: 1 to 3, 5 to 6." in first[0]["content"]
    assert first[1]["content"] == "0\nPossible: 1 or 3; 5."
    assert refused.metrics
    assert not taken.metrics


def test_two_functions_of_ones_own_take_the_environment_if_they_like():
    def say(observation, env):
        return f"{observation} of {env.observation_space.n}"

    def parse(text):
        return {"go": 1}[text] if text == "go" else int(text)

    lake = text_environment("FrozenLake-v1", env_kwargs={"is_slippery": False}, obs_to_text=say, action_parser=parse)
    first, answers = play(lake, "go", "nowhere")
    assert first[1]["content"] == "0 of 16"
    assert last_text(answers[0]) == "4 of 16"
    assert answers[1].metrics  # ValueError: it could not be parsed


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_time_limit_truncates_and_does_not_terminate():
    lake = text_environment("FrozenLake-v1", env_kwargs={"is_slippery": False, "max_episode_steps": 2})
    _, answers = play(lake, "L", "L")
    assert [(a.terminated, a.truncated) for a in answers] == [(False, False), (False, True)]
    assert answers[-1].metrics == {"success": 0.0}


def test_turns_are_bounded_where_nothing_moves():
    _, answers = play(text_environment("FrozenLake-v1", max_turns=2), "?", "?")
    assert [a.truncated for a in answers] == [False, True]
    _, answers = play(text_environment(Echo), *["x"] * 64)
    assert [a.truncated for a in answers] == [False] * 63 + [True]


def test_a_step_that_hangs_truncates_the_episode_and_the_environment_is_replaced(caplog):
    made = []

    class Hangs(Echo):
        def __init__(self):
            super().__init__()
            made.append(self)

        def step(self, action):
            if action == "hang":
                time.sleep(30)
            return super().step(action)

    episode = text_environment(Hangs, timeout=0.2)()
    with caplog.at_level(logging.WARNING, "grouprl"):
        episode.begin({}, 0)
        answer = episode.answer(Said("hang", True))
    assert (answer.terminated, answer.truncated) == (False, True)
    assert answer.metrics["environment/timeouts"] == 1.0
    assert "environment Hangs hangs: its step of turn 1 had not ended after 0.2 s" in caplog.text
    before = len(made)
    assert episode.begin({}, 1) == [{"role": "user", "content": "seed 1"}]
    assert len(made) == before + 1


def hangs_on(word):
    def function(given, *_):
        if word in str(given):
            time.sleep(30)
        return given

    return function


@pytest.mark.parametrize("what", ["obs_to_text", "action_parser", "state"])
def test_a_function_of_the_users_that_hangs_truncates_the_episode_and_is_named(what, caplog):
    episode = text_environment(Echo, timeout=0.2, **{what: hangs_on("hang")})()
    with caplog.at_level(logging.WARNING, "grouprl"):
        episode.begin({}, 0)
        assert not episode.answer(Said("fine", True)).truncated
        answer = episode.answer(Said("hang", True))
    assert (answer.terminated, answer.truncated) == (False, True)
    assert answer.metrics == {"environment/timeouts": 1.0, "success": 0.0}
    assert f"environment Echo hangs: its {what} of turn 2 had not ended after 0.2 s; another one" in caplog.text
    assert episode.begin({}, 1) == [{"role": "user", "content": "seed 1"}]
    assert not episode.answer(Said("fine", True)).truncated


@pytest.mark.parametrize("where", ["the main thread", "a thread of replies"])
def test_a_regular_expression_that_backtracks_truncates_the_episode_and_is_named(where, caplog):
    def parser(text):  # within C, which keeps Python's lock; of 40 letters it would take hours
        return text if re.fullmatch(r"(a+)+b|[^a].*", text) else None

    episode = text_environment(Echo, timeout=0.2, action_parser=parser)()
    episode.begin({}, 0)

    class Asked:
        def reply(self, number, turn):
            return episode.answer(Said("a" * 40, True))

    assert not episode.answer(Said("fine", True)).truncated
    if where == "the main thread":
        answer = Asked().reply(0, None)
    else:
        with replies_of(Asked(), 1) as replies:
            replies.ask(0, None)
            ((_, answer),) = replies.take(1)
    assert answer.truncated
    assert "environment Echo hangs: its action_parser of turn 2 had not ended after 0.2 s; another one" in caplog.text


def test_what_a_parser_raises_in_the_main_thread_is_raised_in_its_own():
    def parser(text):
        if text == "0":
            return text
        raise KeyError(threading.current_thread().name)

    episode = text_environment(Echo, timeout=5, action_parser=parser)()
    episode.begin({}, 0)

    class Asked:
        def reply(self, number, turn):
            assert threading.current_thread().name == "grouprl-reply"
            return episode.answer(Said("1", True))

    with replies_of(Asked(), 1) as replies:
        replies.ask(0, None)
        with pytest.raises(TrainingError, match="failed in action_parser, at turn 1: KeyError: 'MainThread'"):
            replies.take(1)


def test_what_a_parser_in_the_main_thread_sets_torch_to_ends_with_it():
    def parser(text):
        if text == "1":
            torch.set_grad_enabled(False)
        return threading.current_thread().name

    episode = text_environment(Echo, timeout=5, action_parser=parser)()
    episode.begin({}, 0)

    class Asked:
        def reply(self, number, turn):
            return episode.answer(Said("1", True))

    try:
        with replies_of(Asked(), 1) as replies:
            replies.ask(0, None)
            ((_, answer),) = replies.take(1)
        assert last_text(answer) == "MainThread"
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_functions_of_the_users_that_hang_at_once_are_an_error_when_the_environment_is_made():
    with pytest.raises(TrainingError, match=r"environment Echo had not ended its obs_to_text after 0.1 s, twice"):
        text_environment(Echo, timeout=0.1, obs_to_text=hangs_on("seed"))
    with pytest.raises(TrainingError, match=r"action_parser of environment Echo had not ended after 0.1 s for the te"):
        text_environment(Echo, timeout=0.1, action_parser=hangs_on("0"))


def test_a_parser_may_say_of_any_text_that_it_is_no_action():
    def nothing(text):
        raise ValueError(text)

    _, answers = play(text_environment(Echo, action_parser=nothing), "x")
    assert answers[0].metrics["environment/invalid_actions"] == 1.0


def test_a_reset_that_hangs_twice_is_an_error():
    class Hangs(Echo):
        def reset(self, seed=None):
            if seed == 5:
                time.sleep(30)
            return super().reset(seed)

    with pytest.raises(TrainingError, match=r"environment Hangs had not ended its reset after 0.1 s, twice"):
        play(text_environment(Hangs, timeout=0.1), seed=5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": None}, r"the reward that step returns must be one finite number.*None \(NoneType\)"),
        ({"reward": float("nan")}, "must be one finite number"),
        ({"reward": "1"}, r"'1' \(str\)"),
        ({"observation": 3}, r"the observation gave 3 \(int\), which is no text; give obs_to_text"),
        ({"terminated": "yes"}, "terminated, which step returns, must be True or False"),
        ({"truncated": None}, "truncated, which step returns"),
        ({"info": None}, "the info that step returns must be a dict"),
        ({"done": True}, "step must return .* it returned 6 values"),
    ],
)
def test_what_a_step_must_not_return_names_the_environment_and_the_turn(values, message):
    episode = text_environment(lambda: Echo(**values))
    with pytest.raises(TrainingError, match=rf"environment <lambda> failed at turn 1: .*{message}"):
        play(episode, "a")


def test_a_step_that_raises_is_named_with_its_place():
    class Fails(Echo):
        def step(self, action):
            raise KeyError("board")

    with pytest.raises(TrainingError, match=r"environment Fails failed at turn 1: KeyError: 'board'; .*line \d+ of"):
        play(text_environment(Fails), "a")


def _broken_reset():
    env = Echo()
    env.reset = lambda seed=None: "only text"
    return env


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: text_environment("FrozenLaek-v1"), "did you mean FrozenLake-v1"),
        (lambda: text_environment("FrozenLake-v1", env_kwargs={"size": 3}), "cannot be made with {'size': 3}"),
        (lambda: text_environment(Echo()), "every row needs its own environment: give Echo itself"),
        (lambda: text_environment(object), "has no reset and no step"),
        (
            lambda: text_environment("guess-number", env_kwargs={"size": 3}),
            r"environment guess-number cannot be made with {'size': 3}: TypeError: .*'size'",
        ),
        (lambda: text_environment(Echo, form="chat"), "'messages' or 'text'"),
        (lambda: text_environment(Echo, max_turns=0), "max_turns=0"),
        (
            lambda: text_environment(Echo, invalid_reward="-1e-1"),
            r"invalid_reward='-1e-1' \(str\) must be a finite",
        ),
        (lambda: text_environment(Echo, success=True), r"success=True \(bool\) must be a finite"),
        (lambda: text_environment(Echo, timeout=0), "timeout=0"),
        (lambda: text_environment(Echo, obs_to_text="x"), "obs_to_text='x'"),
        (lambda: text_environment(_broken_reset), r"reset must return \(observation, info\)"),
        (lambda: text_environment(lambda: Spaces(spaces.Graph(PAIR["throttle"], None))), "give action_parser"),
        (
            lambda: text_environment(lambda: Spaces(PAIR, spaces.Box(0, 255, (84, 84, 3)), np.zeros((84, 84, 3)))),
            "observations of 21168 numbers, as an image has; give obs_to_text",
        ),
    ],
)
def test_what_cannot_be_played_is_refused_before_training(make, message):
    with pytest.raises((UsageError, TrainingError), match=message):
        make()


def test_a_reset_without_a_seed_is_refused():
    class Unseeded(Echo):
        def reset(self):
            return "", {}

    with pytest.raises(UsageError, match="reset of environment Unseeded takes no seed"):
        text_environment(Unseeded)


@pytest.mark.parametrize(
    ("text", "place"),
    [("l", 0), ("Left", 0), ("0", 0), ("go right, not left", 2), ("d", None), ("down!", 1), ("7", None), ("", None)],
)
def test_an_action_is_chosen_by_name_letter_or_number(text, place):
    assert chosen(text, ("left", "down", "right", "done")) == place


def test_the_game_that_ships_is_won_by_halving():
    game = text_environment("guess-number")
    for secret in range(10):
        episode = game()
        episode.begin({"options": {"secret": secret}}, 0)
        low, high, answer = 0, 9, None
        while answer is None or not answer.terminated:
            guess = (low + high) // 2
            answer = episode.answer(Said(str(guess), True))
            low, high = (guess + 1, high) if last_text(answer) == "higher" else (low, guess - 1)
        assert answer.metrics == {"success": 1.0}


def test_the_lakes_of_even_and_odd_seeds_have_none_in_common():
    lakes = [{"".join(random_lake(seed)["desc"]) for seed in range(first, 200, 2)} for first in (0, 1)]
    assert all(len(maps) > 30 for maps in lakes)
    assert not lakes[0] & lakes[1]
    assert random_lake(5) == random_lake(5)
    text_environment("FrozenLake-v1", env_kwargs=random_lake)


def test_a_prompt_that_nobody_would_read_is_an_error():
    with pytest.raises(UsageError, match=r"own text, .* has the prompt 'Win!'; leave the column out, or"):
        text_environment("guess-number")().begin({"prompt": "Win!", "seed": 1}, 1)
