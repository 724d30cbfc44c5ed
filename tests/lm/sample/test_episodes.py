"""Episodes of several turns: what is recorded of them, against one plain forward pass over each sample."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from architectures import EOS, PACKED, PAD, PLAIN, build
from scripted import ENDS, HOW, PROMPTS, Scripted, check, same, seeded, without_a_token

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.packed.attention import UnsupportedError
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.trial import Trial
from grouprl.lm.sample.appending import TorchRows
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.sampler import Sampler
from grouprl.lm.sample.turns import Reply, Turn


def packed(model, ends=ENDS, *, dtype=torch.float32, **options) -> Sampler:
    return Sampler(Backbone(model), LowPrecision(model, dtype), ends, **options)


def plain(model, ends=ENDS, **_) -> PlainSampler:
    return PlainSampler(model, torch.float32, ends, PAD)


@pytest.mark.parametrize("max_rows", [256, 3])
@pytest.mark.parametrize("name", PACKED)
def test_log_probabilities_are_those_of_one_forward_pass(name: str, max_rows: int) -> None:
    model, partner = build(name, **({} if name == "gpt2" else {"max_position_embeddings": 128})), Scripted(anew=(1,))
    found = packed(model, max_rows=max_rows).sample_episodes(PROMPTS, 3, HOW, seeded(), partner)
    assert len(found) == 12
    for i, samples in enumerate(found):
        check(model, PROMPTS[i // 3], samples, partner, i)
    assert {len(heard) for heard in partner.heard.values()} == {1, 2, 3, 4}
    assert {len(samples) for samples in found} == {1, 2}
    assert {finished for samples in found for sample in samples for finished in sample.finished} == {True, False}


@pytest.mark.parametrize("name", ["llama", *PLAIN])
def test_models_that_are_read_again_at_every_step_are_sampled_too(name: str) -> None:
    model, partner = (
        build(name, **({} if name == "mamba" else {"max_position_embeddings": 128})),
        Scripted(3, anew=(1,)),
    )
    found = plain(model).sample_episodes(PROMPTS[:3], 2, HOW, seeded(), partner)
    for i, samples in enumerate(found):
        check(model, PROMPTS[i // 2], samples, partner, i)


@pytest.mark.parametrize("kind", [packed, plain])
def test_the_order_of_replies_changes_nothing(kind) -> None:
    def slow_at_random(seed: int):
        times = torch.rand(12, 4, generator=seeded(seed)).mul(0.01).tolist()
        return lambda episode, turn: times[episode][turn]

    sampler, partners = kind(build("qwen2"), max_rows=8), [Scripted(wait=slow_at_random(seed)) for seed in (1, 2)]
    found = [sampler.sample_episodes(PROMPTS, 3, HOW, seeded(), partner) for partner in (Scripted(), *partners)]
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert len(partners[0].threads) > 1
    assert not same(found[0], sampler.sample_episodes(PROMPTS, 3, HOW, seeded(1), Scripted()))


@pytest.mark.parametrize("kind", [packed, plain])
def test_no_turn_no_sample_and_no_context_is_exceeded(kind) -> None:
    sampler = kind(build("llama"), (EOS,), max_rows=5)
    for how, context in ((SamplingSettings(20, max_turn_tokens=6), None), (SamplingSettings(99), 24)):
        partner = Scripted()
        for i, samples in enumerate(sampler.sample_episodes(PROMPTS, 2, how, seeded(), partner, context)):
            (sample,) = samples
            assert all(1 <= stop - start <= (how.max_turn_tokens or 99) for start, stop in sample.turns)
            room = min(how.max_new_tokens, (context or 999) - len(sample.prompt))
            assert len(sample.ids) <= room
            last = partner.said[i][-1]  # the partner hears of every turn, the cut one too
            assert len(partner.said[i]) == len(sample.turns)
            assert last.over or len(sample.ids) + len(last.ids) >= room
    assert any(not said[-1].over for said in partner.said.values())


def test_a_prompt_without_room_for_a_turn_is_refused() -> None:
    with pytest.raises(UsageError, match=r"9 tokens.*reads 9 at most"):
        packed(build("llama")).sample_episodes(PROMPTS, 1, HOW, seeded(), Scripted(), context=9)


class Raises(Scripted):
    """Never comes back from one episode, and raises in the others."""

    def __init__(self, held: threading.Event) -> None:
        super().__init__()
        self.held = held

    def reply(self, episode: int, turn: Turn) -> Reply:
        if episode != 3:
            raise KeyboardInterrupt("stop")
        self.held.wait()
        return Reply(over=True)


def test_what_a_partner_raises_ends_sampling_though_another_call_hangs() -> None:
    held = threading.Event()
    try:
        with pytest.raises(KeyboardInterrupt, match="stop"):
            packed(build("llama")).sample_episodes(PROMPTS, 2, HOW, seeded(), Raises(held))
    finally:
        held.set()
    until = time.monotonic() + 10
    while any(thread.name == "grouprl-reply" for thread in threading.enumerate()):
        assert time.monotonic() < until, "threads are left over"
        time.sleep(0.01)


class AnewWithNothing(Scripted):
    def reply(self, episode: int, turn: Turn) -> Reply:
        return Reply(anew=True)


def test_a_sample_without_a_prompt_is_refused() -> None:
    with pytest.raises(TrainingError, match="anew with an empty prompt"):
        packed(build("llama")).sample_episodes(PROMPTS, 1, HOW, seeded(), AnewWithNothing())


class Hangs(Scripted):
    def __init__(self, held: threading.Event) -> None:
        super().__init__()
        self.held = held

    def reply(self, episode: int, turn: Turn) -> Reply:
        assert threading.current_thread().daemon  # so that it does not keep the program from ending
        self.held.wait()
        return Reply(over=True)


@pytest.mark.parametrize("kind", [packed, plain])
def test_an_interruption_is_heard_while_all_wait(kind) -> None:
    held = threading.Event()
    interruption = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    sampler = kind(build("llama"))
    interruption.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sampler.sample_episodes(PROMPTS, 2, HOW, seeded(), Hangs(held))
    finally:
        held.set()
        interruption.join()


def test_the_repetition_penalty_knows_what_both_sides_said() -> None:
    """So large that nothing is said twice, whoever said it first, and all is forgotten in a new sample."""
    how = SamplingSettings(40, temperature=0.01, repetition_penalty=1e6, max_turn_tokens=5)
    for kind in (packed, plain):
        partner = Scripted(anew=(1,))
        for samples in kind(build("llama")).sample_episodes(PROMPTS, 2, how, seeded(), partner):
            for sample in samples:
                for start, stop in sample.turns:
                    for i in range(start, stop):
                        assert sample.ids[i] not in [*sample.prompt, *sample.ids[:i]]


def test_no_turn_ends_before_the_least_length() -> None:
    how = SamplingSettings(60, min_new_tokens=3, max_turn_tokens=7)
    partner = Scripted()
    found = packed(build("llama"), tuple(range(90))).sample_episodes(PROMPTS, 2, how, seeded(), partner)
    turns = [stop - start for samples in found for sample in samples for start, stop in sample.turns]
    assert min(turns) == 4
    assert len(turns) > 16


def test_a_trial_finds_stretches_that_are_read_wrongly(monkeypatch) -> None:
    sampler = packed(build("llama"))
    trial = Trial(sampler.backbone.model)
    assert sampler.disagreement(trial) == ""
    monkeypatch.setattr("grouprl.lm.sample.decode_steps.TorchRows", without_a_token(TorchRows))
    assert "stretches of tokens" in sampler.disagreement(trial)
    with pytest.raises(UnsupportedError):
        packed(build("llama"))
