"""Answers found in what a model wrote. Nothing here evaluates text; all of it takes time linear in its length."""

from __future__ import annotations

import re

_QUOTES = "\"'`*\u2018\u2019\u201c\u201d"
_NUMBER = re.compile(r"(?<![0-9.])-?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)*")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+")


def bare(text: str) -> str:
    """`text` without white space, quotes and emphasis around it and without a full stop at its end."""
    for _ in range(2):  # a full stop may stand inside the quotes or outside
        text = text.strip().rstrip(".").strip(_QUOTES)
    return text.strip()


def last_integer(text: str) -> str | None:
    """The last integer in `text` as a plain numeral, None if there is none: "= 1,234.0" gives "1234".

    A hyphen right after a digit is a minus between two numbers, not a sign. Numbers with decimals other than 0 do not
    count, nor do version numbers.
    """
    last = None
    for number in _NUMBER.findall(text.replace("\u2212", "-")):
        whole, _, decimals = number.partition(".")
        if decimals.strip("0"):
            continue
        last = whole.replace(",", "") if _THOUSANDS.fullmatch(whole) else whole.split(",")[-1]
    if last is None:
        return None
    magnitude = last.lstrip("-").lstrip("0") or "0"
    return "-" + magnitude if last.startswith("-") and magnitude != "0" else magnitude


def tagged(text: str) -> str | None:
    """What stands inside the last <answer>...</answer>, stripped; None if there is no such pair."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip()
