"""Prompts of your own in a file of JSON lines."""

from __future__ import annotations

import json
import os
from typing import Any

from grouprl.errors import UsageError, first_line
from grouprl.reading import check_size
from grouprl.runs.files import user_path


def load_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object a line; empty lines are skipped.

    Every row needs `prompt`: a string, or a list of messages {"role": ..., "content": ...}. All other columns are kept
    for the reward; a column that a row lacks is None there.

    Raises UsageError, naming the line, if the file cannot be read, holds no row, or a line is not such an object.
    """
    path = user_path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.") from error
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f'{path} holds no row; write one JSON object a line, such as {{"prompt": "...", ...}}.')
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise UsageError(f"{where} is not JSON: {first_line(error)}.") from error
    check_size(row, where)
    if not isinstance(row, dict):
        raise UsageError(f"{where} is a JSON {type(row).__name__}; it must be an object with a prompt.")
    if "prompt" not in row:
        raise UsageError(f"{where} has no prompt; it has: {', '.join(map(repr, row)) or 'nothing'}.")
    problem = _problem(row["prompt"])
    if problem:
        raise UsageError(
            f'{where}: {problem}; a prompt is text or a list of messages such as {{"role": "user", "content": "..."}}.'
        )
    return row


def _problem(prompt: Any) -> str | None:
    """What is wrong with a prompt, if anything."""
    if isinstance(prompt, str):
        return None if prompt else "the prompt is empty"
    if not isinstance(prompt, list):
        return f"the prompt is a {type(prompt).__name__}"
    if not prompt:
        return "the prompt is an empty list"
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return f"message {number} of the prompt has no role or no content"
    return None
