"""From episodes to samples: advantages of turns, by hand, and repeated over their tokens."""

import pytest
import torch
from architectures import build
from small_policies import policy

from grouprl import objective
from grouprl.errors import TrainingError, UsageError
from grouprl.lm.generate.episodes import Episode, samples_of_episodes, turn_advantages
from grouprl.lm.prompts import Prompt
from grouprl.lm.sample.turns import Sampled
from grouprl.lm.settings.config import GRPOConfig

PROMPT = (4, 5, 6)


def sampled(*turns: int, prompt: tuple[int, ...] = PROMPT, said: int = 9) -> Sampled:
    """Turns of these lengths, and between them one token ``said`` by the partner."""
    spans, ids = [], []
    for n in turns:
        ids += [said] * bool(ids)
        spans.append((len(ids), len(ids) + n))
        ids += [7] * n
    return Sampled(list(prompt), ids, spans, torch.full((sum(turns),), -1.0), [True] * len(turns))


def episode(group: int, rewards: list[float], *samples: Sampled, states=None, truncated: bool = False) -> Episode:
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": f"of {group}"}]
    states = [None] * len(rewards) if states is None else states
    return Episode(
        Prompt(group, "go", {}, PROMPT), group, samples, rewards, not truncated, truncated, states, messages, {"n": 1.0}
    )


PLAYED = [
    episode(0, [1.0, 0.0], sampled(2, 1)),
    episode(0, [0.0, 3.0], sampled(1, 1), truncated=True),
    # Its history was rewritten after the first turn.
    episode(0, [0.0, 0.0, 2.0], sampled(2), sampled(1, 3, prompt=(8, 8))),
    episode(1, [5.0], sampled(4)),
    episode(1, [4.0], sampled(1)),
]


def config(**settings) -> GRPOConfig:
    return GRPOConfig(num_generations=2, prompts_per_step=2, **settings)


def advantages(**settings) -> list[list[float]]:
    """Of the turns of each episode."""
    found = turn_advantages(PLAYED, config(**settings))
    return [part.tolist() for part in found.split([len(episode.rewards) for episode in PLAYED])]


