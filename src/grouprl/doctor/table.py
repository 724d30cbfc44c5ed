"""What a rule reads, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Diagnosis:
    """One illness of a run.

    Attributes:
        name: of the rule, in words with hyphens.
        finding: what was seen, with its numbers, as one sentence.
        advice: what to try, with the names of settings, as one or more sentences.
        ill: False for a remark on the machine, which spoils no result.
    """

    name: str
    finding: str
    advice: str
    ill: bool = True


@dataclass(frozen=True)
class Table:
    """The metrics of a run so far, and what it was asked to do.

    Attributes:
        columns: the metrics by name, one number per row, NaN where a row has none.
        settings: the fields of the arena's configuration.
        goal: the return or reward at which the task counts as solved, None where nobody says one.
        progress: the share of the planned steps that is done, in [0, 1].
    """

    columns: Mapping[str, Array]
    settings: Mapping[str, Any] = field(default_factory=dict)
    goal: float | None = None
    progress: float = 1.0

    def values(self, name: str) -> Array:
        """The numbers of a column in their order, without blanks; none where there is no such column."""
        import numpy as np

        column = self.columns.get(name)
        return np.empty(0) if column is None else column[np.isfinite(column)]

    def first(self, name: str) -> Array:
        """The first third of :meth:`values`, rounded up."""
        values = self.values(name)
        return values[: -(-len(values) // 3)]

    def last(self, name: str) -> Array:
        """The last third of :meth:`values`, rounded up."""
        values = self.values(name)
        return values[len(values) - -(-len(values) // 3) :]

    def recent(self, name: str, parts: int = 3) -> Array:
        """The numbers of a column in the last third, or half, or so, of all rows, without blanks."""
        import numpy as np

        column = self.columns.get(name)
        late = np.empty(0) if column is None else column[len(column) - -(-len(column) // parts) :]
        return late[np.isfinite(late)]

    def late(self, name: str) -> float:
        """The median of the last third, NaN where there is nothing."""
        import numpy as np

        values = self.last(name)
        return float(np.median(values)) if len(values) else float("nan")

    @cached_property
    def rows(self) -> int:
        """Rows of the table."""
        return max(map(len, self.columns.values()), default=0)


Rule = Callable[[Table], "Diagnosis | None"]
