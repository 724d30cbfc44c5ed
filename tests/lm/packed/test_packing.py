"""Packs: where every token of every sample lies, and what it may see."""

import torch
from architectures import MIXED, build, learned, make_log_probs, random_groups, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from grouprl.lm.packed import packing
from grouprl.lm.packed.packing import Block, Group, Pack, split_into_packs

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)
shapes = st.lists(st.tuples(st.integers(1, 7), lengths), min_size=1, max_size=5)


def numbered(shape: list[tuple[int, list[int]]]) -> list[Group]:
    """Groups in which every token is another number."""
    ids = iter(range(10**6))
    return [Group([next(ids) for _ in range(p)], [[next(ids) for _ in range(n)] for n in ns]) for p, ns in shape]


def places(block: Block) -> list[int]:
    return block.prompt.flatten().tolist() + ([] if block.completion is None else block.completion.flatten().tolist())


def test_a_pack_holds_all_prompts_then_all_completions_end_to_end() -> None:
    pack = Pack.of([Group([10, 11, 12], [[20, 21], [30], [40, 41, 42]]), Group([50], [[60, 61]])])
    assert pack.ids.tolist() == [10, 11, 12, 50, 20, 40, 41, 60]  # no last token of a completion is an input
    assert pack.positions.tolist() == [0, 1, 2, 0, 3, 3, 4, 1]
    assert pack.predictors.tolist() == [2, 4, 2, 2, 5, 6, 3, 7]
    assert pack.targets.tolist() == [20, 21, 30, 40, 41, 42, 60, 61]
    assert pack.lengths.tolist() == [2, 1, 3, 2]
    assert pack.prompt_lengths.tolist() == [3, 1]
    starts, counts, groups = pack.stretches
    assert starts.tolist() == [0, 4, 5, 5, 3, 7]
    assert counts.tolist() == [3, 1, 0, 2, 1, 1]
    assert groups.tolist() == [0, 4, 6]


def test_tokens_of_the_partner_are_inputs_and_not_targets() -> None:
    completions = [[20, 21, 22, 23, 24, 25], [30, 31]]
    whole = Pack.of([Group([10, 11], completions), Group([50], [[60, 61]])])
    group = Group([10, 11], completions, [[(0, 2), (5, 6)], [(1, 2)]])
    pack = Pack.of([group, Group([50], [[60, 61]])])
    assert torch.equal(pack.ids, whole.ids)
    assert torch.equal(pack.positions, whole.positions)
    assert pack.places == whole.places
    assert pack.targets.tolist() == [20, 21, 25, 31, 60, 61]
    assert pack.ids[pack.predictors].tolist() == [11, 20, 24, 30, 50, 60]
    assert pack.lengths.tolist() == [3, 1, 2]
    assert group.n_inputs == 8
    assert group.only([1]) == Group([10, 11], [[30, 31]], [[(1, 2)]])


def test_the_block_of_two_groups_is_padded_with_places_behind_the_row() -> None:
    (block,) = Pack.of([Group([10, 11, 12], [[20, 21], [30]]), Group([50], [[60, 61, 62]])]).rectangles[0]
    assert block.prompt.tolist() == [[0, 1, 2], [3, 7, 7]]
    assert block.completion is not None
    assert block.completion.tolist() == [[[4, 7], [7, 7]], [[5, 6], [7, 7]]]
    assert block.prompt_lengths.tolist() == [3, 1]
    assert block.size == 6 + 8


def test_a_pack_of_completions_of_one_token_has_no_completion_input() -> None:
    pack = Pack.of([Group([10, 11], [[20], [30]])])
    assert pack.ids.tolist() == [10, 11]
    assert pack.predictors.tolist() == [1, 1]
    assert [block.completion for block in pack.rectangles[0]] == [None]
    assert pack.rectangles[0][0].hidden(None)[1] is None


def test_a_pack_of_prompts_alone_predicts_nothing() -> None:
    pack = Pack.of([Group([10, 11], ()), Group([12], ())])
    assert pack.ids.tolist() == [10, 11, 12]
    assert pack.targets.numel() == pack.lengths.numel() == 0


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_every_target_is_predicted_from_the_token_before_it_at_its_position(shape: list) -> None:
    groups = numbered(shape)
    pack = Pack.of(groups)
    expected = [
        (before, at - 1, token)
        for g in groups
        for c in g.completions
        for at, (before, token) in enumerate(zip([g.prompt[-1], *c[:-1]], c, strict=True), start=len(g.prompt))
    ]
    found = zip(pack.ids[pack.predictors], pack.positions[pack.predictors], pack.targets, strict=True)
    assert [tuple(map(int, row)) for row in found] == expected
    assert len(pack.ids) == sum(g.n_inputs for g in groups)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([1, 60, 1 << 18]))
