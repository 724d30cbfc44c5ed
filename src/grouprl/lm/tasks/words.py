"""Common short words, most of them a single token after a space; those for evaluation stand apart."""

from __future__ import annotations

_TRAIN = (
    "tree moon cat river stone cloud bird fish apple house chair table bread milk salt "
    "sand wind rain snow fire ship boat train road hill lake leaf rose corn rice "
    "lamp door wall roof bell drum ring coin king bear wolf lion goat horse garden"
)
_EVAL = "star sun sea book hat coat cup fork window paper shirt clock bridge queen horn"

TRAIN_WORDS = tuple(_TRAIN.split())
EVAL_WORDS = tuple(_EVAL.split())
