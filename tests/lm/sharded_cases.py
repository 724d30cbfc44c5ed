"""Trainings that one process does alone and two do with sharded weights; run as a program in each of the two."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agent_rank_cases
import torch
from rank_cases import LORA, Gradients, some
from small_runs import EVAL_ROWS, ROWS, Stop, logged, mixture, trainer, warm, without_times
from transformers import TrainerCallback

from grouprl.errors import GrouprlError, TrainingError
from grouprl.learning.shards import held, whole
from grouprl.lm import GRPOTrainer
from grouprl.machine.ranks import here

SAME: dict[str, dict[str, Any]] = {
    "usual": {"max_steps": 5},
    "dynamic sampling": {"reward": some, "dynamic_sampling": True, "dynamic_sampling_max_batches": 3},
    "reference": {
        "max_steps": 3, "beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5,
        "fsdp_config": {"reshard_after_forward": False},
    },
    "another reference": {"beta": 0.2, "other": True},
    "penalty in the reward": {"beta": 0.2, "kl_in": "reward", "advantage": "reinforce_pp"},
    "adapter": {"peft_config": LORA, "beta": 0.1},
    "several passes": {
        "max_steps": 3, "steps_per_generation": 2, "num_iterations": 2, "fsdp_config": {"auto_wrap_policy": "NO_WRAP"},
        "seed": 4,
    },
    "experts": {"mixture": True, "router_aux_loss_coef": 0.5},
    "some tokens": {"reward": some, "top_entropy_quantile": 0.5},
    "recomputed": {"reward": some, "fsdp_config": {"activation_checkpointing": True}},
    "evaluation": {"eval_dataset": EVAL_ROWS[:5], "eval_strategy": "steps", "eval_steps": 2},
}  # fmt: skip
"""Settings of trainings that give the same on one process and sharded on two.

With seed 3 one number of "several passes" falls within 3e-7 of where the next token begins, and rounding decides.
"""


def _trainer(folder: Path, **given: Any) -> GRPOTrainer:
    return trainer(folder, **{"bf16": False, "fsdp": True, "attention": "plain", "max_steps": 2, **given})


def _weights(made: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone() for name, value in made.model.named_parameters()}


def run(name: str, folder: Path) -> dict[str, Any]:
    """What one of `SAME` gave."""
    given, gradients = copy.deepcopy(SAME[name]), Gradients()
    if given.pop("mixture", False):
        given["model"] = mixture()
    if given.pop("other", False):
        given["ref_model"], _ = warm()
        with torch.no_grad():
            given["ref_model"].get_input_embeddings().weight.mul_(0.9)
    made = _trainer(folder, callbacks=[gradients], **given)
    gradients.trainer = made
    made.train()
    log = [
        {k: v for k, v in entry.items() if not k.endswith(("samples_per_second", "runtime"))} for entry in logged(made)
    ]
    held_here = sum(held(p).numel() for p in made.model.parameters())
    return {"weights": _weights(made), "log": without_times(log), "gradients": gradients.found,
            "texts": None if made.last_samples is None else made.last_samples.texts,
            "held": held_here, "saved": saved(made, folder)}  # fmt: skip


def saved(made: GRPOTrainer, folder: Path) -> str:
    """The folder of the model at the end."""
    place = folder.parent / f"{folder.name}-model"
    made.save_model(place)
    return str(place)


def agents(folder: Path) -> dict[str, Any]:
    """Episodes of several turns, with a KL term that passes over all of them before anything is learned."""
    settings, given = agent_rank_cases.SAME["penalty in the reward"]
    made = agent_rank_cases.trainer(
        folder, {"max_steps": 2, "fsdp": True, "attention": "plain", **settings}, **copy.deepcopy(given)
    )
    made.train()
    assert made.last_samples is not None
    return {"weights": _weights(made), "completions": made.last_samples.completions}


CHAIN = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 7, "beta": 0.1, "sync_ref_model": True,
         "ref_model_sync_steps": 2, "seed": 4}  # fmt: skip
"""Settings of a run that is stopped and gone on with, in the middle of generations."""


def chain(folder: Path, *, stop: int | None, resume: bool, **given: Any) -> dict[str, Any]:
    """One link: train until a step, or to the end, from the newest checkpoint or anew."""
    made = _trainer(folder, **CHAIN, callbacks=[] if stop is None else [Stop(stop)], **given)
    made.train(resume_from_checkpoint=resume)
    return {"weights": _weights(made), "step": made.state.global_step}


class _Raises(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if here().rank == 1:
            raise KeyError("of a callback")


def _reward(completions: list[str], **kwargs: Any) -> list[float]:
    if here().rank == 1:
        raise ValueError("the judge is out")
    return [float(len(c)) for c in completions]


def _surrogate(logp: torch.Tensor, logp_old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    if here().rank == 1:
        raise ValueError("no loss today")
    return (logp - logp_old).exp() * advantages


def _quantised(folder: Path) -> GRPOTrainer:
    model, tokenizer = warm()
    model.is_quantized = True
    return _trainer(folder, model=(model, tokenizer))


def _optimizer(folder: Path) -> GRPOTrainer:
    model, tokenizer = warm()
    return _trainer(folder, model=(model, tokenizer), optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))


FAILING: dict[str, Callable[[Path], Any]] = {
    "reward": lambda folder: _trainer(folder, reward=_reward).train(),
    "loss": lambda folder: _trainer(folder, surrogate_function=_surrogate).train(),
    "callback": lambda folder: _trainer(folder, callbacks=[_Raises]).train(),
    "data": lambda folder: _trainer(folder, rows=ROWS[: 30 + here().rank]),
    "quantised": _quantised,
    "optimizer": _optimizer,
    "layer": lambda folder: _trainer(folder, fsdp_config={"transformer_layer_cls_to_wrap": "BertLayer"}),
}
"""Trainings that fail."""


def main(out: Path) -> None:
    """Do all of it as one of two processes, and write what came of it."""
    torch.set_num_threads(1)
    place = here()
    found: dict[str, Any] = {name: run(name, out / "runs" / name) for name in SAME}
    for name, fails in FAILING.items():
        try:
            fails(out / "failing" / name)
            found[f"error {name}"] = "nothing was raised"
        except (GrouprlError, KeyError) as error:
            found[f"error {name}"] = f"{type(error).__name__}: {error}"
    found["agents"] = agents(out / "agents")
    parts = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    found["straight"] = chain(out / "straight", stop=None, resume=False)
    found["stopped"] = chain(out / "stopped", stop=3, resume=False)
    found["on"] = chain(out / "stopped", stop=None, resume=True)
    found["parts"] = chain(out / "parts", stop=3, resume=False, **parts)
    if place.rank == 0:  # to be gone on with by one process
        shutil.copytree(out / "parts", out / "parts at 3")
    found["parts on"] = chain(out / "parts", stop=None, resume=True, **parts)
    made = _trainer(out / "of one")
    try:
        if made.is_world_process_zero():
            made.save_model(out / "of one" / "model")
    except TrainingError as error:
        found["saved by one"] = str(error)
    torch.save(found, out / f"rank{place.rank}.pt")


def last(out: Path, folder: Path) -> None:
    """The last link of a chain, as one of two processes."""
    torch.set_num_threads(1)
    torch.save(chain(folder, stop=None, resume=True), out / f"rank{here().rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else last(Path(sys.argv[1]), Path(sys.argv[2]))
