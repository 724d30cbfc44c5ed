"""Looks at a run while it goes on, and says once what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from grouprl.doctor.examine import examine_running
from grouprl.doctor.table import Table

_log = logging.getLogger("grouprl")

LOOKS = 10
"""How often a whole run is looked at, evenly spaced: ten looks cost less than a thousandth of a short run."""


class Watch:
    """Keeps the metrics of a run, and warns of each illness once.

    Args:
        settings: fields of the arena's configuration. language_model: which arena.
        goal: the return at which the environment counts as solved.
    """

    def __init__(self, settings: Mapping[str, Any], *, language_model: bool, goal: float | None = None) -> None:
        self.settings, self.language_model, self.goal = settings, language_model, goal
        self._rows: list[Mapping[str, Any]] = []
        self._told: set[str] = set()
        self._looks = 0

    def note(self, row: Mapping[str, Any], progress: float) -> list[str]:
        """A row of metrics at this share of the run; returns the names of illnesses that were now told."""
        self._rows.append(row)
        if int(progress * LOOKS) <= self._looks:
            return []
        self._looks = int(progress * LOOKS)
        found = examine_running(Table(_columns(self._rows), self.settings, self.goal, progress), self.language_model)
        new = [one for one in found if one.ill and one.name not in self._told]
        for one in new:
            _log.warning("doctor, %s: %s. Try: %s", one.name, one.finding, one.advice)
            self._told.add(one.name)
        return [one.name for one in new]


def _columns(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    import numpy as np

    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows], float) for name in names}
