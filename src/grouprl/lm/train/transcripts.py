"""Transcripts: what the model wrote while it learned, one line of JSON per sample, and a page to browse them with."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from torch import Tensor

from grouprl.errors import UsageError
from grouprl.lm.generate.collect import ScoredGroups
from grouprl.lm.generate.samples import Samples
from grouprl.lm.prompts import Prompt
from grouprl.runs.files import explain_os_error, plain_number, write_bytes, write_text

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Transcript:
    """One sample.

    Attributes:
        step: optimizer step it was drawn for.
        prompt_index: row of the dataset.
        group: number of its group within the step; the samples of a group are compared with each other.
        prompt: a text, or messages.
        completion: what the model wrote, decoded.
        tokens: length of the completion, its end-of-sequence token included.
        finished: whether it ended by itself.
        rewards: of each reward function, by name; None where it does not apply.
        reward: their weighted sum, None if there is none.
        advantage: what the update used; None for samples of an evaluation.
        extra: further columns, such as the answer in the dataset.
    """

    step: int
    prompt_index: int
    group: int
    prompt: str | Messages
    completion: str
    tokens: int
    finished: bool
    rewards: Mapping[str, float | None]
    reward: float | None
    advantage: float | None
    extra: Mapping[str, Any] = field(default_factory=dict)


def whole_groups(samples: Samples, wanted: int | Literal["all"]) -> int:
    """How many samples to keep for the first groups to be whole and at least ``wanted`` samples to be there."""
    size = len(samples) // len(samples.prompts)
    return len(samples) if wanted == "all" else min(-(-wanted // size) * size, len(samples))


def transcripts_of(samples: Samples, names: Sequence[str], step: int, n: int) -> Iterator[Transcript]:
    """The first ``n`` samples of a generation; ``names`` are those of the reward functions."""
    starts = samples.lengths.cumsum(0) - samples.lengths
    for i in range(n):
        group = int(samples.group[i])
        yield _transcript(
            samples.prompts[group], i, names, samples.rewards, samples.extras, step=step, group=group,
            completion=samples.texts[i], tokens=int(samples.lengths[i]), finished=bool(samples.finished[i]),
            reward=float(samples.returns[i]), advantage=float(samples.advantages[int(starts[i])]),
        )  # fmt: skip


def transcripts_of_scored(drawn: ScoredGroups, names: Sequence[str]) -> Iterator[Transcript]:
    """All samples of an evaluation."""
    returns = drawn.returns.tolist()
    for i, completion in enumerate(drawn.completions):
        group = i // drawn.group_size
        yield _transcript(
            drawn.prompts[group], i, names, drawn.rewards.values, drawn.rewards.extras, step=0, group=group,
            completion=drawn.texts[i], tokens=len(completion.ids), finished=completion.finished, reward=returns[i],
            advantage=None,
        )  # fmt: skip


def _transcript(
    prompt: Prompt, i: int, names: Sequence[str], rewards: Tensor, extras: Mapping[str, Sequence[Any]], **others: Any
) -> Transcript:
    """Sample ``i``, an answer to ``prompt``."""
    judged = zip(names, rewards[i].tolist(), strict=True)
    return Transcript(
        prompt_index=prompt.index, prompt=prompt.prompt,
        rewards={name: None if math.isnan(value) else value for name, value in judged},
        extra=prompt.columns | {name: column[i] for name, column in extras.items()}, **others,
    )  # fmt: skip


class TranscriptWriter:
    """Appends to a file of transcripts (JSON lines); opens one that exists and goes on after its last whole line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, which need not exist yet. Raises UsageError if it cannot be read or written."""
        self.path = Path(path)
        self._file: TextIO | None = None
        raw = _read(self.path) if self.path.exists() else b""
        if not raw.endswith(b"\n") and raw:
            write_bytes(self.path, _whole_lines(raw))

    def append(self, transcripts: Iterable[Transcript]) -> None:
        """Write the samples of a step and hand them to the operating system, so that a crash loses none.

        NaN and infinities become null, and what JSON cannot hold becomes text.
        """
        text = "".join(json.dumps(_plain(asdict(t)), ensure_ascii=False, allow_nan=False) + "\n" for t in transcripts)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="")
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise explain_os_error(error, self.path) from error

    def truncate_after(self, step: int) -> None:
        """Drop the samples of later steps: those of a run that resumes from a checkpoint of `step`."""
        self.close()
        if not self.path.exists():
            return
        lines = _read(self.path).splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if _parse(self.path, number, line)["step"] <= step]
        if len(kept) < len(lines):
            write_bytes(self.path, b"".join(kept))

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> TranscriptWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_transcripts(path: str | os.PathLike[str]) -> Iterator[Transcript]:
    """The samples in a file of transcripts, in its order; a torn last line is left out.

    Raises UsageError if the file is missing or holds something else.
    """
    path = Path(path)
    for number, line in enumerate(_whole_lines(_read(path)).splitlines(), start=1):
        values = _parse(path, number, line)
        try:
            yield Transcript(**values)
        except TypeError as error:
            raise UsageError(f"{path}, line {number}, is no transcript: {error}.") from error


def write_html(
    jsonl_path: str | os.PathLike[str],
    html_path: str | os.PathLike[str],
    title: str,
    max_bytes: int = 8_000_000,
    curve: Mapping[int, float] | None = None,
) -> None:
    """Write one HTML page, which needs nothing else, to browse a file of transcripts with.

    Args:
        title: shown on top.
        max_bytes: size of the page. If the samples do not fit, steps are left out evenly, never the first nor
            the last, and the page says so.
        curve: mean reward of each step over all samples drawn; default: over those in the file.

    Raises UsageError if `jsonl_path` holds no transcripts or `html_path` cannot be written, TrainingError if the disk
    is full.
    """
    samples = list(read_transcripts(jsonl_path))
    if not samples:
        raise UsageError(f"{jsonl_path} holds no transcripts yet.")
    by_step: dict[int, dict[int, list[Transcript]]] = {}
    for sample in samples:
        by_step.setdefault(sample.step, {}).setdefault(sample.group, []).append(sample)
    steps = {step: [_compact(group) for group in by_step[step].values()] for step in sorted(by_step)}
    means: Mapping[int, float | None] = curve or {
        step: _mean(s.reward for group in by_step[step].values() for s in group) for step in steps
    }
    data: dict[str, Any] = {
        "names": list(dict.fromkeys(name for sample in samples for name in sample.rewards)),
        "curve": [[step, mean] for step, value in sorted(means.items()) if (mean := _short(value)) is not None],
        "whole": bool(curve),
        "n_steps": len(steps),
        "n_samples": len(samples),
        "file": Path(jsonl_path).name,
    }
    page = files("grouprl.lm.train").joinpath("transcripts.html").read_text(encoding="utf-8")
    kept = _thin(steps, max_bytes - len(page) - len(json.dumps(data)))
    data["groups"] = [group for groups in kept.values() for group in groups]
    before, after = page.split("{{DATA}}")
    write_text(html_path, before.replace("{{TITLE}}", html.escape(title)) + _embed(data) + after)


def _compact(group: Sequence[Transcript]) -> dict[str, Any]:
    """A group as the page wants it: best sample first; what all its samples share is said once."""
    first = group[0]
    shared = {key: value for key, value in first.extra.items() if all(s.extra.get(key) == value for s in group)}
    return {
        "step": first.step,
        "index": first.prompt_index,
        "prompt": first.prompt if isinstance(first.prompt, str) else [_message(message) for message in first.prompt],
        "extra": {key: _text(value) for key, value in shared.items()},
        "samples": [
            {
                "text": sample.completion,
                "tokens": sample.tokens,
                "done": sample.finished,
                "reward": _short(sample.reward),
                "advantage": _short(sample.advantage),
                "rewards": {name: _short(value) for name, value in sample.rewards.items()},
                "extra": {key: _text(value) for key, value in sample.extra.items() if key not in shared},
            }
            for sample in sorted(group, key=lambda s: -math.inf if s.reward is None else s.reward, reverse=True)
        ],
    }


def _message(message: Mapping[str, Any]) -> list[str]:
    """Role and text; whatever else a message holds, such as calls of tools, follows as JSON."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    parts = [_text(message["content"])] if message.get("content") else []
    return [str(message.get("role", "")), "\n".join(parts + ([_text(rest)] if rest else []))]


