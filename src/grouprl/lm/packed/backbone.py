"""The parts of a Hugging Face causal model that the packed paths use, and a test whether they support the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import error_text
from grouprl.lm.models.context import read_setting, rotates_by_length
from grouprl.lm.models.core import core_of
from grouprl.lm.packed import attention
from grouprl.lm.packed.attention import AttentionPlan, AttentionSpec, PackedAttention, UnsupportedError
from grouprl.lm.packed.low_precision import LowPrecision, is_touched
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.trial import Trial, own_pass, plain_logits

_TOLERANCE = 1e-3
"""The largest allowed difference in nats between log-probabilities of the packed and the plain pass."""

_LARGE_LOGIT = 100.0
"""The size of logits in the search for a cap on them. Models cap logits at 15 to 50."""


class Backbone:
    """The parts of a causal model that the packed paths run.

    Args:
        model: a causal model of transformers, or a PEFT model around one.

    Attributes:
        model: the model as given.
        core: the model of transformers, without PEFT around it.
        decoder: the part that turns tokens into hidden states.
        head: the linear layer that turns hidden states into logits.

    Raises:
        UnsupportedError: the model has no decoder with a linear head, its rotary positions depend on the longest
            sequence, or its head or a parameter has hooks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.core: Any = core_of(model)
        self.head: Any = self.core.get_output_embeddings()
        self.decoder: Any = self.core.get_decoder() if hasattr(self.core, "get_decoder") else None
        if self.decoder is None or self.decoder is self.core or type(self.head) is not nn.Linear:
            raise UnsupportedError(f"{type(self.core).__name__} has no decoder with a linear head on top")
        if is_touched(self.head):
            raise UnsupportedError(f"the head of {type(self.core).__name__} has a hook or a forward of its own")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.core.parameters()):
            raise UnsupportedError(
                f"parameters of {type(self.core).__name__} have hooks, which packed passes do not run"
            )
        if rotates_by_length(self.core.config):
            raise UnsupportedError(
                f"{type(self.core).__name__} rotates positions by the length of the longest sequence"
            )
        attention.register()

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its input tokens."""
        weight: Tensor = self.core.get_input_embeddings().weight
        return weight.device

    def on_device(self) -> AbstractContextManager[Any]:
        """If the model is on a GPU, launch kernels on this GPU while the context is open."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Compute the last hidden states of a packed row. Call this within :meth:`following`.

        Args:
            ids: ``[S]`` int64 token ids.
            positions: ``[S]`` int64 positions of the tokens in their sequences.

        Returns:
            Hidden states ``[S, d]``.
        """
        # The model receives embeddings: with ids, some models look for padding, which makes the CPU wait for the GPU.
        embedded = self.core.get_input_embeddings()(ids[None])
        out = self.decoder(inputs_embeds=embedded, position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden[0]

    def one_dtype(self) -> AbstractContextManager[Any]:
        """Run the layers of a model with weights of several dtypes in float32, while the context is open.

        Such a model may not run by itself, such as one whose norms were kept in float32.
        """
        mixed = len({p.dtype for p in self.model.parameters()}) > 1
        return LowPrecision(self.model, torch.float32).exactly() if mixed else nullcontext()

    @cached_property
    def asked(self) -> dict[nn.Module, AttentionSpec]:
        """The attention settings of each attention layer."""
        return self._asked_and_kept[0]

    @cached_property
    def kept(self) -> int:
        """How many numbers all layers together keep of each token while decoding: its keys and values."""
        return self._asked_and_kept[1]

    @cached_property
    def _asked_and_kept(self) -> tuple[dict[nn.Module, AttentionSpec], int]:
        sizes: list[int] = []
        pack = Pack.of([Group([0], ())], self.device)
        plan = PackedAttention(pack, keep=lambda _, k, v: sizes.append(k.numel() + v.numel()))
        training = self.model.training  # a PEFT model that was just made is; attention asks for its dropout then
        self.model.eval()
        try:
            with torch.no_grad(), self.following(plan), self.one_dtype():
                self.hidden(pack.ids, pack.positions)
        finally:
            self.model.train(training)
        return plan.asked, sum(sizes)

    @contextmanager
    def following(self, plan: AttentionPlan) -> Iterator[None]:
        """Let the attention layers of the model follow ``plan`` while the context is open."""
        configs = {id(m.config): m.config for m in self.core.modules() if hasattr(m, "config")}.values()
        before = [(config, config._attn_implementation) for config in configs]
        try:
            for config in configs:
                config._attn_implementation = attention.NAME
            with attention.using(plan):
                yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def find_backbone(model: nn.Module, trial: Trial | None = None) -> tuple[Backbone | None, str]:
    """Find out whether a packed pass of the model gives the same log-probabilities as plain passes.

    The function runs short groups of random tokens both ways, at the first positions and at far ones. The results
    differ for models that the packed paths do not support:

    - A token depends on its neighbours outside of attention, through convolutions or recurrent layers.
    - The model does not take positions from ``position_ids``, with ALiBi for example.
    - The model scales or caps its logits after the head.
    - Attention does not go through the attention interface of transformers.

    Both passes run in float32, because rounding would hide differences.

    Args:
        model: a causal model of transformers, or a PEFT model around one.
        trial: a trial of this model with its weights as they are, to use it more than once.

    Returns:
        The :class:`Backbone` of the model and "", or None and the reason.
    """
    try:
        backbone = Backbone(model)
        difference = _difference(backbone, trial or Trial(model))
    except UnsupportedError as error:
        return None, str(error)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        # A model may raise any of these errors when it does not know the packed form of the call.
        return None, error_text(error)
    if not difference < _TOLERANCE:
        return None, f"log-probabilities of a packed pass differ by {difference:.2g}"
    return backbone, ""


def _difference(backbone: Backbone, trial: Trial) -> float:
    """The largest difference in nats between packed and plain log-probabilities, by whichever precision is possible."""
    config, name, pack = backbone.core.config, type(backbone.core).__name__, trial.pack
    seen: set[nn.Module] = set()

    def once(module: nn.Module, *_: Tensor) -> None:
        if module in seen:
            raise UnsupportedError(f"{type(module).__name__} attends twice in one pass")
        seen.add(module)

    own, far = trial.own().flatten(0, 2), trial.own_far()
    own = own if far is None else torch.cat([own, far])
    plan = PackedAttention(pack, keep=once)
    with own_pass(backbone.model):
        with backbone.following(plan):
            hidden = backbone.hidden(pack.ids, pack.positions)[pack.predictors]
        difference = float((backbone.head(hidden).float().log_softmax(-1) - own).abs().max())
        ends_with_head = _ends_with_its_head(backbone, pack.ids[None, :2])
    window = read_setting(config.get_text_config(), "sliding_window")
    if window is not None and all(spec.window != window for spec in plan.asked.values()):
        raise UnsupportedError(f"{name} does not tell its attention of its sliding window")
    if not ends_with_head:
        raise UnsupportedError(f"{name} changes its logits behind the head")
    return difference


def _ends_with_its_head(backbone: Backbone, ids: Tensor) -> bool:
    """Whether the model returns the outputs of its head as they are.

    The outputs are enlarged for this, because a cap on logits has no effect on small ones.
    """
    outputs: list[Tensor] = []

    def enlarge(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        outputs.append(out * (_LARGE_LOGIT / out.abs().max().clamp(min=1e-6)))
        return outputs[-1]

    hook = backbone.head.register_forward_hook(enlarge)
    try:
        logits = plain_logits(backbone.model, ids)
    finally:
        hook.remove()
    return len(outputs) == 1 and bool((outputs[0].float() - logits).abs().max() < 1e-3 * _LARGE_LOGIT)
