"""Finds the fused layers that a model can use: each candidate is compared with the model's own layers first."""

from __future__ import annotations

import logging
from importlib import util
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.kernels.compile import available
from grouprl.lm.llama.adapters import is_lora, nonzero_adapters
from grouprl.lm.llama.between_products import BetweenProducts, BetweenProductsTorch
from grouprl.lm.llama.between_products_c import BetweenProductsC
from grouprl.lm.llama.between_products_triton import BetweenProductsTriton
from grouprl.lm.llama.block import JoinedProducts, LlamaBlocks, find_llama
from grouprl.lm.llama.decode_c import can_decode_in_c
from grouprl.lm.llama.layers import LlamaLayers, run_layer
from grouprl.lm.packed import flash
from grouprl.lm.packed.attention import PackedAttention, flash_works
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.trial import Trial

_log = logging.getLogger("grouprl")


@torch.no_grad()
def find_layers(backbone: Backbone, dtype: torch.dtype) -> LlamaLayers | None:
    """The layers of ``backbone`` as fused functions, or None unless each has the output of the model's own layer.

    Needs a Llama-shaped model (see :mod:`grouprl.lm.llama.block`) without adapters other than PEFT's plain low-rank
    ones. On a CPU it needs a C compiler, on a GPU products in half precision and FlashAttention.

    Args:
        dtype: the dtype of the products.
    """
    llama = find_llama(backbone)
    if llama is None:
        return None
    with backbone.on_device():
        return _find(backbone, llama, dtype)


def _find(backbone: Backbone, llama: LlamaBlocks, dtype: torch.dtype) -> LlamaLayers | None:
    modules: list[Any] = list(backbone.decoder.layers.modules())
    low_rank = sum(2 * len(m.lora_A) for m in modules if is_lora(m))
    for operations in _candidates(backbone, llama, dtype):
        layers = LlamaLayers(backbone.decoder, llama.specs, dtype, operations)
        if len(layers.linears) != 7 * len(backbone.decoder.layers) + low_rank:
            return None
        try:
            if _differs_by(backbone, layers) < 1.0 and (
                operations is not BetweenProductsTriton or _same_gradient(layers)
            ):
                return layers
            if operations is BetweenProductsTriton:
                raise ArithmeticError("they give other numbers than torch")
        except Exception as error:  # Triton has errors of its own, as many as ways to fail
            if operations is not BetweenProductsTriton:
                raise
            _log.warning("learning is slower than it could be: Triton's kernels cannot be used: %s", error)
    return None


def _differs_by(backbone: Backbone, layers: LlamaLayers) -> float:
    """The largest relative error of a fused layer's output, as a multiple of the allowed one: beyond 1 is too much."""
    pack = Trial(backbone.model).pack
    operations = layers.operations
    tried = torch.float32 if operations is BetweenProductsC else layers.dtype
    differences: list[float] = []

    def compare(module: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
        x, own = inputs[0][0].float().contiguous(), (out[0] if isinstance(out, tuple) else out)[0].float()
        between = operations.of(module, layers.specs[len(differences)])
        fused = run_layer(backbone.decoder, between, tried, x, pack)
        differences.append(float((fused - own).norm() / own.norm()))

    training = backbone.model.training
    backbone.model.eval()
    hooks = [layer.register_forward_hook(compare) for layer in backbone.decoder.layers]
    try:
        with nonzero_adapters(backbone.decoder), backbone.following(PackedAttention(pack)), backbone.one_dtype():
            backbone.hidden(pack.ids, pack.positions)
    finally:
        backbone.model.train(training)
        for hook in hooks:
            hook.remove()
    exact = tried == backbone.head.weight.dtype == torch.float32
    worst = max(differences) if all(map(isfinite, differences)) else inf
    return worst / (1e-4 if exact else 0.05)


def _same_gradient(layers: LlamaLayers) -> bool:
    """Whether the first layer's input has the same gradient (to 2 %) by Triton kernels as by torch operations."""
    module, spec = layers.decoder.layers[0], layers.specs[0]
    pack = Pack.of([Group([0] * 5, ([0] * 9, [0])), Group([0] * 20, ([0] * 3,))], module.mlp.down_proj.weight.device)
    generator = torch.Generator().manual_seed(0)
    shape = (len(pack.ids), module.mlp.down_proj.out_features)
    x, g = (torch.randn(shape, generator=generator).to(pack.ids.device) for _ in range(2))
    learned = [p for p in module.parameters() if p.requires_grad]
    gradients = []
    try:
        for p in learned:
            p.requires_grad_(False)
        for operations in (BetweenProductsTriton, BetweenProductsTorch):
            leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                out = run_layer(layers.decoder, operations.of(module, spec), layers.dtype, leaf, pack)
                gradients.append(torch.autograd.grad(out, leaf, g)[0])
    finally:
        for p in learned:
            p.requires_grad_(True)
    by_triton, by_torch = gradients
    return float((by_triton - by_torch).norm()) < 0.02 * float(by_torch.norm())


def _candidates(backbone: Backbone, llama: LlamaBlocks, dtype: torch.dtype) -> list[type[BetweenProducts]]:
    """The implementations of everything between the products that may run here, fastest first."""
    if can_decode_in_c(backbone.decoder, backbone.head) and available():
        return [BetweenProductsC]
    if backbone.device.type != "cuda" or not (llama.has_silu and JoinedProducts.can_join(llama)):
        return []
    if any(spec.window is not None for spec in llama.specs):
        return []
    heads, k_heads, d = BetweenProductsTorch.of(backbone.decoder.layers[0], llama.specs[0]).heads
    q, k = (torch.empty(1, n, d, device=backbone.device, dtype=dtype) for n in (heads, k_heads))
    if not (flash.can_attend(q, k, dtype, None) and flash_works(q.device, dtype, heads, k_heads, d)):
        return []
    return (
        [BetweenProductsTriton, BetweenProductsTorch]
        if util.find_spec("triton") is not None
        else [BetweenProductsTorch]
    )
