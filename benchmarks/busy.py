"""Training on a machine that is busy with something else: seconds of a step, beside processes that never rest.

    python benchmarks/busy.py                                     the whole table, about 25 minutes on a quiet machine
    python benchmarks/busy.py --works envs --only quiet --only "one busy process"
    python benchmarks/busy.py --waits ours --rounds 1 --window 8

Works: ``nth-word`` is the recipe of that name, full fine-tuning of SmolLM2-135M with 8 prompts x 8 completions;
``envs`` is CartPole-v1 with the robust default, its step an update on 16 environments x 2,048 steps.

Conditions: quiet; beside one process that keeps a core busy; two of the training side by side; beside fifteen busy
processes (a load of 15). The others are in another session, which Linux gives the same share of the cores. The
training is loaded and warm before they start.

How threads wait for each other: ``ours`` as grouprl has it; ``spinning`` as OpenMP has it by itself (10 ms here
before a thread sleeps); ``sleeping`` at once. Each measurement is a new process, and waits take turns within
a round. The figure is the median step of each process, and of these the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measuring

WAITS: dict[str, dict[str, str]] = {
    "ours": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
}
CONDITIONS = {"quiet": (1, 0), "one busy process": (1, 1), "two trainings": (2, 0), "fifteen busy processes": (1, 15)}
"""How many trainings, how many busy processes."""
WORKS = ("nth-word", "envs")
_READ_BY_OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
LIMIT = 150.0
"""Seconds after which a measurement is given up; its step takes longer than that, then."""
RESULTS = Path(__file__).resolve().parent / "results"


# --- in the process that trains ---------------------------------------------------------------------------------------
class Clock:
    """Seconds of each step in a window that begins when the parent says so, after two steps to warm up."""

    def __init__(self, window: float) -> None:
        self.window, self.done, self.seconds = window, 0, list[float]()
        self.last = self.began = self.cpu = 0.0

    def step(self) -> bool:
        """A step ended; whether the window is over."""
        now = time.monotonic()
        self.done += 1
        if self.done == 2:
            print("ready", flush=True)
            sys.stdin.readline()
            now = self.began = time.monotonic()
            self.cpu = time.process_time()
        elif self.done > 2:
            self.seconds.append(now - self.last)
        self.last = now
        return self.done >= 3 and now - self.began > self.window


def train_language_model(clock: Clock) -> None:
    from transformers import TrainerCallback

    from grouprl.lm import GRPOConfig, GRPOTrainer, tasks

    task = tasks.get("nth-word")

    class EndOfStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = clock.step()

    config = GRPOConfig(
        prompts_per_step=8, num_generations=8, max_completion_length=6, learning_rate=1e-5, scale_rewards="none",
        max_steps=2000, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = tasks.dataset(task, "train", 8192, 0)
    GRPOTrainer("smollm2", task.reward, config, rows, callbacks=[EndOfStep()]).train()


def train_environments(clock: Clock) -> None:
    from grouprl import GRPO

    agent = GRPO("CartPole-v1", preset="default", n_envs=16, collect="segments", n_steps=2048)
    while not clock.step():
        agent.learn(16 * 2048)


# --- in the process that measures -------------------------------------------------------------------------------------
def start(work: str, wait: str, window: float, threads: int) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if key not in _READ_BY_OPENMP}
    env |= {"HF_HUB_OFFLINE": "1", **WAITS[wait], **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, __file__, "--train", work, "--window", str(window)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def disturb(busy: int) -> subprocess.Popen[bytes] | None:
    """So many processes that never rest, together in another session, as from another terminal."""
    if not busy:
        return None
    program = f"import os\nfor _ in range({busy - 1}):\n    if not os.fork(): break\nwhile True: pass"
    return subprocess.Popen([sys.executable, "-c", program], start_new_session=True)


def measure(work: str, condition: str, wait: str, window: float, threads: int) -> dict[str, Any]:
    """One measurement; window seconds of it count."""
    trainings, busy = CONDITIONS[condition]
    running, disturbing = [], None
    load = os.getloadavg()[0]
    try:
        for _ in range(trainings):  # one after another is warm, so that loading disturbs nobody
            running.append(start(work, wait, window, threads))
            while (line := running[-1].stdout.readline().strip()) != "ready":  # type: ignore[union-attr]
                if running[-1].poll() is not None:
                    raise SystemExit(f"the training ended: {line}")
        disturbing = disturb(busy)
        for process in running:
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        deadline = time.monotonic() + LIMIT
        ends = []
        for process in running:
            said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            ends.append(json.loads(said.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return {"work": work, "condition": condition, "wait": wait, "median": LIMIT, "over": True, "load_before": load}
    finally:
        if disturbing is not None:
            os.killpg(disturbing.pid, signal.SIGKILL)
            disturbing.wait()
        for process in running:
            process.kill()
            process.wait()
    steps = [step for end in ends for step in end["seconds"]]
    return {
        "work": work, "condition": condition, "wait": wait, "median": statistics.median(steps), "steps": len(steps),
        "spins": ends[0]["spins"], "cpu": sum(end["cpu"] for end in ends) / len(steps), "load_before": load,
        "versions": ends[0]["versions"], "threads": ends[0]["threads"],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The figures, and how often each is of the quiet one of ``ours``."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["work"], row["condition"], row["wait"]), []).append(row["median"])
    middle = {key: statistics.median(values) for key, values in found.items()}
    waits = [wait for wait in WAITS if any(key[2] == wait for key in middle)]
    lines = ["| work | condition | " + " | ".join(waits) + " |", "| --- | --- |" + " ---: |" * len(waits)]
    for work in WORKS:
        quiet = middle.get((work, "quiet", "ours"))
        for condition in CONDITIONS:
            cells = []
            for wait in waits:
                value = middle.get((work, condition, wait))
                ratio = "" if value is None or quiet is None else f" ({value / quiet:.2f})"
                over = "> " if value == LIMIT else ""
                cells.append("" if value is None else f"{over}{value:.3g}{ratio}")
            if any(cells):
                lines.append(f"| {work} | {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], command: str, path: Path) -> None:
    """The table with what it means."""
    last = next(row for row in reversed(rows) if not row.get("over"))
    of = measuring.machine()
    where = f"{of['cpu']}, {of['cores']} cores, {of['memory_gb']} GB, {of['system']}"
    text = (
        "# A machine that is busy\n\n"
        f"`{command}`\n\nSeconds of a step, and in brackets how often that is of the quiet step with `ours`.\n\n"
        f"{table(rows)}\n\n" + (__doc__ or "").split("\n\n", 2)[2] + "\n"
        f"{len(rows)} measurements with {last['threads']} threads; {where}; "
        + ", ".join(f"{name} {version}" for name, version in last["versions"].items())
        + ".\n"
    )
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--works", action="append", choices=WORKS, help="default: all")
    parser.add_argument("--only", action="append", choices=list(CONDITIONS), help="a condition; default: all")
    parser.add_argument("--waits", action="append", choices=list(WAITS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=float, default=15.0, help="seconds that count in a measurement")
    parser.add_argument("--threads", type=int, default=0, help="of OpenMP; default: as many as there are cores")
    parser.add_argument("--raw", type=Path, default=RESULTS / "busy.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "busy.md")
    parser.add_argument("--table", action="store_true", help="render the table of --raw again")
    given = parser.parse_args()
    if given.train:
        clock = Clock(given.window)
        (train_language_model if given.train == "nth-word" else train_environments)(clock)
        import torch

        end = {
            "seconds": clock.seconds, "cpu": time.process_time() - clock.cpu, "threads": torch.get_num_threads(),
            "spins": os.environ.get("GOMP_SPINCOUNT", ""), "versions": measuring.versions("grouprl", "torch"),
        }  # fmt: skip
        print(json.dumps(end), flush=True)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it started ends with it
    rows: list[dict[str, Any]] = []
    if given.table:
        rows = [json.loads(line) for line in given.raw.read_text().splitlines()]
    else:
        given.raw.unlink(missing_ok=True)
        for _ in range(given.rounds):
            for work in given.works or WORKS:
                for condition in given.only or CONDITIONS:
                    for wait in given.waits or WAITS:
                        rows.append(measure(work, condition, wait, given.window, given.threads))
                        print(json.dumps({k: v for k, v in rows[-1].items() if k != "versions"}), flush=True)
                        with given.raw.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    write(rows, "python benchmarks/busy.py", given.out)


if __name__ == "__main__":
    main()
