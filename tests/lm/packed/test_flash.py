"""How the parts that FlashAttention's kernels do are put together, with a stand-in for the kernels on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import MIXED, random_groups
from stand_in import stand_in

from grouprl.lm.packed import flash
from grouprl.lm.packed.attention import AttentionSpec
from grouprl.lm.packed.flash import Flash, Layout
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.rectangles import RectangleAttention

SCALE = 0.4


GROUPS = {
    "mixed": random_groups(*MIXED),
    "one": random_groups((6, (5, 3, 1))),
    "prompts alone": [Group([1, 2, 3], ()), Group([4], ())],
    "completions of one token": random_groups((4, (1, 1)), (2, (1,))),
    "a prompt that nothing sees": random_groups((4, (1, 1)), (3, (5, 1, 2)), (2, (1,))),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("heads", "k_heads"), [(4, 2), (3, 3), (4, 1)])
def test_the_parts_make_the_whole_forwards_and_backwards(
    name: str, heads: int, k_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    pack, generator = Pack.of(GROUPS[name]), torch.Generator().manual_seed(1)
    given = [
        torch.randn(len(pack.ids), n, 8, generator=generator, dtype=torch.float64) for n in (heads, k_heads, k_heads)
    ]
    gradient = torch.randn(given[0].shape, generator=generator, dtype=torch.float64)
    found = []
    for way, more in (
        (RectangleAttention, (pack, AttentionSpec(SCALE, None, None), torch.float64)),
        (Flash, (Layout.of(pack), SCALE)),
    ):
        inputs = [x.clone().requires_grad_() for x in given]
        out = way.apply(*inputs, *more)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    for wanted, other in zip(*found, strict=True):
        torch.testing.assert_close(other, wanted, rtol=0, atol=2e-6)  # rectangles have float32 scores
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_layout_says_who_sees_whom() -> None:
    layout = Layout.of(Pack.of([Group([1, 2, 3], ([4, 5, 6], [7])), Group([8, 9], ([1],)), Group([2], ([3, 4],))]))
    assert layout.own.queries.tolist() == layout.own.keys.tolist() == [0, 3, 5, 6, 8, 9]
    assert layout.own.longest == (3, 3)
    assert layout.own.causal
    assert layout.shared is not None
    assert layout.shared.queries.tolist() == [0, 2, 2, 3]
    assert layout.shared.keys.tolist() == [0, 3, 5, 6]
    assert layout.shared.longest == (2, 3)
    assert (layout.prompts, layout.alone, layout.span) == (6, [slice(3, 5)], 5)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"softcap": 30.0}, False),
        ({"d": 20}, False),
        ({"d": 512}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_what_the_kernels_can_do(changes: dict[str, Any], wanted: bool) -> None:
    given = {"dtype": torch.bfloat16, "softcap": None, "d": 64, "device": "cuda"} | changes

    class Shape:
        is_cuda = given["device"] == "cuda"

        def __init__(self, heads: int) -> None:
            self.shape = (30, heads, given["d"])

    asked: tuple[Any, ...] = (Shape(4), Shape(2))
    assert flash.can_attend(*asked, given["dtype"], given["softcap"]) is wanted