def close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [len(part) for part in found] == [len(part) for part in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_estimators_of_whole_episodes_give_all_turns_the_same() -> None:
    # returns 1, 3, 2 and 5, 4
    close(advantages(scale_rewards="none"), [[-1, -1], [1, 1], [0, 0, 0], [0.5], [-0.5]])
    close(advantages(advantage="leave_one_out"), [[-1.5] * 2, [1.5] * 2, [0.0] * 3, [1.0], [-1.0]])


def test_timestep_compares_turns_of_one_number_and_discounts_by_turns() -> None:
    # to go: 1, 0 | 3, 3 | 2, 2, 2 and 5 | 4; the first two have ended when the third has its third turn
    close(advantages(advantage="timestep"), [[-1.5, -2.5], [1.5, 2.0], [0.0, 0.5, 2.0], [1.0], [-1.0]])
    # to go: 1, 0 | 1.5, 3 | .5, 1, 2
    close(
        advantages(advantage="timestep", gamma=0.5),
        [[0.0, -2.0], [0.75, 2.5], [-0.75, -0.5, 2.0], [1.0], [-1.0]],
    )


def test_gigpo_compares_turns_after_what_the_model_read() -> None:
    # Returns 1, 3, 2: -1, 1, 0. After the prompt to go 1, 3, 2; after token 9 of the partner 0, 3 and 2 of the last
    # turn of the third, whose second turn came after a prompt that nobody else read.
    after_9 = [0 - 5 / 3, 3 - 5 / 3, 2 - 5 / 3]
    wanted = [[-1 - 1, -1 + after_9[0]], [1 + 1, 1 + after_9[1]], [0, 0, after_9[2]], [1.0], [-1.0]]
    close(advantages(advantage="gigpo", scale_rewards="none"), wanted)


def test_a_state_of_the_users_takes_the_place_of_what_was_read() -> None:
    one = episode(0, [0.0, 1.0], sampled(1, 1), states=["a", "b"])
    other = episode(0, [0.0, 0.0], sampled(1, 1), states=["b", None])
    found = turn_advantages([one, other], config(advantage="gigpo", scale_rewards="none"))
    assert found.tolist() == [0.5, 1.0, -1.0, -0.5]
    broken = episode(0, [0.0], sampled(1), states=[{"board": [1]}])
    with pytest.raises(UsageError, match=r"the state of turn 1 is {'board': \[1\]}, which cannot be told from others"):
        turn_advantages([broken, broken], config(advantage="gigpo"))


def test_every_token_of_a_turn_gets_the_advantage_of_the_turn_and_every_sample_knows_its_episode() -> None:
    samples = samples_of_episodes(PLAYED, config(advantage="timestep"))
    assert samples.turns is not None
    assert samples.turns.advantages.tolist() == [-1.5, -2.5, 1.5, 2.0, 0.0, 0.5, 2.0, 1.0, -1.0]
    assert samples.lengths.tolist() == [3, 2, 2, 4, 4, 1]
    assert samples.turn_lengths.tolist() == [2, 1, 1, 1, 2, 1, 3, 4, 1]
    assert samples.advantages.tolist() == [-1.5] * 2 + [-2.5, 1.5, 2.0, 0, 0, 0.5] + [2.0] * 3 + [1.0] * 4 + [-1.0]
    assert samples.group.tolist() == [0, 0, 0, 0, 1, 1]
    assert samples.episode.tolist() == [0, 1, 2, 2, 3, 4]
    assert samples.returns.tolist() == [1, 3, 2, 2, 5, 4]
    assert samples.finished.tolist() == [True, False, True, True, True, True]
    assert samples.turns.rewards.tolist() == [1, 0, 0, 3, 0, 0, 2, 5, 4]
    assert samples.turns.truncated.tolist() == [False, True, False, False, False]
    assert samples.texts == ["of 0"] * 4 + ["of 1"] * 2
    assert [prompt.index for prompt in samples.prompts] == [0, 1]
    prompts, context = samples.contexts
    assert [list(ids) for ids in prompts] == [[4, 5, 6], [8, 8], [4, 5, 6]]
    assert context.tolist() == [0, 0, 0, 1, 2, 2]


def test_an_estimator_of_the_users_gets_turns() -> None:
    def own(rewards, lengths, group):
        assert rewards.tolist() == [1, 0, 0, 3, 0, 0, 2, 5, 4]
        assert (lengths.tolist(), group.tolist()) == ([2, 2, 3, 1, 1], [0, 0, 0, 1, 1])
        return objective.returns_to_go(rewards, lengths, 1.0)

    assert turn_advantages(PLAYED, config(), own=own).tolist() == [1, 0, 3, 3, 2, 2, 2, 5, 4]


def test_an_estimator_of_the_users_may_ask_for_the_states_of_turns_and_the_discount() -> None:
    def own(rewards, lengths, group, states, gamma):
        # After the prompt, after token 9, after the prompt of the third's second sample.
        assert (states.tolist(), gamma) == ([0, 1, 0, 1, 0, 2, 1, 0, 0], 0.5)
        return objective.gigpo(rewards, lengths, group, states, gamma, scale="none")

    found = turn_advantages(PLAYED, config(gamma=0.5), own=own)
    assert torch.equal(found, turn_advantages(PLAYED, config(advantage="gigpo", gamma=0.5, scale_rewards="none")))


def test_reward_functions_may_be_normalised_one_by_one() -> None:
    rewards = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [5.0, torch.nan], [4.0, torch.nan]]).double()
    weights = torch.tensor([1.0, 0.5]).double()
    settings = config(multi_objective_aggregation="normalize_then_sum")
    found = turn_advantages(PLAYED, settings, rewards=rewards, weights=weights)
    per_episode = objective.gdpo(rewards, weights, torch.ones(5).long(), torch.tensor([0, 0, 0, 1, 1])).float()
    torch.testing.assert_close(found, per_episode.repeat_interleave(torch.tensor([2, 2, 3, 1, 1])))
    samples = samples_of_episodes(PLAYED, settings, rewards=rewards, weights=weights, extras={"x": [1, 2, 3, 4, 5]})
    assert samples.rewards[3].tolist() == [2.0, 1.0]
    assert samples.extras == {"x": [1, 2, 3, 3, 4, 5]}


def test_a_penalty_for_length_falls_on_the_last_turn_and_one_for_divergence_on_its_own() -> None:
    settings = {"advantage": "timestep", "max_completion_length": 6, "soft_overlong_cache": 4}
    # 6 tokens, the partner's included, of at most 6: -1. 3 of them: -1/4.
    two = [episode(0, [0.0, 0.0], sampled(4, 1)), episode(0, [0.0, 0.0], sampled(1, 1))]
    found = turn_advantages(two, config(**settings))
    assert found.tolist() == [0.0] * 4
    assert samples_of_episodes(two, config(**settings)).advantages.tolist()[:5] == [-0.75] * 5
    made = policy(build("llama"), build("llama", seed=1), beta=0.1, kl_in="reward", advantage="timestep")
    samples = samples_of_episodes(two, made.config, policy=made)
    assert bool(samples.known_old.all())
    assert bool(samples.known_ref.all())
    kl = objective.DIVERGENCES["k3"].value(samples.logp_old, samples.logp_ref).double()
    per_turn = -0.1 * objective.segment_sum(kl, samples.turn_lengths)
    lengths, group = torch.tensor([2, 2]), torch.zeros(2).long()
    wanted = objective.timestep(per_turn, lengths, group).float()
    torch.testing.assert_close(samples.turns.advantages, wanted)
    assert float(wanted.abs().max()) > 1e-3


def test_rewards_too_large_to_compute_with_are_an_error() -> None:
    with pytest.raises(TrainingError, match="scale the rewards"):
        turn_advantages([episode(0, [1e30], sampled(1)), episode(0, [0.0], sampled(1))], config())
