"""Episodes of training: a few batches of a run, a line of JSON each, and a page that shows them side by side."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grouprl.errors import UsageError
from grouprl.runs.files import write_text
from grouprl.runs.pages import embed, fill
from grouprl.runs.records import RecordLog, read_records

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WHAT = "file of episodes"
_PICTURE = "data:image/png;base64,"

Picture = Annotated[str, Field(pattern=f"^{_PICTURE}[A-Za-z0-9+/=]*$")]
Numbers = list[float | None]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Sample(_Plain):
    """One episode of a batch, or the piece of it that the batch holds, read off at P of its steps.

    Attributes:
        group: samples with equal numbers are compared. begins: steps of the episode before the piece.
        length: steps of the piece. ended: how it ended; ``batch`` where the batch cut it.
        total: sum of its rewards. advantage: mean over its steps, as the loss saw it.
        at: the P steps, counted from the beginning of the piece.
        observation: some numbers of the observation, P of each. rewards: means since the point before.
        to_go: discounted return from each point on, with the baseline's value where the batch cut the piece.
        advantages, values: of the points; no values without a baseline.
        actions: what was done; the first number of a vector. frames: small pictures, evenly spaced over the piece.
    """

    group: int
    begins: int
    length: int
    ended: Literal["terminated", "truncated", "batch"]
    total: float | None
    advantage: float | None
    at: list[int]
    observation: list[Numbers]
    rewards: Numbers
    to_go: Numbers
    advantages: Numbers
    values: Numbers | None = None
    actions: Numbers = []
    frames: list[Picture] = []


class Batch(_Plain):
    """Some samples of one batch.

    Attributes:
        step: environment steps of the run, this batch included. estimator: of the advantages.
        names: of the numbers of the observation that the samples show. samples_in_batch: how many there were.
    """

    step: int
    estimator: str
    names: list[str]
    samples_in_batch: int
    samples: list[Sample]


class EpisodeLog(RecordLog):
    """Appends to a file of batches; opens one that exists and goes on after its last whole line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, which need not exist yet. Raises UsageError if it cannot be read or written."""
        super().__init__(path, _WHAT, lambda path, number, line: _parse(path, number, line).step)

    def append(self, batch: Batch) -> None:
        """Write a batch."""
        self.append_lines([batch.model_dump_json()])


def read_episodes(path: str | os.PathLike[str]) -> Iterator[Batch]:
    """The batches in a file, in its order; a torn last line is left out.

    Raises UsageError if the file is missing or holds something else.
    """
    return read_records(path, _WHAT, _parse)


def write_html(
    jsonl_path: str | os.PathLike[str],
    html_path: str | os.PathLike[str],
    title: str,
    *,
    curve: Mapping[int, float] | None = None,
    film: Sequence[str] = (),
    max_bytes: int = 4_000_000,
) -> None:
    """Write one HTML page, which needs nothing else, that shows the batches in a file.

    Args:
        title: shown on top.
        curve: return of training by step. film: pictures of an episode at the end of the run.
        max_bytes: size of the page. If the batches do not fit, later ones of each two are left out until they do.

    Raises UsageError if `jsonl_path` holds no batches or `html_path` cannot be written, TrainingError if the disk is
    full.
    """
    batches = list(read_episodes(jsonl_path))
    if not batches:
        raise UsageError(f"{jsonl_path} holds no episodes yet.")
    found, texts = len(batches), [embed(batch.model_dump()) for batch in batches]
    while sum(map(len, texts)) > max_bytes and len(texts) > 1:
        texts = texts[::2]
    about = {
        "curve": [[step, round(value, 4)] for step, value in (curve or {}).items() if math.isfinite(value)],
        "film": [picture for picture in film if picture.startswith(_PICTURE)],
        "found": found,
        "file": Path(jsonl_path).name,
    }
    data = f'{{"about":{embed(about)},"batches":[{",".join(texts)}]}}'
    write_text(html_path, fill("episodes.html", title, {"DATA": data}))


class Strip:
    """Some evenly spaced pictures of as many as come, without keeping more than twice as many as are wanted."""

    def __init__(self, wanted: int = 8) -> None:
        self.wanted = wanted
        self._kept: list[NDArray[np.uint8]] = []
        self._every, self._seen = 1, 0

    def offer(self, frame: NDArray[np.uint8]) -> None:
        """The next picture ``[H, W, 3]``, which nobody changes afterwards."""
        if self._seen % self._every == 0:
            self._kept.append(frame)
            if len(self._kept) == 2 * self.wanted:
                self._kept, self._every = self._kept[::2], 2 * self._every
        self._seen += 1

    @property
    def pictures(self) -> list[str]:
        """Those that were kept, as data URIs."""
        n = len(self._kept)
        chosen = range(n) if n <= self.wanted else [i * (n - 1) // (self.wanted - 1) for i in range(self.wanted)]
        return [picture(self._kept[i]) for i in chosen]


def picture(frame: NDArray[np.uint8], longest: int = 160) -> str:
    """A picture ``[H, W]`` or ``[H, W, 3]`` as a PNG data URI, its longer side at most so many pixels."""
    from PIL import Image

    image = Image.fromarray(frame)
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    (image if image.mode == "L" else image.quantize(64)).save(buffer, "PNG")
    return _PICTURE + base64.b64encode(buffer.getvalue()).decode()


def _parse(path: Path, number: int, line: bytes) -> Batch:
    try:
        return Batch.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = f"{place}: {first['msg']}" if place else first["msg"]
        raise UsageError(f"{path}, line {number}, is no batch of episodes: {said}.") from None
    except RecursionError:
        raise UsageError(f"{path}, line {number}, is no batch of episodes: it is nested too deeply.") from None
