"""Trainings with vLLM that a process does alone and two do together; run as a program in each of the two.

By the address of a server, which is told to the program, or by a vLLM in each process: a stand-in, or vLLM itself.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import agent_rank_cases
import torch
from peft import LoraConfig
from small_runs import EVAL_ROWS, ROWS, config, logged, without_times
from small_vllm import build
from vllm_stand_in import OwnEngine

import grouprl.lm.engines.sampler
import grouprl.lm.engines.server
from grouprl.errors import GrouprlError
from grouprl.learning.shards import whole
from grouprl.lm import GRPOTrainer
from grouprl.machine.ranks import here

LORA = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
SAME: dict[str, dict[str, Any]] = {
    "usual": {"prompts_per_step": 4},
    "adapter": {"peft_config": LORA},
    "a process without a prompt": {"eval_dataset": EVAL_ROWS[:1], "eval_strategy": "steps", "eval_steps": 2},
    "sharded": {"fsdp": True, "attention": "plain"},
    "sharded adapter": {"fsdp": True, "attention": "plain", "peft_config": LORA},
    "gathered": {"fsdp": True, "attention": "plain", "fsdp_config": {"reshard_after_forward": False}},
}
"""Settings of trainings that give the same on one process and on two."""

REAL = ("usual", "sharded adapter")
"""Those that are tried with a real vLLM too: starting one takes a while."""

STEPS = 3


def length(completions: list[str], **others: Any) -> list[float]:
    """A reward."""
    return [float(len(text)) + 0.1 * (ord(text[-1]) % 7 if text else 0) for text in completions]


def server_at(url: str | None) -> dict[str, Any]:
    """Settings by which a server at ``url`` samples, or a vLLM of its own."""
    if url is None:
        return {}
    return {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 5.0}


def trainer(folder: Path, url: str | None, **given: Any) -> GRPOTrainer:
    """A trainer that samples by the server at ``url``, or by a vLLM of its own."""
    own = {name: given.pop(name) for name in ("eval_dataset", "peft_config") if name in given}
    model, tokenizer = build()
    settings = {"use_vllm": True, "bf16": False, "use_cpu": True, "max_completion_length": 6, "max_steps": STEPS}
    return GRPOTrainer(
        model=model, reward_funcs=length, args=config(folder, **settings | server_at(url) | given), train_dataset=ROWS,
        processing_class=tokenizer, **own,
    )  # fmt: skip


def run(name: str, folder: Path, url: str | None) -> dict[str, Any]:
    """What one of `SAME` gave."""
    made = trainer(folder, url, **copy.deepcopy(SAME[name]))
    made.train()
    assert made.last_samples is not None
    log = [
        {k: v for k, v in entry.items() if not k.endswith(("samples_per_second", "runtime"))} for entry in logged(made)
    ]
    return {"weights": {name: whole(value).clone() for name, value in made.model.named_parameters()},
            "log": without_times(log), "texts": made.last_samples.texts}  # fmt: skip


AGENTS = ("three groups", "a prompt for each turn", "function of the user's")
"""Of the cases of `agent_rank_cases`."""


def play(name: str, folder: Path, url: str | None) -> dict[str, Any]:
    """What agents did and learned."""
    settings, given = agent_rank_cases.SAME[name]
    made = agent_rank_cases.trainer(folder, {"use_vllm": True, **server_at(url), **settings, "max_steps": 2}, **given)
    made.train()
    samples = made.last_samples
    assert samples is not None
    return {"weights": {name: value.detach().clone() for name, value in made.model.named_parameters()},
            "log": without_times(logged(made)), "texts": [samples.completions, samples.turns.spans]}  # fmt: skip


def _unanswered(folder: Path, url: str | None) -> None:
    """The last process alone does not reach the server."""
    made = trainer(folder, url)
    engine: Any = made.policy.sampler
    if here().rank == 1:
        engine.engine.url = "http://127.0.0.1:9"
    made.train()


def _unwritable(folder: Path, url: str | None, **given: Any) -> None:
    """The first process cannot write the weights, while the others gather them with it."""
    made = trainer(folder, url, **given)
    engine: Any = made.policy.sampler
    if here().rank == 0:
        engine.engine._folder.cleanup()
    made.train()


FAILING: dict[str, Callable[[Path, str | None], Any]] = {
    "unanswered": _unanswered,
    "unwritable": _unwritable,
    "unwritable, sharded": lambda folder, url: _unwritable(folder, url, fsdp=True, attention="plain"),
    "in between": lambda folder, url: trainer(folder, url).policy.sample([[1, 5]], 2, torch.Generator()),
}
"""What fails."""


def main(out: Path, url: str, of_agents: str) -> None:
    """Do all of it as one of two processes, and write what came of it.

    Args:
        url, of_agents: addresses of servers of both models; empty: try a real vLLM in this process.
    """
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if url:
        grouprl.lm.engines.server._PART = 1 << 12  # several files for a small model
        found |= {f"server, {name}": run(name, out / f"server {name}", url) for name in SAME}
        found |= {f"server, {name}": play(name, out / f"server {name}", of_agents) for name in AGENTS}
        for name, fails in FAILING.items():
            try:
                fails(out / name, url)
                found[f"error {name}"] = "nothing was raised"
            except GrouprlError as error:
                found[f"error {name}"] = f"{type(error).__name__}: {error}"
        grouprl.lm.engines.sampler.ColocatedEngine = OwnEngine  # type: ignore[misc,assignment]
    found |= {f"own, {name}": run(name, out / f"own {name}", None) for name in (SAME if url else REAL)}
    if url:
        found |= {f"own, {name}": play(name, out / f"own {name}", None) for name in AGENTS}
    torch.save(found, out / f"rank{here().rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
