"""Kills runs of both arenas at random moments and system calls, and starves them: does resume end at the same weights?

Each try is drawn from its number (``--only envs:17``). A try starts the command line, ends it in one of the ways below,
then calls ``grouprl resume`` (with some more kills on the way) until the run is finished, and compares weights,
metrics, transcripts and summary with those of a run that was left alone. A run of which nothing was left is made anew.

- kill: SIGKILL, or SIGTERM, SIGHUP, SIGINT, after a random time
- call: SIGKILL at a random one of the calls that open, write, flush, rename or delete files
- size, files, memory: a limit on file sizes (a full disk, for a process), open files, address space; a process that
  cannot load compiled code for it computes other digits, and says so: told

    python benchmarks/robustness/kills.py --n 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from short_runs import ARENAS, RECIPE, Arena, differing, results

SECONDS = 120
"""After which something hangs."""
WAYS = ("kill", "kill", "kill", "call", "call", "call", "size", "files", "memory")
FAULTS = ("differs", "traceback", "hang", "not finished")

PROGRAM = """
import os, signal, sys
at = int(os.environ.get("KILL_AT_CALL", "0"))
if at:
    left = [at]
    def hear(event, args):
        calls = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.listdir", "shutil.rmtree")
        if event in calls:
            name = str(args[0]) if args else ""
            if os.environ["KILL_IN"] in name:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hear)
    flush = os.fsync
    def fsync(descriptor):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)
    os.fsync = fsync
from grouprl.cli import main
main()
"""


class Bench:
    """The runs that were left alone, and a place for the others."""

    def __init__(self, work: Path) -> None:
        self.work = work
        (work / "small.yaml").write_text(RECIPE)
        self.expected: dict[str, Any] = {}
        self.takes: dict[str, float] = {}
        for name, arena in ARENAS.items():
            began = time.monotonic()
            done = self.start(self.command(arena, work / name))
            assert done.wait() == 0, (work / "log").read_text()
            self.takes[name] = time.monotonic() - began
            self.expected[name] = json.loads(json.dumps(results(work / name, arena)))

    def command(self, arena: Arena, folder: Path) -> list[str]:
        words = [str(self.work / "small.yaml") if word == "RECIPE" else word for word in arena.command]
        return [*words, "--out", str(folder)]

    def start(self, words: list[str], limit: tuple[int, int] | None = None, **env: str) -> subprocess.Popen[bytes]:
        def limited() -> None:
            if limit is not None:
                resource.setrlimit(limit[0], (limit[1], limit[1]))

        log = (self.work / "log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words], stdout=log, stderr=log, preexec_fn=limited,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )  # fmt: skip

    def disturb(self, name: str, words: list[str], folder: Path, draw: random.Random) -> str:
        """Start a command and end it, or starve it, in one of the ways; says how."""
        way = draw.choice(WAYS)
        if way == "kill":
            number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
            after = draw.choice((draw.random() * 0.2, draw.random() * self.takes[name] * 1.1))
            process = self.start(words)
            time.sleep(after)
            process.send_signal(number)
            said = f"{number.name} after {after:.2f} s"
        elif way == "call":
            at = draw.randrange(1, 160)
            process = self.start(words, KILL_AT_CALL=str(at), KILL_IN=str(folder))
            said = f"SIGKILL at call {at}"
        else:
            limits = {
                "size": (resource.RLIMIT_FSIZE, draw.choice((0, 100, 3_000, 20_000, 100_000, 500_000))),
                "files": (resource.RLIMIT_NOFILE, draw.randrange(8, 40)),
                "memory": (resource.RLIMIT_AS, draw.randrange(200, 3000) << 20),
            }
            process = self.start(words, limits[way])
            said = f"{way} limited to {limits[way][1]}"
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"{said}: hang"
        return said

    def tries(self, name: str, number: int) -> tuple[str, str, str]:
        """What was done in try ``number``, the outcome, and what is worth reading."""
        arena, draw = ARENAS[name], random.Random(f"{name} {number}")
        folder = self.work / "try"
        shutil.rmtree(folder, ignore_errors=True)
        (self.work / "log").unlink(missing_ok=True)
        done = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            done.append(self.disturb(name, self._next(arena, folder), folder, draw))
        said = "; ".join(done)
        for _ in range(2):
            if not (folder / "summary.json").exists():
                process = self.start(self._next(arena, folder))
                try:
                    process.wait(SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    return said, "hang", ""
        log = (self.work / "log").read_text(errors="replace")
        if "hang" in said:
            return said, "hang", log[-500:]
        if not (folder / "summary.json").exists():
            return said, "not finished", log[-500:]
        different = differing(self.expected[name], json.loads(json.dumps(results(folder, arena))))
        told = any(words in log for words in ("without compiled code", "numbers will differ"))
        if different:
            return said, "told" if told else "differs", ", ".join(different) + "\n" + log[-3000:]
        ours = "Traceback" in log and "/grouprl/" in log  # not of Python's own start
        return said, "traceback" if ours else "same", log[-600:] if ours else ""

    def _next(self, arena: Arena, folder: Path) -> list[str]:
        """``resume`` if there is something to resume from, else the whole run again."""
        if any(folder.glob(arena.checkpoints)):
            return ["resume", str(folder), "--quiet"]
        shutil.rmtree(folder, ignore_errors=True)
        return self.command(arena, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="tries per arena")
    parser.add_argument("--only", help="one try, such as envs:17")
    parser.add_argument("--raw", type=Path, help="where tries are kept; those of an earlier, unfinished call count")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "kills.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        bench = Bench(Path(place))
        if options.only:
            name, _, number = options.only.partition(":")
            print(*bench.tries(name, int(number)), sep="\n")
            return
        options.raw = options.raw or Path(place) / "tries.jsonl"
        known = [json.loads(line) for line in options.raw.read_text().splitlines()] if options.raw.exists() else []
        counts = {name: Counter(outcome for n, _, outcome in known if n == name) for name in ARENAS}
        tried = {(name, number) for name, number, _ in known}
        for number in range(options.n):
            for name in ARENAS:
                if (name, number) in tried:
                    continue
                said, outcome, about = bench.tries(name, number)
                counts[name][outcome] += 1
                with options.raw.open("a") as file:
                    file.write(json.dumps([name, number, outcome]) + "\n")
                if outcome in FAULTS:
                    print(f"{name}:{number} {outcome}: {said}\n    {about}", flush=True)
    outcomes = ("same", "told", *FAULTS)
    rows = ["| arena | tries | " + " | ".join(outcomes) + " |", "| --- |" + " ---: |" * (len(outcomes) + 1)]
    for name, count in counts.items():
        rows.append(f"| {ARENAS[name].name} | {count.total()} | " + " | ".join(str(count[o]) for o in outcomes) + " |")
    text = "\n".join(rows)
    print(text)
    said = "\n".join((__doc__ or "").split("\n")[2:13])
    command = f"`python benchmarks/robustness/kills.py --n {options.n}`"
    options.out.write_text(f"# Kills and starvation\n\n{command}\n\n{text}\n\n{said}\n")


if __name__ == "__main__":
    main()
