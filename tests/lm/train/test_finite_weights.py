"""Numbers that are not finite end a training where they come up, and nothing is reported or saved of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small_runs import ROWS, config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from grouprl.errors import TrainingError, UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.models.tiny import build_tiny, tiny_tokenizer
from grouprl.lm.run.chat import Chat

LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
NAN, INF = float("nan"), float("inf")


def model_of(vocabulary: int = 32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=3,
        ))  # fmt: skip


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) + 0.1 * i for i, c in enumerate(completions)]


def made(path: Path, model: Any = None, **settings: Any) -> GRPOTrainer:
    given = {"reward_funcs": reward, "callbacks": None, "peft_config": None, "ref_model": None, "optimizers": None,
             "advantage_function": None, "surrogate_function": None}  # fmt: skip
    given |= {name: settings.pop(name) for name in list(settings) if name in given}
    model = model_of() if model is None else model
    return GRPOTrainer(
        model, args=config(path, **{"max_steps": 3, "learning_rate": 1e-2, **settings}), train_dataset=ROWS,
        processing_class=tiny_tokenizer(), **given,
    )  # fmt: skip


@torch.no_grad()
def spoil(model: Any, value: float = NAN) -> None:
    model.model.norm.weight[0] = value


PATHS = {"compiled": {}, "torch": {"native": False}, "plain": {"attention": "plain"}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vocabulary", [256, 300, 512, 49152])
def test_logits_that_are_not_finite_are_not_sampled_from(tmp_path: Path, vocabulary: int, path: str) -> None:
    one = made(tmp_path, model_of(vocabulary), **PATHS[path])
    spoil(one.model)
    with pytest.raises(TrainingError, match=r"^step 1: the model's logits are not finite.*model\.norm\.weight"):
        one.train()
    for greedy in (False, True):
        with pytest.raises(TrainingError, match="the model's logits are not finite"):
            one.evaluate(ROWS, greedy=greedy)
    with pytest.raises(UsageError, match=r"the model's logits are not finite.*model\.norm\.weight"):
        made(tmp_path, one.model, **PATHS[path])


@pytest.mark.parametrize("value", [INF, -INF, 1e38])
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_whatever_is_wrong_with_the_numbers_and_however_tokens_are_drawn(
    tmp_path: Path, settings: dict[str, Any], value: float
) -> None:
    one = made(tmp_path, **settings)
    spoil(one.model, value)
    if value == 1e38:
        one.model.lm_head.weight.data.mul_(1e3)  # finite, but not their products
    said = "although all weights are" if value == 1e38 else r"model\.norm\.weight"
    with pytest.raises(TrainingError, match=rf"the model's logits are not finite.*{said}"):
        one.train()


def test_a_chat_with_a_model_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(0)
    chat = Chat(model, tokenizer, config(tmp_path), [], True, False, "")
    spoil(model)
    with pytest.raises(TrainingError, match="the model's logits are not finite"):
        chat.ask("abc")


class Spoils(TrainerCallback):
    """Makes weights NaN at an event of a step."""

    def __init__(self, event: str, at: int = 1) -> None:
        self.at = at
        setattr(self, event, self.act)

    def act(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.at:
            spoil(model)


EVENTS = {  # and the step after which it is
    "on_train_begin": 0, "on_step_begin": 1, "on_pre_optimizer_step": 1, "on_optimizer_step": 1, "on_step_end": 2,
    "on_log": 2, "on_save": 1,
}  # fmt: skip


@pytest.mark.parametrize("steps_per_generation", [1, 3])
@pytest.mark.parametrize("event", EVENTS)
def test_weights_that_a_callback_makes_nan_end_the_training_before_they_are_saved(
    tmp_path: Path, event: str, steps_per_generation: int
) -> None:
    one = made(
        tmp_path, callbacks=[Spoils(event, EVENTS[event])], save_strategy="steps", save_steps=1, logging_steps=1,
        steps_per_generation=steps_per_generation, max_steps=3,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"step \d: .* not finite.*model\.norm\.weight"):
        one.train()
    saved = list(tmp_path.glob("checkpoint-*"))
    assert len(saved) == (0 if event == "on_train_begin" else 1)
    for folder in saved:
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize("last", [False, True])
def test_a_step_of_the_optimizer_to_weights_that_are_not_finite_ends_the_training(tmp_path: Path, last: bool) -> None:
    model = model_of()
    sgd = torch.optim.SGD(model.parameters(), 1e-5, weight_decay=1e3)

    class Leaps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                sgd.param_groups[0]["lr"] = 1e38

    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)
    one = made(tmp_path, model, optimizers=(sgd, constant), callbacks=[Leaps()], max_steps=2 if last else 9)
    with pytest.raises(TrainingError, match=r"^step [23]: the model's (weights|logits) are not finite: look"):
        one.train()
    assert one.state.global_step == 2


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_model_that_is_not_finite_does_not_replace_one_that_was_saved(
    tmp_path: Path, beside: bool, bad: float
) -> None:
    one = made(tmp_path, max_steps=1)
    one.train()
    place = tmp_path if beside else tmp_path / "model"
    one.save_model(place)
    good = (place / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(one.model.parameters())[0, 0] = bad
    with pytest.raises(TrainingError, match="the model's weights are not finite: look at the weights"):
        one.save_model(place)
    assert (place / "model.safetensors").read_bytes() == good


def test_adapters_that_become_nan_are_named(tmp_path: Path) -> None:
    class Adapter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(NAN)

    one = made(tmp_path, peft_config=LORA, callbacks=[Adapter()])
    with pytest.raises(TrainingError, match=r"^step 2: .*look at the weights \S*lora_A"):
        one.train()


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_reference_that_is_not_finite_is_named(tmp_path: Path, kl_in: str) -> None:
    other = model_of()
    one = made(tmp_path, ref_model=other, beta=0.1, kl_in=kl_in)
    spoil(other)
    with pytest.raises(TrainingError, match=r"^step 1: of the reference of the KL divergence, .*model\.norm\.weight"):
        one.train()
    with pytest.raises(UsageError, match="the logits of ref_model are not finite"):
        made(tmp_path, ref_model=other, beta=0.1)


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_a_divergence_beyond_the_range_of_numbers_is_named(tmp_path: Path, kl_in: str) -> None:
    other = model_of()
    one = made(tmp_path, ref_model=other, beta=0.1, kl_in=kl_in, kl_estimator="k2")
    with torch.no_grad():
        other.lm_head.weight.mul_(1e22)
    with pytest.raises(TrainingError, match=r"^step 1: the divergence to the reference is not finite"):
        one.train()


def infinite(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return logp / 0.0


SURROGATES: dict[str, tuple[Callable[..., Any], str]] = {
    "infinite": (infinite, "returned a number that is not finite"),
    "constant inf": (lambda logp, old, adv: 0 * logp + INF, "returned a number that is not finite"),
    "nan": (lambda logp, old, adv: logp * NAN, "returned a number that is not finite"),
    "detached": (lambda logp, old, adv: -logp.detach() * adv, "not differentiable in logp"),
    "no gradient": (torch.no_grad()(lambda logp, old, adv: -logp * adv), "not differentiable in logp"),
    "a mean": (lambda logp, old, adv: (-logp * adv).mean(), r"shape \[\]"),
    "a number": (lambda logp, old, adv: 1.0, "returned float"),
    "a column": (lambda logp, old, adv: (-logp * adv)[:, None], r"shape \[\d+, 1\]"),
    "complex": (lambda logp, old, adv: logp * 1j, "complex64"),
    "sparse": (lambda logp, old, adv: (-logp * adv).to_sparse(), "without plain values"),
    "an exception": (lambda logp, old, adv: {}["weights"], "raised KeyError: 'weights'"),
    "another signature": (lambda logp, old: logp, "raised TypeError"),
}


@pytest.mark.parametrize("kind", SURROGATES)
def test_what_a_surrogate_returns_is_checked(tmp_path: Path, kind: str) -> None:
    function, said = SURROGATES[kind]
    one = made(tmp_path, surrogate_function=function)
    with pytest.raises(TrainingError, match=rf"^step 1: surrogate_function .*{said}"):
        one.train()


ADVANTAGES: dict[str, tuple[Callable[..., Any], str]] = {
    "infinite": (lambda r, n, g: r / 0.0, "not finite"),
    "nan": (lambda r, n, g: r * NAN, "not finite"),
    "beyond float32": (lambda r, n, g: r + 1e39, "advantages are not finite in float32"),
    "per sample": (lambda r, n, g: torch.ones(len(n)), r"shape \[\d+\]"),
    "bool": (lambda r, n, g: r > 0, "bool"),
    "a list": (lambda r, n, g: r.tolist(), "list"),
    "on meta": (lambda r, n, g: r.to("meta"), "without plain values"),
    "an exception": (lambda r, n, g: r / (1 // 0), "raised ZeroDivisionError"),
}


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_what_an_advantage_function_returns_is_checked(tmp_path: Path, kind: str) -> None:
    function, said = ADVANTAGES[kind]
    with pytest.raises(TrainingError, match=rf"^step 1: .*{said}"):
        made(tmp_path, advantage_function=function).train()


def test_an_advantage_function_may_change_what_it_is_given_and_return_what_has_a_gradient(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(()))

    def function(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
        rewards.zero_()
        lengths.zero_()
        group.zero_()
        return torch.arange(len(rewards)) * parameter

    one = made(tmp_path, advantage_function=function, max_steps=1)
    one.train()
    assert parameter.grad is None
    assert one.last_samples is not None
    assert float(one.last_samples.returns.abs().min()) > 0


@pytest.mark.parametrize(("size", "weight"), [(1e18, 1e10), (1e10, 1e120)])
def test_weighted_rewards_beyond_the_range_are_refused(tmp_path: Path, size: float, weight: float) -> None:
    def large(completions: list[str], **_: Any) -> list[float]:
        return [size * (i % 2) for i in range(len(completions))]

    with pytest.raises(TrainingError, match=r"^step 1: .*lower reward_weights"):
        made(tmp_path, reward_funcs=large, reward_weights=[weight]).train()


ESTIMATORS = [
    {"scale_rewards": "group"}, {"scale_rewards": "batch"}, {"scale_rewards": "none"}, {"advantage": "leave_one_out"},
    {"advantage": "opo"}, {"advantage": "maxrl"}, {"advantage": "pass_at_k"}, {"advantage": "reinforce_pp"},
    {"advantage": "reinforce_pp_baseline"}, {"multi_objective_aggregation": "normalize_then_sum"},
]  # fmt: skip


@pytest.mark.parametrize("settings", ESTIMATORS, ids=lambda s: str(next(iter(s.values()))))
def test_huge_rewards_give_the_advantages_of_others_or_an_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for size in (1.0, 1e18):

        def sized(completions: list[str], size: float = size, **_: Any) -> list[float]:
            return [size * (i % 3) / 2 for i in range(len(completions))]

        one = made(tmp_path, reward_funcs=sized, max_steps=1, logging_steps=1, **settings)
        try:
            one.train()
        except TrainingError as error:
            assert size > 1.0
            assert "scale the rewards" in str(error)  # noqa: PT017
            return
        assert one.last_samples is not None
        assert math.isfinite(one.state.log_history[0]["loss"])
        advantages = one.last_samples.advantages
        found.append(advantages / advantages.abs().max())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_surrogate_may_change_what_it_is_given(tmp_path: Path) -> None:
    def polite(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return -(logp - old).exp() * advantages

    def rude(logp: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        loss = polite(logp, old.clone(), advantages.clone())
        for given in (logp.detach(), old, advantages):
            given.zero_()
        return loss

    runs = [made(tmp_path / f.__name__, surrogate_function=f, num_iterations=2) for f in (polite, rude)]
    for one in runs:
        one.train()
    losses, others = ([log["loss"] for log in one.state.log_history if "loss" in log] for one in runs)
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(*(one.model.parameters() for one in runs), strict=True))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    one = made(tmp_path)
    spoil(one.model)
    with pytest.raises(TrainingError, match="the model's weights are not finite: look"):
        one.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
