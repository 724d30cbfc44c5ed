"""Transcripts: what a model wrote while it learned, one line of JSON per sample, and a page to browse them with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.runs.files import plain_number, rounded, write_text
from grouprl.runs.pages import embed, fill
from grouprl.runs.records import RecordLog, read_records

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
        turns: of an episode of several turns what followed the prompt, message after message: ``role`` and ``text``,
            and of the model's also ``reward`` and ``advantage``. Empty for a completion.
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
    turns: Sequence[Mapping[str, Any]] = ()


_WHAT = "file of transcripts"


class TranscriptWriter(RecordLog):
    """Appends to a file of transcripts (JSON lines); opens one that exists and goes on after its last whole line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`, which need not exist yet. Raises UsageError if it cannot be read or written."""
        super().__init__(path, _WHAT, lambda path, number, line: _parse(path, number, line).step)

    def append(self, transcripts: Iterable[Transcript]) -> None:
        """Write the samples of a step and hand them to the operating system, so that a crash loses none.

        NaN and infinities become null, and what JSON cannot hold becomes text.
        """
        columns = ({name: value for name, value in vars(t).items() if name != "turns" or value} for t in transcripts)
        self.append_lines(json.dumps(plain(one), ensure_ascii=False, allow_nan=False) for one in columns)


def read_transcripts(path: str | os.PathLike[str]) -> Iterator[Transcript]:
    """The samples in a file of transcripts, in its order; a torn last line is left out.

    Raises UsageError if the file is missing or holds something else.
    """
    return read_records(path, _WHAT, _parse)


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
    kept = _thin(steps, max_bytes - len(fill("transcripts.html", title, {"DATA": embed(data)})))
    data["groups"] = [group for groups in kept.values() for group in groups]
    write_text(html_path, fill("transcripts.html", title, {"DATA": embed(data)}))


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
                **({"turns": [_turn(turn) for turn in sample.turns]} if sample.turns else {}),
            }
            for sample in sorted(group, key=lambda s: -math.inf if s.reward is None else s.reward, reverse=True)
        ],
    }


def _turn(turn: Mapping[str, Any]) -> list[Any]:
    """Role, text, reward and advantage, the last two None where the model did not say it."""
    return [turn["role"], turn["text"], _short(turn.get("reward")), _short(turn.get("advantage"))]


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
    return len(embed(group).encode()) + 1


def _short(value: float | None) -> float | None:
    """Six digits, more than a reader needs; None for what JSON has no number for."""
    return None if value is None else rounded(value, 6)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_DEEPEST = 50
"""The depth to which lists within lists are written; what lies deeper is written as text."""


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as transcripts write it: what JSON can hold, and text for the rest."""
    if isinstance(value, Mapping | list | tuple) and depth >= _DEEPEST:
        return shown(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and value.bit_length() > _BITS:
        return None  # as for infinities: programs that read it as a float would get one
    if isinstance(value, str | bool | int) or value is None:
        return value
    try:
        return plain(plain_number(value), depth)
    except TypeError:
        return _as_text(value)


def _as_text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # of a class of the user's
        return shown(value)


_BITS = 1023
"""The most bits of a whole number that a float can hold, and so a reader of JSON."""
_NAMES = {item.name for item in fields(Transcript)}


def _parse(path: Path, number: int, line: bytes) -> Transcript:
    """A line of the file. Raises UsageError if it is none."""
    where = f"{path}, line {number}, is no transcript"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: it is not JSON ({error}).") from error
    except RecursionError:
        raise UsageError(f"{where}: it is nested too deeply.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{where}: it is a JSON {type(values).__name__}.")
    for name, is_right in _RIGHT.items():
        if name not in values:
            raise UsageError(f"{where}: it names no {name}.")
        if not is_right(values[name]):
            raise UsageError(f"{where}: its {name} is {shown(values[name])}.")
    if not isinstance(values.get("extra", {}), dict):
        raise UsageError(f"{where}: its extra is {shown(values['extra'])}.")
    turns = values.get("turns", [])
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise UsageError(f"{where}: its turns are {shown(turns)}.")
    if unknown := values.keys() - _NAMES:
        raise UsageError(f"{where}: it has {', '.join(map(repr, sorted(unknown)))}.")
    if _depth(values) > 2 * _DEEPEST:
        raise UsageError(f"{where}: it is nested too deeply.")
    return Transcript(**values)


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("role", "text")):
        return False
    return all(_number(value.get(name)) for name in ("reward", "advantage"))


def _depth(value: Any) -> int:
    """Lists and mappings within each other."""
    depth, level = 0, [value]
    while level:
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [part for item in nested for part in (item.values() if isinstance(item, dict) else item)]
        depth += bool(nested)
    return depth


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64


def _number(value: Any) -> bool:
    if value is None or isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _BITS


_RIGHT: Mapping[str, Callable[[Any], bool]] = {
    "step": _count,
    "prompt_index": _count,
    "group": _count,
    "prompt": lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(part, dict) for part in v)),
    "completion": lambda v: isinstance(v, str),
    "tokens": _count,
    "finished": lambda v: isinstance(v, bool),
    "rewards": lambda v: isinstance(v, dict) and all(map(_number, v.values())),
    "reward": _number,
    "advantage": _number,
}
"""What the columns of a transcript hold."""
