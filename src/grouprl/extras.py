"""Packages that grouprl can do without: which of them belong together, and how to install them here."""

from __future__ import annotations

import json
import re
import shlex
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname

_NEEDED_BY = {
    "lm": "language models need",
    "tasks": "tasks of Reasoning Gym need",
    "math": "the reward math_accuracy needs",
    "bench": "benchmarks and sweeps need",
    "wandb": "the tracker wandb needs",
    "export": "an export to ONNX needs",
    "envpool": "EnvPool's environments need",
    "box2d": "environments of Box2D need",
    "mujoco": "environments of MuJoCo need",
    "toy-text": "toy-text environments need",
    "atari": "Atari environments need",
}


def how_to_install(extra: str) -> str:
    """The command that adds an extra, such as ``lm``, to this installation: with its Python, from where it came."""
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(f'{_source()}[{extra}]')}"


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """What a package that is not installed is for and how to install it; None for a package of no extra."""
    package = _normal((error.name or "").partition(".")[0])
    for extra, packages in _packages().items():
        if package and package in packages:
            return f"{_NEEDED_BY[extra]} {error.name}, which is not installed; run: {how_to_install(extra)}"
    return None


def require(package: str) -> None:
    """Raise ModuleNotFoundError, with how to install it, if a package of an extra is not installed."""
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        explained = explain_missing(error)
        if explained is None:
            raise
        raise ModuleNotFoundError(explained, name=error.name) from error


def _source() -> str:
    """What pip is to install: the folder that this installation was made from, else the name in an index."""
    try:
        origin = distribution("grouprl").read_text("direct_url.json")
    except PackageNotFoundError:
        return "grouprl"
    url = json.loads(origin)["url"] if origin else ""
    return url2pathname(urlsplit(url).path) if url.startswith("file:") and not url.endswith(".whl") else "grouprl"


@cache
def _packages() -> dict[str, set[str]]:
    """The packages of each extra, by their importable names."""
    packages: dict[str, set[str]] = {extra: set() for extra in _NEEDED_BY}
    try:
        requirements = distribution("grouprl").requires or []
    except PackageNotFoundError:
        return packages
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and extra and extra[1] in packages:
            packages[extra[1]].add(_normal(name[0]))
    return packages


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
