"""Where metrics are shown while a run goes on: TensorBoard, Weights & Biases, or nowhere.

The metrics file is written whatever the trackers are; it is the record, they are the view.
"""

from __future__ import annotations

import logging
import netrc
import os
import socket
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlparse

from grouprl.errors import UsageError, with_type
from grouprl.extras import how_to_install
from grouprl.redaction import redact, without_secrets
from grouprl.runs.files import explain_os_error
from grouprl.runs.in_place import check_in_place
from grouprl.runs.metrics import MetricRow

_log = logging.getLogger("grouprl")

TRACKERS = ("tensorboard", "wandb", "none")
WandbMode = Literal["online", "offline", "shared", "disabled"]


class Tracker(Protocol):
    """Something that shows metrics."""

    def log(self, metrics: MetricRow, step: int) -> None:
        """Show `metrics` as those of `step`; None is left out."""

    def close(self) -> None:
        """Write what is pending; nothing may be logged afterwards."""


class TensorBoardTracker:
    """Writes scalars as TensorBoard's event files, each `log` flushed.

    The files are written with the tensorboard package alone: torch.utils.tensorboard takes longer to import and loads
    TensorFlow where that is installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Start a new event file in `folder`. Raises UsageError if it cannot be written."""
        self._folder = Path(folder)
        self._start()

    def _start(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder, now = self._folder, time.time()
        file = folder / f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._resumed = any(folder.glob("events.out.tfevents.*"))
            self._file = file.open("wb")
        except OSError as error:
            raise explain_os_error(error, file) from error
        self._path, self._records = file, RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def log(self, metrics: MetricRow, step: int) -> None:
        """Write all of `metrics` as one event."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._look()
        if self._resumed:  # makes readers drop what an earlier process logged from this step on
            self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
            self._resumed = False
        values = [Summary.Value(tag=k, simple_value=float(v)) for k, v in metrics.items() if v is not None]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the event file."""
        self._records.close()

    def _look(self) -> None:
        """Start another event file, and say so, if this one was deleted: what is written there nobody can read."""
        if os.fstat(self._file.fileno()).st_nlink:
            return
        check_in_place(self._path)
        _log.warning(
            "%s was deleted while this run writes there; another file shows what follows, metrics.csv holds the rest",
            self._path,
        )
        self._records.close()
        self._start()

    def _write(self, event: Any) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            raise explain_os_error(error, self._path) from error


class WandbTracker:
    """Logs to Weights & Biases; without an account it writes an offline run, which `wandb sync` can upload later."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        project: str,
        name: str,
        config: Mapping[str, Any],
        mode: WandbMode | None = None,
    ) -> None:
        """Start a run whose files are in `folder`/wandb, or go on with the one that is open.

        WANDB_PROJECT takes precedence over `project`.

        `mode` None means: what WANDB_MODE says, else online if there is a key or a login, else offline.

        Raises UsageError if wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UsageError(f"Tracker 'wandb' needs Weights & Biases; run: {how_to_install('wandb')}") from error
        if mode is None and "WANDB_MODE" not in os.environ and not _wandb_login():
            mode = "offline"
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._given = wandb.run is not None  # by whoever called: it stays open for them
        self._run = wandb.run or wandb.init(
            dir=str(folder), project=os.environ.get("WANDB_PROJECT") or project, name=name, config=dict(config),
            mode=mode,
        )  # fmt: skip

    def log(self, metrics: MetricRow, step: int) -> None:
        """Log `metrics` at `step`."""
        self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table at `step`: a value for each of `columns` in each of `rows`."""
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def close(self) -> None:
        """Finish the run, unless it was there before."""
        if not self._given:
            self._run.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is not in TRACKERS, no list of names, or a tracker whose package is missing."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(
            f"track={with_type(names)} must be a list of names, such as ['wandb']. Allowed: {', '.join(TRACKERS)}."
        )
    unknown = [n for n in names if n not in TRACKERS]
    if unknown:
        raise UsageError(f"Unknown tracker {', '.join(map(repr, unknown))}. Allowed: {', '.join(TRACKERS)}.")
    if "none" in names and len(set(names)) > 1:
        raise UsageError(f"Tracker 'none' excludes the others, got {', '.join(names)}. Leave out one or the other.")
    if "wandb" in names and find_spec("wandb") is None:
        raise UsageError(f"Tracker 'wandb' needs Weights & Biases; run: {how_to_install('wandb')}")


def make_trackers(
    names: Sequence[str],
    *,
    tensorboard_folder: str | os.PathLike[str],
    wandb_folder: str | os.PathLike[str],
    name: str,
    project: str = "grouprl",
    config: Mapping[str, Any],
) -> list[Tracker]:
    """The trackers called `names`, each once. "none" stands for no tracker and must stand alone.

    Raises UsageError as `check_trackers` does.
    """
    check_trackers(names)
    trackers: list[Tracker] = []
    if "tensorboard" in names:
        trackers.append(TensorBoardTracker(tensorboard_folder))
    if "wandb" in names:
        trackers.append(WandbTracker(wandb_folder, project, redact(name), without_secrets(config)))
    return trackers


def _wandb_login() -> bool:
    """Whether wandb could upload without asking: it knows a key from the environment or from a login."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
