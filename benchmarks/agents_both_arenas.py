"""One environment, one estimator, one objective, two actors: a 64x64 network and a language model.

    python benchmarks/agents_both_arenas.py                       # all actors, seeds 0, 1, 2
    python benchmarks/agents_both_arenas.py --actor network --seeds 0
    python benchmarks/agents_both_arenas.py --table               # render again, run nothing

The environment is FrozenLake-v1 of Gymnasium with ten starts, on ice that is not slippery. The network sees the number
of the place, as the environment gives it. The language models read words, and say words or letters. Rewards, groups
(8 episodes from one start, 3 starts a batch), estimator and loss are the same, and so is the code that computes
advantages and loss. Each training batch is a row of results/agents_both_arenas.jsonl: episodes so far, seconds of
training so far, and the mean return of its episodes, actions sampled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring

HERE = Path(__file__).resolve().parent
LOG, PAGE = HERE / "results" / "agents_both_arenas.jsonl", HERE / "results" / "agents_both_arenas.md"
LAKE = {"desc": ["SSSS", "SHSH", "SSSH", "HSSG"], "is_slippery": False, "max_episode_steps": 12}
STARTS, GROUP, ADVANTAGE, GAMMA = 3, 8, "timestep", 0.99
BATCHES = {"network": 400, "tiny": 300, "smollm2": 40}
ACTORS = {
    "network": "64x64 network, 5,508 parameters", "tiny": "language model, 100,672 parameters, from scratch",
    "smollm2": "SmolLM2-135M-Instruct",
}  # fmt: skip
EPISODES = (24, 120, 240, 480, 960, 2400, 4800, 9600)
SECONDS = (1, 5, 10, 20, 60, 120, 240)
SMOOTH = 5

Row = dict[str, Any]


def network(seed: int) -> Iterator[Row]:
    """The environment arena."""
    from grouprl import GRPO

    agent = GRPO(
        "FrozenLake-v1", preset=None, env_kwargs=LAKE, n_envs=STARTS * GROUP, group_size=GROUP, collect="episodes",
        min_steps=1, warmup_steps=0, sticky=0.0, advantage=ADVANTAGE, gamma=GAMMA, learning_rate=3e-3, seed=seed,
    )  # fmt: skip
    rows: list[Row] = []

    def note(agent: Any, metrics: Row) -> bool:
        before = rows[-1]["episodes"] if rows else 0
        rows.append(
            {"episodes": before + metrics["episodes"], "seconds": metrics["train_seconds"],
             "return": metrics["return_batch"]}
        )  # fmt: skip
        return len(rows) < BATCHES["network"]

    agent.learn(10**9, callback=note)
    yield from rows


def language_model(name: str, seed: int) -> Iterator[Row]:
    """The language arena."""
    from transformers import TrainerCallback

    from grouprl.lm import GRPOConfig, GRPOTrainer, text_environment
    from grouprl.lm.models.tiny import build_tiny

    words: Row = {"env_kwargs": LAKE, "form": "text", "invalid_action": "random", "max_turns": 12}
    if name == "tiny":
        words |= {
            "instructions": "",
            "obs_to_text": lambda place: "abcdefghijklmnop"[int(place)],
            "action_parser": lambda text: "0123".index(text) if text and text in "0123" else None,
        }
        model, tokenizer = build_tiny(seed)
        settings: Row = {"learning_rate": 1e-3, "max_completion_length": 40}
    else:
        words |= {
            "instructions": "Walk over the ice to the goal. Each move is one of: left, down, right, up.",
            "cue": "\nMove:",
        }
        model, tokenizer = "smollm2", None
        settings = {"learning_rate": 2e-5, "adam_beta2": 0.99, "max_completion_length": 320, "warmup_steps": 3}
    rows: list[Row] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
            if logs and "reward" in logs:
                done = state.global_step * STARTS * GROUP
                rows.append({"episodes": done, "seconds": time.perf_counter() - self.began, "return": logs["reward"]})

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, seed=seed, prompts_per_step=STARTS, num_generations=GROUP, max_steps=BATCHES[name],
            max_turn_length=1, advantage=ADVANTAGE, gamma=GAMMA, scale_rewards="none", logging_steps=1,
            lr_scheduler_type="constant_with_warmup", save_strategy="no", report_to="none", disable_tqdm=True,
            **settings,
        )  # fmt: skip
        starts = [{"seed": i} for i in range(4096)]
        GRPOTrainer(
            model=model, processing_class=tokenizer, args=config, train_dataset=starts, callbacks=[Clock()],
            environment_factory=text_environment("FrozenLake-v1", **words),
        ).train()  # fmt: skip
    yield from rows


def measure(actor: str, seed: int) -> None:
    """Train once, in a process of its own, and append its curve."""
    line = [sys.executable, __file__, "--one", actor, "--seeds", str(seed)]
    curve = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    record = {
        "actor": actor, "seed": seed, "curve": curve, "commit": measuring.commit(), "machine": measuring.machine(),
        "versions": measuring.versions("grouprl", "torch", "transformers", "gymnasium"),
    }  # fmt: skip
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{actor} seed {seed}: {curve[0]['return']:.2f} -> {curve[-1]['return']:.2f}", flush=True)


def at(curve: list[Row], column: str, value: float) -> float | None:
    """The mean return of the last few batches up to ``value`` of a column; None where the run ended before."""
    if curve[-1][column] < value:
        return None
    so_far = [row["return"] for row in curve if row[column] <= value]
    return statistics.fmean(so_far[-SMOOTH:]) if so_far else None


def table(column: str, values: tuple[int, ...], runs: dict[str, list[Row]]) -> list[str]:
    """Return against episodes, or against seconds: the median over seeds."""
    lines = [f"| {column} | " + " | ".join(f"{v:,}" for v in values) + " |", "| --- |" + " --- |" * len(values)]
    for actor, of_actor in runs.items():
        cells = []
        for value in values:
            found = [r for run in of_actor if (r := at(run["curve"], column, value)) is not None]
            cells.append(f"{statistics.median(found):.2f}" if len(found) == len(of_actor) else "")
        lines.append(f"| {ACTORS[actor]} | " + " | ".join(cells) + " |")
    return lines


def page() -> str:
    """The Markdown page, of the newest run of each actor and seed."""
    newest: dict[tuple[str, int], Row] = {}
    for line in LOG.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        newest[run["actor"], run["seed"]] = run
    runs = {actor: [run for (name, _), run in sorted(newest.items()) if name == actor] for actor in ACTORS}
    runs = {actor: of_actor for actor, of_actor in runs.items() if of_actor}
    everything = [run for of_actor in runs.values() for run in of_actor]
    versions = ", ".join(sorted({f"{name} {v}" for run in everything for name, v in run["versions"].items()}))
    machines = "; ".join(sorted({f"{run['machine']['cpu']}, {run['machine']['cores']} cores" for run in everything}))
    seeds = {ACTORS[actor]: ", ".join(str(run["seed"]) for run in of_actor) for actor, of_actor in runs.items()}
    about = (
        f"Made by `python benchmarks/agents_both_arenas.py --table` from `{LOG.name}`. FrozenLake-v1 with ten starts, "
        f"not slippery, at most 12 steps; `advantage={ADVANTAGE}`, `gamma={GAMMA}`, groups of {GROUP} episodes from "
        f"one start, {STARTS} starts a batch. Mean return of sampled training episodes, the share that reached "
        f"the goal, over {SMOOTH} batches; median over seeds. A cell is empty where a run ended before."
    )
    return "\n".join([
        "# One environment, two actors", "", about, "",
        "Seeds: " + "; ".join(f"{actor}: {of_actor}" for actor, of_actor in seeds.items()) + ".  ",
        f"{machines}; {versions}; commit {', '.join(sorted({run['commit'] for run in everything}))}.", "",
        "## Return against episodes", "", *table("episodes", EPISODES, runs), "",
        "## Return against seconds of training", "", *table("seconds", SECONDS, runs), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actor", choices=list(ACTORS), action="append")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", choices=list(ACTORS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.one is not None:
        curve = network(seeds[0]) if given.one == "network" else language_model(given.one, seeds[0])
        print(json.dumps(list(curve)))
        return
    if not given.table:
        for actor in given.actor or list(ACTORS):
            for seed in seeds:
                measure(actor, seed)
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
