"""Environments of small images for evidence.yaml, as "benchmarks.pixels:NAME"; importing this module registers them.

MinAtar (Young and Tian 2019, arXiv 1903.03176): Atari games as 10 x 10 images with a channel for each kind of object,
each in its version with the actions that matter. MinAtar ends no game that is played well, so that a policy could play
one for ever: here a game is cut after 2,500 steps.
"""

import gymnasium as gym
from minatar.gym import BaseEnv

MOST_STEPS = 2500


def _register(name: str, game: str) -> None:
    kwargs = {"game": game, "use_minimal_action_set": True}
    gym.register(name, entry_point=BaseEnv, kwargs=kwargs, max_episode_steps=MOST_STEPS)


_register("MinAtar-Breakout-v1", "breakout")
_register("MinAtar-SpaceInvaders-v1", "space_invaders")
