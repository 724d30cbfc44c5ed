"""Errors of Transformers and safetensors about models they cannot load, as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grouprl.errors import UsageError, first_line


@contextmanager
def explained(
    what: str, describe: Callable[[Exception], str] = first_line, missing_package: str | None = None
) -> Iterator[None]:
    """Turn an error of loading ``what`` into a UsageError: "Cannot load WHAT: REASON."

    Args:
        describe: the reason in an error; default: its first line.
        missing_package: the reason where a package is missing; default: the first line of the ImportError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    except SafetensorError as error:
        raise UsageError(
            f"Cannot load {what}: its weights are cut short or damaged ({error}). Fetch it again."
        ) from error
    except ImportError as error:
        raise UsageError(f"Cannot load {what}: {missing_package or first_line(error)}.") from error
    except Exception as error:  # foreign files make foreign code raise anything
        raise UsageError(f"Cannot load {what}: {describe(error)}.") from error
