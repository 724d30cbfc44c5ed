"""Pages that a run leaves: one HTML file each, which needs nothing else and does nothing that its data asks for."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def fill(name: str, title: str, parts: Mapping[str, str]) -> str:
    """The template ``name`` of this package with what all pages share, a title, and ``parts`` in their places.

    ``title`` is any text. The parts go in as they are: HTML that is escaped already, or what :func:`embed` gives.
    """
    shared = {"STYLE": _template("page.css"), "SCRIPT": _template("page.js"), "TITLE": html.escape(title)}
    return _assemble(_template(name), {**shared, **parts})


def _template(name: str) -> str:
    return files("grouprl.runs").joinpath(name).read_text(encoding="utf-8")


def _assemble(template: str, parts: Mapping[str, str]) -> str:
    """The template with each {{NAME}} replaced; what is put in is not searched for names again."""
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def embed(data: Any) -> str:
    """JSON that no text in it can break out of the script element it stands in, or be taken for markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()
