"""Environments that are played in text: anything with Gymnasium's five-tuple, as the other side of an episode.

:func:`text_environment` is the only door. Behind it stand

- ``text_settings.py``: how an environment is made and told in text, and the checks of these arguments,
- ``text_episodes.py``: one episode, turn by turn,
- ``returned.py``: the checks of what an environment returns,
- ``of_gymnasium.py``: Gymnasium's spaces in words; the only module of the language arena that imports Gymnasium,
- ``known.py``: FrozenLake, CliffWalking, Taxi, Blackjack and MiniGrid in words,
- ``adapters.py``: TextArena, OpenEnv and GEM, which have interfaces of their own,
- ``games.py``: a small game that ships.
"""

from grouprl.lm.agents.environments.text import TextEnvironment, text_environment

__all__ = ["TextEnvironment", "text_environment"]