def test_every_token_has_one_place_in_the_blocks_and_all_other_places_are_empty(shape: list, scores: int) -> None:
    before, packing.BLOCK_SCORES = packing.BLOCK_SCORES, scores
    pack = Pack.of(numbered(shape))
    try:
        assert len(pack.rectangles) == 2
    finally:
        packing.BLOCK_SCORES = before
    everything = [place for block in pack.rectangles[0] for place in places(block)]
    n = len(pack.ids)
    assert sorted(place for place in everything if place < n) == list(range(n))
    assert {place for place in everything if place >= n} <= {n}
    assert [everything[i] for i in pack.rectangles[1].tolist()] == list(range(n))
    assert sum(len(block.prompt) for block in pack.rectangles[0]) == len(shape)
    if scores == 1:
        assert len(pack.rectangles[0]) == len(shape)


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from([None, 1, 2, 4]))
def test_a_token_sees_its_prompt_and_its_own_past_within_the_window(shape: list, window: int | None) -> None:
    def visible(distance: int) -> bool:
        return distance >= 0 and (window is None or distance < window)

    (block,) = Pack.of(numbered(shape)).rectangles[0]
    by_prompt, by_completion = block.hidden(window)
    t = block.prompt.shape[1]
    assert by_prompt.tolist() == [[not visible(i - j) for j in range(t)] for i in range(t)]
    if block.completion is None:
        assert by_completion is None
        return
    assert by_completion is not None
    r = block.completion.shape[2]
    for (p, _), found in zip(shape, by_completion[:, 0, 0].tolist(), strict=True):
        for i in range(r):
            assert found[i][:t] == [not (j < p and visible(p + i - j)) for j in range(t)]
            assert found[i][t:] == [not visible(i - j) for j in range(r)]


def test_numbers_do_not_depend_on_how_groups_are_divided_into_blocks(monkeypatch) -> None:
    model, groups = build("mistral"), random_groups(*MIXED)
    weights = random_weights(groups)
    log_probs = make_log_probs(model)
    assert len(Pack.of(groups).rectangles[0]) == 1
    logp, gradient = learned(log_probs, groups, weights)
    monkeypatch.setattr(packing, "BLOCK_SCORES", 1)
    assert len(Pack.of(groups).rectangles[0]) == len(groups)
    logp_apart, gradient_apart = learned(log_probs, groups, weights)
    torch.testing.assert_close(logp_apart, logp, rtol=0, atol=1e-5)
    for name, value in gradient.items():
        torch.testing.assert_close(gradient_apart[name], value, rtol=1e-4, atol=1e-4)


# --- micro-batches ----------------------------------------------------------------------------------------------------


def inputs(groups: list[Group], pack: list[tuple[int, list[int]]]) -> int:
    return sum(Group(groups[g].prompt, [groups[g].completions[j] for j in which]).n_inputs for g, which in pack)


@settings(deadline=None, max_examples=200)
@given(shapes, st.integers(1, 60), st.none() | st.integers(1, 60))
def test_micro_batches_hold_each_completion_once_and_keep_to_the_budget(
    shape: list, budget: int, together: int | None
) -> None:
    groups = numbered(shape)
    packs = split_into_packs(groups, budget, together)
    everything = [(g, j) for pack in packs for g, which in pack for j in which]
    assert sorted(everything) == [(g, j) for g, (_, ns) in enumerate(shape) for j in range(len(ns))]
    for pack in packs:
        assert pack
        assert all(which for _, which in pack)
        alone = len(pack) == 1 and len(pack[0][1]) == 1
        assert alone or inputs(groups, pack) <= budget
        if together is not None and len(pack) > 1:
            assert inputs(groups, pack) <= together


@settings(deadline=None, max_examples=100)
@given(shapes, st.integers(1, 60))
def test_a_group_is_divided_only_if_it_alone_exceeds_the_budget(shape: list, budget: int) -> None:
    groups = numbered(shape)
    seen: dict[int, int] = {}
    for pack in split_into_packs(groups, budget):
        for g, _ in pack:
            seen[g] = seen.get(g, 0) + 1
    for g, times in seen.items():
        assert times == 1 or groups[g].n_inputs > budget


def test_micro_batches_take_the_longest_completions_first() -> None:
    groups = numbered([(2, [1, 1]), (2, [5, 2]), (3, [5, 1]), (2, [3])])
    assert split_into_packs(groups, 10**6) == [[(2, [0, 1]), (1, [0, 1]), (3, [0]), (0, [0, 1])]]


def test_the_parts_of_a_divided_group_each_carry_the_prompt() -> None:
    groups = numbered([(4, [5, 2, 4, 1])])
    # 4 + 4 + 1 inputs would be 9, 4 + 4 + 0 are 8
    assert split_into_packs(groups, 8) == [[(0, [0])], [(0, [1, 2, 3])]]


def test_no_groups_are_no_micro_batches() -> None:
    assert split_into_packs([], 10) == []
