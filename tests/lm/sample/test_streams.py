"""Random numbers that belong to completions: published answers, and the same whoever asks for them."""

import numpy as np
import pytest
import torch
from architectures import EOS, PAD, build, random_ids

from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.sampler import Sampler
from grouprl.lm.sample.streams import EVALUATION, Draws, Stream, draws_of, philox, seed_for

ONES = 0xFFFFFFFF


def packed(model):
    return Sampler(Backbone(model), LowPrecision(model, torch.float32), (EOS,))


def by(steps):
    return lambda model: PlainSampler(model, torch.float32, (EOS,), PAD, steps)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [random_ids(n, generator) for n in lengths]


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, wanted) -> None:
    assert tuple(int(word) for word in philox(counter, key)) == wanted


def test_a_number_depends_on_seed_use_completion_and_token_alone() -> None:
    draws = Stream(5).next(7)
    whole = draws.uniform(0, 30)
    assert whole.dtype == torch.float32
    assert whole.shape == (30, 7)
    for first, n in ((0, 1), (3, 9), (8, 8), (29, 1)):
        assert torch.equal(draws.uniform(first, n), whole[first : first + n])
    assert torch.equal(draws.of([6, 2]).uniform([4, 1], 5), torch.stack([whole[4:9, 6], whole[1:6, 2]], 1))
    stream = Stream(5)
    parts = [stream.next(n).uniform(0, 30) for n in (3, 4)]
    assert torch.equal(torch.cat(parts, 1), whole)
    others = (Stream(6), Stream(5 + 2**32), Stream(5, EVALUATION))
    assert not any(bool((other.next(7).uniform(0, 30) == whole).any()) for other in others)
    far = Draws(5, 0, np.array([2**32, 2**33], dtype=np.uint64)).uniform(0, 30)
    assert len(torch.cat([far, whole], 1).unique()) == 9 * 30


def test_the_numbers_are_uniform_and_below_one() -> None:
    found = Stream(1).next(1000).uniform(0, 400).double().flatten()
    assert float(found.min()) >= 0.0
    assert float(found.max()) < 1.0
    share = torch.histc(found, 20, 0.0, 1.0) / len(found)
    assert float((share - 0.05).abs().max()) < 5 * (0.05 / len(found)) ** 0.5
    assert abs(float(torch.corrcoef(found.view(400, 1000)[:2])[0, 1])) < 0.15


def test_a_generator_gives_the_seed_of_a_stream_and_moves_on() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (draws_of(generator, 2).uniform(0, 4) for _ in range(2))
    again = draws_of(torch.Generator().manual_seed(1), 2).uniform(0, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_seeds_of_dropout_differ_by_each_number() -> None:
    seeds = {seed_for(s, a, b) for s in (0, 1) for a in (0, 1, 2**31) for b in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("make", [packed, *map(by, ("generate", "generate by length", "forward passes"))])
def test_completions_are_the_same_however_they_are_divided_and_ordered(make) -> None:
    """In one call, alone, in another order, and behind completions that were never sampled."""
    sampler, how, prompts = make(build("llama")), SamplingSettings(70, temperature=1.5), prompts_of(5, 1, 5, 3)
    draws = Stream(3).next(8)
    together = [c.ids for c in sampler.sample(prompts, 2, how, draws)]
    for i, prompt in enumerate(prompts):
        alone = sampler.sample([prompt], 2, how, draws.of(slice(2 * i, 2 * i + 2)))
        assert [c.ids for c in alone] == together[2 * i : 2 * i + 2]
    turned = sampler.sample([prompts[3], prompts[1]], 2, how, draws.of([7, 6, 2, 3]))
    assert [c.ids for c in turned] == [together[i] for i in (7, 6, 2, 3)]
    assert len({len(ids) for ids in together}) > 2


def test_all_samplers_draw_the_same_completions() -> None:
    model, prompts, how = build("llama"), prompts_of(5, 1, 5, 3), SamplingSettings(12)
    makes = (packed, *map(by, ("generate", "generate by length", "forward passes")))
    found = [[c.ids for c in make(model).sample(prompts, 3, how, Stream(9))] for make in makes]
    assert found[0] == found[1] == found[2] == found[3]
