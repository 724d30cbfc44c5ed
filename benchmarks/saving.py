"""What checksums cost when a checkpoint is saved.

The model has SmolLM2's shape (135 million weights, float32) and random values; beside it stand the moments of AdamW.
Saving ends on the disk: every file is flushed before its folder takes its place. How long that takes depends on the
disk and on what else it does. So every part is saved with checksums and without them in turn, and the table has the
medians of both and of the pairs' differences, and beside them the processor's seconds.

    python benchmarks/saving.py --rounds 20 --out benchmarks/results/saving.md
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import measuring

SHAPE: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
_MODEL = "model, written by Transformers, then read again for its checksum"
_STATE = "moments, written and checked in one pass"


class Saved(NamedTuple):
    """Seconds: by the clock and of the processor; by the clock without checksums; of the processor for checksums."""

    wall: float
    cpu: float
    without: float
    checksums: float


class _Nothing:
    """Takes the place of a checksum."""

    def update(self, data: Any) -> None:
        """Do nothing with data."""

    def hexdigest(self) -> str:
        """As long as a checksum."""
        return "0" * 16


@contextmanager
def no_checksums() -> Iterator[None]:
    """Save without them."""
    with (
        mock.patch("grouprl.runs.tensor_file.xxh3_64", _Nothing),
        mock.patch("grouprl.runs.manifest.file_checksum", return_value="0" * 16),
    ):
        yield


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


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def saved(work: Callable[[], object], *, checksums_first: bool) -> Saved:
    """What saving took, with checksums and without them."""
    took: dict[bool, tuple[float, float]] = {}
    spent: list[float] = []
    for with_them in (checksums_first, not checksums_first):
        with timed_checksums(spent) if with_them else no_checksums():
            took[with_them] = seconds(work)
    return Saved(*took[True], took[False][0], sum(spent))


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
    for work in parts.values():
        saved(work, checksums_first=True)  # the first files of a folder take longer
    for number in range(rounds):
        for name, work in parts.items():
            found[name].append(saved(work, checksums_first=number % 2 == 0))
    found["both: a checkpoint"] = [
        Saved(*map(sum, zip(*pair, strict=True))) for pair in zip(*found.values(), strict=True)
    ]
    return found


def table(found: dict[str, list[Saved]], rounds: int) -> str:
    """Markdown."""
    machine = measuring.machine()
    lines = [
        "# What checksums cost when a checkpoint is saved", "",
        f"`python benchmarks/saving.py --rounds {rounds}`. Medians of {rounds} pairs, in seconds. 135 million "
        "weights in float32 are 0.54 GB, their moments 1.08 GB. *Difference*: of a pair, with its quartiles.", "",
        "| part | with checksums | without | difference | share | processor | of it checksums |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, of in found.items():
        wall, cpu, without, checksums = (statistics.median(column) for column in zip(*of, strict=True))
        low, middle, high = statistics.quantiles([s.wall - s.without for s in of], n=4)
        lines.append(
            f"| {name} | {wall:.3f} | {without:.3f} | {middle:+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{middle / without:.1%} | {cpu:.2f} | {checksums:.3f} |"
        )
    return "\n".join([*lines, "", f"{machine['cpu']}, {machine['cores']} cores."]) + "\n"


def main() -> None:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        text = table(measure(asked.rounds, Path(folder)), asked.rounds)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
