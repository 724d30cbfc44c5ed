"""Observations into arrays, actions into the environment, and spaces into JSON, against arrays written out by hand."""

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.distributions import Categorical, DiagonalGaussian, IndependentBernoulli, MultiCategorical
from grouprl.envs.space_json import space_from_json, space_to_json
from grouprl.envs.spaces import ObservationCodec
from grouprl.errors import UsageError

quick = settings(deadline=None, derandomize=True, max_examples=100)


def pixels(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


NESTED = spaces.Dict(
    OrderedDict(
        zone=spaces.Discrete(3, start=-1),
        arm=spaces.Tuple(
            (
                spaces.Box(-1.0, np.array([1.0, np.inf], np.float64), dtype=np.float64),
                spaces.MultiDiscrete([[2, 3]], start=[[1, 5]]),
            )
        ),
        camera=pixels(16, 20, 3),
        lamps=spaces.MultiBinary((1, 2)),
    )
)


class TestEncode:
    def test_a_float32_box_comes_back_as_it_is_without_a_copy(self) -> None:
        batch = np.arange(6, dtype=np.float32).reshape(2, 3)
        encoded = ObservationCodec(spaces.Box(-1, 1, (3,))).encode(batch)
        assert list(encoded) == ["flat"]
        assert np.shares_memory(encoded["flat"], batch)
        np.testing.assert_array_equal(encoded["flat"], batch)

    def test_a_box_of_several_dimensions_is_raveled_without_a_copy(self) -> None:
        batch = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
        flat = ObservationCodec(spaces.Box(-1, 1, (2, 2))).encode(batch)["flat"]
        assert np.shares_memory(flat, batch)
        np.testing.assert_array_equal(flat, [[0, 1, 2, 3], [4, 5, 6, 7]])

    def test_a_box_without_dimensions_is_one_number(self) -> None:
        flat = ObservationCodec(spaces.Box(-1, 1, ())).encode(np.float32([0.5, -0.5]))["flat"]
        np.testing.assert_array_equal(flat, [[0.5], [-0.5]])

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float64, np.float16])
    def test_a_box_of_another_dtype_becomes_float32(self, dtype: type) -> None:
        flat = ObservationCodec(spaces.Box(0, 100, (2,), dtype)).encode(np.array([[1, 2], [3, 100]], dtype))["flat"]
        assert flat.dtype == np.float32
        np.testing.assert_array_equal(flat, [[1, 2], [3, 100]])

    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_discrete_is_one_hot_from_its_start(self, dtype: type) -> None:
        flat = ObservationCodec(spaces.Discrete(3, start=-1)).encode(np.array([-1, 1, 0, 1], dtype))["flat"]
        assert flat.dtype == np.float32
        np.testing.assert_array_equal(flat, [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])

    def test_multi_discrete_is_a_one_hot_for_each_component(self) -> None:
        space = spaces.MultiDiscrete([[2, 3], [1, 2]], start=[[0, 5], [7, -1]])
        flat = ObservationCodec(space).encode(np.array([[[0, 5], [7, -1]], [[1, 7], [7, 0]]]))["flat"]
        np.testing.assert_array_equal(flat, [[1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1, 0, 1]])

    def test_multi_binary_is_floats(self) -> None:
        flat = ObservationCodec(spaces.MultiBinary((2, 2))).encode(np.array([[[0, 1], [1, 1]]], np.int8))["flat"]
        assert flat.dtype == np.float32
        np.testing.assert_array_equal(flat, [[0, 1, 1, 1]])

    def test_nested_leaves_are_concatenated_in_the_order_of_the_space_and_images_stay_apart(self) -> None:
        camera = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), np.uint8)
        batch = {
            "lamps": np.array([[[1, 0]], [[0, 1]]], np.int8),
            "camera": camera,
            "zone": np.array([1, -1]),
            "arm": (np.array([[0.25, 9.0], [-1.0, 3.0]]), np.array([[[2, 5]], [[1, 7]]])),
        }
        codec = ObservationCodec(NESTED)
        encoded = codec.encode(batch)
        assert set(encoded) == {"flat", "image:camera"}
        np.testing.assert_array_equal(
            encoded["flat"],
            [[0, 0, 1, 0.25, 9, 0, 1, 1, 0, 0, 1, 0], [1, 0, 0, -1, 3, 1, 0, 0, 0, 1, 0, 1]],
        )
        np.testing.assert_array_equal(codec.normalise, np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool))
        assert codec.n_flat == 12
        assert codec.images == {"image:camera": (3, 16, 20)}
        assert encoded["image:camera"].dtype == np.uint8
        np.testing.assert_array_equal(encoded["image:camera"][1, 2], camera[1, :, :, 2])

    @pytest.mark.parametrize(
        "space",
        [
            spaces.Box(-1, 1, (3,)),
            spaces.Box(-5, 5, (2, 2), np.int64),
            spaces.Discrete(4, start=3),
            spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 2], [3, 4]]),
            spaces.MultiBinary(5),
            pixels(16, 16),
            pixels(4, 84, 84),
            NESTED,
        ],
        ids=str,
    )
    def test_a_batch_is_encoded_row_by_row_as_its_observations_are_alone(self, space: spaces.Space[Any]) -> None:
        batched = batch_space(space, 3)
        batched.seed(0)
        batch = batched.sample()
        codec = ObservationCodec(space)
        encoded = codec.encode(batch)
        assert codec.is_batched(batch)
        for row in range(3):
            observation = nested_row(batch, row)
            assert not codec.is_batched(observation)
            alone = codec.encode_single(observation)
            assert set(alone) == set(encoded)
            for key in encoded:
                assert alone[key].shape[0] == 1
                np.testing.assert_array_equal(alone[key][0], encoded[key][row])

    @pytest.mark.parametrize("value", [-2, 2])
    def test_a_discrete_value_outside_its_space_is_an_error_and_not_another_component(self, value: int) -> None:
        space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Discrete(3, start=-1))
        with pytest.raises(UsageError, match=r"'b' lies outside its space.*\[-1\] to \[1\]"):
            ObservationCodec(space).encode({"a": np.array([0]), "b": np.array([value])})

    def test_keys_with_slashes_do_not_collide(self) -> None:
        space = spaces.Dict({"a/b": pixels(16, 16), "a": spaces.Dict({"b": pixels(16, 16)})})
        assert set(ObservationCodec(space).images) == {"image:a/b", "image:a~1b"}


