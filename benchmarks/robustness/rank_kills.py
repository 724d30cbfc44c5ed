"""Kills one of two processes of a training at random moments under ``torchrun --max-restarts``: does it end the same?

Each try is drawn from its number. torchrun starts two processes that train the tiny model and save every step; one of
them, drawn at random, gets SIGKILL at a random moment. torchrun ends the other and starts both again, which go on from
the newest checkpoint. The weights at the end are compared, bit for bit, with those of a run that was left alone.

    python benchmarks/robustness/rank_kills.py --n 20
    python benchmarks/robustness/rank_kills.py --n 5 --fsdp     # the weights sharded
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 12
PAUSE = 0.4
"""Seconds that each step waits, so that a kill at a random moment is one at a random step."""
SECONDS = 180
TIMEOUT = 60
"""Seconds that a process waits for another that neither answers nor ends."""


def work(folder: Path, fsdp: bool) -> None:
    """What each process does: train, from the newest checkpoint if there is one, and leave the weights."""
    import torch
    from transformers import TrainerCallback

    from grouprl.learning.shards import whole
    from grouprl.lm import GRPOConfig, GRPOTrainer, tasks
    from grouprl.lm.models.tiny import build_tiny

    rank = os.environ["RANK"]
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    task = tasks.get("reverse", length=3)

    class Slowly(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            time.sleep(PAUSE)

    model, tokenizer = build_tiny(0)
    config = GRPOConfig(
        output_dir=folder / "run", prompts_per_step=2, num_generations=4, max_completion_length=4, max_steps=STEPS,
        steps_per_generation=2, num_iterations=2, save_strategy="steps", save_steps=1, save_total_limit=3,
        learning_rate=1e-3, report_to=[], bf16=False, disable_tqdm=True, ddp_timeout=TIMEOUT, fsdp=fsdp,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, task.reward, config, tasks.dataset(task, "train", 40, form="text"), processing_class=tokenizer,
        callbacks=[Slowly()],
    )  # fmt: skip
    saved = sorted((folder / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    with (folder / f"starts{rank}").open("a") as file:
        file.write(f"{saved[-1].name if saved else 'nothing'}\n")
    trainer.train(resume_from_checkpoint=bool(saved))
    torch.save({name: whole(p) for name, p in model.named_parameters()}, folder / f"weights{rank}.pt")


def launch(folder: Path, restarts: int, fsdp: bool = False) -> subprocess.Popen[bytes]:
    """torchrun with two processes."""
    folder.mkdir(parents=True)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
         str(restarts), "--monitor-interval", "0.1", __file__, "--work", str(folder), *(["--fsdp"] if fsdp else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=(folder / "log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def end_of(process: subprocess.Popen[bytes]) -> int:
    """How torchrun ended; None of its processes outlives it."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return 124


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--only", type=int, help="the one try of this number")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.fsdp)
        return
    import torch

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        if end_of(launch(root / "alone", 0, options.fsdp)):
            sys.exit((root / "alone" / "log").read_text())
        wanted = torch.load(root / "alone" / "weights0.pt")
        rows = [
            "| try | rank killed | after | went on from | starts | at the end |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        numbers = range(options.n) if options.only is None else [options.only]
        same = 0
        for number in numbers:
            draw = random.Random(number)
            folder, rank = root / str(number), draw.randrange(2)
            begun = folder / (f"pid{rank}" if number % 4 == 0 else f"starts{rank}")  # one in four while it starts
            moment = draw.uniform(0.0, STEPS * PAUSE + 1.0)
            process = launch(folder, 20, options.fsdp)
            while not begun.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moment)
            pid = folder / f"pid{rank}"
            if process.poll() is None:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            status = end_of(process)
            starts = (folder / f"starts{1 - rank}").read_text().split() if status == 0 else []
            outcome = f"torchrun ended with {status}"
            if status == 0:
                found = [torch.load(folder / f"weights{r}.pt") for r in (0, 1)]
                equal = all(torch.equal(weights[name], value) for weights in found for name, value in wanted.items())
                outcome, same = ("the same weights", same + 1) if equal else ("OTHER WEIGHTS", same)
            when = f"{moment:.1f} s of {'the start' if number % 4 == 0 else 'training'}"
            went_on = starts[-1] if len(starts) > 1 else "the start"
            rows.append(f"| {number} | {rank} | {when} | {went_on} | {len(starts)} | {outcome} |")
            print(rows[-1], flush=True)
        said = f"{same} of {len(rows) - 2} ended at the same weights, bit for bit."
        print(said)
        if options.out is not None:
            options.out.write_text("\n".join([*rows, "", said, ""]))


if __name__ == "__main__":
    main()
