"""Credit for turns in training: what an estimator says of the turns of a run is what is learned from."""

from pathlib import Path

import pytest
import torch
from small_agents import trainer
from small_runs import logged

from grouprl import objective
from grouprl.lm.agents.interaction import Answer, Interaction


class Many(Interaction):
    """Twelve turns of one word; each is worth 1 if it says yes, whatever the others say."""

    turns_of_all = 12

    def begin(self, row, seed):
        self.turns = 0
        return "go"

    def answer(self, said):
        self.turns += 1
        return Answer(" no", reward=float("yes" in said.text), terminated=self.turns == self.turns_of_all)

    def close(self):
        self.turns = -1


class Ending(Many):
    """One turn, or several if it says no."""

    def answer(self, said):
        self.turns += 1
        return Answer(" no", float("yes" in said.text), terminated="no" not in said.text, state=self.turns % 2)


SETTINGS = {"max_turn_length": 1, "num_generations": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("history", ["full", "turn"])
@pytest.mark.parametrize("advantage", ["timestep", "gigpo", "leave_one_out"])
def test_the_advantages_of_a_run_are_those_of_the_estimator_for_its_turns(
    tmp_path: Path, advantage: str, history: str
) -> None:
    settings = {**SETTINGS, "max_steps": 2, "advantage": advantage, "gamma": 0.9, "history": history, "max_turns": 4}
    made = trainer(tmp_path, {**settings, "importance_sampling_level": "turn"}, environment_factory=Ending)
    made.train()
    samples = made.last_samples
    turns = samples.turns
    lengths = objective.segment_sum(samples.n_turns, torch.unique_consecutive(samples.episode, return_counts=True)[1])
    group = torch.arange(2).repeat_interleave(8)
    assert len(lengths) == 16
    assert int(lengths.max()) > 1
    if advantage == "timestep":
        wanted = objective.timestep(turns.rewards, lengths, group, 0.9)
    elif advantage == "gigpo":
        states = (objective.position(lengths) + 1) % 2
        wanted = objective.gigpo(turns.rewards, lengths, group, states, 0.9, eps=1e-4)
    else:
        wanted = objective.leave_one_out(turns.rewards, lengths, group)
    torch.testing.assert_close(turns.advantages, wanted.float())
    assert torch.equal(samples.advantages, turns.advantages.repeat_interleave(samples.turn_lengths))
    assert bool((turns.advantages != 0).any())
    assert ("shared_states" in logged(made)[-1]) is (advantage == "gigpo")


def test_credit_for_each_turn_learns_faster_than_one_advantage_for_the_episode(tmp_path: Path) -> None:
    means = {}
    for advantage in ("outcome", "timestep"):
        settings = {**SETTINGS, "max_steps": 9, "learning_rate": 2e-2, "advantage": advantage, "seed": 2}
        made = trainer(tmp_path / advantage, settings, environment_factory=Many)
        made.train()
        means[advantage] = sum(entry["reward"] for entry in logged(made)) / 9
    assert means["timestep"] > means["outcome"] + 0.3
