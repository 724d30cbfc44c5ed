"""Which way of fused layers a model can take: each is tried against the model's own before it is used."""

from __future__ import annotations

import logging
from importlib import util
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.kernels.compile import available
from grouprl.lm.llama.adapters import doing_something, is_lora
from grouprl.lm.llama.between_products import Parts, TorchParts
from grouprl.lm.llama.between_products_c import NativeParts
from grouprl.lm.llama.between_products_triton import KernelParts
from grouprl.lm.llama.block import Joined, LeanStep, lean_step
from grouprl.lm.llama.decode_c import supported
from grouprl.lm.llama.layers import LlamaLayers, run_layer
from grouprl.lm.packed import flash
from grouprl.lm.packed.attention import PackedAttention, flash_works
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.packing import Group, Pack

_log = logging.getLogger("grouprl")


@torch.no_grad()
def find_layers(backbone: Backbone, dtype: torch.dtype) -> LlamaLayers | None:
    """The layers of ``backbone`` as fused functions, if each gives what the model's own module gives, else None.

    Needs a Llama-shaped model (see :mod:`grouprl.lm.llama.block`) without adapters other than PEFT's plain low-rank
    ones; on a CPU a C compiler, on a GPU products in half precision and FlashAttention.
    """
    step = lean_step(backbone)
    if step is None:
        return None
    with backbone.on_device():
        return _find(backbone, step, dtype)


def _find(backbone: Backbone, step: LeanStep, dtype: torch.dtype) -> LlamaLayers | None:
    modules: list[Any] = list(backbone.decoder.layers.modules())
    low_rank = sum(2 * len(m.lora_A) for m in modules if is_lora(m))
    for kind in _kinds(backbone, step, dtype):
        layers = LlamaLayers(backbone.decoder, step.ways, dtype, kind)
        if len(layers.linears) != 7 * len(backbone.decoder.layers) + low_rank:
            return None
        try:
            if _differs_by(backbone, layers) < 1.0 and (kind is not KernelParts or _same_gradient(layers)):
                return layers
            if kind is KernelParts:
                raise ArithmeticError("they give other numbers than torch")
        except Exception as error:  # Triton has errors of its own, as many as ways to fail
            if kind is not KernelParts:
                raise
            _log.warning("learning is slower than it could be: Triton's kernels cannot be used: %s", error)
    return None


def _differs_by(backbone: Backbone, layers: LlamaLayers) -> float:
    """How far what fused layers give is from what the model's modules give: beyond 1 is too far."""
    pack = Pack.of([Group([1, 2, 3, 4, 2], ([3, 1, 2], [0, 4])), Group([2, 1], ([1, 3, 2],))], backbone.device)
    kind = layers.kind
    tried = torch.float32 if kind is NativeParts else layers.dtype
    differences: list[float] = []

    def compare(module: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
        x, wanted = given[0][0].float().contiguous(), (out[0] if isinstance(out, tuple) else out)[0].float()
        parts = kind.of(module, layers.ways[len(differences)])
        found = run_layer(backbone.decoder, parts, tried, x, pack)
        differences.append(float((found - wanted).norm() / wanted.norm()))

    training = backbone.model.training
    backbone.model.eval()
    hooks = [layer.register_forward_hook(compare) for layer in backbone.decoder.layers]
    try:
        with doing_something(backbone.decoder), backbone.following(PackedAttention(pack)):
            backbone.hidden(pack.ids, pack.positions)
    finally:
        backbone.model.train(training)
        for hook in hooks:
            hook.remove()
    exact = tried == backbone.head.weight.dtype == torch.float32
    worst = max(differences) if all(map(isfinite, differences)) else inf
    return worst / (1e-4 if exact else 0.05)


def _same_gradient(layers: LlamaLayers) -> bool:
    """Whether kernels have the gradient that torch operations have, of the input of the first layer."""
    module, how = layers.decoder.layers[0], layers.ways[0]
    pack = Pack.of([Group([0] * 5, ([0] * 9, [0])), Group([0] * 20, ([0] * 3,))], module.mlp.down_proj.weight.device)
    generator = torch.Generator().manual_seed(0)
    shape = (len(pack.ids), module.mlp.down_proj.out_features)
    x, g = (torch.randn(shape, generator=generator).to(pack.ids.device) for _ in range(2))
    learned = [p for p in module.parameters() if p.requires_grad]
    found = []
    try:
        for p in learned:
            p.requires_grad_(False)
        for kind in (KernelParts, TorchParts):
            given = x.clone().requires_grad_()
            with torch.enable_grad():
                out = run_layer(layers.decoder, kind.of(module, how), layers.dtype, given, pack)
                found.append(torch.autograd.grad(out, given, g)[0])
    finally:
        for p in learned:
            p.requires_grad_(True)
    mine, its = found
    return float((mine - its).norm()) < 0.02 * float(its.norm())


def _kinds(backbone: Backbone, step: LeanStep, dtype: torch.dtype) -> list[type[Parts]]:
    """What may be able to do all that lies between the products here, best first."""
    if supported(backbone.decoder, backbone.head) and available():
        return [NativeParts]
    if backbone.device.type != "cuda" or not (step.has_silu and Joined.supported(step)):
        return []
    if any(how.window is not None for how in step.ways):
        return []
    heads, k_heads, d = TorchParts.of(backbone.decoder.layers[0], step.ways[0]).heads
    q, k = (torch.empty(1, n, d, device=backbone.device, dtype=dtype) for n in (heads, k_heads))
    if not (flash.supported(q, k, dtype, None) and flash_works(q.device, dtype, heads, k_heads, d)):
        return []
    return [KernelParts, TorchParts] if util.find_spec("triton") is not None else [TorchParts]
