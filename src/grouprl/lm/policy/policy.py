"""The model being trained and everything that runs it: how it samples, how it is differentiated, what holds it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grouprl.errors import UsageError
from grouprl.lm.llama.trial import find_layers
from grouprl.lm.models.load import eos_token_ids
from grouprl.lm.packed.backbone import Backbone, find_backbone
from grouprl.lm.packed.low_precision import LowPrecision, supports_bf16
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.policy.reference import Reference
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.rows import Adjust, Completion
from grouprl.lm.sample.sampler import Sampler
from grouprl.lm.settings.config import GRPOConfig

_CACHE_BYTES = 1 << 30
"""What the sampler's own keys and values may take by default; on a GPU, an eighth of its memory."""

_TOKENS = 2048
"""Tokens of a micro-batch by default."""

_log = logging.getLogger("grouprl")


class Policy:
    """A causal language model that samples and learns.

    Args:
        model: a transformers causal model or a PEFT model around one, on its device.
        tokenizer: says which tokens end a completion.
        config: precision, temperature, micro-batches, reference.
        ref_model: what the KL divergence is measured to; default: the model as it is now.

    Attributes:
        packed: whether the packed paths run it; if not, ``why_plain`` says why.
        reference: what the KL divergence is measured to, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, config: GRPOConfig, ref_model: Any = None) -> None:
        self.model, self.config = model, config
        self.device: torch.device = next(model.parameters()).device
        fast = supports_bf16(self.device)
        if config.bf16 and not fast and self.device.type != "cpu":
            raise UsageError(f"bf16=True, but {self.device} has no bfloat16; leave bf16 out")
        low = fast if config.bf16 is None else config.bf16
        own = next(model.parameters()).dtype
        dtype = torch.bfloat16 if low or own == torch.bfloat16 else torch.float32
        self.precision = LowPrecision(model, dtype, config.native)
        backbone, self.why_plain = (None, "attention='plain' asks for it")
        if config.attention == "auto":
            backbone, self.why_plain = find_backbone(model)
            if backbone is None:
                _log.warning("%s runs without packed attention, exactly but slowly: %s", _class(model), self.why_plain)
        self.packed = backbone is not None
        self.log_probs = self._make_log_probs(model, backbone, self.precision)
        ends = eos_token_ids(model, tokenizer)
        self.sampler: Sampler | PlainSampler
        if backbone is None:
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
            self.sampler = PlainSampler(model, self.precision.dtype, ends, pad)
        else:
            rows = config.max_rows_per_decode or self._rows_that_fit(backbone)
            self.sampler = Sampler(backbone, self.precision, ends, rows, "native" if config.native else "blocks")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs or {"use_reentrant": False})
        self.reference = self._reference(ref_model)

    def sample(
        self, prompts: Sequence[Sequence[int]], group_size: int, generator: torch.Generator,
        settings: SamplingSettings | None = None, adjust: Adjust | None = None,
    ) -> list[Completion]:  # fmt: skip
        """``group_size`` completions of each prompt, as the configuration says unless ``settings`` are given."""
        return self.sampler.sample(prompts, group_size, settings or sampling_settings(self.config), generator, adjust)

    def _make_log_probs(self, model: Any, backbone: Any, precision: LowPrecision) -> LogProbs:
        config = self.config
        layers, dropout = None, not config.disable_dropout and has_dropout(model)
        if backbone is not None and config.native and not dropout and not config.gradient_checkpointing:
            layers = find_layers(backbone, precision.dtype)
        budget = config.tokens_per_micro_batch or (_TOKENS if backbone is None else self._tokens_at_once(backbone))
        return LogProbs(model, backbone, precision, config.temperature, budget, dropout, config.native, layers)

    def _reference(self, ref_model: Any) -> Reference | None:
        """What the KL divergence is measured to, if ``beta`` asks for one. Raises UsageError if it cannot be that."""
        if self.config.beta == 0:
            if ref_model is not None:
                raise UsageError("ref_model is given, but beta=0 gives it no weight; set beta, or leave it out")
            return None
        other = None
        if ref_model is not None:
            if {id(p) for p in ref_model.parameters()} & {id(p) for p in self.model.parameters()}:
                raise UsageError(
                    "ref_model shares weights with the model and would be trained along; leave it out (the reference "
                    "is then the model as it is now), or pass a copy"
                )
            ref_model = ref_model.to(self.device)
            # Its parameters may go on asking for gradients, of which there are none. They should: torch multiplies by
            # a weight that asks for one in another way, and rounds differently; the KL of a model from its copy would
            # not be 0.
            backbone = find_backbone(ref_model)[0] if self.packed else None
            precision = LowPrecision(ref_model, self.precision.dtype, self.config.native)
            other = ref_model, self._make_log_probs(ref_model, backbone, precision)
        reference = Reference(self.model, self.log_probs, other)
        if self.config.sync_ref_model:
            reference.check_can_follow()
        return reference

    def _tokens_at_once(self, backbone: Backbone) -> int:
        """Tokens whose activations and logits fit into an eighth of a GPU's memory; _TOKENS on a CPU.

        About 34 bytes per token, layer and number of a hidden state (arXiv 2205.05198, section 4.1), and logits twice.
        """
        if self.device.type != "cuda":
            return _TOKENS
        vocabulary, width = map(int, backbone.head.weight.shape)
        token = 34 * int(self.model.config.get_text_config().num_hidden_layers) * width + 4 * vocabulary
        room = torch.cuda.get_device_properties(self.device).total_memory // 8  # of all, as below
        return max(_TOKENS // 2, min(32 * _TOKENS, room // token))

    def _rows_that_fit(self, backbone: Backbone) -> int:
        """Rows whose keys and values of a whole completion fit into _CACHE_BYTES; on a GPU, together with their logits
        and what is made of those, into an eighth of its memory."""
        room, logits = _CACHE_BYTES, 0
        if self.device.type == "cuda":  # of all, not of what is free: a run must not depend on what else is there
            room = torch.cuda.get_device_properties(self.device).total_memory // 8
            logits = 16 * backbone.head.weight.shape[0]
        text = self.model.config.get_text_config()
        heads: Any = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
        size: Any = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token = (
            2
            * int(text.num_hidden_layers)
            * int(heads)
            * int(size)
            * (4 if self.device.type == "cpu" else self.precision.dtype.itemsize)
        )
        return max(16, min(1024, room // (token * self.config.max_completion_length + logits)))


def has_dropout(model: Any) -> bool:
    """Whether a model drops anything out when it trains: by a module, or by a number of its configuration or layers."""
    rates = [m.p if isinstance(m, nn.Dropout) else getattr(m, "dropout", 0.0) for m in model.modules()]
    text = model.config.get_text_config() if hasattr(model, "config") else None
    rates += [value for name, value in vars(text).items() if "drop" in name] if text is not None else []
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def sampling_settings(config: GRPOConfig, *, greedy: bool = False) -> SamplingSettings:
    """What the configuration says of sampling; with ``greedy`` the likeliest token instead."""
    if greedy:
        return SamplingSettings(config.max_completion_length, temperature=0.0, min_new_tokens=config.min_new_tokens)
    return SamplingSettings(
        max_new_tokens=config.max_completion_length, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, min_p=config.min_p or 0.0, repetition_penalty=config.repetition_penalty,
        min_new_tokens=config.min_new_tokens,
    )  # fmt: skip


def _class(model: Any) -> str:
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(core).__name__
