"""A progress bar over steps, silent where nobody watches."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm
    from typing_extensions import Never

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress:
    """Shows steps done, steps per second, time left and a few values on standard error."""

    def __init__(
        self, total: int, enabled: bool | None = None, *, description: str | None = None, done: int = 0
    ) -> None:
        """Start at `done` of `total` steps. `enabled` None means: if standard error is a terminal."""
        if enabled is None:
            enabled = sys.stderr is not None and sys.stderr.isatty()
        self._bar: tqdm[Never] | None = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=description, bar_format=_FORMAT, unit=" steps", unit_scale=True,
                dynamic_ncols=True, file=sys.stderr,
            )  # fmt: skip

    def update(self, done: int, **values: float | str | None) -> None:
        """Show that `done` steps are done in all, with `values` (None is left out)."""
        if self._bar is None:
            return
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        self._bar.set_postfix({key: value for key, value in shown.items() if value is not None}, refresh=False)
        self._bar.update(done - self._bar.n)

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
