"""Warnings of a run, kept for its row: of Python's `warnings`, and what grouprl logs, the doctor's words included."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MOST = 20
"""A row keeps so many different warnings: an environment may give another one at every step."""

_HEARD = (UserWarning, RuntimeWarning)
"""About what a user gave, and about training that goes wrong; DeprecationWarning and its like are for authors."""


class _Keeper(logging.Handler):
    """Keeps each text once."""

    def __init__(self, alone: bool) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self._alone = alone

    def emit(self, record: logging.LogRecord) -> None:
        self.keep(record.getMessage())
        if self._alone and logging.lastResort is not None:  # it shows only what no handler takes
            logging.lastResort.handle(record)

    def keep(self, text: str) -> None:
        if text not in self.said and len(self.said) < _MOST:
            self.said.append(text)


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """A list that fills with what is warned of meanwhile; all of it is shown as well."""
    log = logging.getLogger("grouprl")
    keeper = _Keeper(alone=not log.hasHandlers())
    with warnings.catch_warnings():
        for category in _HEARD:
            warnings.simplefilter("default", category)  # each once, whatever filters there are
        show = warnings.showwarning

        def heard(message: Warning | str, category: type[Warning], *where: object) -> None:
            if issubclass(category, _HEARD):
                keeper.keep(str(message))
            show(message, category, *where)  # type: ignore[arg-type]

        warnings.showwarning = heard  # type: ignore[assignment]
        log.addHandler(keeper)
        try:
            yield keeper.said
        finally:
            log.removeHandler(keeper)