def nested_row(batch: Any, row: int) -> Any:
    if isinstance(batch, dict):
        return {key: nested_row(part, row) for key, part in batch.items()}
    return tuple(nested_row(part, row) for part in batch) if isinstance(batch, tuple) else batch[row]


class TestImages:
    @pytest.mark.parametrize(
        ("shape", "channels_first"),
        [
            ((84, 84), (1, 84, 84)),
            ((16, 16), (1, 16, 16)),
            ((4, 84, 84), (4, 84, 84)),
            ((84, 84, 4), (4, 84, 84)),
            ((210, 160, 3), (3, 210, 160)),
            ((84, 84, 1), (1, 84, 84)),
            ((16, 16, 16), (16, 16, 16)),
            ((16, 20, 16), (16, 16, 20)),
            ((4, 84, 84, 3), (12, 84, 84)),
            ((4, 84, 84, 1), (4, 84, 84)),
            ((4, 3, 84, 84), (12, 84, 84)),
        ],
    )
    def test_a_uint8_picture_is_an_image_with_channels_first(
        self, shape: tuple[int, ...], channels_first: tuple[int, int, int]
    ) -> None:
        codec = ObservationCodec(pixels(*shape))
        assert codec.images == {"image:": channels_first}
        assert codec.n_flat == 0
        assert codec.normalise.shape == (0,)
        encoded = codec.encode(np.zeros((5, *shape), np.uint8))
        assert {key: value.shape for key, value in encoded.items()} == {"image:": (5, *channels_first)}

    @pytest.mark.parametrize(
        "space",
        [
            pixels(15, 84),
            pixels(3, 15, 84),
            pixels(84, 15, 3),
            pixels(17, 17, 17),
            pixels(64),
            pixels(17, 16, 16, 3),
            pixels(2, 15, 16, 3),
            pixels(2, 2, 16, 16, 3),
            spaces.Box(0, 1, (84, 84), np.float32),
            spaces.Box(0, 2, (84, 84), np.uint8),
            spaces.Box(1, 255, (84, 84), np.uint8),
            spaces.Box(0, np.full((16, 16), 255, np.uint8) - np.eye(16, dtype=np.uint8), dtype=np.uint8),
        ],
        ids=str,
    )
    def test_any_other_box_is_flat(self, space: spaces.Box) -> None:
        codec = ObservationCodec(space)
        assert codec.images == {}
        assert codec.n_flat == np.prod(space.shape)
        assert codec.normalise.all()

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_frames_in_colour_become_channels_the_newest_last(self, channels_last: bool) -> None:
        shape = (4, 16, 20, 3) if channels_last else (4, 3, 16, 20)
        given = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
        encoded = ObservationCodec(pixels(*shape)).encode(given)["image:"]
        newest = given[:, -1].transpose(0, 3, 1, 2) if channels_last else given[:, -1]
        np.testing.assert_array_equal(encoded[:, -3:], newest)


