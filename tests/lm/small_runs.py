"""A model of 100,000 parameters that begins to reverse three letters, and trainers of it that take moments."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from grouprl.lm import GRPOConfig, GRPOTrainer, tasks
from grouprl.lm.models.tiny import ALPHABET, build_tiny, tiny_tokenizer, warm_start

REVERSE = tasks.get("reverse", length=3)
ROWS = tasks.dataset(REVERSE, "train", 40, form="text")
EVAL_ROWS = tasks.dataset(REVERSE, "eval", 6, form="text")
TIMES = ("step_time", "runtime", "per_second", "train_seconds")


@functools.cache
def _warm_weights() -> dict[str, torch.Tensor]:
    model, tokenizer = build_tiny(0)

    def pair(rng: random.Random) -> tuple[str, str]:
        example = REVERSE.generate(rng, "train")
        return REVERSE.text(example), example.answer

    warm_start(model, tokenizer, pair, steps=40, batch_size=64, learning_rate=3e-3)
    return {name: value.clone() for name, value in model.state_dict().items()}


def warm() -> tuple[Any, Any]:
    """A copy of the model after its supervised start, and its tokenizer."""
    model, tokenizer = build_tiny(0)
    model.load_state_dict(_warm_weights())
    return model, tokenizer


def mixture(coefficient: float = 0.0) -> tuple[Any, Any]:
    """A mixture of four experts with random weights, two for each token, and its tokenizer.

    Args:
        coefficient: what its configuration says of the loss that balances their load.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=len(ALPHABET), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64, router_aux_loss_coef=coefficient,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).eval(), tiny_tokenizer()


def config(folder: Path, **settings: Any) -> GRPOConfig:
    """Two prompts times four completions of at most four tokens, six steps, every one logged."""
    given = {
        "output_dir": folder, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 4, "max_steps": 6,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "seed": 3, "save_strategy": "no",
    } | settings  # fmt: skip
    if "per_device_train_batch_size" in settings:
        del given["prompts_per_step"]
    return GRPOConfig(**given)


def trainer(folder: Path, *, rows: Any = ROWS, reward: Any = None, model: Any = None, **given: Any) -> GRPOTrainer:
    """A trainer of the warm model; settings of the configuration are told from arguments of the trainer by name."""
    own = {
        name: given.pop(name)
        for name in (
            "eval_dataset", "callbacks", "optimizers", "peft_config", "ref_model", "advantage_function",
            "surrogate_function",
        )
        if name in given
    }  # fmt: skip
    loaded, tokenizer = warm() if model is None else model
    return GRPOTrainer(
        model=loaded, reward_funcs=reward or REVERSE.reward, args=config(folder, **given), train_dataset=rows,
        processing_class=tokenizer, **own,
    )  # fmt: skip


def weights(made: GRPOTrainer) -> dict[str, torch.Tensor]:
    """All parameters, as they are now."""
    return {name: value.detach().clone() for name, value in made.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(made: GRPOTrainer) -> list[dict[str, Any]]:
    """What was logged while it trained: all but the closing entry on the whole run."""
    return [entry for entry in made.state.log_history if "train_runtime" not in entry]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without what no two runs share."""
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in history]


class Heard(TrainerCallback):
    """Keeps what each step learned from."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, ...]] = []
        self.trainer: GRPOTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is not None and self.trainer.last_samples is not None:
            self.texts.append(tuple(self.trainer.last_samples.texts))


class Stop(TrainerCallback):
    """Saves and stops after a step, as a person would who presses Ctrl-C."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
