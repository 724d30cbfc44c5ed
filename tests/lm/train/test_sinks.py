"""Where completions and numbers go while a script trains."""

import io
import sys
from pathlib import Path

import pytest
from small_runs import trainer


def test_completions_that_standard_output_has_no_characters_for_are_printed_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, log_completions=True, max_steps=1)
    decode = made.processing_class.batch_decode
    monkeypatch.setattr(
        made.processing_class, "batch_decode", lambda *a, **k: [text + "\u20ac" for text in decode(*a, **k)]
    )
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    made.train()
    made.log_metrics("train", {"na\xefve": 1.0})
    out.flush()
    text = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert text.count("\\u20ac") == 8
    assert "na\\xefve = 1.0000" in text
