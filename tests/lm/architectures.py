"""Tiny random models of many architectures, and what anybody would compute of them: the yardstick of the packed paths.

Weights are larger than at initialisation, and biases and norms random too, so that no part of a model is without
influence on its log-probabilities.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Spans
from grouprl.lm.policy.log_probs import LogProbs, steps_of

VOCABULARY = 97
PAD, EOS = 3, 2
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA = {**_LLAMA, "head_dim": 8}
_WINDOWS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _GEMMA),
    "gpt2": ("GPT2", {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": EOS, "pad_token_id": PAD,
    }),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {
        **_GEMMA, "layer_types": _WINDOWS, "sliding_window": 4, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": None,
    }),
    "gemma3": ("Gemma3Text", {**_GEMMA, "layer_types": _WINDOWS, "sliding_window": 4}),
    "phi": ("Phi", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", _LLAMA),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 4}),
    "opt": ("OPT", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt_neox": ("GPTNeoX", {**_COMMON, "intermediate_size": 48}),
    "smollm3": ("SmolLM3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "bloom": ("Bloom", {**_COMMON, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 1,
        "eos_token_id": EOS, "pad_token_id": PAD,
    }),
    "granite": ("Granite", {**_LLAMA, "logits_scaling": 2.0}),
    "gemma2_capped": ("Gemma2", {**_GEMMA, "layer_types": _WINDOWS, "sliding_window": 4}),
}  # fmt: skip
PACKED = tuple(CONFIGS)[:13]
"""Architectures that the packed paths run."""
PLAIN = tuple(CONFIGS)[13:]
"""Architectures that they do not."""


def build(name: str, *, seed: int = 0, loud: bool = True, **changes: Any) -> Any:
    """A random model in float32 and evaluation mode; not ``loud``: with the weights transformers initialises."""
    import transformers

    kind, settings = CONFIGS[name]
    return make(getattr(transformers, f"{kind}Config")(**{**settings, **changes}), seed=seed, loud=loud)


def make(config: Any, *, seed: int = 0, loud: bool = True) -> Any:
    """The same from a configuration of transformers."""
    import transformers

    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if loud:
            make_loud(model)
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None  # as `load` does: PyTorch would give that row no gradient
    return model.eval()


@torch.no_grad()
def make_loud(model: nn.Module) -> None:
    """Random weights of the size that keeps activations near 1, and no bias or norm at its neutral value."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "A_log" not in name:
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        elif parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def random_ids(n: int, generator: torch.Generator) -> list[int]:
    """``n`` random tokens."""
    return torch.randint(VOCABULARY, (n,), generator=generator).tolist()


def random_groups(*shapes: tuple[int, Sequence[int]], seed: int = 0) -> list[Group]:
    """For each (prompt length, completion lengths) a group; the longer prompts hold padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for length, completions in shapes:
        prompt = random_ids(length, generator)
        if length >= 4:
            prompt[0] = prompt[2] = PAD
        groups.append(Group(prompt, [random_ids(n, generator) for n in completions]))
    return groups


MIXED = ((5, (4, 1, 7)), (1, (3,)), (9, (1, 2, 6, 2)), (2, (1, 1)))
"""Groups of unequal sizes, completions of one token, a prompt of one token."""


EPISODES = ((5, ((2, 3, 1), (4,), (1, 1, 2, 4, 1))), (1, ((3, 1, 1),)), (9, ((1, 2, 1), (6,))))
"""Of each group the length of the prompt, and of each completion the lengths of turns of the model and its partner."""


def random_episodes(*shapes: tuple[int, Sequence[Sequence[int]]], seed: int = 0) -> list[Group]:
    """For each (prompt length, lengths of turns of each completion) a group. The first turn is the model's."""
    whole = random_groups(*((length, [sum(ns) for ns in turns]) for length, turns in shapes), seed=seed)
    groups = []
    for group, (_, turns) in zip(whole, shapes, strict=True):
        ends = [[0, *itertools.accumulate(ns)] for ns in turns]
        spans = [[(e[k], e[k + 1]) for k in range(0, len(e) - 1, 2)] for e in ends]
        groups.append(Group(group.prompt, group.completions, spans))
    return groups


def of_turns(x: Tensor, spans: Spans) -> Tensor:
    """Of ``x [n, ...]``, one entry for each token of a completion, those of the model's turns."""
    return torch.cat([x[start:stop] for start, stop in spans])


def naive_log_probs(model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> Tensor:
    """``[n]``: one sequence, no padding, no cache, the softmax over everything."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logp = (logits[0, -len(completion) - 1 : -1].float() / temperature).log_softmax(-1)
    return logp.gather(1, ids[0, len(prompt) :, None])[:, 0]


def naive(
    model: Any, groups: Sequence[Group], weights: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities ``[m]`` of the model's turns, and the gradient of ``(weights * logp).sum()`` by autograd.

    Log-probabilities come on the CPU, gradients where the model is.
    """
    model.zero_grad(set_to_none=True)
    parts = [
        of_turns(naive_log_probs(model, g.prompt, c, temperature), g.spans(j))
        for g in groups
        for j, c in enumerate(g.completions)
    ]
    logp = torch.cat(parts)
    if weights is None:
        return logp.detach().cpu(), {}
    (weights.to(logp.device) * logp).sum().backward()
    return logp.detach().cpu(), take_gradient(model)


def take_gradient(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, zeros where there is none; the model keeps none."""
    out = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return out


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over all parameters together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    size = sum(float(b[k].double().square().sum()) for k in b)
    return (difference / size) ** 0.5


def n_tokens(groups: Sequence[Group]) -> int:
    """The model's tokens in ``groups``."""
    return sum(stop - start for g in groups for j in range(len(g.completions)) for start, stop in g.spans(j))


def random_weights(groups: Sequence[Group], seed: int = 1) -> Tensor:
    """One normal number per token of the model."""
    return torch.randn(n_tokens(groups), generator=torch.Generator().manual_seed(seed))


def as_samples(groups: Sequence[Group]) -> tuple[list[Any], list[Any], list[int], Tensor]:
    """Prompts, completions, group of each completion, numbers of the model's tokens."""
    completions = [c for g in groups for c in g.completions]
    group = [i for i, g in enumerate(groups) for _ in g.completions]
    lengths = [sum(stop - start for start, stop in g.spans(j)) for g in groups for j in range(len(g.completions))]
    return [g.prompt for g in groups], completions, group, torch.tensor(lengths)


def learned(log_probs: Any, groups: Sequence[Group], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What :func:`naive` returns, by a :class:`LogProbs`."""
    prompts, completions, group, lengths = as_samples(groups)
    log_probs.model.zero_grad(set_to_none=True)
    logp = torch.full((len(weights),), torch.nan)
    whole = all(g.turns is None for g in groups)
    turns = None if whole else [g.spans(j) for g in groups for j in range(len(g.completions))]
    with log_probs.learning():
        for part in log_probs.micro_batches(prompts, completions, group, turns):
            index = steps_of(part.samples, lengths)
            terms = log_probs.evaluate(part)
            logp[index] = terms.logp.detach().cpu()
            (weights[index].to(terms.logp.device) * terms.logp).sum().backward()
    return logp, take_gradient(log_probs.model)


def make_log_probs(
    model: Any,
    *,
    temperature: float = 1.0,
    budget: int = 10**9,
    dtype: torch.dtype = torch.float32,
    plain: bool = False,
) -> LogProbs:
    """A :class:`LogProbs` on packed groups; ``plain``: on what the library offers."""
    backbone = None if plain else Backbone(model)
    return LogProbs(model, backbone, LowPrecision(model, dtype), temperature, budget)
