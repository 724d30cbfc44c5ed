"""Weights that Transformers changes whenever it reads them: what is trained there would not be what anybody loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grouprl.errors import UsageError
from grouprl.lm.models.adapters import has_adapters


def check_read_back(model: Any) -> None:
    """Refuse to train the row of the padding token where ``from_pretrained`` sets it to zero.

    Some classes (Youtu's is one) start that row at zero in a way that Transformers repeats when it reads a saved model.
    That does no harm to a table of embeddings of its own, where the row stays zero. A table that is the output layer
    too is trained there as well.

    Raises UsageError with what to do.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if has_adapters(model) or not isinstance(inputs, nn.Embedding) or outputs is None:
        return
    if not type(model).__module__.startswith("transformers."):  # of other classes it leaves alone what it has read
        return
    padding = model.config.get_text_config().pad_token_id
    if padding is None or inputs.weight is not outputs.weight or not inputs.weight.requires_grad:
        return
    if 0 <= padding < inputs.num_embeddings and _is_zeroed(model, padding):
        raise UsageError(
            f"{type(model).__name__} would not be read back as it was trained: its table of embeddings is its output "
            f"layer too, and Transformers sets the row of the padding token ({padding}) to zero whenever it reads it; "
            "set model.config.pad_token_id = None (the tokenizer still names the padding token), or train an adapter "
            "(peft_config) or with freeze_embeddings"
        )


def _is_zeroed(model: Any, padding: int) -> bool:
    """Whether the class clears that row of a table which Transformers marks as read from a file."""
    table = nn.Embedding(padding + 1, 1, padding_idx=padding)
    nn.init.ones_(table.weight)
    table.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        try:
            getattr(model, "base_model", model)._init_weights(table)  # the nearest to the table, as Transformers does
        except Exception:  # it expects another module, and clears none of this kind then
            return False
    return bool(table.weight[padding] == 0)
