"""Episodes whose turns a vLLM samples: what is recorded of them, against one plain forward pass over each sample."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import build
from scripted import ENDS, HOW, PROMPTS, Scripted, check, same
from vllm_stand_in import OwnEngine

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.engines.sampler import VllmSampler
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Stream
from grouprl.lm.sample.turns import Reply


class Served(OwnEngine):
    """One that may be asked from several threads."""

    side_by_side = True


class Texts:
    """In the place of a tokenizer: each token is a character."""

    def __len__(self) -> int:
        return 97

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) - 32 for character in text]}

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(chr(32 + token) for token in row) for row in rows]


def sampler(engine: Any = OwnEngine, **changes: Any) -> VllmSampler:
    model = build("llama", **{"max_position_embeddings": 128} | changes)
    return VllmSampler(model, engine(model, None, torch.float32), ENDS)


@pytest.mark.parametrize("engine", [OwnEngine, Served])
def test_log_probabilities_are_those_of_one_forward_pass(engine: Any) -> None:
    made, partner = sampler(engine), Scripted(anew=(1,), wait=lambda episode, turn: 0.002 * (episode % 3))
    found = made.sample_episodes(PROMPTS, 3, HOW, Stream(3), partner)
    assert len(found) == 12
    for i, samples in enumerate(found):
        check(made.model, PROMPTS[i // 3], samples, partner, i)
    assert {len(heard) for heard in partner.heard.values()} == {1, 2, 3, 4}
    assert {len(samples) for samples in found} == {1, 2}
    assert {finished for samples in found for sample in samples for finished in sample.finished} == {True, False}
    assert made.engine.loads == 1  # type: ignore[attr-defined]


def test_neither_threads_nor_others_nor_the_order_of_replies_change_an_episode() -> None:
    first = sampler().sample_episodes(PROMPTS, 3, HOW, Stream(3), Scripted())
    late = Scripted(wait=lambda episode, turn: 0.01 * ((7 * episode + turn) % 3))
    assert same(first, sampler(Served).sample_episodes(PROMPTS, 3, HOW, Stream(3), late))
    own = Stream(3).next(12).of(range(6, 12))

    class Later(Scripted):
        def reply(self, episode: int, turn: Any) -> Reply:
            return super().reply(episode + 6, turn)

    assert same(first[6:], sampler().sample_episodes(PROMPTS[2:], 3, HOW, own, Later()))
    assert len({tuple(s.ids) for samples in first[:3] for s in samples}) == 3


def test_turns_of_an_episode_have_random_numbers_of_their_own() -> None:
    draws = Stream(5).next(3)
    seeds = [seed for turn in range(4) for seed in draws.seeds(turn)]
    assert len(set(seeds)) == 12
    assert seeds[:3] == draws.seeds()


def test_an_episode_is_cut_where_vllm_takes_no_more_tokens() -> None:
    made = sampler()
    made.engine.context = 24
    found = made.sample_episodes(PROMPTS, 3, replace(HOW, min_new_tokens=5), Stream(3), Scripted(), 128)
    lengths = [len(sample.prompt) + len(sample.ids) for samples in found for sample in samples]
    assert max(lengths) <= 24
    assert any(len(sample.turns) > 1 for samples in found for sample in samples)
    made.engine.context = 9
    with pytest.raises(
        UsageError, match="a prompt has 9 tokens, and the stand-in takes 9 in all, so it leaves no room"
    ):
        made.sample_episodes(PROMPTS, 3, HOW, Stream(3), Scripted())


def test_a_stop_string_ends_a_turn_and_what_lies_behind_it_is_never_read() -> None:
    from grouprl.lm.sample.stopping import Stops

    made, partner = sampler(), Scripted(turns=3)
    stops = Stops([chr(32 + token) for token in range(1, 60) if token not in ENDS], Texts())
    found = made.sample_episodes(PROMPTS, 2, SamplingSettings(60, max_turn_tokens=9, stop=stops), Stream(3), partner)
    turns = [turn for heard in partner.heard.values() for turn in heard]
    assert {turn.stopped for turn in turns} == {True, False}
    for samples in found:
        for sample in samples:
            said = torch.cat([torch.arange(*turn) for turn in sample.turns])
            assert len(sample.logp) == len(said)
    for turn in turns:
        if turn.stopped:
            assert 1 <= turn.ids[-1] < 60
            assert not any(1 <= token < 60 for token in turn.ids[:-1])


@pytest.mark.parametrize("engine", [OwnEngine, Served])
def test_what_a_partner_or_vllm_raises_ends_the_sampling(engine: Any) -> None:
    class Broken(Scripted):
        def reply(self, episode: int, turn: Any) -> Reply:
            if episode == 4:
                raise KeyError("gone")
            time.sleep(0.001)
            return super().reply(episode, turn)

    with pytest.raises(KeyError, match="gone"):
        sampler(engine).sample_episodes(PROMPTS, 3, HOW, Stream(3), Broken())
    made = sampler(engine)
    made.engine.generate = lambda requests, options: (_ for _ in ()).throw(TrainingError("no more"))  # type: ignore
    with pytest.raises(TrainingError, match="no more"):
        made.sample_episodes(PROMPTS, 3, HOW, Stream(3), Scripted())
