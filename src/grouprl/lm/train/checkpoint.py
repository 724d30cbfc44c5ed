"""Checkpoints a run is resumed from bit for bit, even within a generation: a model folder and one state file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import DamagedFileError
from grouprl.lm.generate.samples import Samples
from grouprl.lm.models.save import save_model
from grouprl.lm.prompts import Prompt, PromptSource
from grouprl.runs.files import write_json
from grouprl.runs.folder import newest_good
from grouprl.runs.manifest import MANIFEST, STATE_FILE, check_manifest
from grouprl.runs.state import load_state, save_state

STATE = STATE_FILE
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the model: named tensors and plain values, and the state file they come from."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    file: Path = Path()

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with ``prefix.``, without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


def write(path: Path, model: Any, tokenizer: Any, checkpoint: Checkpoint | None, state: Any) -> None:
    """Write a checkpoint folder, whole or not at all; without a ``checkpoint``, the model and TrainerState alone.

    Raises UsageError if the place cannot be written, TrainingError if the disk is full.
    """

    def also(folder: Path) -> None:
        write_json(folder / "trainer_state.json", trainer_state(state))
        if checkpoint is not None:
            save_state(folder / STATE, checkpoint.tensors, {**checkpoint.meta, "listed": True})

    save_model(model, tokenizer, path, also=also)


def write_beside(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model's files into a folder that holds other things too, such as checkpoints.

    Raises UsageError if the place cannot be written, TrainingError if the disk is full; no file is ever half written.
    """
    inner = folder / ".model"
    save_model(model, tokenizer, inner)
    for file in inner.iterdir():
        place = folder / file.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(file, place)
    inner.rmdir()


def read(path: Path) -> Checkpoint:
    """The state in a checkpoint folder, whose files are all verified.

    Raises DamagedFileError if there is none, it holds the model alone, or a file of the folder is damaged.
    """
    if not path.is_dir():
        raise DamagedFileError(f"there is no checkpoint folder {path}")
    if not os.path.lexists(path / STATE):
        raise DamagedFileError(
            f"{path} holds a model but no {STATE}, so training cannot resume from it (save_only_model=True writes such "
            "folders); give the folder as the model instead"
        )
    tensors, meta = load_state(path / STATE)
    if not check_manifest(path) and meta.get("listed"):
        raise DamagedFileError(f"{path} is damaged: it has lost its {MANIFEST}")
    return Checkpoint(tensors, meta, path / STATE)


@contextmanager
def offering_another(path: Path) -> Iterator[None]:
    """Around code that takes up ``path``: if that is damaged, the error also names the newest good checkpoint beside.

    Raises DamagedFileError as the code within.
    """
    try:
        yield
    except DamagedFileError as error:
        others = [other for other in existing(path.absolute().parent) if other.name != path.name]
        found = newest_good(others, read)
        if found is None:
            raise
        raise DamagedFileError(
            f"{error}. The newest good checkpoint beside it is {found[0]}.".replace("..", ".")
        ) from error


def existing(output_dir: Path) -> list[Path]:
    """Checkpoint folders in ``output_dir``, oldest first."""
    if not output_dir.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def latest(output_dir: Path) -> Path | None:
    """The newest checkpoint that can be resumed from, or None; each newer one that cannot is named in the log."""
    found = newest_good(existing(output_dir), read)
    return None if found is None else found[0]


_PER_TOKEN = ("logp_sampled", "advantages", "logp_old", "logp_ref", "known_old", "known_ref")
_PER_SAMPLE = ("group", "finished", "rewards", "returns")


def samples_state(samples: Samples) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Buffered samples as tensors and plain values; prompts by their row in the dataset."""
    tensors = {name: getattr(samples, name) for name in (*_PER_TOKEN, *_PER_SAMPLE)}
    tensors["ids"] = torch.tensor([token for c in samples.completions for token in c])
    tensors["lengths"] = samples.lengths
    return tensors, {"prompts": [prompt.index for prompt in samples.prompts], "texts": samples.texts}


def load_samples(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: PromptSource) -> Samples:
    """The inverse of :func:`samples_state`.

    Raises LookupError, TypeError, ValueError or RuntimeError for what that cannot have given.
    """
    completions = [c.tolist() for c in torch.split(tensors["ids"], tensors["lengths"].tolist())]
    sizes = dict.fromkeys(_PER_TOKEN, len(tensors["ids"])) | dict.fromkeys(_PER_SAMPLE, len(completions))
    for name, size in sizes.items():
        if len(tensors[name]) != size:
            raise ValueError(f"{name} of the samples has {len(tensors[name])} entries, not {size}")
    if len(meta["texts"]) != len(completions) or int(tensors["group"].max()) >= len(meta["prompts"]):
        raise ValueError("the samples are more than their texts or prompts")
    if bool(torch.isnan(tensors["advantages"]).any()):
        raise ValueError("advantages of the samples are NaN")
    prompts: list[Prompt] = [source[index] for index in meta["prompts"]]
    fields: dict[str, Any] = {name: tensors[name] for name in (*_PER_TOKEN, *_PER_SAMPLE)}
    return Samples(prompts=prompts, completions=completions, texts=list(meta["texts"]), **fields)


def trainer_state(state: Any) -> dict[str, Any]:
    """transformers' TrainerState as plain values, without what its callbacks keep in memory."""
    values = asdict(state)
    values.pop("stateful_callbacks", None)
    return values
