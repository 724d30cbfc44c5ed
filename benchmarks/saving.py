"""What checksums cost when a checkpoint is saved: the processor's time for them, beside that of the whole.

The model has SmolLM2's shape (135 million weights, float32) and random values; beside it stand the moments of AdamW.
Saving ends on the disk: every file is flushed before its folder takes its place. How
long that takes depends on the disk and on what else it does, so the processor's time is measured beside the clock's.

    python benchmarks/saving.py --rounds 5 --out benchmarks/results/saving.md
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

SHAPE: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
_MODEL = "model, written by Transformers, then read again for its checksum"
_STATE = "moments, written and checked in one pass"


class Saved(NamedTuple):
    """Seconds that saving took: by the clock, of the processor, and of the processor for checksums."""

    wall: float
    cpu: float
    checksums: float


@contextmanager
def timed_checksums(spent: list[float]) -> Iterator[None]:
    """Add the processor's seconds of every checksum to ``spent``."""
    from xxhash import xxh3_64

    from grouprl.runs import manifest

    of_file = manifest.file_checksum

    class Timed:
        def __init__(self) -> None:
            self._own = xxh3_64()

        def update(self, data: Any) -> None:
            begin = time.thread_time()
            self._own.update(data)
            spent.append(time.thread_time() - begin)

        def hexdigest(self) -> str:
            return self._own.hexdigest()

    def timed_file(path: Path) -> str:
        begin = time.thread_time()
        found = of_file(path)
        spent.append(time.thread_time() - begin)
        return found

    with (
        mock.patch("grouprl.runs.tensor_file.xxh3_64", Timed),
        mock.patch("grouprl.runs.manifest.file_checksum", timed_file),
    ):
        yield


def saved(work: Callable[[], object]) -> Saved:
    """What saving took."""
    spent: list[float] = []
    with timed_checksums(spent):
        wall, cpu = time.perf_counter(), time.thread_time()
        work()
        return Saved(time.perf_counter() - wall, time.thread_time() - cpu, sum(spent))


def measure(rounds: int, folder: Path) -> dict[str, list[Saved]]:
    """Each part, once in each round."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from grouprl.lm.models.save import save_model
    from grouprl.runs.state import save_state

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    moments = {
        f"{kind}.{name}": torch.rand_like(p) for name, p in model.named_parameters() for kind in ("exp_avg", "sq")
    }
    parts = {
        _MODEL: lambda: save_model(model, None, folder / "model"),
        _STATE: lambda: save_state(folder / "state.safetensors", moments, {"step": 1}),
    }
    found: dict[str, list[Saved]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, work in parts.items():
            found[name].append(saved(work))
    return found


def table(found: dict[str, list[Saved]], rounds: int) -> str:
    """Markdown: the least of all rounds, as other work on the machine only ever adds."""
    least = {name: Saved(*(min(column) for column in zip(*of, strict=True))) for name, of in found.items()}
    least["both: a checkpoint"] = Saved(*(sum(column) for column in zip(*least.values(), strict=True)))
    lines = [
        f"Seconds, the least of {rounds} rounds. 135 million weights in float32 are 0.54 GB, their moments 1.08 GB.",
        "",
        "| part | by the clock | of the processor | of it for checksums | share of the clock | of the processor |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {s.wall:.2f} | {s.cpu:.2f} | {s.checksums:.2f} | {s.checksums / s.wall:.0%} | "
        f"{s.checksums / s.cpu:.0%} |"
        for name, s in least.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        text = table(measure(asked.rounds, Path(folder)), asked.rounds)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
