"""Checksums of the files in a folder, in a file beside them: a saved model is several files of other libraries."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grouprl.errors import DamagedFileError
from grouprl.runs.atomic_folder import flush
from grouprl.runs.files import check_file, file_checksum, read_bytes, write_json

MANIFEST = "grouprl_checksums.json"
STATE_FILE = "grouprl_state.safetensors"
"""A state file beside a model; it has checksums of its own."""
_log = logging.getLogger("grouprl")
_WHAT = "list of checksums"
_MOST_BYTES = 1 << 28
"""More than a configuration or a tokenizer has."""


def write_manifest(folder: Path) -> None:
    """Write size and checksum of each file in `folder`, but for a state file.

    The files go to the disk meanwhile, so that checksums take no time of their own.

    Raises as `grouprl.runs.files.atomic_path`.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(1, "grouprl-flush") as disk:
        for name in names:
            disk.submit(flush, folder / name)
        files = {
            name: {"bytes": (folder / name).stat().st_size, "xxh3_64": file_checksum(folder / name)}
            for name in names
            if name not in (STATE_FILE, MANIFEST)
        }
    write_json(folder / MANIFEST, files)


def check_manifest(folder: Path, *, all_files: bool = True) -> bool:
    """Whether `folder` has a list of checksums; folders that others wrote have none.

    With `all_files` False only weights must be as they were saved: people change a chat template, say, or a
    configuration. That this was done is said in the log.

    Raises DamagedFileError, which names the file, if one is not what was saved.
    """
    place = folder / MANIFEST
    if not os.path.lexists(place):
        return False
    try:
        files = json.loads(read_bytes(place, _WHAT, most_bytes=1 << 24))
        listed = {str(name): (int(about["bytes"]), str(about["xxh3_64"])) for name, about in files.items()}
    except DamagedFileError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{place} is damaged: {error}. {_advice(place)}") from error
    for name, (size, checksum) in listed.items():
        path = folder / name
        if not all_files and not os.path.lexists(path):
            continue  # whoever needs the file will say that it is missing
        fault = _fault(path, size, checksum)
        if fault is None:
            continue
        if all_files or path.suffix == ".safetensors" or path.stat().st_size > _MOST_BYTES:
            raise DamagedFileError(f"{path} is {fault}. {_advice(place)}")
        _log.warning("%s was changed or damaged since it was saved; what is there now holds", path)
    return True


def _advice(place: Path) -> str:
    return f"If another program saved a model there on purpose, delete {place}."


def _fault(path: Path, size: int, checksum: str) -> str | None:
    """What is wrong with a file, or None. Raises DamagedFileError if it is none, or cannot be read."""
    found = check_file(path, "file of a saved model")
    if found != size:
        return f"{'cut short or ' if found < size else ''}damaged: it has {found:,} bytes, {size:,} were saved"
    try:
        same = file_checksum(path) == checksum
    except OSError as error:
        raise DamagedFileError(f"Cannot read {path}: {error.strerror or error}.") from error
    return None if same else "damaged: it is not what was saved (its checksum differs)"
