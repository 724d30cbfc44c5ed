"""What the routers of a mixture of experts do with tokens, and the loss that balances the load of the experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.lm.models.core import core_of
from grouprl.lm.packed.packing import Group


class Routed(NamedTuple):
    """Sums over the layers and over some tokens.

    Attributes:
        chosen: ``[E]`` float32, how often each of the E experts was among those of highest probability.
        probability: ``[E]`` float32, of its probabilities. It carries a gradient.
        rows: a number, the tokens times the layers.
    """

    chosen: Tensor
    probability: Tensor
    rows: Tensor

    def plus(self, other: Routed) -> Routed:
        """The sums with those over other tokens."""
        return Routed(self.chosen + other.chosen, self.probability + other.probability, self.rows + other.rows)


class Experts:
    """Reads the routers of a mixture of experts.

    Args:
        model: a causal model of transformers with a router, or a PEFT model around one.

    Attributes:
        coefficient: the weight of the loss that balances their load.
        n: the number E of experts. k: how many of them compute a token.

    Raises:
        AttributeError: its configuration does not say how many.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        core: Any = core_of(model)
        settings = core.config.get_text_config()
        k = getattr(core, "num_experts_per_tok", None)
        self.k = int(settings.num_experts_per_tok if k is None else k)
        decoder = core.get_decoder() if hasattr(core, "get_decoder") else None
        self._decoder: nn.Module = core if decoder is None else decoder
        self.coefficient, self.n = coefficient, 0
        self._logits: Sequence[Tensor] = ()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let the model give the logits of its routers in each pass while the context is open."""

        def ask(_: nn.Module, args: Any, options: dict[str, Any]) -> Any:
            return args, {**options, "output_router_logits": True}

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            self._logits = getattr(out, "router_logits", None) or ()

        hooks = [
            self._decoder.register_forward_pre_hook(ask, with_kwargs=True),
            self._decoder.register_forward_hook(keep),
        ]
        try:
            yield
        finally:
            self._logits = ()
            for hook in hooks:
                hook.remove()

    def routed(self, weights: Tensor | None = None) -> Routed:
        """What the routers did in the last pass.

        Args:
            weights: ``[B * T]`` how often each of the tokens that were read counts; None: all but the last.

        Raises UsageError if they did not say it, or of other tokens.
        """
        if weights is None and self._logits:
            weights = torch.ones(self._logits[0].shape[:-1].numel(), device=self._logits[0].device)
            weights[-1] = 0.0
        if weights is None or not self._logits or any(x.shape[:-1].numel() != len(weights) for x in self._logits):
            raise UsageError(
                "the model does not say what its routers did with each token, so their load cannot be balanced; set "
                "router_aux_loss_coef=0"
            )
        logits = [x.reshape(len(weights), -1) for x in self._logits]
        self.n = logits[0].shape[1]
        weights = weights.float()
        chosen = torch.zeros(self.n, device=weights.device)
        probability = torch.zeros(self.n, device=weights.device)
        for of_layer in logits:
            p = of_layer.to(weights.device).softmax(-1)
            taken = torch.zeros_like(p, dtype=torch.float32).scatter_(1, p.topk(self.k, dim=-1).indices, 1.0)
            # Products add in one order, also on a GPU, where additions to one place would be in any.
            chosen = chosen + weights @ taken
            probability = probability + weights @ p.float()
        return Routed(chosen, probability, weights.sum() * len(logits))

    def nothing(self, device: torch.device) -> Routed:
        """What they did with no token."""
        # Tensors of their own, as what other processes met is added to each in its place.
        return Routed(*(torch.zeros(shape, device=device) for shape in ((self.n,), (self.n,), ())))

    def loss(self, part: Routed, whole: Routed) -> Tensor:
        """What some tokens add to E sum_e f_e P_e over all of them, which is k where the load is even, and else more.

        f_e is the share of tokens that expert e computes, and P_e the mean of its probabilities, over all tokens and
        layers. f_e has no gradient. So the losses of parts add up to that of the whole.

        Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6.
        """
        return self.n * (whole.chosen * part.probability).sum() / whole.rows.clamp(min=1.0).square()


def weights_of(groups: Sequence[Group]) -> list[float]:
    """How often each token of a packed row of these groups counts: those of a prompt once for each completion."""
    prompts = [float(len(group.completions)) for group in groups for _ in group.prompt]
    return prompts + [1.0] * sum(len(c) - 1 for group in groups for c in group.completions)
