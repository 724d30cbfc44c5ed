"""Seconds and memory of a GRPO step on a language model: grouprl beside TRL, and what each shortcut of grouprl buys.

    python benchmarks/lm_speed.py                       # the works of lm_work.py, both sides in turn
    python benchmarks/lm_speed.py --ablation            # grouprl on W1 and LONG, one shortcut less at a time
    python benchmarks/lm_speed.py --lora 16             # both sides in turn, training adapters of rank 16 alone
    python benchmarks/lm_speed.py --table               # write the table of what was measured
    python benchmarks/lm_speed.py --device cuda         # on a GPU, with one more work; files of its own

Each measurement is a process of its own; the two sides take turns, so that a machine that grows slower or faster meets
both. What a process measured is appended to results/lm_speed.jsonl (lm_speed_cuda.jsonl); the table takes the newest
run of each kind on each processor. ``--python`` and ``--peer-python`` name other interpreters than those of the two
virtual environments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_work
import measuring

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NAMES = {"cpu": "lm_speed", "cuda": "lm_speed_cuda"}
OURS = HERE.parent / ".venv" / "bin" / "python"
PEER = HERE.parent / ".venv-peers-lm" / "bin" / "python"
SHORTCUTS = (
    "shared-prompts", "prompts-read-once", "compiled-code", "low-precision", "kept-memory", "packed-attention",
)  # fmt: skip
REACH = {"W1": (4.0, 0.6), "W2": (4.0, 0.6), "LONG": (10.0, 0.35)}


def run(python: Path, worker: str, *arguments: str) -> dict[str, Any]:
    """The last line of a worker's output, with the load average just before it started."""
    load = os.getloadavg()[0]
    line = [str(python), str(HERE / worker), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"worker failed ({done.returncode}): {' '.join(line)}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "load_before": load}


def keep(log: Path, batch: str, side: str, result: dict[str, Any]) -> None:
    """Append a result and say what it was."""
    RESULTS.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps(
                {"batch": batch, "side": side, "machine": measuring.machine(), "commit": measuring.commit(), **result}
            )
            + "\n"
        )
    step = statistics.median(s["step"] for s in result["steps"])
    print(f"{result['work']:5s} {side:24s} {step:7.2f} s a step, {_peak_mb(result) / 1e3:.2f} GB", flush=True)


def _peak_mb(result: dict[str, Any]) -> float:
    """The peak memory that counts: of the GPU, where one was used."""
    peak: float = result.get("peak_gpu_mb", result["peak_rss_mb"])
    return peak


@dataclass(frozen=True)
class Series:
    """How often to measure what, and with which interpreters."""

    device: str
    works: list[str]
    rounds: int
    steps: int
    warmup: int
    ours: Path
    peer: Path
    lora: int

    def compare(self, variants: list[str]) -> None:
        """Both sides in turn on every work."""
        batch = f"{'lora' if self.lora else 'compare'} {time.strftime('%Y-%m-%d %H:%M')}"
        for work in self.works:
            for _ in range(self.rounds):
                self._measure(batch, "grouprl", work)
                for variant in variants:
                    self._measure(batch, f"trl {variant}", work, "--variant", variant)

    def ablate(self) -> None:
        """grouprl with everything and with one shortcut less, in turn."""
        batch = f"ablation {time.strftime('%Y-%m-%d %H:%M')}"
        for work in self.works:
            for _ in range(self.rounds):
                self._measure(batch, "everything", work)
                for shortcut in SHORTCUTS:
                    self._measure(batch, f"without {shortcut}", work, "--without", shortcut)

    def _measure(self, batch: str, side: str, work: str, *more: str) -> None:
        python, worker = (self.peer, "lm_worker_trl.py") if "--variant" in more else (self.ours, "lm_worker_grouprl.py")
        steps = ("--steps", str(self.steps + self.warmup), "--warmup", str(self.warmup), "--lora", str(self.lora))
        result = run(python, worker, "--work", work, *steps, "--device", self.device, *more)
        keep(RESULTS / f"{NAMES[self.device]}.jsonl", batch, side, result)