class TestActionMask:
    space = spaces.Dict(action_mask=spaces.Box(0, 1, (3,), np.int8), obs=spaces.Box(-1, 1, (2,)))
    batch = {"action_mask": np.array([[1, 0, 1], [0, 0, 1]], np.int8), "obs": np.zeros((2, 2), np.float32)}  # noqa: RUF012

    @pytest.mark.parametrize("mask_size", [None, 3])
    def test_the_mask_is_taken_out_of_the_inputs(self, mask_size: int | None) -> None:
        codec = ObservationCodec(self.space, mask_size=mask_size)
        assert codec.n_flat == 2
        assert codec.encode(self.batch)["flat"].shape == (2, 2)
        mask = codec.mask(self.batch)
        assert mask is not None
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, [[True, False, True], [False, False, True]])

    def test_the_mask_of_one_observation_is_one_row(self) -> None:
        codec = ObservationCodec(self.space)
        mask = codec.mask(codec.batch_of_one({"action_mask": [1, 0, 0], "obs": [0.0, 0.0]}))
        np.testing.assert_array_equal(mask, [[True, False, False]])

    def test_multi_binary_may_be_a_mask(self) -> None:
        space = spaces.Dict(action_mask=spaces.MultiBinary(2), obs=spaces.Discrete(2))
        np.testing.assert_array_equal(ObservationCodec(space).mask({"action_mask": np.eye(2)}), np.eye(2, dtype=bool))

    def test_it_is_refused_where_the_action_space_takes_no_mask(self) -> None:
        with pytest.raises(UsageError, match="'action_mask' is no mask"):
            ObservationCodec(self.space, mask_size=0)

    @pytest.mark.parametrize(
        "leaf", [spaces.Box(-9, 9, (3,)), spaces.Discrete(3), spaces.MultiDiscrete([3, 2, 2]), spaces.Tuple([])]
    )
    def test_a_leaf_of_that_name_with_other_values_is_refused(self, leaf: spaces.Space[Any]) -> None:
        with pytest.raises(UsageError, match=r"holds more than 0 and 1; allowed is MultiBinary\(3\)"):
            ObservationCodec(spaces.Dict(action_mask=leaf, obs=spaces.Discrete(2)), mask_size=3)

    @pytest.mark.parametrize("wrap", [lambda d: spaces.Dict(player=d), lambda d: spaces.Tuple([spaces.Discrete(2), d])])
    def test_a_nested_one_of_numbers_is_a_mask_too(self, wrap: Any) -> None:
        inner = spaces.Dict(action_mask=spaces.MultiDiscrete([2, 2, 2]), obs=spaces.Discrete(2))
        codec = ObservationCodec(wrap(inner), mask_size=3)
        given = {"action_mask": np.array([[1, 0, 1]]), "obs": np.array([1])}
        observation = {"player": given} if isinstance(codec.space, spaces.Dict) else (np.array([0]), given)
        np.testing.assert_array_equal(codec.mask(observation), [[True, False, True]])
        assert codec.n_flat == (2 if isinstance(codec.space, spaces.Dict) else 4)

    def test_two_of_them_are_refused(self) -> None:
        one = spaces.Dict(action_mask=spaces.MultiBinary(3), obs=spaces.Discrete(2))
        with pytest.raises(UsageError, match="2 leaves 'action_mask': a/action_mask, b/action_mask"):
            ObservationCodec(spaces.Dict(a=one, b=one), mask_size=3)

    def test_numbers_other_than_0_and_1_are_refused(self) -> None:
        space = spaces.Dict(action_mask=spaces.Box(0, 1, (2,)), obs=spaces.Discrete(2))
        with pytest.raises(UsageError, match=r"action mask holds 0\.5"):
            ObservationCodec(space, mask_size=2).mask({"action_mask": np.array([[0.5, 1.0]])})

    def test_a_mask_of_another_size_is_an_error_that_names_both(self) -> None:
        with pytest.raises(UsageError, match=r"\(3,\); allowed is \(4,\)"):
            ObservationCodec(self.space, mask_size=4)

    def test_a_space_without_a_mask_gives_none(self) -> None:
        assert ObservationCodec(spaces.Discrete(2)).mask(np.array([0])) is None


