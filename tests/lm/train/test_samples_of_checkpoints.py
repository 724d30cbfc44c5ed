"""The samples that a checkpoint keeps: what is read is what was written."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from played import episodes

from grouprl.lm.train.checkpoint import load_samples, samples_state
from grouprl.runs.state import load_state, save_state


def equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_samples_of_episodes_come_back_with_their_turns(tmp_path: Path) -> None:
    of = episodes(torch.tensor([False, True, False, False, False]))
    assert of.turns is not None
    of.turns.messages[1] = [{"role": "user", "content": "and?"}]
    of.turns.metrics[2] = {"tools/calls": 2.0}
    save_state(tmp_path / "state", *samples_state(of))
    found = load_samples(*load_state(tmp_path / "state"), of.prompts)
    assert found.turns is not None
    for one, other in ((of, found), (of.turns, found.turns)):
        for field in fields(one):
            if field.name not in ("turns", "spans", "contexts", "extras"):
                assert equal(getattr(one, field.name), getattr(other, field.name)), field.name
    assert [list(map(tuple, spans)) for spans in found.turns.spans] == [list(spans) for spans in of.turns.spans]
    assert list(map(list, found.turns.contexts)) == list(map(list, of.turns.contexts))
    assert torch.equal(found.lengths, of.lengths)


@pytest.mark.parametrize("name", ["turn_rewards", "episode_truncated", "episode", "logp_sampled", "spans"])
def test_samples_whose_parts_do_not_fit_are_refused(name: str) -> None:
    of = episodes()
    tensors, meta = samples_state(of)
    tensors[name] = tensors[name][:-1]
    with pytest.raises((ValueError, RuntimeError)):
        load_samples(tensors, meta, of.prompts)


def test_columns_that_rewards_have_logged_come_back_as_transcripts_write_them(tmp_path: Path) -> None:
    of = episodes()
    n = len(of.texts)
    of.extras = {"length": list(range(n)), "parts": [{"right": torch.tensor(0.5), "of": {1}}] * n}
    save_state(tmp_path / "state", *samples_state(of))
    found = load_samples(*load_state(tmp_path / "state"), of.prompts)
    assert found.extras == {"length": list(range(n)), "parts": [{"right": 0.5, "of": "{1}"}] * n}
    tensors, meta = samples_state(of)
    with pytest.raises(ValueError, match="do not fit"):
        load_samples(tensors, {**meta, "extras": {"length": [1]}}, of.prompts)
