"""The folder of one run: how it is made, opened, read back and finished."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grouprl.errors import DamagedFileError, GrouprlError, TrainingError, UsageError, shown
from grouprl.reading import parse_yaml
from grouprl.runs import replacing
from grouprl.runs.files import explain_os_error, free_path, is_sealed, read_bytes, user_path, write_json, write_yaml
from grouprl.runs.in_place import check_in_place
from grouprl.runs.layout import RunLayout
from grouprl.runs.lock import locked
from grouprl.runs.nearby import another_run
from grouprl.runs.signals import leave_if_asked
from grouprl.runs.state import load_state

T = TypeVar("T")

_log = logging.getLogger("grouprl")
_told: set[bytes] = set()
"""Configurations that were changed by hand, as this process has said already."""


@dataclass(frozen=True)
class RunFolder(RunLayout):
    """The folder of one run. Make it with `create` or `open`, which check; the files are made as the run goes on."""

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], *, overwrite: bool = False) -> RunFolder:
        """Make the folder and write `config` (plain types) as its config.yaml.

        With `overwrite` an older run in the same folder is put aside, until `settle` deletes it or `abandon` brings it
        back; other files are never touched.

        Raises UsageError if the folder holds anything already, or cannot be made.
        """
        folder = cls(user_path(path).absolute())
        try:
            if folder.holds_something():
                folder._check_replaceable(overwrite)
                replacing.put_aside(folder)
            write_yaml(folder.config_path, dict(config), seal=True)
        except OSError as error:
            raise explain_os_error(error, folder.path) from error
        return folder

    def check_free(self, overwrite: bool) -> None:
        """Raises UsageError if `create` could not make a run here; nothing is touched."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file. Choose another folder.")
        if self.holds_something():
            self._check_replaceable(overwrite)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that no other process writes there; folders made for it that stay empty are deleted.

        Raises UsageError if another process holds it, which is named, or if the folder cannot be written.
        """
        made = [folder for folder in self.path.absolute().parents if not folder.exists()]
        try:
            with locked(self.path):
                yield
        finally:
            for folder in (self.path, *made):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The run in `path`. Raises UsageError if there is none."""
        folder = cls(user_path(path).absolute())
        try:
            if not folder.path.is_dir():
                raise UsageError(f"There is no run folder {path}. {another_run(folder.path)}")
            if not folder.config_path.is_file() and replacing.is_replacing(folder):
                folder.abandon()  # another was to replace it, and was killed before it began
            os.listdir(folder.path)
        except OSError as error:
            raise DamagedFileError(f"Cannot read {path}: {error.strerror or error}.") from error
        if not os.path.lexists(folder.config_path):
            raise UsageError(f"{path} is not a run folder: it holds no config.yaml. {another_run(folder.path)}")
        return folder

    def read_config(self) -> dict[str, Any]:
        """The mapping in config.yaml. Raises UsageError if it is missing, not YAML or no mapping."""
        data = read_bytes(self.config_path, "configuration of a run", most_bytes=1 << 24)
        try:
            config = parse_yaml(data.decode(), "it", longest=1 << 24)
        except ValueError as error:  # a UsageError too
            raise DamagedFileError(f"{self.config_path} is damaged: {' '.join(str(error).split())}.") from error
        if not is_sealed(data) and data not in _told:
            _told.add(data)
            _log.warning(
                "%s is not as grouprl left it: somebody changed it, or it is damaged; what is there now holds",
                self.config_path,
            )
        config = _mapping(config, self.config_path)
        for name in ("run", "config", "env_kwargs", "callbacks"):
            if not isinstance(config.get(name, {}), dict):
                raise DamagedFileError(f"{self.config_path}: {name} is {shown(config[name])}, and must be a mapping")
        for name in ("seed", "begun_at"):
            number = config.get(name, 0)
            if isinstance(number, bool) or not isinstance(number, int):
                raise DamagedFileError(f"{self.config_path}: {name} is {shown(number)}, and must be a whole number")
        solved = config.get("reward_threshold")
        if solved is not None and (isinstance(solved, bool) or not isinstance(solved, int | float)):
            raise DamagedFileError(
                f"{self.config_path}: reward_threshold is {shown(solved)}, and must be a number, or null for none"
            )
        return config

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; NaN and infinities become null.

        Raises TrainingError if what it would sum up has been deleted since, and as `write_json` does.
        """
        check_in_place(self.path)
        if not self.is_usable():
            raise TrainingError(
                f"{self.path} holds no run any more: its config.yaml, or its model and checkpoints, were deleted while "
                "the run finished; start anew"
            )
        write_json(self.summary_path, summary)

    def read_summary(self) -> dict[str, Any]:
        """The mapping in summary.json, empty if the run has not finished. Raises UsageError if it is damaged."""
        if not self.is_finished():
            return {}
        data = read_bytes(self.summary_path, "summary of a run", most_bytes=1 << 24)
        try:
            summary = json.loads(data)
        except ValueError as error:
            raise DamagedFileError(f"{self.summary_path} is damaged: {' '.join(str(error).split())}.") from error
        return _mapping(summary, self.summary_path)

    def is_finished(self) -> bool:
        """Whether the run has left its summary, the last thing that it writes."""
        return self.summary_path.is_file()

    def reopen(self, config: Mapping[str, Any] | None) -> None:
        """The run goes on, by `config` from now on if one is given: it is not finished any more.

        Raises UsageError if the folder cannot be written, TrainingError if the disk is full.
        """
        if config is not None:
            write_yaml(self.config_path, dict(config), seal=True)
        try:
            self.summary_path.unlink(missing_ok=True)
        except OSError as error:
            raise explain_os_error(error, self.summary_path) from error

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole, or None; each newer one that is not is named in the log."""
        found = newest_good(self.checkpoints(), load_state)
        return None if found is None else found[0]

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the `keep` newest checkpoints. Raises UsageError if `keep` < 1."""
        if keep < 1:
            raise UsageError(f"Cannot keep {keep} checkpoints: keep at least 1.")
        for path in self.checkpoints()[:-keep]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise explain_os_error(error, path) from error

    @contextmanager
    def kept_in_order(self) -> Iterator[None]:
        """Around a run: if it fails, `abandon` it, and say where to find what it had recorded."""
        try:
            yield
        except BaseException as error:
            usable, place = self.is_usable(), self.abandon()
            if isinstance(error, GrouprlError) and place is not None and not usable:
                said = str(error).rstrip(".")
                raise type(error)(f"{said}. What it recorded is in {place}.") from error
            raise

    def settle(self) -> None:
        """Delete the run that this one replaces, if there is one: this one can be used, or resumed from."""
        replacing.settle(self)

    def abandon(self) -> Path | None:
        """After a failure: keep what is of use, and bring back the run that this one was to replace.

        A run with a checkpoint stays. One that has recorded a step stays too, in a folder beside this one if it was to
        replace another; of one that has not, nothing is left. Returns where it is, or None.
        """
        return replacing.abandon(self)

    def _check_replaceable(self, overwrite: bool) -> None:
        if not self.config_path.is_file() and not replacing.older_config(self).is_file():
            raise UsageError(f"{self.path} is not empty and holds no run. Choose another folder.")
        if not overwrite:
            raise UsageError(
                f"{self.path} already holds a run. Choose another folder, continue that run with "
                f"`grouprl resume {shlex.quote(str(self.path))}`, or overwrite it (--overwrite, in Python "
                "overwrite=True)."
            )


def newest_good(paths: Sequence[Path], read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """The last of `paths` that `read` can read, and what it gave, or None.

    Each later one, which is damaged or no checkpoint at all, is named in the log.
    """
    for path in reversed(paths):
        try:
            return path, read(path)
        except DamagedFileError as error:
            leave_if_asked()  # an import that a signal ended makes any file look damaged
            _log.warning("%s cannot be used, an older checkpoint may do: %s", path, error)
    return None


def default_run_path(root: str | os.PathLike[str], name: str, seed: int) -> Path:
    """A path that does not exist yet: root/NAME-seedSEED-DATE-TIME, with -2, -3, ... after it if that is taken."""
    safe_name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    return free_path(user_path(root) / f"{safe_name}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}")


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} must hold a mapping, got {type(value).__name__}.")
    return value
