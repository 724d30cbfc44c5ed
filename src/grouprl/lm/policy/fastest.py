"""Which learner and which sampler a model gets: the fastest that agree with its own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grouprl.errors import UsageError, error_text
from grouprl.lm.engines.sampler import vllm_sampler
from grouprl.lm.llama.trial import find_layers
from grouprl.lm.models.core import core_of
from grouprl.lm.packed.attention import UnsupportedError
from grouprl.lm.packed.backbone import Backbone, find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.policy.trial import PolicyTrial
from grouprl.lm.sample.decode_steps import Steps
from grouprl.lm.sample.interface import CompletionSampler
from grouprl.lm.sample.plain import PLAIN_STEPS, PlainSampler
from grouprl.lm.sample.sampler import Sampler
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE, Ranks

_CACHE_BYTES = 1 << 30
"""The default limit in bytes for the keys and values that the sampler stores, on a CPU."""

_TOKENS = 2048
"""The default number of input tokens of a micro-batch on a CPU."""

_log = logging.getLogger("grouprl")


def find_learner(
    model: Any, config: GRPOConfig, precision: LowPrecision, trial: PolicyTrial, *, sharded: bool
) -> tuple[LogProbs, str]:
    """The fastest learner that agrees with the model's own forward pass, and why it is not a packed one, or "".

    Args:
        model: a causal model.
        config: the settings of the run.
        precision: the precision of matrix products.
        trial: a trial of this model with its weights as they are.
        sharded: whether its weights are sharded.

    Raises:
        UsageError: not even the plain learner agrees with it.
    """
    dropout = not config.disable_dropout and has_dropout(model)
    backbone, why = (None, "attention='plain' asks for it")
    if sharded:
        why = "its weights are sharded (fsdp)"
    elif config.attention == "auto":
        backbone, why = find_backbone(model, trial.trial)
    if backbone is not None:
        budget = config.tokens_per_micro_batch or _tokens_at_once(model, backbone)
        layers = None
        if config.native and not dropout and not config.gradient_checkpointing:
            layers = find_layers(backbone, precision.dtype)
        for fused in (layers, None) if layers is not None else (None,):
            learner = LogProbs(model, backbone, precision, config.temperature, budget, dropout, config.native, fused)
            why = trial.learner(learner)
            if not why:
                return learner, ""
            if fused is not None:
                _log.warning("%s learns more slowly, without fused layers: %s", _class(model), why)
    budget = config.tokens_per_micro_batch or _TOKENS
    learner = LogProbs(model, None, precision, config.temperature, budget, dropout, config.native)
    wrong = trial.learner(learner) or trial.causality()
    if not wrong and not sharded:  # a sharded model has no gradient of one weight alone
        wrong = trial.gradient(learner)
    if wrong:
        raise UsageError(f"{_class(model)} cannot be trained in {_name(precision.dtype)}: {wrong}")
    return learner, why


def find_sampler(
    model: Any, config: GRPOConfig, precision: LowPrecision, backbone: Backbone | None, ends: Sequence[int],
    pad: int | None, trial: PolicyTrial, ranks: Ranks = ALONE,
) -> CompletionSampler:  # fmt: skip
    """The fastest sampler that agrees with the model's own forward pass.

    Args:
        model: a causal model.
        config: the settings of the run.
        precision: the precision of matrix products.
        backbone: the model for packed paths, or None if they do not support it.
        ends: the ids of the tokens that end a completion.
        pad: the id of the token that pads shorter prompts, or None if there is none.
        trial: a trial of this model with its weights as they are.
        ranks: the processes that sample, each its own completions.

    Raises:
        UsageError: not even the slowest sampler agrees with it.
    """
    why = ""
    if config.use_vllm:
        return vllm_sampler(model, config, precision.dtype, ends, trial.trial, ranks)
    if backbone is not None:
        rows = config.max_rows_per_decode or _rows_that_fit(backbone, config, precision)
        try:
            fastest: Steps = "native" if config.native else "blocks"
            return Sampler(backbone, precision, ends, rows, fastest, trial.trial)
        except UnsupportedError as error:
            _log.warning("%s samples without packed attention, exactly but slowly: %s", _class(model), error)
    for steps in PLAIN_STEPS:
        sampler = PlainSampler(model, precision.dtype, ends, ends[0] if pad is None else pad, steps)
        wrong = sampler.disagreement(trial.trial)
        if not wrong:
            if why:
                _log.warning("%s samples by %s, which is slower: otherwise %s", _class(model), steps, why)
            return sampler
        why = wrong
    raise UsageError(f"{_class(model)} cannot be sampled from in {_name(precision.dtype)}: {why}")


def warn_of_plain_paths(model: Any, why: str) -> None:
    """Warn that plain paths run the model, and why."""
    _log.warning("%s runs without packed attention, exactly but slowly: %s", _class(model), why)


def warn_if_own_pass_fails(model: Any, dtype: torch.dtype, trial: PolicyTrial) -> None:
    """Warn if the model's own forward pass does not run in the precision of this trainer, whose paths do.

    They are right, but whoever runs the model in that precision afterwards gets the error.
    """
    try:
        trial.trial.own(dtype)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        _log.warning(
            "%s cannot run its own forward pass in %s, in which it is trained all the same: %s",
            _class(model), _name(dtype), error_text(error),
        )  # fmt: skip


def _tokens_at_once(model: Any, backbone: Backbone) -> int:
    """The number of tokens whose activations and logits fit into an eighth of a GPU's memory; _TOKENS on a CPU.

    Activations need about 34 bytes per token, layer and element of a hidden state (arXiv 2205.05198, section 4.1).
    Logits need 4 bytes per token and vocabulary entry: bfloat16, held twice.
    """
    if backbone.device.type != "cuda":
        return _TOKENS
    vocabulary, width = map(int, backbone.head.weight.shape)
    token = 34 * int(model.config.get_text_config().num_hidden_layers) * width + 4 * vocabulary
    room = torch.cuda.get_device_properties(backbone.device).total_memory // 8  # of the total memory, as below
    return max(_TOKENS // 2, min(32 * _TOKENS, room // token))


def _rows_that_fit(backbone: Backbone, config: GRPOConfig, precision: LowPrecision) -> int:
    """The number of rows of a decode step that fit into memory.

    On a CPU, the keys and values of complete rows must fit into _CACHE_BYTES. On a GPU they must fit into an eighth
    of its memory, together with the logits and the tensors that sampling computes from them.
    """
    room, logits = _CACHE_BYTES, 0
    if backbone.device.type == "cuda":  # of the total memory: a run must not depend on how much is free now
        room = torch.cuda.get_device_properties(backbone.device).total_memory // 8
        logits = 16 * backbone.head.weight.shape[0]
    token = backbone.kept * (4 if backbone.device.type == "cpu" else precision.dtype.itemsize)
    return max(16, min(1024, room // (token * config.max_completion_length + logits)))


def has_dropout(model: Any) -> bool:
    """Whether a model uses dropout in training mode.

    The function looks for a positive rate in dropout modules, in ``dropout`` attributes of modules, and in entries of
    the model's configuration with "drop" in their name.
    """
    rates = [m.p if isinstance(m, nn.Dropout) else getattr(m, "dropout", 0.0) for m in model.modules()]
    text = model.config.get_text_config() if hasattr(model, "config") else None
    rates += [value for name, value in vars(text).items() if "drop" in name] if text is not None else []
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _class(model: Any) -> str:
    return type(core_of(model)).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
