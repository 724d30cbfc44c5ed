"""Speed of the environment arena beside its peers, on CartPole-v1. See README.md, "Speed".

Every measurement is a fresh process; all cases take turns, and every other round runs them in reverse, so that a
machine that warms up or is disturbed does not favour anyone.

    python benchmarks/envs_speed.py                    # measure everything, write results/envs_speed.{json,md}
    python benchmarks/envs_speed.py --table            # only render the table again
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measuring
import speed_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "envs_speed.json"
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"

Run = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing measured: which worker, told what. ``kind`` decides how often it runs and in which table it appears."""

    name: str
    kind: str  # throughput | solve | command
    worker: str
    label: str
    arguments: dict[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    """Everything that is measured, in the order of the tables."""
    found = []

    def throughput(name: str, worker: str, label: str, **arguments: Any) -> None:
        found.append(Case(f"throughput/{name}", "throughput", worker, label, arguments))

    for n_envs, updates in ((256, 22), (4096, 6)):
        throughput(f"grouprl-{n_envs}", "grouprl", "grouprl", n_envs=n_envs, updates=updates)
        own = {"n_envs": n_envs, "updates": updates, "plain": True}
        throughput(f"grouprl-own-network-{n_envs}", "grouprl", "grouprl, user's own network", **own)
        throughput(f"rejax-{n_envs}", "rejax", "rejax PPO (JAX)", n_envs=n_envs, updates=updates)
    for threads in (1, 2):
        label = f"SB3 PPO, {threads} thread{'s' * (threads > 1)}"
        throughput(f"sb3-256-{threads}t", "sb3", label, library="sb3", n_envs=256, updates=5, threads=threads)
        throughput(
            f"sb3-zoo-{threads}t", "sb3", f"{label}, RL-Zoo settings", library="sb3", updates=62, threads=threads
        )
    throughput("sbx-256", "sb3", "SBX PPO (JAX)", library="sbx", n_envs=256, updates=5, threads=1)
    throughput("sbx-zoo", "sb3", "SBX PPO (JAX), RL-Zoo settings", library="sbx", updates=62, threads=1)
    throughput("rejax-published", "rejax", "rejax PPO (JAX), its own settings", updates=102)

    def solve(name: str, worker: str, label: str, **arguments: Any) -> None:
        found.append(Case(f"solve/{name}", "solve", worker, label, arguments))

    solve("grouprl", "grouprl", "grouprl, preset")
    solve("sb3-zoo-1t", "sb3", "SB3 PPO, RL-Zoo settings, 1 thread", library="sb3", threads=1)
    solve("sb3-zoo-2t", "sb3", "SB3 PPO, RL-Zoo settings, 2 threads", library="sb3", threads=2)
    solve("sbx-zoo", "sb3", "SBX PPO (JAX), RL-Zoo settings", library="sbx", threads=1)
    solve("rejax-published", "rejax", "rejax PPO (JAX), its own settings", settings="published")
    label = "rejax PPO (JAX), its own settings without entropy bonus"
    solve("rejax-no-entropy-bonus", "rejax", label, settings="no_entropy_bonus")
    found.append(Case("command/train", "command", "grouprl", f"grouprl train {measuring.ENV_ID}"))
    return found


# --- measuring -------------------------------------------------------------------------------------------------------
def measure(case: Case, seed: int) -> Run:
    """One repetition of ``case`` in a fresh process."""
    if case.kind == "command":
        with tempfile.TemporaryDirectory() as folder:
            line = [sys.executable, "-m", "grouprl", "train", measuring.ENV_ID]
            return dict(measuring.run_command([*line, "--seed", str(seed), "--out", Path(folder) / "run"]))
    python = sys.executable if case.worker == "grouprl" else PEERS_PYTHON
    arguments = {"mode": case.kind, "seed": seed, **case.arguments}
    return measuring.run_worker([python, HERE / f"worker_{case.worker}.py"], arguments)


def schedule(chosen: list[Case], repetitions: int, seeds: int) -> Iterator[tuple[Case, int]]:
    """Cases in turn, forwards in even rounds and backwards in odd ones."""
    for turn in range(max(repetitions, seeds)):
        for case in chosen if turn % 2 == 0 else reversed(chosen):
            if turn < (repetitions if case.kind == "throughput" else seeds):
                yield case, turn


def measure_all(chosen: list[Case], repetitions: int, seeds: int, out: Path) -> dict[str, Any]:
    """Run everything; the file is written anew after each run, so that nothing measured is lost."""
    if not PEERS_PYTHON.exists() and any(case.worker != "grouprl" for case in chosen):
        raise SystemExit(
            f"{PEERS_PYTHON} does not exist; make it with: python3 -m venv .venv-peers && .venv-peers/bin/pip install "
            "-r benchmarks/requirements-peers.txt -e . (or measure grouprl alone with --only '*grouprl*')"
        )
    runs: dict[str, list[Run]] = {case.name: [] for case in chosen}
    data: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/envs_speed.py", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": measuring.machine(),
        "versions": {},
        "repetitions": repetitions,
        "seeds": seeds,
        "cases": {case.name: asdict(case) for case in chosen},
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    plan = list(schedule(chosen, repetitions, seeds))
    began = time.perf_counter()
    for done, (case, seed) in enumerate(plan, start=1):
        run = measure(case, seed)
        data["versions"] |= {case.worker: run.pop("versions")} if "versions" in run else {}
        runs[case.name].append({"seed": seed, **run})
        data["total_seconds"] = time.perf_counter() - began
        out.write_text(json.dumps(data, indent=1) + "\n")
        shown = (
            f"{run['steps_per_second']:,.0f} steps/s" if "steps_per_second" in run else json.dumps(run.get("hits", {}))
        )
        print(f"[{done}/{len(plan)}] {case.name} seed {seed}: {run['wall_seconds']:.1f} s, {shown}", flush=True)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="render the table of --out again, measure nothing")
    parser.add_argument("--repetitions", type=int, default=5, help="fresh processes per throughput case (default 5)")
    parser.add_argument("--seeds", type=int, default=10, help="seeds per time-to-solve case (default 10)")
    parser.add_argument("--only", default="*", help="shell pattern of case names, e.g. 'solve/*' or '*grouprl*'")
    parser.add_argument("--list", action="store_true", help="print the case names and stop")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file; the table goes beside it as .md")
    given = parser.parse_args()
    chosen = [case for case in cases() if fnmatch.fnmatch(case.name, given.only)]
    if given.list:
        print("\n".join(case.name for case in chosen))
        return
    if not chosen:
        parser.error(f"no case matches --only {given.only!r}; --list shows the names")
    data = (
        json.loads(given.out.read_text())
        if given.table
        else measure_all(chosen, given.repetitions, given.seeds, given.out)
    )
    given.out.with_suffix(".md").write_text(speed_table.render(data))
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
