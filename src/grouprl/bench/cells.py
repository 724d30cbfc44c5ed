"""One run of a benchmark: what decides its outcome, by which it is known again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from grouprl.errors import UsageError, shown

ENVIRONMENTS, LANGUAGE = "environments", "language models"
"""The two arenas, as rows name them."""

CURVE_STARTS, FINAL_STARTS = 10_000, 20_000
"""Where the seeds of episodes begin that are played for the curve, and at the end, in the run with seed 0."""
_STARTS_OF_A_SEED, _SEEDS_APART = 20_000, 100_000
"""Each seed has its own block of them, so that no two share a start; after so many it begins anew: below 2**31."""


@dataclass(frozen=True)
class Cell:
    """A method on a subject with a seed.

    Attributes:
        method, subject: as the file names them. arena: of the subject.
        steps: of the environment, or of the optimizer for language models. seed: of every random stream.
        env_id, env_kwargs: the environment. recipe: the preset, or the file, of a language model.
        preset: whose settings an environment's run begins with; None: the robust default.
        settings: those of the method. functions: ``module:function`` by the name of the argument.
        worker: the command that does it; empty: grouprl itself.
        reward_noise: the standard deviation of Gaussian noise on every reward of training, in the reward's units.
        episodes: played at the end, greedily and again sampled. points: evaluations along the way; point_episodes: of
            each. A language model is evaluated on its recipe's held-out rows, as often as that says.
        code: a checksum of the files that hold the functions, and the environment where it is one of the user's own.
        folder: of the benchmark's file; modules in it are found, beside those in the current one.
        ready_made: a checksum of what the preset, or the recipe, holds.
    """

    method: str
    subject: str
    arena: str
    steps: int
    seed: int
    env_id: str | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    worker: tuple[str, ...] = ()
    reward_noise: float = 0.0
    episodes: int = 100
    points: int = 20
    point_episodes: int = 20
    code: str = ""
    folder: str = ""
    ready_made: str = ""

    @property
    def name(self) -> str:
        """What people call it, and ``--only`` selects: METHOD/SUBJECT/SEED."""
        return f"{self.method}/{self.subject}/{self.seed}"

    @property
    def id(self) -> str:
        """A hash of all that decides its outcome, wherever its file lies."""
        return hashlib.sha256(json.dumps(self.as_hashed(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def as_hashed(self) -> dict[str, Any]:
        """What decides its outcome, wherever its file lies.

        Fields that came later are left out where they hold nothing, so that the hash of older rows stays theirs.
        """
        fields = {**asdict(self), "folder": ""}
        for later in ("reward_noise", "ready_made"):
            if not fields[later]:
                del fields[later]
        return fields

    def given(self) -> dict[str, Any]:
        """What a worker is told, as plain values."""
        block = _STARTS_OF_A_SEED * (self.seed % _SEEDS_APART)
        starts = {"curve_starts": CURVE_STARTS + block, "final_starts": FINAL_STARTS + block}
        return {**asdict(self), **starts}


_SEEDS = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")
_MOST_SEEDS = 10_000


def parse_seeds(given: object) -> list[int]:
    """Seeds written as ``0-4,7``, or as a list of numbers and ranges; in order, each once.

    Raises UsageError for anything else, and for a number alone that could be a seed or how many there shall be.
    """
    if not isinstance(given, list) and re.fullmatch(r"\s*([2-9]|[1-9]\d+)\s*", str(given)):
        number = int(str(given))
        raise UsageError(f"seeds={number}: write 0-{number - 1} for {number} seeds, or {number}-{number} for this one")
    parts = given if isinstance(given, list) else str(given).split(",")
    seeds: dict[int, None] = {}
    for part in parts:
        found = None if isinstance(part, bool | float) else _SEEDS.fullmatch(str(part))
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last - first >= _MOST_SEEDS:
            raise UsageError(f"seeds={shown(given)}: cannot read {shown(part)}; write whole numbers and ranges: 0-4,7")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    if not seeds:
        raise UsageError(f"seeds={shown(given)} names no seed; write whole numbers and ranges: 0-4,7")
    return list(seeds)


def check_distinct(cells: Iterable[Cell]) -> None:
    """Raises UsageError if two runs are known by one name: their rows could not be told apart."""
    seen: set[str] = set()
    for cell in cells:
        if cell.name in seen:
            raise UsageError(f"two runs are called {cell.name}; give one of them another name")
        seen.add(cell.name)
