"""What may be given as a tokenizer."""

from __future__ import annotations

import copy
import os
from typing import Any

from grouprl.errors import UsageError, shown

_NEEDED = ("eos_token_id", "batch_decode", "__call__")


def tokenizer_of(given: Any) -> Any:
    """The tokenizer itself: also that of a processor, with the processor's chat template. None stays None.

    Raises UsageError, with what to give instead, for anything that is none.
    """
    if given is None or (all(hasattr(given, name) for name in _NEEDED) and not isinstance(given, type)):
        return given
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        raise UsageError(
            f"processing_class={name!r} is a name; give transformers.AutoTokenizer.from_pretrained({name!r})"
        )
    if isinstance(given, type):
        raise UsageError(f"processing_class={given.__name__} is a class; give an instance: from_pretrained(...)")
    if type(given).__module__.partition(".")[0] == "tokenizers":
        raise UsageError(
            "processing_class is a tokenizer of the package tokenizers; give "
            "transformers.PreTrainedTokenizerFast(tokenizer_object=...) with its special tokens"
        )
    inner: Any = getattr(given, "tokenizer", None)
    if not all(hasattr(inner, name) for name in _NEEDED):
        raise UsageError(f"processing_class={shown(given)} is no tokenizer; give one of transformers'")
    template = getattr(given, "chat_template", None)
    if isinstance(template, str) and getattr(inner, "chat_template", None) is None:
        inner = copy.copy(inner)
        inner.chat_template = template
    return inner
