"""Episodes of several turns by compiled code, against torch operations, and bit for bit against themselves."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from compiled import LLAMAS, wide
from scripted import ENDS, HOW, PROMPTS, Scripted, check, same, seeded, without_a_token

from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.sample.appending import NativeRows
from grouprl.lm.sample.sampler import Sampler


def native(model, dtype=torch.float32, **options) -> Sampler:
    sampler = Sampler(Backbone(model), LowPrecision(model, dtype), ENDS, **options)
    assert sampler.steps == "native"
    return sampler


@pytest.mark.parametrize("name", LLAMAS)
def test_log_probabilities_are_those_of_one_forward_pass(name: str) -> None:
    model, partner = build(name, **LLAMAS[name], max_position_embeddings=128), Scripted(anew=(1,))
    found = native(model, max_rows=5).sample_episodes(PROMPTS, 3, HOW, seeded(), partner)
    for i, samples in enumerate(found):
        check(model, PROMPTS[i // 3], samples, partner, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whoever_is_beside_it(dtype: torch.dtype) -> None:
    times = torch.rand(12, 4, generator=seeded(1)).mul(0.01).tolist()
    model = wide("llama")
    together = native(model, dtype).sample_episodes(PROMPTS, 3, HOW, seeded(), Scripted(anew=(1,)))
    for max_rows in (5, 1):
        late = Scripted(anew=(1,), wait=lambda episode, turn: times[episode][turn])
        sampler = native(model, dtype, max_rows=max_rows)
        assert same(together, sampler.sample_episodes(PROMPTS, 3, HOW, seeded(), late))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_whether_tokens_are_read_one_by_one_or_together(dtype: torch.dtype) -> None:
    sampler = native(wide("mistral"), dtype)
    ids = torch.randint(97, (3, 40), generator=seeded()).tolist()
    decode = sampler._decode
    with decode.prepared(), torch.no_grad():
        decoder = decode.appending(4, 64)
        decoder.begin([PROMPTS[0], PROMPTS[2]], [[3, 0], [2, 1]])
        for token in ids[0]:
            one_by_one = decoder.append([0], [[token]])
        together = decoder.append([1, 3, 2], [ids[1], ids[0], ids[2][:5]])
        again = decoder.append([2], [ids[2][5:]])
    assert torch.equal(together[1], one_by_one[0])
    assert not torch.equal(together[0], one_by_one[0])
    assert again.isfinite().all()


def test_stretches_that_are_read_wrongly_are_left_to_torch(monkeypatch) -> None:
    monkeypatch.setattr("grouprl.lm.sample.decode_steps.NativeRows", without_a_token(NativeRows))
    model = wide("llama")
    assert Sampler(Backbone(model), LowPrecision(model, torch.float32), ENDS).steps == "blocks"
