"""Who owns the weights: what is trained is what the model holds, whatever happened to it in between."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from small_runs import ROWS, config, same, weights
from torch import nn
from transformers import TrainerCallback

from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.models.tiny import build_tiny, tiny_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) + c.count("a") for c in completions]


def made(path: Path, model: Any = None, **settings: Any) -> GRPOTrainer:
    model = build_tiny(0)[0] if model is None else model
    others = {name: settings.pop(name) for name in ("peft_config", "callbacks", "optimizers") if name in settings}
    return GRPOTrainer(
        model, reward, config(path, **{"max_steps": 2, "learning_rate": 1e-2, **settings}), ROWS,
        processing_class=tiny_tokenizer(), **others,
    )  # fmt: skip


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return not same(weights_of(model), before)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainers_of_one_model_that_were_made_up_front_each_train_it(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    for phase in (made(tmp_path / "first", model), made(tmp_path / "second", model)):
        before = weights_of(model)
        phase.train()
        assert moved(model, before)


def transpose(p: nn.Parameter) -> None:
    p.data = p.data.t().contiguous().t()


def assign(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "half and back": lambda m: m.half().float(),
    "data of its own": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "a transposed layout": lambda m: [transpose(p) for p in m.parameters() if p.dim() == 2],
    "values loaded": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_given_other_storage_between_two_trainings_is_trained_on(tmp_path: Path, change: str) -> None:
    first = made(tmp_path)
    first.train()
    CHANGES[change](first.model)
    before = weights_of(first.model)
    first.train()
    assert moved(first.model, before)


def test_a_second_training_goes_on_with_the_moments_and_does_not_depend_on_storage(tmp_path: Path) -> None:
    plain, changed = (made(tmp_path / name) for name in ("plain", "changed"))
    for one in (plain, changed):
        one.train()
        if one is changed:
            for p in one.model.parameters():
                p.data = p.data.clone()
        one.train()
    assert same(weights(plain), weights(changed))
    steps = {int(state["step"]) for state in plain.optimizer.state.values()}
    assert steps == {4}


def another_adapter(model: Any) -> None:
    model.add_adapter("second", LORA)
    model.set_adapter("second")


BREAKING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another type": (lambda m: m.to(torch.bfloat16), "became bfloat16, from float32"),
    "half": (lambda m: m.half(), "became float16"),
    "assigned": (assign, "replaced"),
    "resized": (lambda m: m.resize_token_embeddings(200), "changed its shape"),
    "a layer frozen": (lambda m: m.model.layers[0].requires_grad_(False), r"frozen \(requires_grad=False\)"),
    "all frozen": (lambda m: m.requires_grad_(False), "frozen"),
    "untied": (untie, "new parameter lm_head"),
    "parametrised": (
        lambda m: nn.utils.parametrizations.weight_norm(m.model.layers[0].self_attn.q_proj), "parametrizations",
    ),
    "an adapter by another trainer": (lambda m: made(Path(m.where) / "other", m, peft_config=LORA), "frozen"),
}  # fmt: skip


@pytest.mark.parametrize("change", BREAKING)
def test_a_model_that_cannot_be_trained_as_it_was_is_refused_between_two_trainings(tmp_path: Path, change: str) -> None:
    one = made(tmp_path)
    one.train()
    one.model.where = str(tmp_path)
    what, said = BREAKING[change]
    what(one.model)
    before = weights_of(one.model)
    with pytest.raises(UsageError, match=said):
        one.train()
    assert not moved(one.model, before)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_optimizer_step"])
def test_a_callback_that_changes_the_parameters_ends_the_training_with_one_error(tmp_path: Path, event: str) -> None:
    class Halves(TrainerCallback):
        def act(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step >= 1:
                model.half()

    setattr(Halves, event, Halves.act)
    one = made(tmp_path, callbacks=[Halves()])
    with pytest.raises(UsageError, match="became float16, from float32"):
        one.train()
    assert all(p.grad is None for p in one.model.parameters())


def test_other_adapters_than_at_first_are_refused(tmp_path: Path) -> None:
    one = made(tmp_path, peft_config=LORA)
    one.train()
    another_adapter(one.model)
    with pytest.raises(UsageError, match=r"lora_A.*(new|frozen)|(new|frozen).*lora_A|lora_A.default.weight was frozen"):
        one.train()


def test_two_trainers_that_put_adapters_on_one_model_are_refused(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    made(tmp_path / "one", model, peft_config=LORA)
    with pytest.raises(UsageError, match="has an adapter already"):
        made(tmp_path / "two", model, peft_config=LORA)


@pytest.mark.parametrize("ended", ["whole", "by an error"])
def test_what_saves_by_storage_saves_the_whole_model_after_training(tmp_path: Path, ended: str) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if ended == "by an error":
                raise KeyError("of the callback")

    one = made(tmp_path, callbacks=[Fails()])
    try:
        one.train()
    except KeyError:
        assert ended == "by an error"
    accelerate.Accelerator(cpu=True).save_model(one.model, str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    own = {name: value for name, value in one.model.state_dict().items() if name != "lm_head.weight"}
    assert {name for name in own if name in saved and torch.equal(own[name], saved[name])} == set(own)


def test_nothing_of_the_trainer_is_pickled_with_the_model(tmp_path: Path) -> None:
    def size(model: nn.Module) -> int:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return buffer.tell()

    one = made(tmp_path)
    before = size(one.model)
    one.train()
    assert size(one.model) < 1.02 * before
    assert same(weights_of(copy.deepcopy(one.model)), weights_of(one.model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_computed_wherever_train_is_called(tmp_path: Path, mode: Callable[[], Any]) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    one.train()
    with mode():
        other.train()
    assert same(weights(one), weights(other))


def test_a_trainer_made_in_inference_mode_trains_its_adapter(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    with torch.inference_mode():
        one = made(tmp_path, model, peft_config=LORA)
    before = weights_of(one.model)
    one.train()
    assert moved(one.model, before)


def test_a_model_made_in_inference_mode_is_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        model, _ = build_tiny(0)
    with pytest.raises(UsageError, match=r"made in torch\.inference_mode"):
        made(tmp_path, model)


def test_parameters_that_share_a_part_of_their_memory_are_refused(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.layers[:2])
    n = first.numel()
    both = torch.randn(n + n // 2)
    first.data, second.data = both[:n].view_as(first), both[-n:].view_as(second)
    with pytest.raises(UsageError, match="share their memory"):
        made(tmp_path, model)


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    with pytest.raises(UsageError, match="meta device"):
        made(tmp_path, model.to("meta"))


def test_a_trainer_does_not_train_within_its_own_training(tmp_path: Path) -> None:
    class Again(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            one.train()

    one = made(tmp_path, callbacks=[Again()])
    with pytest.raises(UsageError, match="is training already"):
        one.train()
    one.pop_callback(Again)
    assert one.train().global_step == 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_trainer_is_not_copied(tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError, match="cannot be copied or pickled"):
        copied(made(tmp_path))


def test_an_optimizer_that_needs_the_loss_and_a_schedule_of_another_one_are_refused(tmp_path: Path) -> None:
    model, _ = build_tiny(0)
    sgd, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(UsageError, match="LBFGS evaluates the loss several times"):
        made(tmp_path, model, optimizers=(torch.optim.LBFGS(model.parameters()), None))
    with pytest.raises(UsageError, match="a scheduler of another optimizer"):
        made(tmp_path, model, optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(other)))


def test_what_user_functions_set_torch_to_ends_with_their_call(tmp_path: Path) -> None:
    def careless(*_: Any, **__: Any) -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)

    class Careless(TrainerCallback):
        on_step_begin = careless

    def careless_reward(completions: list[str], **_: Any) -> list[float]:
        careless()
        return reward(completions)

    plain = made(tmp_path / "plain")
    one = GRPOTrainer(
        build_tiny(0)[0], careless_reward, config(tmp_path / "one", max_steps=2, learning_rate=1e-2), ROWS,
        processing_class=tiny_tokenizer(), callbacks=[Careless()],
    )  # fmt: skip
    plain.train()
    one.train()
    assert same(weights(plain), weights(one))


def test_a_callback_that_returns_something_is_told_what_to_return(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> bool:
            return False

    with pytest.raises(UsageError, match="on_step_end of a callback returned False; set fields of the control"):
        made(tmp_path, callbacks=[Stops()]).train()


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def louder_head(model: Any) -> None:
    head = Louder(64, 32, bias=False)
    head.weight, model.lm_head = model.lm_head.weight, head


def louder(module: Any, given: Any, out: Any) -> Any:
    out.logits = 3 * out.logits
    return out


UNHEARD: dict[str, Callable[[Any], Any]] = {
    "a hook on the model": lambda m: m.register_forward_hook(louder),
    "another head of the same weight": louder_head,
    "another class": lambda m: setattr(m.lm_head, "__class__", Louder),
    "another activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "a forward of its own": lambda m: setattr(m.model.embed_tokens, "forward", lambda ids: torch.ones(*ids.shape, 64)),
}


@pytest.mark.parametrize("change", UNHEARD)
def test_modules_that_compute_otherwise_than_at_first_are_heard_or_refused(tmp_path: Path, change: str) -> None:
    one = made(tmp_path, bf16=False)
    UNHEARD[change](one.model)
    before = weights_of(one.model)
    for go in (one.train, lambda: one.evaluate(ROWS)):
        with pytest.raises(UsageError, match="modules of the model were replaced or changed since training was set up"):
            go()
    assert not moved(one.model, before)


@pytest.mark.parametrize("change", UNHEARD)
def test_modules_that_a_callback_changes_within_a_run_are_heard_or_refused_at_the_next_step(
    tmp_path: Path, change: str
) -> None:
    class Changes(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                UNHEARD[change](model)

    one = made(tmp_path, bf16=False, callbacks=[Changes()])
    with pytest.raises(UsageError, match="modules of the model were replaced or changed since training was set up"):
        one.train()
    assert one.state.global_step == 1


def test_an_adapter_that_is_merged_is_not_trained(tmp_path: Path) -> None:
    one = made(tmp_path, peft_config=LORA)
    one.model.merge_adapter()
    with pytest.raises(UsageError, match="an adapter is merged into the model"):
        one.train()
    one.model.unmerge_adapter()
    assert one.train().global_step == 2


def test_an_adapter_that_is_merged_by_a_callback_is_not_trained(tmp_path: Path) -> None:
    class Merges(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.merge_adapter()

    one = made(tmp_path, peft_config=LORA, callbacks=[Merges()], attention="plain")
    with pytest.raises(UsageError, match="the loss depends on no trained weight"):
        one.train()
