"""Trainings of agents that a process does alone and two processes do together; run as a program in each of the two."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rank_cases import Gradients
from small_agents import ASKED, Buttons, trainer
from small_runs import Stop, logged, weights, without_times

from grouprl.errors import GrouprlError
from grouprl.lm.agents.interaction import Answer, Interaction, Said
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.machine.ranks import here

ROWS = [{"prompt": ASKED, "right": right} for right in ("a", "b", "a", "b", "b", "a")]


class Turns(Buttons):
    """Rewards each press, and none after the second."""

    def get_turn_reward(self) -> float:
        """1 for a right one."""
        return float(self.pressed[-1:] == [self.right])


class Walk(Interaction):
    """Says "yes" or "no" as the group's seed has it, and ends after two to four turns; a state for each."""

    counted = ("success",)

    def begin(self, row: Any, seed: int) -> list[dict[str, str]]:
        """Ask."""
        self._left, self._seed = 2 + seed % 3, seed
        return [dict(message) for message in ASKED]

    def answer(self, said: Said) -> Answer:
        """Reward words that the model has of its own."""
        self._left -= 1
        reward = float(len(said.text) % 5) - (self._seed % 2) * float("yes" in said.text)
        over = self._left == 0
        return Answer(
            None if over else "yes" if self._seed % 2 else "no", reward, terminated=over, state=self._left % 2,
            metrics={"success": float(over and reward > 1)},
        )  # fmt: skip


def press(key: str) -> str:
    """Press a button.

    Args:
        key: Which one.
    """
    return "yes" if key == "a" else "no"


def calls(completions: list[Any], log_metric: Any = None, **_: Any) -> list[float]:
    """Rewards each call of a tool that the model could make."""
    if log_metric is not None:
        log_metric("said", sum(len(said) for said in completions) / len(completions))
    return [float(sum(m["role"] == "tool" and m["content"] in ("yes", "no") for m in said)) for said in completions]


def longest(completion_ids: list[Any], **_: Any) -> list[float]:
    """A reward for tokens."""
    return [len(ids) % 7 / 7.0 for ids in completion_ids]


def rollout(prompts: list[Any], made: Any) -> dict[str, Any]:
    """Samples by the trainer's own sampler, from numbers that depend on the prompt alone."""
    tokenizer, policy = made.processing_class, made.policy
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    found = [
        policy.sampler.sample([own], 1, SamplingSettings(6), torch.Generator().manual_seed(7 + i % 4))[0]
        for i, own in enumerate(ids)
    ]
    return {"prompt_ids": ids, "completion_ids": [c.ids for c in found], "logprobs": [c.logp.tolist() for c in found]}


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "environment": ({}, {"environment_factory": Buttons, "train_dataset": ROWS}),
    "three groups": ({"prompts_per_step": 4, "max_steps": 3}, {"environment_factory": Turns, "train_dataset": ROWS}),
    "a prompt for each turn": ({"history": "turn", "max_turns": 3}, {"environment_factory": Walk}),
    "states": ({"advantage": "gigpo"}, {"environment_factory": Walk}),
    "ratio of turns": (
        {"importance_sampling_level": "turn", "advantage": "timestep", "num_iterations": 2},
        {"environment_factory": Walk},
    ),
    "tools": ({}, {"tools": [press], "reward_funcs": [calls, longest], "train_dataset": ROWS}),
    "penalty in the reward": ({"beta": 0.2, "kl_in": "reward"}, {"environment_factory": Walk}),
    "dynamic sampling": (
        {"dynamic_sampling": True, "dynamic_sampling_max_batches": 3},
        {"environment_factory": Buttons, "train_dataset": ROWS},
    ),
    "evaluation": (
        {"eval_strategy": "steps", "eval_steps": 2},
        {"environment_factory": Turns, "train_dataset": ROWS, "eval_dataset": ROWS[:3]},
    ),
    "function of the user's": ({}, {"rollout_func": rollout, "reward_funcs": longest, "train_dataset": ROWS}),
}  # fmt: skip
"""Settings, and arguments of the trainer, of trainings that give the same on one process and on two."""


