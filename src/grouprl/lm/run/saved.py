"""The settings of a run, as its config.yaml has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grouprl.errors import DamagedFileError, UsageError
from grouprl.lm.settings.config import GRPOConfig
from grouprl.runs import RunFolder


@contextmanager
def reading(folder: RunFolder) -> Iterator[None]:
    """Around code that takes up the config.yaml of a run: an error in it is one line that names the file.

    Raises UsageError in the place of those within.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{folder.config_path} is not the configuration of a language-model run ({error})") from None
    except DamagedFileError:  # names it
        raise
    except UsageError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError(f"{folder.config_path}: {'; '.join(lines).replace(':; ', ': ')}") from error


def settings_of(folder: RunFolder, **changes: Any) -> GRPOConfig:
    """The settings of a run, with some changed. Raises UsageError as :func:`reading`."""
    with reading(folder):
        return GRPOConfig(**{**folder.read_config()["config"], **changes})


def settings_for_use(folder: RunFolder, **changes: Any) -> GRPOConfig:
    """The settings of a run whose model is used and no longer trained, with some changed.

    Whoever uses it may have neither what only training needs, such as trackers and a server that samples, nor several
    processes.

    Raises UsageError as :func:`reading`.
    """
    return settings_of(folder, **changes).replace(
        beta=0.0, sync_ref_model=False, report_to=(), use_vllm=False, fsdp=False, fsdp_config=None
    )
