"""Progress over steps: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grouprl.printing import LastingStream, show, visible

if TYPE_CHECKING:
    from tqdm import tqdm
    from typing_extensions import Never

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows steps done, steps per second, time left and a few values on standard error."""

    def __init__(
        self, total: int, enabled: bool | None = None, *, description: str | None = None, done: int = 0
    ) -> None:
        """Start at `done` of `total` steps. `enabled` None means: a bar if standard error is a terminal, else lines."""
        terminal = False
        if enabled is None:
            with suppress(AttributeError, ValueError):  # none, no terminal's, closed
                terminal = sys.stderr.isatty()
        self._bar: tqdm[Never] | None = None
        self._lines = enabled is None and not terminal
        self._total, self._began, self._said = total, time.monotonic(), time.monotonic()
        if sys.stderr is not None and (enabled or (enabled is None and terminal)):
            from tqdm import tqdm

            self._stream: Any = LastingStream(sys.stderr)  # nobody listens any more, which is no reason to stop
            self._bar = tqdm(
                total=total, initial=done, desc=description, bar_format=_FORMAT, unit=" steps", unit_scale=True,
                dynamic_ncols=True, file=self._stream,
            )  # fmt: skip

    def update(self, done: int, **values: float | str | None) -> None:
        """Show that `done` steps are done in all, with `values` (None is left out)."""
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if v is not None}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.total = max(self._total, done)  # the last batch may go over; tqdm would then drop the bar
            self._bar.update(done - self._bar.n)
        elif self._lines and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            seconds = f"{time.monotonic() - self._began:.0f} s"
            self.say(", ".join([f"{done}/{self._total} steps", seconds, *(f"{k} {v}" for k, v in shown.items())]))

    def say(self, text: str) -> None:
        """Show a line of text, above the bar if there is one."""
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.write(visible(text), file=self._stream)
        elif sys.stderr is not None:
            show(text, sys.stderr)

    def close(self) -> None:
        """Leave the bar as it last was; does nothing the second time."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
