"""Two processes of one thread beside one process of one thread: seconds of a step, and what of them is communication.

Both sides do the same work, with completions of full length, in turns. The table holds the median of the rounds, and of
each round the median of its steps. Run it on a quiet machine with at least two cores.

    python benchmarks/ranks.py --rounds 5 --out benchmarks/results/ranks.md

| work | prompts x completions x tokens | tokens of a prompt |
| --- | --- | --- |
| wide | 16 x 8 x 32 | about 10 |
| long | 8 x 8 x 64 | 512 |
| W1 | 2 x 8 x 32 | about 10 |
| environment | 8 environments whose step takes 1 ms; batches of 512 steps | |

``wide-lora`` and ``long-lora`` train an adapter of rank 16. Communication is the time in exchanges, waiting included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKS = {"wide": (16, 8, 32, 0), "long": (8, 8, 64, 512), "W1": (2, 8, 32, 0)}
ALL = ("wide", "wide-lora", "long", "long-lora", "W1", "environment")
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def clocked() -> dict[str, float]:
    """Have the seconds of all exchanges added up."""
    from grouprl.machine.ranks import Ranks

    clock = {"seconds": 0.0}
    for name in ("_exchange", "_on_tensor"):
        own = getattr(Ranks, name)

        def timed(self: Any, *arguments: Any, own: Any = own) -> Any:
            began = time.perf_counter()
            try:
                return own(self, *arguments)
            finally:
                clock["seconds"] += time.perf_counter() - began

        setattr(Ranks, name, timed)
    return clock


def language_model(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Seconds of each step, and of its exchanges."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    from grouprl.lm import GRPOConfig, GRPOTrainer

    prompts, group, tokens, long = WORKS[name.removesuffix("-lora")]
    clock = clocked()
    found: dict[str, list[float]] = {"step": [], "exchange": []}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, clock["seconds"] = time.perf_counter(), 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["step"].append(time.perf_counter() - self.began)
            found["exchange"].append(clock["seconds"])

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]  # no group is constant

    words = "The quick brown fox jumps over the lazy dog and runs away from it. "
    rows = [{"prompt": f"{i}. " + words * (1 + long // 15)} for i in range(prompts * 2)]
    config = GRPOConfig(
        output_dir=folder, prompts_per_step=prompts, num_generations=group, max_completion_length=tokens,
        min_new_tokens=tokens, max_steps=steps, learning_rate=1e-6, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if name.endswith("-lora") else None
    GRPOTrainer("smollm2", reward, config, rows, peft_config=lora, callbacks=[Clock()]).train()
    return found


def environment(steps: int) -> dict[str, Any]:
    """Seconds of each update, and of its exchanges."""
    import gymnasium as gym
    import numpy as np

    from grouprl import GRPO

    class Slow(gym.Env):  # type: ignore[type-arg,misc]
        observation_space = gym.spaces.Box(-10, 10, (4,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.left = 50
            return self.np_random.normal(size=4).astype(np.float32), {}

        def step(self, action: int) -> Any:
            until = time.perf_counter() + 1e-3
            while time.perf_counter() < until:
                pass
            self.left -= 1
            return self.np_random.normal(size=4).astype(np.float32), float(action), self.left == 0, False, {}

    clock = clocked()
    found: dict[str, list[float]] = {"step": [], "exchange": []}
    last = {"at": time.perf_counter()}

    def note(agent: Any, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        found["step"].append(now - last["at"])
        found["exchange"].append(clock["seconds"])
        last["at"], clock["seconds"] = now, 0.0

    agent = GRPO(Slow, preset=None, n_envs=8, min_steps=512, max_steps=512, warmup_steps=64, threads=1)
    agent.learn(512 * steps, callback=note)
    return found


def work(name: str, steps: int, out: Path) -> None:
    """What a process does; the first writes the numbers."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = environment(steps) if name == "environment" else language_model(name, steps, Path(folder))
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))


def measure(name: str, world: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step with ``world`` processes, each on a core of its own, and the share of the exchanges."""
    with tempfile.TemporaryDirectory() as place, socket.socket() as port:
        out = Path(place) / "found.json"
        port.bind(("127.0.0.1", 0))
        number = str(port.getsockname()[1])
        port.close()
        meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
        processes = []
        for rank in range(world):
            pin = ["taskset", "-c", str(CPUS[rank])] if len(CPUS) >= world else []
            env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)} | meeting
            command = [*pin, sys.executable, __file__, "--work", name, "--steps", str(steps), "--found", str(out)]
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL))
        if max(process.wait() for process in processes):
            sys.exit(f"{name} failed with {world} processes")
        found = json.loads(out.read_text())
    step = statistics.median(found["step"][1:])
    return step, statistics.median(found["exchange"][1:]) / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(ALL), help="some of " + ", ".join(ALL))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each process; the first is not counted")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.steps, options.found)
        return
    rows = [
        "| work | 1 process, s a step | 2 processes | times as fast | of which exchanges |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in options.works.split(","):
        rounds = [(measure(name, 1, options.steps), measure(name, 2, options.steps)) for _ in range(options.rounds)]
        one, two = (statistics.median(r[side][0] for r in rounds) for side in (0, 1))
        gain = statistics.median(r[0][0] / r[1][0] for r in rounds)
        share = statistics.median(r[1][1] for r in rounds)
        rows.append(f"| {name} | {one:.2f} | {two:.2f} | {gain:.2f} | {share:.0%} |")
        print(rows[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join([*rows, ""]))


if __name__ == "__main__":
    main()
