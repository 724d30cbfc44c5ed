"""Whether the load of a model's experts is balanced, and how: decided when a trainer is made."""

from __future__ import annotations

import logging
from typing import Any

import torch

from grouprl.errors import UsageError, error_text
from grouprl.lm.models.core import core_of
from grouprl.lm.packed.experts import Experts
from grouprl.lm.packed.trial import Trial, own_pass

_log = logging.getLogger("grouprl")
_TOLERANCE = 1e-4


def find_experts(model: Any, coefficient: float | None, trial: Trial) -> Experts | None:
    """What reads the routers of a mixture of experts, or None if nothing is to be balanced.

    Args:
        model: a causal model of transformers, or a PEFT model around one.
        coefficient: the weight of the loss; None: the one in the model's configuration.
        trial: of the model.

    Raises UsageError if a coefficient is given, and the model has no such loss.
    """
    settings = model.config.get_text_config()
    routes = hasattr(settings, "output_router_logits")
    weight = (getattr(settings, "router_aux_loss_coef", None) or 0.0) if coefficient is None else coefficient
    if not weight or (coefficient is None and not routes):
        return None
    core = core_of(model)
    wrong = _trial(model, float(weight), trial) if routes else "its configuration has no output_router_logits"
    if isinstance(wrong, Experts):
        return wrong
    said = f"{type(core).__name__} gives no loss that balances experts: {wrong}"
    if coefficient is not None:
        raise UsageError(f"router_aux_loss_coef={coefficient:g}, but {said}; leave router_aux_loss_coef out")
    _log.warning("%s; it is trained without, although its configuration has router_aux_loss_coef=%g", said, weight)
    return None


@torch.no_grad()
def _trial(model: Any, coefficient: float, trial: Trial) -> Experts | str:
    """What agrees with the loss that the model itself gives of a padded batch, or what does not."""
    sequences = [[*group.prompt, *completion] for group in trial.groups for completion in group.completions]
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=trial.device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=trial.device)
    try:
        experts = Experts(model, coefficient)
        with own_pass(model), experts.watched():
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
            routed = experts.routed(mask.flatten())
        own = getattr(out, "aux_loss", None)
        if own is None:
            return "its forward pass returns none"
        difference = abs(float(own) - float(experts.loss(routed, routed)))
    except (
        AssertionError, AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, UsageError,
    ) as error:  # fmt: skip
        return error_text(error)
    return (
        experts
        if difference <= _TOLERANCE * max(1.0, abs(float(own)))
        else ("it computes another one than E sum f P over its experts")
    )