class TestIsBatched:
    @pytest.mark.parametrize("observation", [np.zeros(2), np.zeros((2, 4)), np.zeros((1, 1, 3)), 1.0])
    def test_neither_one_nor_a_batch_is_an_error_that_shows_the_shapes(self, observation: Any) -> None:
        with pytest.raises(UsageError, match=r"allowed are \(3,\)"):
            ObservationCodec(spaces.Box(-1, 1, (3,))).is_batched(observation)

    def test_batch_axes_of_unequal_length_are_an_error(self) -> None:
        codec = ObservationCodec(spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))))
        with pytest.raises(UsageError, match="of equal length everywhere"):
            codec.is_batched((np.zeros(2, int), np.zeros(3, int)))

    @pytest.mark.parametrize("observation", [{"x": np.zeros(2)}, np.zeros(2), (1,)])
    def test_another_layout_is_an_error_that_names_the_space(self, observation: Any) -> None:
        with pytest.raises(UsageError, match="not laid out as its space Dict"):
            ObservationCodec(spaces.Dict(a=spaces.Box(-1, 1, (2,)))).is_batched(observation)

    def test_plain_numbers_and_lists_are_understood(self) -> None:
        codec = ObservationCodec(spaces.Discrete(3))
        assert not codec.is_batched(2)
        assert codec.is_batched([2, 0])
        np.testing.assert_array_equal(codec.encode_single(2)["flat"], [[0, 0, 1]])


@pytest.mark.parametrize(
    ("space", "name", "wrapper"),
    [
        (spaces.Text(5), "observation space is Text", "FlattenObservation"),
        (spaces.Dict(word=spaces.Text(5)), "leaf 'word'", "FlattenObservation"),
        (spaces.Tuple((spaces.Sequence(spaces.Discrete(2)),)), "leaf '0'", "TransformObservation"),
        (spaces.Graph(spaces.Box(-1, 1, (2,)), None), "is Graph", "TransformObservation"),
        (spaces.Dict(a=spaces.Dict(b=spaces.OneOf([spaces.Discrete(2)]))), "leaf 'a/b'", "FlattenObservation"),
    ],
    ids=lambda value: str(value),
)
def test_an_unsupported_observation_is_an_error_that_names_the_leaf_and_a_wrapper(
    space: spaces.Space[Any], name: str, wrapper: str
) -> None:
    with pytest.raises(UsageError, match=f"{name}.*Allowed are Box, Discrete.*gymnasium.wrappers.{wrapper}"):
        ObservationCodec(space)


@pytest.mark.parametrize(
    "space", [spaces.Dict({}), spaces.Tuple(()), spaces.Box(0, 1, (0,)), spaces.Dict(action_mask=spaces.MultiBinary(2))]
)
def test_an_observation_without_a_number_is_an_error(space: spaces.Space[Any]) -> None:
    with pytest.raises(UsageError, match="no number to learn from"):
        ObservationCodec(space)


