"""Prompts shared out among processes: each plays out its own, and all have what came of all of them."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from grouprl.errors import TrainingError, first_line
from grouprl.lm.generate.collect import Player
from grouprl.lm.generate.samples import Samples
from grouprl.lm.generate.scored_groups import ScoredGroups, logged_means
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Draws, Stream, draws_of
from grouprl.machine.ranks import Place, Ranks
from grouprl.objective.user_functions import TensorFunction


class SharedPlayer:
    """Several processes play out the prompts: each its own, and each has all groups afterwards.

    Args:
        player: plays out those of this process. policy: of the processes.
    """

    def __init__(self, player: Player, policy: Policy) -> None:
        self.player, self.policy, self.ranks, self.names = player, policy, policy.ranks, player.names

    def draw(
        self, prompts: list[Prompt], group_size: int, stream: Stream | Draws, numbers: Sequence[int],
        settings: SamplingSettings | None = None, state: Any = None,
    ) -> ScoredGroups:  # fmt: skip
        """As `Player.draw`."""
        places = [Ranks(Place(rank, self.ranks.world)).share(len(prompts)) for rank in range(self.ranks.world)]
        own = places[self.ranks.rank]
        draws = draws_of(stream, len(prompts) * group_size)
        found: ScoredGroups | None = None
        with self.policy.together(), self.policy.sampler.ready():
            if own:
                of_own = draws.of(slice(own.start * group_size, own.stop * group_size))
                rows = [prompts[i] for i in own]
                found = self.player.draw(rows, group_size, of_own, [numbers[i] for i in own], settings, state)
                found.leave_out_columns()  # the others have them
        parts = [part for part in self._gathered(found) if part is not None]
        for place, part in zip([place for place in places if place], parts, strict=True):
            part.take_columns([prompts[i] for i in place])
        whole = functools.reduce(lambda a, b: a.concatenate(b), parts)
        whole.rewards = replace(whole.rewards, metrics=logged_means([part.rewards for part in parts]))
        return whole

    def _gathered(self, found: ScoredGroups | None) -> list[ScoredGroups | None]:
        try:
            return self.ranks.gather(found)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"what was sampled cannot be sent to the other ranks: {first_line(error)}; let states of turns, and "
                "what reward functions log, be text, numbers, or lists and tuples of them"
            ) from error

    def returns(self, groups: Any) -> Tensor:
        """As `Player.returns`."""
        return self.player.returns(groups)

    def samples(self, groups: Any, own: TensorFunction | None) -> Samples:
        """As `Player.samples`."""
        return self.player.samples(groups, own)

    def judged_by(self, rewards: RewardCaller) -> SharedPlayer:
        """As `Player.judged_by`."""
        return SharedPlayer(self.player.judged_by(rewards), self.policy)

    def close(self) -> None:
        """As `Player.close`."""
        self.player.close()


def shared_out(player: Player, policy: Policy) -> Player:
    """The player, or what shares out its work among the processes of the policy."""
    return player if policy.ranks.world == 1 else SharedPlayer(player, policy)
