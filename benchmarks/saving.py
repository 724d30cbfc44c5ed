"""What checksums cost when a checkpoint is saved: the same checkpoint with and without them, taking turns.

The model has SmolLM2's shape (135 million weights, float32) and random values; beside it stand the moments of AdamW. No
package of the model is needed. Saving ends on the disk: every file is flushed before its folder takes its place.

    python benchmarks/saving.py --rounds 5 --out benchmarks/results/saving.md
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

SHAPE: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
_MODEL = "model, written by Transformers, then read again for its checksum"
_STATE = "moments, written and checked in one pass"


class Nothing:
    """A checksum that looks at nothing."""

    def update(self, data: Any) -> None:
        """Take no notice."""

    def hexdigest(self) -> str:
        """As long as one."""
        return "0" * 16


@contextmanager
def without_checksums() -> Iterator[None]:
    """Files are written as always, and no byte of them is looked at for a checksum."""
    with (
        mock.patch("grouprl.runs.tensor_file.xxh3_64", Nothing),
        mock.patch("grouprl.runs.manifest.file_checksum", return_value="0" * 16),
    ):
        yield


def seconds(work: Any) -> float:
    """How long it took."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(rounds: int, folder: Path) -> dict[str, dict[bool, list[float]]]:
    """Seconds of each part, with and without checksums, in each round."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grouprl.lm.models.save import save_model
    from grouprl.runs.state import save_state

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    moments = {
        f"{kind}.{name}": torch.rand_like(p) for name, p in model.named_parameters() for kind in ("exp_avg", "sq")
    }
    parts = {
        _MODEL: lambda: save_model(model, None, folder / "model"),
        _STATE: lambda: save_state(folder / "state.safetensors", moments, {"step": 1}),
    }
    found: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in parts}
    for at in range(rounds):
        for checked in (True, False) if at % 2 == 0 else (False, True):
            for name, work in parts.items():
                if checked:
                    found[name][True].append(seconds(work))
                else:
                    with without_checksums():
                        found[name][False].append(seconds(work))
    return found


def table(found: dict[str, dict[bool, list[float]]], rounds: int) -> str:
    """Markdown: the least of all rounds, as other work on the machine only ever adds."""
    rows = [*((name, min(by[True]), min(by[False])) for name, by in found.items())]
    rows.append(("both: a checkpoint", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [
        f"Seconds, the least of {rounds} rounds. 135 million weights in float32 are 0.54 GB, their moments 1.08 GB.",
        "", "| part | with checksums | without | share of checksums |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| {name} | {on:.2f} | {off:.2f} | {(on - off) / on:.1%} |" for name, on, off in rows]
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