class TestActions:
    @pytest.mark.parametrize(
        ("space", "distribution", "mask_size"),
        [
            (spaces.Discrete(3, start=4), Categorical(3), 3),
            (spaces.MultiDiscrete([[2, 3], [4, 5]]), MultiCategorical((2, 3, 4, 5)), 14),
            (spaces.Box(-1, 1, (2, 3)), DiagonalGaussian(6), 0),
            (spaces.MultiBinary((2, 2)), IndependentBernoulli(4), 0),
        ],
        ids=str,
    )
    def test_each_space_has_its_distribution(self, space: Any, distribution: Any, mask_size: int) -> None:
        codec = ActionCodec(space)
        assert codec.distribution == distribution
        assert codec.mask_size == mask_size

    def test_discrete_actions_are_moved_to_the_start(self) -> None:
        actions = ActionCodec(spaces.Discrete(3, start=-1)).to_env(np.array([0, 2]))
        assert actions.dtype == np.int64
        np.testing.assert_array_equal(actions, [-1, 1])

    def test_a_bounded_box_is_reached_from_the_unit_interval_and_clipped(self) -> None:
        space = spaces.Box(np.float32([0, -2]), np.float32([10, 2]))
        sampled = np.float32([[-1, -1], [0, 0], [0.5, 0.5], [1, 1], [7, -7]])
        before = sampled.copy()
        np.testing.assert_array_equal(
            ActionCodec(space).to_env(sampled), [[0, -2], [5, 0], [7.5, 1], [10, 2], [10, -2]]
        )
        np.testing.assert_array_equal(sampled, before)  # log-probabilities need the unclipped sample

    def test_a_box_without_two_finite_bounds_is_only_clipped_to_the_finite_one(self) -> None:
        inf = np.inf
        space = spaces.Box(np.float32([-inf, -3, -inf, 0]), np.float32([inf, inf, 3, 4]))
        sampled = np.float32([[-9, -9, -9, -9], [9, 9, 9, 9], [0.5, 0.5, 0.5, 0.5]])
        np.testing.assert_array_equal(
            ActionCodec(space).to_env(sampled), [[-9, -3, -9, 0], [9, 9, 3, 4], [0.5, 0.5, 0.5, 3]]
        )

    def test_a_component_that_cannot_be_0_is_sampled_around_its_bound(self) -> None:
        space = spaces.Box(np.float32([100, -np.inf]), np.float32([np.inf, -7]))
        sampled = np.float32([[-1, -1], [2, 2]])
        np.testing.assert_array_equal(ActionCodec(space).to_env(sampled), [[100, -8], [102, -7]])

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_bounds_that_are_none_leave_the_unit_of_the_environment(self, dtype: Any) -> None:
        largest = float(np.finfo(dtype).max)
        if dtype == np.float16:  # its largest number is no more than a large force; what exceeds it is none
            space = spaces.Box(-np.inf, np.inf, (2,), dtype)
            assert ActionCodec(space).to_env(np.float32([[1, 1e6]])).tolist() == [[1, largest]]
            return
        space = spaces.Box(np.array([-largest, 0, -5e5]), np.array([largest, 1e6, np.inf]), dtype=dtype)
        with pytest.warns(UserWarning, match=r"component 0 .* count as none"):
            codec = ActionCodec(space)
        with np.errstate(all="raise"):
            actions = codec.to_env(np.float32([[-9, -9, -9], [0.5, 0.5, 0.5], [1e30, 1e30, 1e30]]))
        np.testing.assert_array_equal(actions[:2], [[-9, 0, -9], [0.5, 0.5, 0.5]])
        assert all(space.contains(action) for action in actions)

    def test_a_tiny_range_and_a_single_value_are_reached(self) -> None:
        space = spaces.Box(np.array([-1e-8, 2.0, 1e9]), np.array([1e-8, 2.0, 1e9 + 2]), dtype=np.float64)
        actions = ActionCodec(space).to_env(np.float32([[-1, -1, -1], [1, 1, 1], [0.5, 0.5, 0.5]]))
        np.testing.assert_allclose(actions, [[-1e-8, 2, 1e9], [1e-8, 2, 1e9 + 2], [0.5e-8, 2, 1e9 + 1.5]], rtol=1e-12)

    @pytest.mark.parametrize(
        "space",
        [
            spaces.Discrete(3),
            spaces.Discrete(3, start=4),
            spaces.Discrete(3, dtype=np.int32),
            spaces.MultiDiscrete([3, 3]),
            spaces.MultiBinary(2),
            spaces.Box(-1, 1, (2,)),
            spaces.Box(-np.inf, np.inf, (2,)),
            spaces.Box(-1, 1, (2,), np.float64),
        ],
        ids=str,
    )
    def test_what_the_environment_gets_is_memory_of_its_own(self, space: spaces.Space[Any]) -> None:
        codec = ActionCodec(space)
        drawn = codec.distribution.sample(
            np.zeros((4, codec.distribution.n_params), np.float32), np.random.default_rng(0)
        )
        given = codec.to_env(drawn)
        assert not np.shares_memory(drawn, given)
        assert given.dtype == space.dtype

    def test_actions_have_the_shape_and_dtype_of_the_space(self) -> None:
        box = ActionCodec(spaces.Box(-1, 1, (2, 1), np.float64)).to_env(np.zeros((5, 2), np.float32))
        assert (box.shape, box.dtype) == ((5, 2, 1), np.float64)
        lamps = ActionCodec(spaces.MultiBinary((1, 2))).to_env(np.float32([[0, 1]]))
        assert (lamps.shape, lamps.dtype) == ((1, 1, 2), np.int8)
        np.testing.assert_array_equal(lamps, [[[0, 1]]])
        small = ActionCodec(spaces.MultiDiscrete([2, 3], dtype=np.int8, start=[1, 1])).to_env(np.array([[1, 2]]))
        assert (small.shape, small.dtype) == ((1, 2), np.int8)

    def test_multi_discrete_actions_are_moved_to_the_start(self) -> None:
        codec = ActionCodec(spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [-2, 9]]))
        np.testing.assert_array_equal(codec.to_env(np.array([[0, 2, 3, 4]])), [[[1, 2], [1, 13]]])

    @pytest.mark.parametrize(
        ("space", "fix"),
        [
            (spaces.Box(0, 5, (2,), np.int64), "MultiDiscrete"),
            (spaces.Dict(a=spaces.Discrete(2)), "TransformAction"),
            (spaces.Tuple((spaces.Discrete(2),)), "TransformAction"),
            (spaces.Text(3), "TransformAction"),
            (spaces.Box(0, 1, (0,)), "TransformAction"),
        ],
        ids=str,
    )
    def test_an_unsupported_action_is_an_error_that_says_what_to_do(self, space: Any, fix: str) -> None:
        with pytest.raises(UsageError, match=f"(?s)Allowed are Discrete, MultiDiscrete, MultiBinary and Box.*{fix}"):
            ActionCodec(space)


