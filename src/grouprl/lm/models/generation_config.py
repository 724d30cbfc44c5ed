"""A model's generation configuration, saved as it is as far as Transformers agrees to write it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grouprl.errors import first_line

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ["early_stopping", "length_penalty"]
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def writable_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Within, ``model`` has a generation configuration that Transformers agrees to write into ``folder``.

    Transformers reads values that the way of decoding does not use, such as a temperature without do_sample, and
    refuses to write them. They are left out. What it refuses even then it would read, and is written without asking. Of
    a configuration that it would not even read, only the special tokens are kept, with a warning.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    written = copy.deepcopy(own)
    refused = not _is_written(written, folder)
    if refused:
        for name in _unused(written):
            setattr(written, name, None)
        refused = not _is_written(written, folder)
    try:
        model.generation_config = type(own)() if refused else written
        yield
    finally:
        model.generation_config = own
    if refused:
        _readable(written).to_json_file(
            folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"]
        )


def _unused(config: Any) -> list[str]:
    """The values that are set and that this way of decoding does not use."""
    sampling, beams = config.do_sample is True, config.num_beams not in (None, 1)
    contrastive = getattr(config, "penalty_alpha", None) is not None
    names = [name for name in _SAMPLING if not sampling and not (contrastive and name == "top_k")]
    names += [] if beams else _BEAMS
    names += [] if sampling or beams else ["num_return_sequences"]
    return [name for name in names if getattr(config, name, None) is not None]


def _is_written(config: Any, folder: Path) -> bool:
    try:
        config.save_pretrained(folder)
    except ValueError:
        return False
    return True


def _readable(config: Any) -> Any:
    try:
        config.validate()
    except ValueError as error:
        warnings.warn(
            f"the model's generation_config is invalid ({first_line(error)}); only its special tokens are saved",
            stacklevel=2,
        )
        return type(config)(**{name: getattr(config, name, None) for name in _TOKENS})
    return config
