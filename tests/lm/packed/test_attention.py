"""Attention over packed groups, against one dense product with a mask that says pair by pair who sees whom."""

from types import SimpleNamespace

import pytest
import torch
from architectures import MIXED, random_groups
from torch import Tensor, nn

from grouprl.lm.packed import packing
from grouprl.lm.packed.attention import (
    AttentionSpec,
    PackedAttention,
    UnsupportedError,
    attention_function,
    using,
)
from grouprl.lm.packed.packing import Group, Pack


def visible_pairs(groups: list[Group], window: int | None) -> Tensor:
    """``[S, S]`` bool: by the definition alone."""
    owner: list[tuple[int, int, int]] = []  # group, completion (-1: prompt), position
    for g, group in enumerate(groups):
        owner += [(g, -1, i) for i in range(len(group.prompt))]
    for g, group in enumerate(groups):
        for c, completion in enumerate(group.completions):
            owner += [(g, c, len(group.prompt) + i) for i in range(len(completion) - 1)]

    def sees(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
        mine = a[0] == b[0] and b[1] in (-1, a[1])
        distance = a[2] - b[2]
        return mine and distance >= 0 and (window is None or distance < window)

    return torch.tensor([[sees(a, b) for b in owner] for a in owner])


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, spec: AttentionSpec) -> Tensor:
    g = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    s = torch.einsum("shd,thd->hst", q, k) * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    p = s.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hst,thd->shd", p, v)


def random_qkv(s: int, heads: int, k_heads: int, d: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, h, d, generator=generator).requires_grad_() for h in (heads, k_heads, k_heads)]


@pytest.mark.parametrize("blocks_of_one", [False, True])
@pytest.mark.parametrize(
    ("heads", "k_heads", "spec"),
    [
        (4, 2, AttentionSpec(8**-0.5, None, None)),
        (4, 2, AttentionSpec(0.7, None, None)),
        (4, 1, AttentionSpec(1.0, 1, None)),
        (4, 2, AttentionSpec(0.5, 3, None)),
        (6, 2, AttentionSpec(1.3, 4, 2.0)),
        (4, 2, AttentionSpec(1.0, None, 5.0)),
    ],
)
def test_packed_attention_and_its_gradient_equal_dense_attention(
    heads: int, k_heads: int, spec: AttentionSpec, blocks_of_one: bool, monkeypatch
) -> None:
    if blocks_of_one:
        monkeypatch.setattr(packing, "BLOCK_SCORES", 1)
    compare(random_groups(*MIXED), heads, k_heads, spec)


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("spec", [AttentionSpec(8**-0.5, None, None), AttentionSpec(1.0, 3, 5.0)])
def test_each_query_head_may_have_a_key_head_of_its_own(groups: int, spec: AttentionSpec) -> None:
    compare(random_groups(*MIXED[:groups]), 4, 4, spec)


def compare(groups: list[Group], heads: int, k_heads: int, spec: AttentionSpec) -> None:
    pack = Pack.of(groups)
    q, k, v = random_qkv(len(pack.ids), heads, k_heads)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    expected = dense(*(x.double() for x in (q, k, v)), visible_pairs(groups, spec.window), spec)
    wanted = torch.autograd.grad((expected * upstream).sum(), (q, k, v))
    found = PackedAttention(pack).attend(nn.Module(), q, k, v, spec)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-6)
    for a, b in zip(torch.autograd.grad((found * upstream).sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_groups_without_completion_inputs_are_plain_causal_attention() -> None:
    pack = Pack.of([Group([1, 2, 3], [[4], [5]]), Group([6], ())])
    q, k, v = random_qkv(4, 2, 2)
    visible = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(1, 1)).bool()
    found = PackedAttention(pack).attend(nn.Module(), q, k, v, AttentionSpec(1.0, None, None))
    torch.testing.assert_close(found, dense(q, k, v, visible, AttentionSpec(1.0, None, None)), rtol=0, atol=1e-6)


def test_products_run_in_the_dtype_asked_for_and_the_gradient_comes_in_that_of_the_input() -> None:
    groups = random_groups(*MIXED)
    pack = Pack.of(groups)
    q, k, v = random_qkv(len(pack.ids), 4, 2)
    spec = AttentionSpec(8**-0.5, None, None)
    found = PackedAttention(pack, torch.bfloat16).attend(nn.Module(), q, k, v, spec)
    assert found.dtype == torch.bfloat16
    expected = dense(q, k, v, visible_pairs(groups, None), spec)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_a_plan_keeps_keys_and_values_of_every_layer_for_the_one_who_asks() -> None:
    pack = Pack.of([Group([1, 2, 3], ())])
    kept = []
    q, k, v = random_qkv(3, 2, 2)
    layer = nn.Module()
    PackedAttention(pack, keep=lambda *what: kept.append(what)).attend(layer, q, k, v, AttentionSpec(1.0, None, None))
    assert len(kept) == 1
    assert all(a is b for a, b in zip(kept[0], (layer, k, v), strict=True))


# --- the library's interface ------------------------------------------------------------------------------------------


class RecordingPlan:
    """A plan that says spec it was asked."""

    def attend(self, module, q, k, v, spec):
        self.shapes, self.spec = [tuple(x.shape) for x in (q, k, v)], spec
        return q


def call(module=None, **changes):
    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    given = {"query": q, "key": k, "value": k, "attention_mask": None, **changes}
    return attention_function(module or nn.Module(), **given)


def test_the_interface_hands_scale_window_and_soft_cap_to_the_plan() -> None:
    plan = RecordingPlan()
    with using(plan):
        out, weights = call(scaling=0.3, sliding_window=7, softcap=2.0)
    assert plan.shapes == [(5, 4, 8), (5, 2, 8), (5, 2, 8)]
    assert (plan.spec.scale, plan.spec.window, plan.spec.softcap) == (0.3, 7, 2.0)
    assert out.shape == (1, 5, 4, 8)
    assert weights is None
    with using(plan):
        call()
    assert (plan.spec.scale, plan.spec.window, plan.spec.softcap) == (8**-0.5, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "mask"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(4)}, "bias"),
        ({"is_causal": False}, "not causal"),
        ({"module": SimpleNamespace(is_causal=False)}, "not causal"),
        ({"value": torch.zeros(1, 2, 5, 6)}, "another size"),
        ({"query": torch.zeros(2, 4, 5, 8)}, "another size"),
    ],
)
def test_what_packed_attention_does_not_do_is_refused(changes: dict, message: str) -> None:
    with using(RecordingPlan()), pytest.raises(UnsupportedError, match=message):
        call(**changes)


def test_without_a_plan_or_a_pack_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="outside"):
        call()
    with using(PackedAttention(None)), pytest.raises(UnsupportedError, match="before it was given a pack"):
        call()


def test_plans_nest_and_end_with_an_exception_too() -> None:
    outer, inner = RecordingPlan(), RecordingPlan()
    with using(outer):
        with pytest.raises(RuntimeError, match="halt"), using(inner):
            raise RuntimeError("halt")
        call(scaling=2.0)
    assert outer.spec.scale == 2.0
    assert not hasattr(inner, "spec")
    with pytest.raises(UnsupportedError):
        call()