@st.composite
def boxes(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float16", "float32", "float64")) -> spaces.Box:
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
    width = 8 * min(dtype.itemsize, 4)
    bound = st.floats(-1e4, 1e4, width=width) if dtype.kind == "f" else st.integers(0, 100)
    first, second = (draw(hnp.arrays(dtype, shape, elements=bound)) for _ in range(2))
    low, high = np.minimum(first, second), np.maximum(first, second)
    if dtype.kind == "f":
        low = np.where(draw(hnp.arrays(bool, shape)), dtype.type(-np.inf), low)
        high = np.where(draw(hnp.arrays(bool, shape)), dtype.type(np.inf), high)
    return spaces.Box(low, high, shape, dtype.type)


@st.composite
def multi_discretes(draw: st.DrawFn) -> spaces.MultiDiscrete:
    shape = draw(hnp.array_shapes(max_dims=2, max_side=3))
    nvec = draw(hnp.arrays(np.int64, shape, elements=st.integers(1, 4)))
    return spaces.MultiDiscrete(nvec, start=draw(hnp.arrays(np.int64, shape, elements=st.integers(-5, 5))))


discretes = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 5), st.integers(-5, 5))
multi_binaries = st.one_of(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=2)).map(
    spaces.MultiBinary
)
action_spaces = st.one_of(discretes, boxes(), multi_discretes(), multi_binaries)
leaves = st.one_of(action_spaces, boxes(("int8", "uint8", "int64")))
nested_spaces = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(spaces.Tuple),
        st.lists(st.tuples(st.text(max_size=3) | st.integers(), inner), max_size=3, unique_by=lambda item: item[0]).map(
            lambda items: spaces.Dict(OrderedDict(items))
        ),
    ),
    max_leaves=5,
)


