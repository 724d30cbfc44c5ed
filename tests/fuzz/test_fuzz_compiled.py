"""Compiled code on random shapes and values: what torch operations give, and no byte beyond its arrays.

Only an address sanitizer sees the latter: `make sanitize` runs this file with one.
"""

from __future__ import annotations

import math
import shutil
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grouprl import GRPO
from grouprl.envs.adam import Adam
from grouprl.envs.fused import fused_gradient
from grouprl.envs.mlp import MLP
from grouprl.envs.update import UpdateSettings
from grouprl.learning.parameters import TrainedParameters
from grouprl.lm.kernels.attention import attend
from grouprl.lm.kernels.gradient import can_add_weight_gradient, weight_gradient
from grouprl.lm.kernels.head import softmax
from grouprl.lm.kernels.linear import Linear
from grouprl.lm.llama import between_products_c as between
from grouprl.lm.packed.attention import AttentionSpec
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.rectangles import RectangleAttention
from grouprl.objective import Objective

if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
    pytest.skip("there is no C compiler on this machine", allow_module_level=True)

EXTREMES = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-39, 3e38, -3e38, 1e30, 88.0, -88.0, 90.0, -90.0, 1e3, -1e3
]  # fmt: skip
seeds = st.integers(0, 2**31)
kinds = st.sampled_from(["normal", "normal", "extreme", "one extreme", "zero"])
rows = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 95, 96, 97, 130]) | st.integers(1, 40)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def values(seed: int, kind: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    extremes = torch.tensor(EXTREMES)
    if kind == "extreme":
        return extremes[torch.randint(len(extremes), shape, generator=generator)]
    if kind == "one extreme" and x.numel():
        x.view(-1)[seed % x.numel()] = EXTREMES[seed % len(EXTREMES)]
    return torch.zeros(shape) if kind == "zero" else x


def strided(x: Tensor, wider: int) -> Tensor:
    """The same matrix in rows that lie `wider` numbers further apart."""
    whole = torch.empty(len(x), x.shape[1] + wider, dtype=x.dtype)
    whole[:, : x.shape[1]] = x
    return whole[:, : x.shape[1]]


def no_number_is_lost(found: Tensor, given: Tensor) -> None:
    """A row into which something went that is no number gives nothing else."""
    rows = given.isnan().flatten(1).any(1)
    assert found.flatten(1)[rows].isnan().any(1).all()


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal within rounding where everything is finite and of a usual size."""
    assert found.shape == wanted.shape
    if torch.isfinite(wanted).all() and wanted.numel() and float(wanted.abs().max()) < 1e6:
        size = max(1.0, 0.1 * wanted.numel() ** 0.5) + float(wanted.float().norm())  # what should be 0 is rounded too
        assert float((found.float() - wanted.float()).norm()) <= tolerance * size


@given(
    st.lists(st.integers(1, 70), max_size=4), st.integers(1, 40), st.integers(1, 20), st.sampled_from(["tanh", "relu"]),
    rows | st.just(0), kinds, seeds,
)  # fmt: skip
def test_network(hidden: list[int], n_in: int, n_out: int, activation: str, n: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    net = MLP(n_in, n_out, tuple(hidden), activation, 1.0, 1.0)
    found = []
    for native in (True, False):
        net.prefer_native = native
        x = values(seed, kind, n, n_in).requires_grad_()
        y = net(x)
        gradients = torch.autograd.grad(y, [x, *net.parameters()], values(seed + 1, "normal", n, n_out))
        found.append([y.detach(), *gradients])
        if n:
            infer = net.inference()
            near(torch.from_numpy(infer(x.detach().numpy())), y.detach(), 1e-4)
    no_number_is_lost(found[0][0], values(seed, kind, n, n_in))
    if kind in ("normal", "zero"):
        for one, other in zip(*found, strict=True):
            near(one, other, 1e-4)


class Still(gym.Env):
    def __init__(self, n_in: int, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (n_in,)), action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        return np.zeros(self.observation_space.shape, np.float32), 0.0, False, False, {}


@given(
    st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 19), st.booleans(),
    st.sampled_from([{}, {"delta": 1.7}, {"loss_type": "spo"}, {"entropy_coef": 0.3}]), rows, kinds, st.booleans(),
    seeds,
)  # fmt: skip
def test_objective(
    n_in: int, hidden: list[int], n: int, gaussian: bool, objective: dict, steps: int, kind: str, own: bool, seed: int
) -> None:
    space = spaces.Box(-1, 1, (n,), np.float32) if gaussian else spaces.Discrete(n)
    network = (lambda a, b: nn.Linear(a, b)) if own else None
    agent = GRPO(lambda: Still(n_in, space), preset=None, n_envs=1, hidden_sizes=hidden, network=network, seed=0)
    actions = values(seed, "normal", steps, n) if gaussian else torch.randint(n, (steps,))
    gradient = fused_gradient(
        agent.policy, UpdateSettings(epochs=1, minibatch_size=64, micro_batch=50, objective=Objective(**objective)),
        {"flat": values(seed, kind, steps, n_in)}, actions,
        *(values(seed + i, kind, steps) for i in (1, 2)),
    )  # fmt: skip
    assert gradient is not None
    made, _ = gradient(torch.randint(steps, (max(1, steps // 2),)), steps)
    assert made.shape == (sum(p.numel() for p in agent.policy.parameters()),)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), kinds, st.integers(1, 3), seeds)
def test_adam(sizes: list[int], kind: str, steps: int, seed: int) -> None:
    moved = []
    for native in (True, False):
        parameters = TrainedParameters(nn.ParameterList(values(seed + n, "normal", n) for n in sizes))
        adam = Adam(parameters, 0.01, native=native)
        assert adam.native == native
        for i in range(steps):
            parameters.start()
            parameters.add(values(seed + i, kind, sum(sizes)))
            adam.step()
        moved.append(parameters.values().detach())
    near(*moved, 1e-5)


@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 4), rows, st.booleans(), dtypes, dtypes, kinds,
    st.integers(0, 40),
    seeds,
)  # fmt: skip
def test_linear(
    outs: list[int], k: int, n: int, low: bool, of_x: torch.dtype, of_w: torch.dtype, kind: str, wider: int, seed: int
) -> None:
    k *= 32
    outs = [*(16 * out for out in outs[:-1]), outs[-1]]  # only the last block may be part of one
    weights = [values(seed + i, kind, out, k).to(of_w) / k**0.5 for i, out in enumerate(outs)]
    biases = [values(seed + i, "normal", out) if i % 2 else None for i, out in enumerate(outs)]
    x = strided(values(seed + 9, kind, n, k).to(of_x), wider)
    y = strided(torch.empty(n, sum(outs)), wider)
    Linear(weights, biases, low=low).into(y, x)
    no_number_is_lost(y, x)
    bias = torch.cat([torch.zeros(out) if b is None else b for b, out in zip(biases, outs, strict=True)])
    near(y, x.float() @ torch.cat(weights).float().T + bias, 0.02 if low else 1e-4)
    if not sum(outs) % 32:
        g = values(seed + 8, kind, n, sum(outs)).bfloat16()
        near(Linear.backwards(weights)(g), g.float() @ torch.cat(weights).float(), 0.02)


@given(st.integers(1, 5), st.integers(1, 5), rows, st.booleans(), kinds, st.integers(0, 40), seeds)
def test_gradient_of_a_weight(out: int, k: int, n: int, add: bool, kind: str, wider: int, seed: int) -> None:
    to = values(seed, "normal", out * 16, k * 16)
    g = strided(values(seed + 1, kind, n, out * 16).bfloat16(), wider)
    x = strided(values(seed + 2, kind, n, k * 16).bfloat16(), wider)
    wanted = g.float().T @ x.float() + (to if add else 0)
    assert can_add_weight_gradient(to, g, x)
    weight_gradient(to, g, x, add=add)
    near(to, wanted, 0.02)


@given(rows | st.just(0), st.integers(1, 300), dtypes, kinds, st.booleans(), st.sampled_from([1.0, 0.1, 30.0]), seeds)
def test_softmax(
    n: int, width: int, dtype: torch.dtype, kind: str, learning: bool, temperature: float, seed: int
) -> None:
    z = values(seed, kind, n, width).to(dtype)
    targets = torch.randint(width, (n,), generator=torch.Generator().manual_seed(seed))
    wanted = (z.float() / temperature).log_softmax(1)
    logp, entropy, other = softmax(z.clone(), targets, temperature, learning=learning)
    no_number_is_lost(logp[:, None], z)
    no_number_is_lost(entropy[:, None], z)
    if kind in ("normal", "zero") and n:
        near(logp, wanted.gather(1, targets[:, None])[:, 0], 1e-3)
        near(entropy, -(wanted.exp() * wanted).sum(1), 1e-3)
    if learning and kind in ("normal", "zero") and n:
        near(other, 1 - wanted.exp().gather(1, targets[:, None])[:, 0], 1e-3)


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 35), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    st.sampled_from([(1, 1), (4, 2), (3, 3), (9, 3), (14, 2)]), st.integers(1, 5), st.none() | st.integers(1, 50),
    dtypes, kinds, seeds,
)  # fmt: skip
def test_attention(
    shape: list[tuple[int, list[int]]], heads: tuple[int, int], d: int, window: int | None, dtype: torch.dtype,
    kind: str, seed: int,
) -> None:  # fmt: skip
    pack = Pack.of([Group([0] * prompt, [[0] * n for n in completions]) for prompt, completions in shape])
    d *= 16
    q, k, v, gradient = (values(seed + i, kind, len(pack.ids), heads[i in (1, 2)], d) for i in range(4))
    how = AttentionSpec(d**-0.5, window, None)
    found = []
    for compiled in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if compiled:
            out = attend(*leaves, pack.stretches, how.scale, window, dtype)
        else:
            out = RectangleAttention.apply(*leaves, pack, how, dtype)
        out.backward(gradient.to(out.dtype))
        found.append([out.detach(), *(x.grad for x in leaves)])
    no_number_is_lost(found[0][0], q)
    if kind in ("normal", "zero"):
        for one, other in zip(*found, strict=True):
            near(one, other, 0.1 if dtype == torch.bfloat16 else 1e-4)


@given(rows, st.integers(1, 9), dtypes, kinds, st.booleans(), seeds)
def test_norms_and_gates(n: int, width: int, dtype: torch.dtype, kind: str, added: bool, seed: int) -> None:
    width *= 16
    norm = SimpleNamespace(variance_epsilon=1e-6, weight=torch.ones(width))
    x, weight = values(seed, kind, n, width), values(seed + 1, "normal", width)
    y, to = (values(seed + 2, kind, n, width).to(dtype), torch.empty(n, width)) if added else (None, None)
    h = between._norm(norm, weight, x, dtype, y, to)
    total = x if y is None else x + y.float()
    wanted = total * torch.rsqrt(total.square().mean(1, keepdim=True) + 1e-6) * weight
    no_number_is_lost(h, total)
    near(h, wanted, 0.02 if dtype == torch.bfloat16 else 1e-4)
    dh, g = (values(seed + i, kind, n, width) for i in (3, 4))
    between._norm_gradient(norm, weight, x, dh.to(dtype), g, torch.empty(n, width, dtype=dtype))

    layer = between.BetweenProductsC.__new__(between.BetweenProductsC)
    gate_up, dm = values(seed, kind, n, 2 * width).to(dtype), values(seed + 5, kind, n, width).to(dtype)
    gate, up = gate_up.float().chunk(2, 1)
    no_number_is_lost(layer.gate(gate_up), gate_up)
    if float(gate_up.float().abs().nan_to_num().max()) <= 1e30:
        near(layer.gate(gate_up), nn.functional.silu(gate) * up, 0.02 if dtype == torch.bfloat16 else 1e-4)
    layer.gate_gradient(gate_up, dm)


@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 2)]), st.integers(1, 4), st.integers(1, 4), st.integers(2, 90),
    st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(1, 5), dtypes, st.none() | st.integers(1, 9),
    seeds,
)  # fmt: skip
def test_decoding(
    heads: tuple[int, int], d: int, inner: int, vocabulary: int, prompts: list[int], n: int, dtype: torch.dtype,
    window: int | None, seed: int,
) -> None:  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    from grouprl.lm.packed.backbone import find_backbone
    from grouprl.lm.packed.low_precision import LowPrecision
    from grouprl.lm.sample.draw import SamplingSettings
    from grouprl.lm.sample.sampler import Sampler

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 32 * d, "intermediate_size": 32 * inner, "num_hidden_layers": 1,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 16 * d,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
    backbone, _ = find_backbone(model.eval())
    assert backbone is not None
    ids = [[i % vocabulary for i in range(length)] for length in prompts]
    found = []
    for steps in ("native", "blocks"):
        sampler = Sampler(backbone, LowPrecision(model, dtype), [1], steps=steps)
        drawn = sampler.sample(ids, n, SamplingSettings(12), torch.Generator().manual_seed(seed))
        found.append([c.ids for c in drawn])
    if dtype == torch.float32 and sampler.steps == "blocks":
        assert len(found[0]) == len(found[1]) == len(prompts) * n
