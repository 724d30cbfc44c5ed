"""Secrets, such as access tokens and passwords: how they are told from other text, and kept out of what is written.

What is written, shown or raised has ``(secret)`` in their place; ``(secret $HF_TOKEN)`` where the environment held the
same value under that name, from which a resumed run reads it again.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from grouprl.printing import visible

_HIDDEN = "(secret)"
_PLACE = re.compile(r"\(secret(?: \$(\w+))?\)")

_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{10,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bAIza[A-Za-z0-9_-]{30,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
"""Keys of Hugging Face, OpenAI and others, GitHub, GitLab, Amazon, Google, Slack; JSON web tokens; private keys."""
_IN_URL = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
_BEARER = re.compile(r"(?<=\bBearer )[^\s'\",;]{6,}")
_ASSIGNED = re.compile(
    r"(?P<quote>['\"]?)(?P<name>[A-Za-z][\w.-]*)(?P=quote)(?P<sign>\s*[:=]\s*)"
    r"(?P<open>['\"])(?P<value>[^'\"\n]+)(?P=open)"
)
"""A name and its quoted value, as in the representation of a mapping or of an argument."""
_QUERY = re.compile(r"(?<=[?&])(?P<name>[A-Za-z][\w.-]*)=(?P<value>[^\s&#'\"]+)")

_ALWAYS = {"password", "passwd", "passphrase", "pwd", "secret", "secrets", "apikey", "credential", "credentials"}
_LAST = {"token", "key", "auth", "authorization", "cookie", "bearer", "pass", "signature"}
_HARMLESS = {
    "token": {
        "bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "boi", "eoi", "start", "end",
        "stop", "begin", "think", "thinking", "special", "first", "last", "next", "decoder", "forced", "tool", "per",
        "prefix", "suffix", "middle", "empty", "separator", "answer", "skip",
    },
    "key": {
        "sort", "primary", "foreign", "group", "dict", "column", "label", "metric", "answer", "prompt", "question",
        "state", "input", "output", "reward", "text", "messages", "image", "cache", "obs", "observation", "goal",
    },
}  # fmt: skip


def redact(text: str) -> str:
    """``text`` without what has the shape of a secret, stands quoted behind the name of one, or is one of the
    environment's."""
    for name, held in _of_environment():
        text = text.replace(held, f"(secret ${name})")
    text = _SHAPES.sub(_HIDDEN, text)
    text = _IN_URL.sub(_HIDDEN, text)
    text = _BEARER.sub(_HIDDEN, text)
    text = _QUERY.sub(lambda m: f"{m['name']}={_HIDDEN}" if _is_secret(m["name"], m["value"]) else m[0], text)
    return _ASSIGNED.sub(_redact_assigned, text)


_SHORTEST = 8
"""Characters of a variable's value that is looked for in text: shorter ones are words, such as ``true``."""


def _of_environment() -> list[tuple[str, str]]:
    """Variables whose names are those of secrets, and whose values can be nothing else; longer values first."""
    found = [
        (name, held)
        for name, held in os.environ.items()
        if len(held) >= _SHORTEST and name != "PWD" and os.sep not in held[:1] and _is_secret_name(name)
    ]
    return sorted(found, key=lambda pair: -len(pair[1]))


@cache
def _is_secret_name(name: str) -> bool:
    return _is_secret(name, "something")


def _redact_assigned(match: re.Match[str]) -> str:
    if not _is_secret(match["name"].rpartition(".")[2], match["value"]):
        return match[0]
    return f"{match['quote']}{match['name']}{match['quote']}{match['sign']}{match['open']}{_HIDDEN}{match['open']}"


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of nested mappings and lists with a note in the place of each secret, told by its name or its shape."""
    if isinstance(value, Mapping):
        named = bool(name) and _is_secret(name, "something")
        return {
            key: without_secrets(item, name if named and isinstance(item, str) else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item, name) for item in value]
    if not _is_secret(name, value):
        return redact(value) if isinstance(value, str) else value
    return next((f"(secret ${key})" for key, held in os.environ.items() if held == str(value)), _HIDDEN)


def with_secrets(value: Any, where: str) -> Any:
    """The inverse of `without_secrets`, as far as the environment holds them.

    A secret that stood at ``where.name`` is read from the variable that held it, else from ``GROUPRL_NAME``; a token of
    the model hub also from ``HF_TOKEN``.

    Raises ValueError, with what to set, for one that is nowhere.
    """
    if isinstance(value, Mapping):
        return {key: with_secrets(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_secrets(item, where) for item in value]
    place = _PLACE.search(value) if isinstance(value, str) else None
    if place is None:
        return value
    if place[1] and place[1] in os.environ:  # also within other text, such as an address
        return with_secrets(value[: place.start()] + os.environ[place[1]] + value[place.end() :], where)
    name = re.sub(r"\W", "_", where.rpartition(".")[2]).upper()
    variables = [place[1], f"GROUPRL_{name}", *(("HF_TOKEN",) if name.endswith("TOKEN") else ())]
    for variable in variables:
        if variable and variable in os.environ:
            return os.environ[variable]
    advice = " or ".join(dict.fromkeys(variable for variable in variables if variable))
    raise ValueError(f"{where} was a secret, which is written nowhere; set {advice} in the environment")


def _is_secret(name: str, value: Any) -> bool:
    """Whether a value of that name is one: ``token``, ``api_key``, ``dbPassword``, but not ``eos_token``."""
    if value is None or isinstance(value, bool) or value == "" or not isinstance(value, str | int | float):
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().replace("-", "_").strip("_").split("_")
    if _ALWAYS & set(words):
        return not (isinstance(value, str) and _PLACE.fullmatch(value))
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last not in _LAST or before in _HARMLESS.get(last, ()) or not isinstance(value, str):
        return False
    prose = last in _HARMLESS and (value.startswith("<") or " " in value)
    return not prose and not _PLACE.fullmatch(value)


class _Redacting(logging.Filter):
    """Takes secrets out of what grouprl logs, and what would steer a terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = visible(redact(record.getMessage())), None
        return True


logging.getLogger("grouprl").addFilter(_Redacting())