@quick
@given(action_spaces, st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 100.0, 1e6]))
def test_what_the_environment_gets_always_lies_in_its_action_space(
    space: spaces.Space[Any], seed: int, scale: float
) -> None:
    codec = ActionCodec(space)
    rng = np.random.default_rng(seed)
    params = rng.normal(scale=scale, size=(6, codec.distribution.n_params)).astype(np.float32)
    if isinstance(codec.distribution, DiagonalGaussian):
        params[:, codec.distribution.n :] = 0
    with np.errstate(over="ignore"):  # a float16 component without bounds may overflow to infinity
        for actions in (codec.distribution.sample(params, rng), codec.distribution.mode(params)):
            batch = codec.to_env(actions)
            assert batch.shape[0] == 6
            assert all(space.contains(np.asarray(action)) for action in batch), (space, batch)


def bounds(space: spaces.Space[Any]) -> list[Any]:
    """What Gymnasium's own equality leaves out or compares only roughly: exact bounds, and the order of keys."""
    if isinstance(space, spaces.Dict):
        return [(key, bounds(part)) for key, part in space.spaces.items()]
    if isinstance(space, spaces.Tuple):
        return [bounds(part) for part in space.spaces]
    if isinstance(space, spaces.Box):
        return [np.asarray(b).tolist() for b in (space.low, space.high, space.bounded_below, space.bounded_above)]
    return []


class TestJson:
    @quick
    @given(nested_spaces)
    def test_a_space_survives_the_round_trip(self, space: spaces.Space[Any]) -> None:
        text = json.dumps(space_to_json(space), allow_nan=False)
        restored = space_from_json(json.loads(text))
        assert restored == space
        assert bounds(restored) == bounds(space)
        assert type(restored) is type(space)

    def test_nested_spaces_keep_the_order_of_their_keys(self) -> None:
        restored = space_from_json(json.loads(json.dumps(space_to_json(NESTED))))
        assert restored == NESTED
        assert list(restored.spaces) == ["zone", "arm", "camera", "lamps"]  # type: ignore[attr-defined]

    def test_bounds_equal_everywhere_are_stored_once(self) -> None:
        assert space_to_json(pixels(210, 160, 3)) == {
            "type": "Box",
            "shape": [210, 160, 3],
            "dtype": "uint8",
            "low": 0,
            "high": 255,
        }

    def test_infinite_bounds_are_strings(self) -> None:
        box = space_to_json(spaces.Box(np.float32([-np.inf, 0]), np.inf, (2,)))
        assert (box["low"], box["high"]) == (["-inf", 0.0], "inf")

    @pytest.mark.parametrize(
        "space",
        [
            spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
            spaces.Box(-np.inf, np.inf, (2,), np.int32),
            spaces.Box(0, 2**64 - 1, (1,), np.uint64),
            spaces.Discrete(3, dtype=np.int32),
            spaces.MultiDiscrete([2, 3], dtype=np.int8),
        ],
        ids=str,
    )
    def test_extreme_integers_and_other_dtypes_survive(self, space: spaces.Space[Any]) -> None:
        restored = space_from_json(json.loads(json.dumps(space_to_json(space))))
        assert restored == space
        assert bounds(restored)[:2] == bounds(space)[:2]

    @pytest.mark.parametrize("space", [spaces.Text(3), spaces.Dict(a=spaces.Sequence(spaces.Discrete(2)))], ids=str)
    def test_an_unsupported_space_is_an_error(self, space: spaces.Space[Any]) -> None:
        with pytest.raises(UsageError, match="cannot be saved"):
            space_to_json(space)

    def test_a_key_json_cannot_hold_is_an_error(self) -> None:
        with pytest.raises(UsageError, match=r"key \(1, 2\)"):
            space_to_json(spaces.Dict({(1, 2): spaces.Discrete(2)}))

    def test_a_description_of_something_else_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="type 'Graph'"):
            space_from_json({"type": "Graph"})