def _newest(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """For each work the results of the newest batch of a kind."""
    rows = [row for row in rows if row["batch"].startswith(kind)]
    last = {row["work"]: row["batch"] for row in rows}
    return [row for row in rows if last[row["work"]] == row["batch"]]


def _sides(rows: list[dict[str, Any]], work: str) -> dict[str, dict[str, float]]:
    """Medians over all measured steps of each side."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["work"] == work:
            sides.setdefault(row["side"], []).append(row)
    out = {}
    for side, results in sides.items():
        steps = [step for result in results for step in result["steps"]]
        out[side] = {
            **{name: statistics.median(step[name] for step in steps) for name in ("generate", "learn", "step")},
            "low": min(step["step"] for step in steps), "high": max(step["step"] for step in steps),
            "n": len(steps), "gb": statistics.median(_peak_mb(result) for result in results) / 1e3,
        }  # fmt: skip
    return out


def table(device: str) -> str:
    """The Markdown page."""
    log, on_gpu = RESULTS / f"{NAMES[device]}.jsonl", device == "cuda"
    option = " --device cuda" if on_gpu else ""
    lines = [
        "# A GRPO step on SmolLM2-135M-Instruct" + (", on a GPU" if on_gpu else ""), "",
        f"Made by `python benchmarks/lm_speed.py{option} --table` from `{log.name}`; the works are defined in "
        "`lm_work.py`. `trl best`: the fastest that settings alone reach. `trl patched`: the same with two of TRL's "
        "functions replaced (one autocast region around generation, the head on completions only). `trl lean`: `best` "
        "in parts of 8 samples." + (" `trl low`: `best` with bfloat16 weights and moments." if on_gpu else ""),
    ]  # fmt: skip
    if on_gpu:
        lines += ["", "On TRL's side all samples of a step at once. Memory is what tensors took on the GPU."]
    by_machine: dict[str, list[dict[str, Any]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        machine = row["machine"]
        beside = f"{row['gpu']} beside {machine['cores']} cores of {machine['cpu']}" if on_gpu else machine["cpu"]
        by_machine.setdefault(beside, []).append(row)
    for name, rows in sorted(by_machine.items(), key=lambda item: item[1][-1]["batch"].split(" ", 1)[1], reverse=True):
        lines += ["", f"## {name}", *_section(rows, on_gpu)]
    return "\n".join(lines) + "\n"


def _section(rows: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    """What was measured on one machine."""
    compared, adapters, ablated = (_newest(rows, kind) for kind in ("compare", "lora", "ablation"))
    machine = rows[-1]["machine"]
    newest = [*compared, *adapters]
    versions = {k: v for row in newest for k, v in row["versions"].items()}
    threads = lm_work.GPU_THREADS if on_gpu else lm_work.THREADS
    cores = "" if on_gpu else f"{machine['cores']} cores, "
    notes = dict.fromkeys(row["note"] for row in newest if "note" in row)
    dates = " and ".join(dict.fromkeys(row["batch"].split(" ")[1] for row in newest))
    lines = [
        "",
        f"{cores}{threads} threads; {dates}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "."
        + (" Weights are random ones of the same shapes." if any(r.get("weights") == "random" for r in newest) else "")
        + "".join(f" {note}" for note in notes),
        "",
        *(_comparison(compared, reach=not on_gpu) if compared else ()),
    ]  # fmt: skip
    if adapters:
        lines += ["", "### Low-rank adapters of rank 16 on all linear layers", "", *_comparison(adapters)]
    for work in dict.fromkeys(row["work"] for row in ablated):
        sides = _sides(ablated, work)
        whole = sides["everything"]
        lines += [
            "", f"### What each shortcut buys, {work}", "",
            "| | generate (s) | learn (s) | step (s) | times slower | peak memory (GB) |",
            "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for side, m in sides.items():
            lines.append(
                f"| {side} | {m['generate']:.2f} | {m['learn']:.2f} | {m['step']:.2f} | "
                f"{m['step'] / whole['step']:.2f} | {m['gb']:.2f} |"
            )
    return lines


def _comparison(rows: list[dict[str, Any]], *, reach: bool = False) -> list[str]:
    """Both sides of some works, and their ratios; with ``reach`` beside what they should be."""
    lines = [
        "| work | side | generate (s) | learn (s) | step (s) | range of steps | steps | peak memory (GB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    factors = []
    for work in dict.fromkeys(row["work"] for row in rows):
        sides = _sides(rows, work)
        for side, m in sides.items():
            lines.append(
                f"| {work} | {side} | {m['generate']:.2f} | {m['learn']:.2f} | {m['step']:.2f} | "
                f"{m['low']:.2f}-{m['high']:.2f} | {m['n']:.0f} | {m['gb']:.2f} |"
            )
        peers = {side: m for side, m in sides.items() if side != "grouprl"}
        if peers and "grouprl" in sides:
            ours, best = sides["grouprl"], peers["trl best"]
            fastest, leanest = min(m["step"] for m in peers.values()), min(m["gb"] for m in peers.values())
            speed, memory = (f" {REACH[work][0]:g} |", f" {REACH[work][1]:g} |") if reach else ("", "")
            factors.append(
                f"| {work} | {best['step'] / ours['step']:.1f} |{speed} {fastest / ours['step']:.1f} | "
                f"{ours['gb'] / best['gb']:.2f} |{memory} {ours['gb'] / leanest:.2f} |"
            )
    if not factors:
        return [*lines, "", "The other side was not measured on this machine."]
    aim = " aim |" if reach else ""
    return [
        *lines, "",
        f"| work | times faster than best |{aim} than the fastest | share of best's memory |{aim} of the leanest's |",
        "| --- | --- | --- | --- | --- |" + (" --- | --- |" if reach else ""), *factors,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=list(lm_work.WORKS), help="default: all; may be repeated")
    parser.add_argument("--device", choices=list(NAMES), default="cpu")
    parser.add_argument("--python", type=Path, default=OURS, help="what grouprl is installed in")
    parser.add_argument("--peer-python", type=Path, default=PEER, help="what TRL is installed in")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a process before those")
    parser.add_argument("--variant", action="append", help="of TRL, as in lm_worker_trl.py; default: best")
    parser.add_argument("--lora", type=int, default=0, help="low-rank adapters of this rank, a table of their own")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if not given.table:
        subprocess.run([str(given.python), str(HERE / "lm_work.py")], check=True)
        works = given.work or (["W1", "LONG"] if given.ablation else list(lm_work.USUAL[given.device]))
        series = Series(
            given.device, works, given.rounds, given.steps, given.warmup, given.python, given.peer_python, given.lora,
        )  # fmt: skip
        if given.ablation:
            series.ablate()
        else:
            series.compare(given.variant or ["best"])
    page = RESULTS / f"{NAMES[given.device]}.md"
    page.write_text(table(given.device), encoding="utf-8")
    print(f"wrote {page}", file=sys.stderr)


if __name__ == "__main__":
    main()
