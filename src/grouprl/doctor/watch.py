"""Looks at a run while it goes on, and says once what is wrong."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Mapping
from typing import Any

from grouprl.doctor.examine import examine_running
from grouprl.doctor.table import Table

_log = logging.getLogger("grouprl")

LOOKS = 10
"""How often a whole run is looked at, evenly spaced: ten looks cost less than a thousandth of a short run."""

EARLY_LOOK = 32
"""A long run is also looked at after so many updates, twice as many, and so on: a tenth of it may take hours."""


class Watch:
    """Keeps the metrics of a run, and warns of each illness once.

    Args:
        settings: fields of the arena's configuration. language_model: which arena.
        goal: the return at which the environment counts as solved.
    """

    def __init__(self, settings: Mapping[str, Any], *, language_model: bool, goal: float | None = None) -> None:
        self.settings, self.language_model, self.goal = settings, language_model, goal
        self._columns: dict[str, array[float]] = {}
        self._rows = 0
        self._told: set[str] = set()
        self._looks, self._early = 0, EARLY_LOOK

    def note(self, row: Mapping[str, Any], progress: float) -> list[str]:
        """A row of metrics at this share of the run; returns the names of illnesses that were now told."""
        self._append(row)
        looks = int(progress * LOOKS)
        if looks <= self._looks and self._rows < self._early:
            return []
        import numpy as np

        self._looks, self._early = looks, self._early * (2 if self._rows >= self._early else 1)
        columns = {name: np.array(values) for name, values in self._columns.items()}
        found = examine_running(Table(columns, self.settings, self.goal, progress), self.language_model)
        new = [one for one in found if one.ill and one.name not in self._told]
        for one in new:
            _log.warning("doctor, %s: %s. Try: %s", one.name, one.finding, one.advice)
            self._told.add(one.name)
        return [one.name for one in new]

    def _append(self, row: Mapping[str, Any]) -> None:
        """Add a row, in 8 bytes a number: a long run has many, and a dictionary of them takes ten times as much."""
        for name in row.keys() - self._columns.keys():
            self._columns[name] = array("d", [math.nan]) * self._rows
        for name, values in self._columns.items():
            values.append(float(row.get(name, math.nan)))
        self._rows += 1