def run(name: str, folder: Path) -> dict[str, Any]:
    """What one of `SAME` gave."""
    settings, given = SAME[name]
    gradients = Gradients()
    made = trainer(folder, {"max_steps": 5, **settings}, **{**given, "callbacks": [gradients]})
    gradients.trainer = made
    made.train()
    samples = made.last_samples
    return {
        "weights": weights(made), "log": without_times(logged(made)), "gradients": gradients.found,
        "completions": samples.completions, "messages": samples.turns.messages,
        "columns": [p.columns for p in samples.prompts],
    }  # fmt: skip


class Fails(Walk):
    """Breaks in the second turn on the last process alone."""

    def answer(self, said: Said) -> Answer:
        """Raise there."""
        if here().rank == 1 and self._left == 1:
            raise ValueError("the board is gone")
        return super().answer(said)


class CannotBegin(Walk):
    """Does not begin on the last process."""

    def begin(self, row: Any, seed: int) -> list[dict[str, str]]:
        """Raise there."""
        if here().rank == 1:
            raise ValueError("no board")
        return super().begin(row, seed)


class Unsent(Walk):
    """Has states that no other process can be told of."""

    def answer(self, said: Said) -> Answer:
        """With a function as the state."""
        return Answer(terminated=True, state=lambda: None)


class Other(Buttons):
    """Is described to the model in other words on each process."""

    def press(self, key: str) -> str:
        """Press."""
        return super().press(key)


Other.press.__doc__ = f"Press number {here().rank}.\n\nArgs:\n    key: Which one.\n"


def calling_exit(key: str) -> str:
    """Press a button.

    Args:
        key: Which one.
    """
    if here().rank == 1:
        raise SystemExit(3)
    return "yes"


def failing_rollout(prompts: list[Any], made: Any) -> dict[str, Any]:
    """Fails on the last process."""
    if here().rank == 1:
        raise ValueError("the server is down")
    return rollout(prompts, made)


calling_exit.__name__ = "press"
FAILING: dict[str, Callable[[Path], Any]] = {
    "answer": lambda folder: trainer(folder, environment_factory=Fails).train(),
    "begin": lambda folder: trainer(folder, environment_factory=CannotBegin).train(),
    "state": lambda folder: trainer(folder, environment_factory=Unsent).train(),
    "described": lambda folder: trainer(folder, environment_factory=Other),
    "function": lambda folder: trainer(
        folder, rollout_func=failing_rollout, reward_funcs=longest, train_dataset=ROWS
    ).train(),
    "nothing": lambda folder: trainer(
        folder, {"max_steps": 1}, tools=[calling_exit], reward_funcs=calls, train_dataset=ROWS
    ).train(),
}
"""Trainings of agents that fail on one process; a tool that fails is told to the model, and ends nothing."""


def resumed(folder: Path, *, stop: int | None, resume: bool) -> dict[str, Any]:
    """Train in the middle of generations: until a step, or on from there to the end."""
    made = trainer(
        folder, {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 6, "save_strategy": "no"},
        environment_factory=Walk, callbacks=[] if stop is None else [Stop(stop)],
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    return {"weights": weights(made), "step": made.state.global_step}


def main(out: Path) -> None:
    """Do all of it as one of two processes, and write what came of it."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: run(name, out / "runs" / name) for name in SAME}
    for name, fails in FAILING.items():
        try:
            fails(out / "failing" / name)
            found[f"error {name}"] = "nothing was raised"
        except GrouprlError as error:
            found[f"error {name}"] = f"{type(error).__name__}: {error}"
    found["stopped"] = resumed(out / "resumed", stop=3, resume=False)
    found["on"] = resumed(out / "alone", stop=None, resume=True)
    torch.save(found, out / f"rank{here().rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
