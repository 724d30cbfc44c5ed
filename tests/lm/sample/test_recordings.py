"""Recorded decode steps, by a recorder that a CPU has: they give what steps give, and ask for nothing meanwhile."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from architectures import EOS, PACKED, VOCABULARY, build, random_ids
from taping import Tape, TapeRecorder
from torch import Tensor

from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group
from grouprl.lm.sample.decode_steps import DecodeSteps
from grouprl.lm.sample.decode_trials import step_logits
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.recordings import CudaGraphRecorder, Repeated
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.sampler import Sampler

PROMPTS = [random_ids(n, torch.Generator().manual_seed(n)) for n in (5, 1, 9, 3)]
ENDS = tuple(range(0, VOCABULARY, 9))


def sampler(model: Any, ends: tuple[int, ...] = ENDS, *, recorded: bool, steps: Any = "blocks") -> Sampler:
    made = Sampler(Backbone(model), LowPrecision(model, torch.float32), ends, steps=steps)
    if recorded:
        made.record_with(TapeRecorder())
        assert made.why == ""
        assert made.recorder is not None
    return made


def sampled(made: Sampler, how: SamplingSettings, n: int = 6, adjust: Any = None) -> list[Completion]:
    return made.sample(PROMPTS, n, how, torch.Generator().manual_seed(0), adjust)


def assert_same(found: list[Completion], wanted: list[Completion]) -> None:
    assert [c.ids for c in found] == [c.ids for c in wanted]
    assert [c.finished for c in found] == [c.finished for c in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_recorded_steps_give_what_steps_give(name: str) -> None:
    model, how = build(name), SamplingSettings(20, temperature=1.4)
    recorded = sampler(model, recorded=True)
    assert_same(sampled(recorded, how), sampled(sampler(model, recorded=False), how))
    assert recorded.recorder.recorded == 2  # at the trial, and now
    assert recorded.recorder.played > 10


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {"top_k": 7, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 9},
        {"temperature": 0.7, "top_k": 9, "min_p": 0.05, "repetition_penalty": 0.8, "min_new_tokens": 4},
    ],
)
def test_every_setting_can_be_recorded(given: dict[str, Any]) -> None:
    model, how = build("llama"), SamplingSettings(16, **given)
    assert_same(sampled(sampler(model, recorded=True), how), sampled(sampler(model, recorded=False), how))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_rows_may_leave_and_caches_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grouprl.lm.sample.sampler.NEVER_DROP_BELOW", 3)
    model, how = build(name), SamplingSettings(70, temperature=1.4)
    recorded = sampler(model, ENDS[:3], recorded=True)
    found = sampled(recorded, how)
    assert_same(found, sampled(sampler(model, ENDS[:3], recorded=False), how))
    assert max(len(c.ids) for c in found) > 64  # a cache begins with room for 32
    assert recorded.recorder.recorded >= 4


def test_logits_are_adjusted_while_they_are_recorded() -> None:
    def adjust(logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        said = torch.where(rows == step, EOS, 10 + rows)
        return torch.full_like(logits, float("-inf")).scatter_(1, said[:, None], 0.0)

    found = sampled(sampler(build("llama"), (EOS,), recorded=True), SamplingSettings(20), 2, adjust)
    assert [c.ids for c in found] == [[10 + i] * i + [EOS] for i in range(8)]


def test_what_cannot_be_recorded_is_done_step_by_step_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def adjust(logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        logits[:, int(step)] = 9.0
        return logits

    model, how = build("llama"), SamplingSettings(12)
    recorded = sampler(model, recorded=True)
    with caplog.at_level(logging.WARNING, "grouprl"):
        found = sampled(recorded, how, 2, adjust)
        assert_same(found, sampled(sampler(model, recorded=False), how, 2, adjust))
        assert_same(sampled(recorded, how, 2, adjust), found)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "LlamaForCausalLM samples several times more slowly" in message
    assert "_local_scalar_dense cannot be recorded" in message


def test_a_model_that_counts_in_python_is_not_recorded() -> None:
    """What its steps compute depends on a number that a recording would freeze."""
    model, steps = build("llama"), [0]

    def count(module: Any, given: Any, out: Any) -> Any:
        steps[0] = 0 if out.last_hidden_state.shape[1] > 4 else steps[0] + 1
        out.last_hidden_state *= 1 + steps[0]
        return out

    model.get_decoder().register_forward_hook(count)
    made = Sampler(Backbone(model), LowPrecision(model, torch.float32), ENDS, steps="modules")
    made.record_with(TapeRecorder())
    assert made.recorder is None
    assert "replayed ones give other logits" in made.why
    assert all(c.ids for c in sampled(made, SamplingSettings(5)))


def test_others_are_recorded_after_one_that_cannot_be() -> None:
    def adjust(logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        return logits + int(step)

    recorded, how = sampler(build("llama"), recorded=True), SamplingSettings(12)
    recorder: Any = recorded.recorder
    sampled(recorded, how, 2, adjust)
    before = recorder.played
    assert_same(sampled(recorded, how, 2), sampled(sampler(build("llama"), recorded=False), how, 2))
    assert recorder.played > before


def test_recordings_that_give_no_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    made = Sampler(Backbone(model), LowPrecision(model, torch.float32), ENDS, steps="blocks")

    def none_when_replayed(decode: DecodeSteps, groups: Sequence[Group], *repeated: Any) -> Tensor:
        return step_logits(decode, groups) * (torch.nan if repeated else 1)

    monkeypatch.setattr("grouprl.lm.sample.sampler.step_logits", none_when_replayed)
    made.record_with(TapeRecorder())
    assert made.recorder is None
    assert "replayed ones give other logits" in made.why


def test_work_is_recorded_at_its_second_time_and_again_when_tensors_moved() -> None:
    recorder, x = TapeRecorder(), [torch.zeros(1)]
    repeated = Repeated(lambda: x[0].add_(1), recorder, lambda error: pytest.fail(str(error)))
    for _ in range(4):
        repeated()
    assert float(x[0]) == 4
    assert (recorder.prepared, recorder.recorded, recorder.played) == (1, 1, 3)
    x[0] = torch.zeros(1)
    repeated.moved()
    for _ in range(3):
        repeated()
    assert float(x[0]) == 3
    assert (recorder.prepared, recorder.recorded, recorder.played) == (2, 2, 5)


def test_generations_are_recorded_alike_whatever_came_before() -> None:
    recorded, how = sampler(build("llama"), recorded=True), SamplingSettings(20, temperature=1.4)
    recorder: Any = recorded.recorder
    counts = []
    for _ in range(3):
        before = recorder.prepared, recorder.recorded, recorder.played
        sampled(recorded, how)
        counts.append((recorder.prepared - before[0], recorder.recorded - before[1], recorder.played - before[2]))
    assert counts[0] == counts[1] == counts[2]


def test_the_stand_in_freezes_numbers_and_leaves_memory_as_it_was() -> None:
    x, count = torch.zeros(2), [1.0]

    def work() -> None:
        x[1:].add_(count[0])

    with (tape := Tape()):
        work()
    tape.rewind()
    assert x.tolist() == [0.0, 0.0]
    count[0] = 5.0
    tape.play()
    assert x.tolist() == [0.0, 1.0]


class FakeGraph:
    """A CUDA graph as torch 2.11 has it: a pool that a failed capture was for cannot be recorded into again."""

    stuck: ClassVar[set[int]] = set()
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        self.open = self.replayed = False
        self.handle = 0

    def capture_begin(self, pool: int, mode: str) -> None:
        assert mode == "thread_local"
        if pool in FakeGraph.stuck:
            raise RuntimeError("already recording to mempool_id")
        self.handle, self.open = pool, True

    def capture_end(self) -> None:
        if not self.open:
            raise RuntimeError("nothing to end")
        self.open = False
        FakeGraph.made += 1

    def pool(self) -> int:
        return self.handle

    def replay(self) -> None:
        self.replayed = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CudaGraphRecorder:
    class Stream:
        def __init__(self, *_: Any) -> None: ...

        def wait_stream(self, other: Any) -> None: ...

    pools = iter(range(1, 100))
    FakeGraph.stuck, FakeGraph.made = set(), 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return CudaGraphRecorder(torch.device("cpu"))


def failing(error: BaseException, recorder: CudaGraphRecorder) -> Any:
    def work() -> None:
        FakeGraph.stuck.add(recorder._keeper.pool())
        raise error

    return work


@pytest.mark.parametrize("error", [RuntimeError("asked for a number"), KeyboardInterrupt()])
def test_after_a_capture_that_failed_others_are_recorded(recorder: CudaGraphRecorder, error: BaseException) -> None:
    first = recorder.record(lambda: None)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            recorder.record(failing(error, recorder))
        assert not any(graph.open for graph in recorder._failed)  # type: ignore[attr-defined]
    again = recorder.record(lambda: None)
    again()
    assert again.__self__.replayed  # type: ignore[attr-defined]
    assert not first.__self__.replayed  # type: ignore[attr-defined]
    assert gc.isenabled()


def test_a_capture_without_memory_is_tried_again_with_what_was_only_kept(
    recorder: CudaGraphRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back, tries = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))

    def work() -> None:
        tries.append(1)
        if not given_back:
            failing(torch.cuda.OutOfMemoryError("no memory"), recorder)()

    recorder.record(work)
    assert len(tries) == 2
    assert given_back == [1]
    given_back.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        recorder.record(failing(torch.cuda.OutOfMemoryError("no memory"), recorder))
