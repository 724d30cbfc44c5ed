"""Layers in low precision: what they compute, what they add to ``.grad``, what they leave behind."""

import pytest
import torch
from architectures import build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grouprl.lm.packed.attention import PackedAttention
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision, add_gradient, supports_bf16
from grouprl.lm.packed.packing import Group, Pack

BF16, FLOAT = torch.bfloat16, torch.float32


class Net(nn.Module):
    """An embedding, a linear layer, a transposed one, and a head that is the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8, padding_idx=3)
        self.up = nn.Linear(8, 12)
        self.down = Conv1D(8, 12)
        self.bare = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.down.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(torch.tanh(self.bare(x)))


IDS = torch.tensor([[1, 3, 5], [3, 3, 10]])


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        return Net()


def backward(net: nn.Module) -> tuple[Tensor, list[Tensor]]:
    upstream = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    out = net(IDS)
    (out.float() * upstream).sum().backward()
    return out, [p.grad.clone() for p in net.parameters()]


def without_padding_idx(net: Net) -> tuple[Tensor, list[Tensor]]:
    net.embed.padding_idx = None
    try:
        return backward(net)
    finally:
        net.embed.padding_idx = 3
        net.zero_grad(set_to_none=True)


def test_in_float32_everything_is_as_autograd_has_it(net: Net) -> None:
    out, gradients = without_padding_idx(net)
    with LowPrecision(net, FLOAT).learning():
        found, found_gradients = backward(net)
    assert torch.equal(found, out)
    for a, b in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_weights_stay_and_gradients_come_in_float32(net: Net) -> None:
    out, gradients = without_padding_idx(net)
    with LowPrecision(net, BF16).learning():
        found, found_gradients = backward(net)
    assert found.dtype == BF16
    torch.testing.assert_close(found.float(), out, rtol=0.03, atol=0.03)
    for a, b in zip(found_gradients, gradients, strict=True):
        assert a.dtype == FLOAT
        assert float((a - b).norm()) < 0.02 * float(b.norm())


def test_the_row_of_the_padding_token_keeps_its_gradient(net: Net) -> None:
    net.head.weight = nn.Parameter(torch.randn(11, 8))
    with LowPrecision(net, FLOAT).learning():
        backward(net)
    assert bool(net.embed.weight.grad[3].any())
    assert not net.embed.weight.grad[[0, 2, 4, 6, 7, 8, 9]].any()


def test_gradients_are_added_in_place_so_that_views_stay_views(net: Net) -> None:
    _, gradients = without_padding_idx(net)
    flat = torch.ones(sum(p.numel() for p in net.parameters()))
    offset = 0
    for p in net.parameters():
        p.grad = flat[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    with LowPrecision(net, FLOAT).learning():
        backward(net)
        backward(net)
    expected = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(flat, 1 + 2 * expected, rtol=1e-5, atol=1e-5)


def test_a_tied_weight_gets_the_gradient_of_both_its_uses(net: Net) -> None:
    with LowPrecision(net, FLOAT).learning():
        backward(net)
    tied = net.embed.weight.grad.clone()
    net.zero_grad(set_to_none=True)
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    with LowPrecision(net, FLOAT).learning():
        backward(net)
    assert bool(net.embed.weight.grad.any() and net.head.weight.grad.any())
    torch.testing.assert_close(tied, net.embed.weight.grad + net.head.weight.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_frozen_weights_get_no_gradient_and_pass_it_on(net: Net, dtype: torch.dtype) -> None:
    with LowPrecision(net, dtype).learning():
        backward(net)
    wanted = net.up.weight.grad.clone()
    net.zero_grad(set_to_none=True)
    for module in (net.down, net.bare, net.embed):
        module.requires_grad_(False)
    with LowPrecision(net, dtype).learning():
        net(IDS).float().mul(torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))).sum().backward()
    torch.testing.assert_close(net.up.weight.grad, wanted)
    assert all(p.grad is None for module in (net.down, net.bare, net.embed) for p in module.parameters())


def test_low_precision_gradients_of_low_precision_weights_are_added_too(net: Net) -> None:
    net.to(BF16)
    with LowPrecision(net, BF16).learning():
        _, once = backward(net)
        _, twice = backward(net)
    for a, b in zip(once, twice, strict=True):
        assert a.dtype == BF16
        torch.testing.assert_close(b, 2 * a, rtol=0.02, atol=0.02)


def test_each_weight_is_rounded_when_learning_begins_and_again_after_it_has_changed(net: Net) -> None:
    products = LowPrecision(net, BF16)
    with torch.no_grad(), products.learning():
        before = net(IDS)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
        with products.learning():
            after = net(IDS)
    assert float((after - before).abs().max()) > 0.1


def test_an_input_that_was_changed_in_place_is_rounded_again(net: Net) -> None:
    products = LowPrecision(net, BF16)
    x = torch.ones(2, 8)
    with torch.no_grad(), products.learning():
        first = net.bare(x)
        x.mul_(2.0)
        second = net.bare(x)
    torch.testing.assert_close(second, 2 * first, rtol=0.02, atol=0.02)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sampling_computes_what_learning_does(name: str, dtype: torch.dtype) -> None:
    backbone, why = find_backbone(build(name))
    assert backbone is not None, why
    products = LowPrecision(backbone.model, dtype)
    pack = Pack.of([Group(row, ()) for row in IDS.tolist()])

    def logits() -> torch.Tensor:
        with backbone.following(PackedAttention(pack, dtype)):
            out: torch.Tensor = backbone.head(backbone.hidden(pack.ids, pack.positions))
            return out.float()

    with torch.no_grad(), products.learning():
        learning = logits()
    with products.sampling():
        sampling = logits()
        assert not sampling.requires_grad
    tolerance = 1e-5 if dtype == FLOAT else 0.15
    torch.testing.assert_close(sampling, learning, rtol=tolerance, atol=tolerance)


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["learning", "sampling"])
def test_forwards_are_restored_after_an_exception_too(net: Net, how: str) -> None:
    products = LowPrecision(net, BF16)
    own = {name: module.forward for name, module in net.named_modules()}

    def halt() -> None:
        assert "forward" in vars(net.up)
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"), getattr(products, how)():
        halt()
    assert {name: module.forward for name, module in net.named_modules()} == own
    assert not any("forward" in vars(module) for module in net.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_exactly_is_the_pass_of_the_model_in_float32(name: str) -> None:
    model, ids = build(name).bfloat16(), torch.arange(6)[None]  # the first two have LayerNorm
    with LowPrecision(model, torch.float32).exactly():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, model.float()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_a_hook_has_put_on_a_layer_is_put_back(net: Net) -> None:
    own = net.up.forward
    net.up.forward = hooked = lambda x: own(x) + 1.0  # as accelerate's hooks do
    with LowPrecision(net, FLOAT).learning():
        pass
    assert vars(net.up).get("forward") is hooked


def test_layers_that_compute_in_another_way_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * super().forward(x)

    class Offset(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 1)

    net = nn.Sequential(Offset(5, 4), Scaled(4, 4), nn.Embedding(5, 4, max_norm=0.1))
    with LowPrecision(net, FLOAT).learning():
        assert not any("forward" in vars(module) for module in net)


def test_a_gradient_is_made_where_there_is_none_and_added_where_there_is() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    add_gradient(parameter, torch.ones(2, dtype=BF16))
    assert parameter.grad.dtype == FLOAT
    place = parameter.grad.data_ptr()
    add_gradient(parameter, torch.ones(2, dtype=BF16))
    assert parameter.grad.tolist() == [2.0, 2.0]
    assert parameter.grad.data_ptr() == place


def test_devices_without_bfloat16_products_say_so() -> None:
    assert supports_bf16(torch.device("meta")) is False
    assert isinstance(supports_bf16(torch.device("cpu")), bool)


@pytest.mark.parametrize(
    ("onednn", "avx512", "instructions", "fast"),
    [
        (False, False, False, False),  # x86 with AVX2
        (True, True, False, False),  # AVX-512 of Skylake to Ice Lake: oneDNN takes it, and converts to float32
        (True, True, True, True),
        (True, False, False, True),  # ARM with bfloat16
    ],
)
def test_bfloat16_is_for_processors_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512: bool, instructions: bool, fast: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert supports_bf16(torch.device("cpu")) is fast
