"""What every environment benchmark shares: one clock, one greedy evaluation, one way to run a worker process.

Imports numpy and gymnasium only inside the functions that need them: the driver stays small, so that the peak memory
the kernel reports for a child is the child's own (a child starts with the high-water mark of the process it came from).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ENV_ID = "CartPole-v1"
SOLVED = 475.0
GREEDY_EPISODES = 20
TRAINING_EPISODES = 50


def greedy_mean(act: Callable[[Any], Any], seed: int = 12345) -> float:
    """Mean return of ``GREEDY_EPISODES`` CartPole episodes; ``act`` maps observations [n, 4] to actions [n]."""
    import gymnasium as gym
    import numpy as np

    venv = gym.make_vec(ENV_ID, num_envs=GREEDY_EPISODES, vectorization_mode="vector_entry_point")
    observation, _ = venv.reset(seed=seed)
    returns, alive = np.zeros(GREEDY_EPISODES), np.ones(GREEDY_EPISODES, bool)
    while alive.any():
        observation, reward, terminated, truncated, _ = venv.step(np.asarray(act(observation)))
        returns += reward * alive
        alive &= ~(terminated | truncated)
    venv.close()
    return float(returns.mean())


class SolveClock:
    """Notes when each of the two criteria is first met; stands still while evaluating.

    greedy: ``GREEDY_EPISODES`` greedy episodes return 475 on average; training: the last ``TRAINING_EPISODES``
    training episodes do. Both are looked at after every update.
    """

    def __init__(self, launched: float) -> None:
        self.launched = launched  # wall-clock time at which the driver started this process
        self.setup_seconds = time.time() - launched
        self.began = time.perf_counter()
        self.paused = 0.0
        self.hits: dict[str, dict[str, float]] = {}

    def check(self, steps: int, act: Callable[[Any], Any], recent: Callable[[], Sequence[float]]) -> bool:
        """Look at both criteria after an update; True once both were met."""
        now = time.perf_counter()
        trained = now - self.began - self.paused
        hit = {"steps": steps, "seconds": trained, "process_seconds": self.setup_seconds + trained}
        if "greedy" not in self.hits and greedy_mean(act) >= SOLVED:
            self.hits["greedy"] = hit
        if "training" not in self.hits:
            last = list(recent())[-TRAINING_EPISODES:]
            if len(last) == TRAINING_EPISODES and sum(last) / len(last) >= SOLVED:
                self.hits["training"] = hit
        self.paused += time.perf_counter() - now
        return len(self.hits) == 2


class StepClock:
    """Env-steps per second of the whole trainer, the first ``burn_in`` updates left out."""

    def __init__(self, burn_in: int = 2) -> None:
        self.burn_in = burn_in
        self.stamps: list[tuple[int, float]] = []

    def stamp(self, steps: int) -> None:
        """Call after every update, with the total of environment steps so far."""
        self.stamps.append((steps, time.perf_counter()))

    def result(self) -> dict[str, float]:
        """Steps, seconds and their quotient over the updates after the burn-in."""
        (steps0, time0), (steps1, time1) = self.stamps[self.burn_in - 1], self.stamps[-1]
        steps, seconds = steps1 - steps0, time1 - time0
        return {
            "timed_updates": len(self.stamps) - self.burn_in,
            "timed_steps": steps,
            "timed_seconds": seconds,
            "steps_per_second": steps / seconds,
        }


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes), as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM; this benchmark needs Linux")


def now(device: str = "cpu") -> float:
    """The clock of a benchmark, in seconds; on a GPU, once that has done all it was asked for."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def gpu(device: str) -> dict[str, Any]:
    """Name of the GPU and the most memory this process has had there in MB (10^6 bytes): in tensors, and in all."""
    if device != "cuda":
        return {}
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6,
        "reserved_gpu_mb": torch.cuda.max_memory_reserved() / 1e6,
    }


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, and Python's."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def report(result: dict[str, Any]) -> None:
    """What a worker ends with: its result as the last line of stdout."""
    print(json.dumps({**result, "peak_rss_mb": peak_rss_mb()}), flush=True)


def worker_arguments() -> dict[str, Any]:
    """What the driver passed to this worker."""
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    return arguments


def run_worker(command: Sequence[str | Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a worker in a fresh process and return its result, with the load average just before it started.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    load = os.getloadavg()[0]
    launched = time.time()
    line = [*map(str, command), json.dumps({**arguments, "launched": launched})]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"worker failed ({done.returncode}): {line}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "wall_seconds": time.time() - launched, "load_before": load}


def run_command(line: Sequence[str | Path]) -> dict[str, float]:
    """Wall seconds and peak memory of a whole command, seen from outside.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    load = os.getloadavg()[0]
    began = time.perf_counter()
    with subprocess.Popen([*map(str, line)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if child.returncode != 0:
        raise RuntimeError(f"command failed ({child.returncode}): {line}\n{said[-3000:]}")
    return {"wall_seconds": seconds, "peak_rss_mb": usage.ru_maxrss * 1024 / 1e6, "load_before": load}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from grouprl.machine.processor import described_processor, processor_name  # the peers' environments lack it

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": processor_name(described_processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def commit() -> str:
    """The commit that ran, marked if the tree differs from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()
