"""Everything that needs a GPU, in one command of at most eight minutes: tests, two processes on one GPU, vLLM, speed.

    python benchmarks/gpu.py                   # all parts, in this order; results/gpu.md
    python benchmarks/gpu.py --part ranks      # one part; may be repeated
    python benchmarks/gpu.py --device cpu --part ranks --out /tmp/gpu.md      # to try the script itself

Each part is processes of its own with a time limit, and ``--seconds`` bounds the whole. What a part said is kept, also
if it failed or ran out of time; a part that cannot run here says why. The speed table needs the virtual environment
of ``make bench-lm``, the part on vLLM one with vLLM in it (``--vllm-python``).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import measuring

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peers-lm" / "bin" / "python"
STEPS = 5


@dataclass(frozen=True)
class Found:
    """What a part gave: how it ended, in a word, and what it said."""

    part: str
    outcome: str
    seconds: float
    said: str


class Budget:
    """Runs commands within the seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def run(self, *command: str | Path, limit: float, **environ: str) -> tuple[int | None, str]:
        """The exit status of a command, None where its time ran out, and the end of what it printed."""
        left = min(limit, self.end - time.monotonic())
        if left < 5:
            return None, "no time was left"
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=HERE.parent, env={**os.environ, **environ}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=left)
            return process.returncode, said[-4000:].strip()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return None, f"{said[-4000:].strip()}\n(ended after {left:.0f} s)"


def tests(budget: Budget, args: argparse.Namespace) -> tuple[str, str]:
    """The tests that a machine without a GPU leaves out."""
    status, said = budget.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/lm/test_cuda.py",
                              "tests/machine", limit=200)  # fmt: skip
    return _outcome(status), said.splitlines()[-1] if status == 0 else said


def ranks(budget: Budget, args: argparse.Namespace) -> tuple[str, str]:
    """One process beside two that share the GPU, which NCCL cannot, so they talk by gloo: weights after five steps."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        train = ("-m", "grouprl", "train-lm", "tiny", "--steps", str(STEPS), "--seed", "0", "--quiet",
                 "--set", "bf16=false", "--set", "eval_strategy=no", "--set", "save_strategy=no",
                 "--set", f"use_cpu={str(args.device == 'cpu').lower()}")  # fmt: skip
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        ways: dict[str, tuple[str, ...]] = {"one": train, "gloo": (*launch, *train, "--set", "ddp_backend=gloo")}
        if torch.cuda.device_count() > 1 and args.device == "cuda":
            ways["nccl"] = (*launch, *train)
        found = {}
        for name, way in ways.items():
            out = Path(folder) / name
            status, said = budget.run(sys.executable, *way, "--out", out, limit=100, OMP_NUM_THREADS="1")
            if status != 0:
                return _outcome(status), f"{name}: {said}"
            found[name] = load_file(out / "model" / "model.safetensors")
        lines = []
        for name in list(ways)[1:]:
            pairs = [(found["one"][key].double(), value.double()) for key, value in found[name].items()]
            lines.append(f"{name}: the weights of two processes after {STEPS} steps differ from those of one by at "
                         f"most {max(float((a - b).abs().max()) for a, b in pairs):.1e}")  # fmt: skip
        return "ran", "\n".join(lines)


def vllm(budget: Budget, args: argparse.Namespace) -> tuple[str, str]:
    """Our sampler beside vLLM."""
    if budget.run(args.vllm_python, "-c", "import vllm", limit=60)[0] != 0:
        return "not run", f"vLLM is not installed for {args.vllm_python}; name a Python by --vllm-python"
    status, said = budget.run(args.vllm_python, HERE / "lm_vllm.py", "--rounds", "1", limit=150)
    return _outcome(status), said


def speed(budget: Budget, args: argparse.Namespace) -> tuple[str, str]:
    """Seconds and memory of a step, beside TRL."""
    if not PEER.exists():
        return "not run", "TRL's virtual environment is not there; run: make bench-lm"
    status, said = budget.run(sys.executable, HERE / "lm_speed.py", "--device", args.device, "--rounds", "1",
                              limit=400)  # fmt: skip
    return _outcome(status), said


PARTS: dict[str, Callable[[Budget, argparse.Namespace], tuple[str, str]]] = {
    "tests": tests, "ranks": ranks, "vllm": vllm, "speed": speed,
}  # fmt: skip


def _outcome(status: int | None) -> str:
    return "ran" if status == 0 else "out of time" if status is None else f"failed ({status})"


def _lines(found: list[Found], device: str) -> Iterator[str]:
    yield f"# What needs a GPU\n\n`python benchmarks/gpu.py` on {device}, commit {measuring.commit()}.\n"
    yield "| part | outcome | seconds |\n| --- | --- | --- |"
    yield from (f"| {each.part} | {each.outcome} | {each.seconds:.0f} |" for each in found)
    for each in found:
        yield f"\n## {each.part}\n\n{PARTS[each.part].__doc__}\n\n```text\n{each.said}\n```"


def main() -> None:
    """Run the parts, and write what they gave."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all; may be repeated")
    parser.add_argument("--seconds", type=float, default=480.0, help="most seconds of all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vllm-python", type=Path, default=Path(sys.executable), help="what vLLM is installed in")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.md")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use; --device cpu tries the script itself")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU, to try the script"
    budget, found = Budget(args.seconds), []
    for part in args.part or PARTS:
        began = time.monotonic()
        outcome, said = PARTS[part](budget, args)
        found.append(Found(part, outcome, time.monotonic() - began, said))
        print(f"{part}: {outcome}\n{said}", flush=True)
        args.out.write_text("\n".join(_lines(found, device)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