def _thin(steps: Mapping[int, list[dict[str, Any]]], budget: int) -> dict[int, list[dict[str, Any]]]:
    """As many evenly spaced steps as fit into `budget` bytes, the first and the last among them."""
    sizes = {step: sum(map(_size, groups)) for step, groups in steps.items()}
    numbers = list(steps)
    count = len(numbers)
    while True:
        picked = (
            [numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count)] if count > 1 else numbers[-1:]
        )
        total = sum(sizes[step] for step in picked)
        if total <= budget:
            return {step: steps[step] for step in picked}
        if count == 1:
            return {picked[0]: _fitting(steps[picked[0]], budget)}
        count = max(1, min(count - 1, int(count * budget / total)))


def _fitting(groups: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first groups that fit into `budget` bytes, at least one."""
    total = list(accumulate(map(_size, groups)))
    return groups[: max(1, sum(size <= budget for size in total))]


def _size(group: Mapping[str, Any]) -> int:
    return len(_embed(group).encode()) + 1


def _embed(data: Any) -> str:
    """JSON that no text in it can break out of the script element it stands in, or be taken for markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()


def _short(value: float | None) -> float | None:
    """Six digits, more than a reader needs; None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int) or value is None:
        return value
    try:
        return _plain(plain_number(value))
    except TypeError:
        return str(value)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"There is no file of transcripts {path}.") from error
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _whole_lines(raw: bytes) -> bytes:
    """Without what stands after the last line end: a crash tore that line."""
    return raw[: raw.rfind(b"\n") + 1]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number}, is no transcript: it is not JSON ({error}).") from error
    if not isinstance(values, dict) or "step" not in values:
        raise UsageError(f"{path}, line {number}, is no transcript: it names no step.")
    return values
