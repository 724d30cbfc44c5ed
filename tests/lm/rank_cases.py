"""Trainings that a process does alone and two processes do together, by name; run as a program in each of the two."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from small_runs import EVAL_ROWS, REVERSE, ROWS, Stop, logged, mixture, trainer, warm, weights, without_times
from transformers import TrainerCallback

from grouprl.errors import GrouprlError
from grouprl.lm import GRPOTrainer
from grouprl.machine.ranks import here

LORA = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0
)


class Gradients(TrainerCallback):
    """Keeps the gradient of each step, as it is taken."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self.trainer: GRPOTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.found.append(self.trainer.parameters.gradient.clone())


class StopOfLast(TrainerCallback):
    """Ends the training after a step, on the last process alone."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == args.world_size - 1:
            control.should_training_stop = True


def some(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """A reward that says nothing of half of the prompts, so that their groups have no signal."""
    rewards = REVERSE.reward(prompts=prompts, completions=completions, answer=answer)
    return [r if ord(a[0]) % 2 else 0.0 for r, a in zip(rewards, answer, strict=True)]


def failing(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that fails on the last process alone."""
    if here().rank == 1:
        raise ValueError("the judge is out")
    return [float(len(c)) for c in completions]


SAME: dict[str, dict[str, Any]] = {
    "usual": {"prompts_per_step": 4, "num_generations": 4},
    "one group": {"reward": some},
    "dynamic sampling": {"reward": some, "dynamic_sampling": True, "dynamic_sampling_max_batches": 3},
    "reference": {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    "penalty in the reward": {"beta": 0.2, "kl_in": "reward", "advantage": "reinforce_pp"},
    "adapter with dropout": {"peft_config": LORA, "disable_dropout": False, "beta": 0.1},
    "several passes": {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5},
    "cut groups": {"per_device": 8, "steps_per_generation": 4, "num_generations": 4},
    "plain": {"attention": "plain", "prompts_per_step": 2},
    "evaluation": {"eval_dataset": EVAL_ROWS, "eval_strategy": "steps", "eval_steps": 2, "log_completions": False},
    "experts": {"mixture": True, "router_aux_loss_coef": 0.5, "tokens_per_micro_batch": 24},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 100.0, "entropy_coef": 0.1},
    "stop of one": {"callbacks": [StopOfLast]},
}
"""Settings of trainings that give the same on one process and on two."""


def run(name: str, folder: Path, world: int) -> dict[str, Any]:
    """What one of `SAME` gave."""
    given = {"bf16": False, "max_steps": 4, **copy.deepcopy(SAME[name])}
    if "per_device" in given:  # of each process
        given["per_device_train_batch_size"] = given.pop("per_device") // world
    if given.pop("mixture", False):
        given["model"] = mixture()
    gradients = Gradients()
    given["callbacks"] = [gradients, *given.get("callbacks", ())]
    if name == "adapter with dropout":
        given["peft_config"].lora_dropout = 0.3
    made = trainer(folder, **given)
    gradients.trainer = made
    made.train()
    log = [{k: v for k, v in entry.items() if not k.endswith("samples_per_second")} for entry in logged(made)]
    return {"weights": weights(made), "log": without_times(log), "gradients": gradients.found,
            "texts": None if made.last_samples is None else made.last_samples.texts,
            "num_tokens": made.state.log_history[-2].get("num_tokens")}  # fmt: skip


def resumed(folder: Path, *, stop: int | None, resume: bool) -> dict[str, Any]:
    """Train in the middle of generations: until a step, or on from there to the end."""
    made = trainer(folder, bf16=False, prompts_per_step=2, steps_per_generation=3, num_iterations=2, max_steps=9,
                   beta=0.1, callbacks=[] if stop is None else [Stop(stop)])  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    return {"weights": weights(made), "step": made.state.global_step}


def _poisoned(folder: Path) -> GRPOTrainer:
    """A trainer whose gradient is not finite on the last process."""
    made = trainer(folder, bf16=False)
    own = made.policy.log_probs.evaluate

    def evaluate(batch: Any) -> Any:
        terms = own(batch)
        return terms._replace(logp=terms.logp * float("nan")) if here().rank == 1 else terms

    made.policy.log_probs.evaluate = evaluate  # type: ignore[method-assign]
    return made


class _Raises(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if here().rank == 1:
            raise KeyError("of a callback")


FAILING: dict[str, Callable[[Path], Any]] = {
    "reward": lambda folder: trainer(folder, reward=failing).train(),
    "gradient": lambda folder: _poisoned(folder).train(),
    "callback": lambda folder: trainer(folder, callbacks=[_Raises]).train(),
    "setting": lambda folder: trainer(folder, learning_rate=1e-3 * (1 + here().rank)),
    "seed": lambda folder: trainer(folder, seed=here().rank),
    "data": lambda folder: trainer(folder, rows=ROWS[: 30 + here().rank]),
    "model": lambda folder: trainer(folder, model=_frozen(), peft_config=LORA),
    "groups": lambda folder: trainer(folder, prompts_per_step=3),
    "folder": lambda folder: trainer(folder / "file" if _file(folder) else folder).train(),
}
"""Trainings that fail, on one process alone or because the two differ."""


def _frozen() -> Any:
    model, tokenizer = warm()
    with torch.no_grad():
        next(model.parameters()).add_(0.1 * here().rank)
    return model, tokenizer


def _file(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_text("")
    return True


def main(out: Path) -> None:
    """Do all of it as one of two processes, and write what came of it."""
    torch.set_num_threads(1)
    place = here()
    found: dict[str, Any] = {name: run(name, out / "runs" / name, place.world) for name in SAME}
    for name, fails in FAILING.items():
        try:
            fails(out / "failing" / name)
            found[f"error {name}"] = "nothing was raised"
        except GrouprlError as error:
            found[f"error {name}"] = f"{type(error).__name__}: {error}"
        except KeyError as error:
            found[f"error {name}"] = f"KeyError: {error}"
    found["stopped"] = resumed(out / "resumed", stop=4, resume=False)
    found["on"] = resumed(out / "alone", stop=None, resume=True)  # from what one process left
    made = trainer(out / "saved", bf16=False)
    if made.is_world_process_zero():  # as scripts do
        made.save_model(out / "saved" / "model")
    torch.save(found, out / f"rank{place.rank}.pt")


def last(out: Path, folder: Path) -> None:
    """The last link of a chain, as one of two processes."""
    torch.set_num_threads(1)
    torch.save(resumed(folder, stop=None, resume=True), out / f"rank{here().rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else last(Path(sys.argv[1]), Path(sys.argv[2]))
