"""Checkpoints a run is resumed from bit for bit, even within a generation: a model folder and one state file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import DamagedFileError, UsageError
from grouprl.learning.shards import is_sharded, sharded_like
from grouprl.lm.fingerprint import digest
from grouprl.lm.generate.samples import Samples, Turns
from grouprl.lm.models.save import gathered_state, model_files, save_model, untied
from grouprl.lm.packed.packing import Spans
from grouprl.lm.prompts import Prompt, PromptSource
from grouprl.machine.ranks import ALONE, Ranks
from grouprl.runs import shards
from grouprl.runs.files import explain_os_error, list_folder, write_json
from grouprl.runs.folder import newest_good
from grouprl.runs.manifest import MANIFEST, STATE_FILE, check_manifest
from grouprl.runs.state import load_state, read_meta, save_state, taking_up
from grouprl.runs.temporaries import beside
from grouprl.runs.transcripts import plain

STATE = STATE_FILE
_INNER = ".model"
"""A model on its way into a folder that holds other things too."""
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the model: named tensors and plain values, and the state file they come from."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    file: Path = Path()

    def part(self, prefix: str, like: Callable[[str], Tensor | None] = lambda _: None) -> dict[str, Tensor]:
        """The tensors whose name begins with ``prefix.``, without it.

        Args:
            like: for such a name the tensor here that takes it up, of which this process may hold a part.
        """
        inner = {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}
        found: dict[str, Tensor] = {}
        for name, value in inner.items():
            place = like(name)
            found[name] = value if place is None else sharded_like(value, place)
        return found | shards.read(self.file.parent / shards.SHARDS, prefix, like)


def write(
    path: Path, model: Any, tokenizer: Any, checkpoint: Checkpoint | None, state: Any, ranks: Ranks = ALONE,
    *, whole: bool = True,
) -> None:  # fmt: skip
    """Write a checkpoint folder, whole or not at all; without a ``checkpoint``, the model and TrainerState alone.

    Of sharded tensors each process writes its part. All of them call this; the first writes everything else.

    Args:
        whole: gather the weights of a sharded model, so that ``from_pretrained`` reads the folder.

    Raises UsageError if the place cannot be written, TrainingError if the disk is full.
    """
    tensors = {} if checkpoint is None else checkpoint.tensors
    sharded = {name: value for name, value in tensors.items() if is_sharded(value)}
    weights = gathered_state(model, first=ranks.first) if whole or checkpoint is None else {}
    if weights == {}:
        sharded |= {f"weights.{name}": value for name, value in untied(model).items()}
    parts = ranks.once(lambda: _new_folder(beside(path.absolute()))) if sharded else None

    def also(folder: Path) -> None:
        write_json(folder / "trainer_state.json", trainer_state(state))
        if checkpoint is not None:
            own = {name: value for name, value in tensors.items() if name not in sharded}
            save_state(folder / STATE, own, checkpoint.meta)
        if parts is not None:
            os.replace(parts, folder / shards.SHARDS)

    try:
        if parts is not None:
            shards.write(parts, sharded, ranks.group)
        ranks.once(lambda: save_model(model, tokenizer, path, also=also, state=weights))
    finally:
        if parts is not None and ranks.first:
            shutil.rmtree(parts, ignore_errors=True)


def _new_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise explain_os_error(error, path) from error
    return path


def write_beside(folder: Path, model: Any, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    """Write a model's files into a folder that holds other things too, such as checkpoints; an older model's go.

    Args:
        state: the weights of a sharded model, gathered.

    Raises UsageError if the place cannot be written, TrainingError if the disk is full; no file is ever half written.
    """
    finish_beside(folder)
    save_model(model, tokenizer, folder / _INNER, state=state)
    written = finish_beside(folder)
    for stale in model_files(folder) - written:
        (shutil.rmtree if stale.is_dir() else os.remove)(stale)


def finish_beside(folder: Path) -> set[Path]:
    """Move the files of a model that is whole to their places in `folder`, and give these; nothing if there is none.

    A process that was killed between the first and the last of them left it to the next.
    """
    inner = folder / _INNER
    files = list_folder(inner)
    try:
        for file in files:
            place = folder / file.name
            if place.is_dir():
                shutil.rmtree(place)
            os.replace(file, place)
        if inner.is_dir():
            inner.rmdir()
    except OSError as error:
        raise explain_os_error(error, folder) from error
    return {folder / file.name for file in files}


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
    if not check_manifest(path):
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
    """Checkpoint folders in ``output_dir``, oldest first: by the run they are of, and by their step."""
    return [path for _, _, path in _with_runs(output_dir)]


def of_run(output_dir: Path, began: float) -> list[Path]:
    """The checkpoint folders of the run that began at this time, oldest first."""
    return [path for run, _, path in _with_runs(output_dir) if run == began]


def _with_runs(output_dir: Path) -> list[tuple[float, int, Path]]:
    """When the run of each checkpoint began, its step and its folder, in order.

    One without a state that says so counts to the last run that had begun when it was written.
    """
    found = [(int(match[1]), path) for path in list_folder(output_dir) if (match := _NAME.fullmatch(path.name))]
    began = {path: _began(path) for _, path in found}
    known = sorted(time for time in began.values() if time is not None)
    runs = []
    for step, path in found:
        time = began[path]
        if time is None:
            written = path.stat().st_mtime
            time = max((known_time for known_time in known if known_time <= written), default=0.0)
        runs.append((time, step, path))
    return sorted(runs)


def _began(path: Path) -> float | None:
    """When the run began that wrote a checkpoint; None if it does not say."""
    try:
        with taking_up(path / STATE):
            return float(read_meta(path / STATE)["began"])
    except UsageError:
        return None


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
    tensors["lengths"] = torch.tensor([len(c) for c in samples.completions])
    tensors["prompt_ids"] = torch.tensor([token for prompt in samples.prompts for token in prompt.ids])
    tensors["prompt_lengths"] = torch.tensor([len(prompt.ids) for prompt in samples.prompts])
    meta: dict[str, Any] = {
        "prompts": [prompt.index for prompt in samples.prompts],
        "contents": [digest(prompt.prompt) for prompt in samples.prompts], "texts": samples.texts,
        "extras": plain(samples.extras), "sampled_elsewhere": samples.sampled_elsewhere,
    }  # fmt: skip
    if samples.turns is not None:
        of_turns, meta["turns"] = _turns_state(samples, samples.turns)
        tensors |= of_turns
    return tensors, meta


_PER_TURN = {"turn_rewards": "rewards", "turn_advantages": "advantages", "turn_finished": "finished"}
_PER_EPISODE = {"episode_terminated": "terminated", "episode_truncated": "truncated"}


def _turns_state(samples: Samples, turns: Turns) -> tuple[dict[str, Tensor], dict[str, Any]]:
    contexts, context = samples.contexts
    tensors = {name: getattr(turns, field) for name, field in (_PER_TURN | _PER_EPISODE).items()}
    tensors |= {"n_turns": samples.n_turns, "episode": turns.episode, "context": context}
    tensors["spans"] = torch.tensor([span for spans in turns.spans for span in spans])
    tensors["context_ids"] = torch.tensor([token for ids in contexts for token in ids])
    tensors["context_lengths"] = torch.tensor([len(ids) for ids in contexts])
    return tensors, {
        "messages": turns.messages, "metrics": turns.metrics, "prompts": [prompt.prompt for prompt in samples.prompts],
        "spoken": turns.spoken,
    }  # fmt: skip


def _load_turns(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Turns:
    """The inverse of :func:`_turns_state`. Raises ValueError and the like for what it cannot have given."""
    n_turns, episode = tensors["n_turns"], tensors["episode"]
    sizes = dict.fromkeys(_PER_TURN, int(n_turns.sum())) | dict.fromkeys(_PER_EPISODE, len(meta["messages"]))
    for name, size in sizes.items():
        if len(tensors[name]) != size:
            raise ValueError(f"{name} of the samples has {len(tensors[name])} entries, not {size}")
    found, parts = torch.unique_consecutive(episode, return_counts=True)
    if found.tolist() != list(range(len(meta["messages"]))) or int(parts.sum()) != len(n_turns):
        raise ValueError("the samples do not belong to the episodes that are there")
    contexts = [ids.tolist() for ids in torch.split(tensors["context_ids"], tensors["context_lengths"].tolist())]
    of_samples = torch.split(tensors["spans"], n_turns.tolist())
    spans: list[Spans] = [[(start, stop) for start, stop in part.tolist()] for part in of_samples]
    fields: dict[str, Any] = {field: tensors[name] for name, field in (_PER_TURN | _PER_EPISODE).items()}
    return Turns(
        spans=spans, contexts=[contexts[i] for i in tensors["context"].tolist()], episode=episode,
        messages=list(meta["messages"]), metrics=list(meta["metrics"]), spoken=list(meta["spoken"]), **fields,
    )  # fmt: skip


def load_samples(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: PromptSource) -> Samples:
    """The inverse of :func:`samples_state`.

    Raises UsageError if a row of the dataset is not the prompt's; LookupError, TypeError, ValueError or RuntimeError
    for what samples_state cannot have given.
    """
    completions = [c.tolist() for c in torch.split(tensors["ids"], tensors["lengths"].tolist())]
    turns = _load_turns(tensors, meta["turns"]) if "turns" in meta else None
    n_tokens = len(tensors["ids"]) if turns is None else int(tensors["spans"].diff(dim=1).sum())
    sizes = dict.fromkeys(_PER_TOKEN, n_tokens) | dict.fromkeys(_PER_SAMPLE, len(completions))
    for name, size in sizes.items():
        if len(tensors[name]) != size:
            raise ValueError(f"{name} of the samples has {len(tensors[name])} entries, not {size}")
    if len(meta["texts"]) != len(completions) or int(tensors["group"].max()) >= len(meta["prompts"]):
        raise ValueError("the samples are more than their texts or prompts")
    extras = {str(name): list(column) for name, column in meta["extras"].items()}
    if any(len(column) != len(completions) for column in extras.values()):
        raise ValueError("the columns of the samples do not fit the samples")
    if bool(torch.isnan(tensors["advantages"]).any()):
        raise ValueError("advantages of the samples are NaN")
    prompts: list[Prompt] = [source[index] for index in meta["prompts"]]
    if turns is not None:  # what an environment began with, which is not in the dataset
        starts = zip(prompts, meta["turns"]["prompts"], strict=True)
        prompts = [replace(prompt, prompt=begun) for prompt, begun in starts]
    for prompt, content in zip(prompts, meta["contents"], strict=True):
        if digest(prompt.prompt) != content:
            raise UsageError(
                f"the checkpoint holds completions of another prompt than that of row {prompt.index} of the "
                "train_dataset here; resume with the same dataset in the same order"
            )
    # As the model read them: a chat template may have put the date in.
    ids = torch.split(tensors["prompt_ids"], tensors["prompt_lengths"].tolist())
    prompts = [replace(prompt, ids=tuple(read.tolist())) for prompt, read in zip(prompts, ids, strict=True)]
    fields: dict[str, Any] = {name: tensors[name] for name in (*_PER_TOKEN, *_PER_SAMPLE)}
    fields |= {"texts": list(meta["texts"]), "extras": extras}
    fields |= {"sampled_elsewhere": bool(meta["sampled_elsewhere"])}
    return Samples(prompts=prompts, completions=completions, turns=turns, **fields)


def trainer_state(state: Any) -> dict[str, Any]:
    """transformers' TrainerState as plain values, without what its callbacks keep in memory."""
    values = asdict(state)
    values.pop("stateful_callbacks", None)
    return values
