"""Every causal architecture of transformers as a tiny random model: the paths that grouprl takes, and their errors.

    python benchmarks/lm_architectures.py --jobs 2          # those without a row yet
    python benchmarks/lm_architectures.py --again bloom     # measure these anew
    python benchmarks/lm_architectures.py --table           # write the table of what was measured

The measure of everything is the naive way: the model's own forward pass in float32, one sequence at a time, without
padding and without a cache. The models are small, but their weights are large, so that no part of a model is without
effect, and the entropy of a token is about two nats. Borders such as sliding windows lie at 14 to 16 tokens: above the
lengths of the trial that grouprl makes at construction, and below the lengths that are measured here.

Each architecture runs in a process of its own with a time limit. Rows are appended to a file, so an interrupted series
continues where it stopped.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import measuring

RESULTS = Path(__file__).resolve().parent / "results"
LOG, PAGE = RESULTS / "lm_architectures.jsonl", RESULTS / "lm_architectures.md"
SECONDS = 150
"""The time limit of one architecture."""
EXACT = 1e-4
"""The largest allowed difference in nats between float32 log-probabilities, and between gradients, relatively."""
SAMPLED = 1e-3
"""The largest allowed difference between log-probabilities of sampled tokens. Recurrent caches round differently."""
VOCABULARY, CONTEXT, MOST_PARAMETERS = 32, 64, 15_000_000
ENTROPY = 2.0
"""The entropy in nats that the models should have on average, of log 32 = 3.5 at most."""
BEGIN, END, PAD = 0, 1, 3
"""Special tokens of the tiny tokenizer."""
GROUPS = ((5, (4, 1, 7)), (33, (9, 2)), (1, (3,)), (18, (5, 6)))
"""Lengths of a prompt, and of its completions."""

_WIDTH, _HEADS = 64, 4
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "word_embed_proj_dim", "embedding_size",
                     "attention_hidden_size", "lru_width", "mlp_hidden_size"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "n_inner",
                     "ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "kv_channels",
                     "index_head_dim", "swa_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "state_size",
                     "ssm_state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank"), 4),
    "index_n_heads": 16,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "moe_shared_expert_intermediate_size", "moe_latent_size", "mamba_headdim", "mamba_head_dim",
                     "mamba_d_head", "expert_dim", "global_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts",
                     "encoder_layers", "n_groups", "mamba_n_groups", "num_nextn_predict_layers",
                     "moe_num_shared_experts", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "context_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "index_topk", "keep_window_size",
                     "attention_window_size", "local_window_size", "window_size", "swa_window",
                     "sliding_window_size"), 14),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
    "image_size": 16, "patch_size": 4, "num_channels": 3, "chunk_size": 8, "mamba_chunk_size": 8,
    "num_kv_shared_layers": 0,
    "is_decoder": True, "num_buckets": None, "max_source_positions": CONTEXT, "max_target_positions": CONTEXT,
}  # fmt: skip
"""Settings of configurations, by name, wherever a configuration has them."""

_LATENT = {"head_dim": 4, "num_key_value_heads": 4}
_INDEXED = {**_LATENT, "index_topk": 14}
_HYBRID = ["linear_attention", "full_attention"]
_SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
_GEMMA4: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": 14,
    "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "max_position_embeddings": CONTEXT,
    "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), _INDEXED),
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"),
        _LATENT,
    ),
    "dots3_note_text": {**_INDEXED, "layer_types": ["indexed_attention", "sliding_attention"]},
    "longcat_flash": _LATENT,
    "bailing_hybrid": {
        **_LATENT,
        "layer_types": _HYBRID,
        "first_k_dense_replace": 1,
        "num_expert_group": 1,
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_experts_per_token": 2,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_n_heads": 8, "logits_scaling": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen4_exp_text": {
        "layer_types": _HYBRID,
        "hc_lowrank": 4,
        "ple_embed_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 2,
        "indexer_head_dim": 16,
        "indexer_budget": 14,
        "indexer_compress_ratio": 2,
    },
    "xlstm": {"embedding_dim": 64, "num_blocks": 2, "mode": "train"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
    },
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (32, 32),
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "roc_bert": {
        "shape_vocab_size": 32,
        "pronunciation_vocab_size": 32,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32},
    "ministral3": {"rope_parameters": {**_SCALED, "llama_4_scaling_beta": 0.5}},
    "llama": {"rope_parameters": _SCALED},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "granite": {"logits_scaling": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"text_config": _GEMMA4} for name in ("gemma4", "gemma4_unified")},
}
"""Settings of single architectures beyond those."""


# --- tiny models ------------------------------------------------------------------------------------------------------


def shrink(config: Any, depth: int = 0) -> Any:
    """Give a configuration and those within it the settings of SMALL."""
    from transformers import PretrainedConfig

    for name, value in SMALL.items():
        if name in vars(config) or name in config.attribute_map:
            try:
                setattr(config, name, value)
            except Exception:  # some are computed
                continue
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig) and depth < 3:
            shrink(value, depth + 1)
        elif isinstance(value, list) and "type" in name and len(value) > 2:
            kinds = list(dict.fromkeys(value))
            setattr(config, name, (kinds + kinds)[:2])
    return config


def build(name: str) -> Any:
    """A random model of the architecture, in evaluation mode. Raises RuntimeError if none can be made."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[name]
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", {}))
    known |= {field for base in kind.__mro__ for field in getattr(base, "__annotations__", {})}
    settings = {k: v for k, v in SMALL.items() if k in known} | MORE.get(name, {})
    problems = []
    attempts = (lambda: kind(**settings), lambda: shrink(kind(**MORE.get(name, {}))), lambda: shrink(kind(**settings)))
    for attempt in attempts:
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(attempt()).parameters())
            if size > MOST_PARAMETERS:
                problems.append(f"{size:,} parameters")
                continue
            torch.manual_seed(0)
            return loud(AutoModelForCausalLM.from_config(attempt()).eval())
        except Exception as error:
            problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
    raise RuntimeError(" | ".join(dict.fromkeys(problems)))


def loud(model: Any) -> Any:
    """The model with weights so large that every part has an effect, and that its entropy is about two nats a token."""
    import torch

    ids = torch.tensor([tokens(12, 5) + 12 * tokens(1, 6)])  # a copying model repeats itself

    def deviating() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()

    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen: set[int] = set()
    with torch.no_grad():
        for gain in (1.2, 0.6, 0.3, None):
            torch.manual_seed(1)
            model.load_state_dict(before)
            seen.clear()
            for name, p in model.named_parameters():
                if id(p) in seen or not p.is_floating_point() or any(part in name for part in ("A_log", "dt_", ".D")):
                    continue
                seen.add(id(p))
                if p.dim() >= 2 and gain is not None:
                    p.normal_(0.0, gain * min(p.shape[-1], 64) ** -0.5)
                elif p.dim() == 1:
                    p.add_(torch.randn_like(p), alpha=0.1)
            if 0.02 < float(deviating().std(-1).mean()) < 20:
                break
        head = model.get_output_embeddings()
        if head is not None:
            size, factors, entropies = head.weight.clone(), [2.0**power for power in range(-6, 7)], []
            for factor in factors:  # in earnest, as the head may be the table of embeddings too
                head.weight.copy_(factor * size)
                entropies.append(float(torch.distributions.Categorical(logits=deviating()).entropy().mean()))
            head.weight.copy_(factors[min(range(13), key=lambda i: abs(entropies[i] - ENTROPY))] * size)
    return model


def tokens(n: int, seed: int) -> list[int]:
    """Random tokens that are no special ones."""
    import torch

    return torch.randint(4, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- the naive way ----------------------------------------------------------------------------------------------------


def naive(model: Any, prompt: Sequence[int], completion: Sequence[int], low: bool = False) -> Any:
    """Log-probabilities ``[n]`` by a forward pass of one sequence."""
    import torch

    ids = torch.tensor([[*prompt, *completion]])
    with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    chosen = logits[0, -len(completion) - 1 : -1].float().log_softmax(-1)
    return chosen.gather(1, ids[0, -len(completion) :, None])[:, 0]


def samples() -> tuple[list[Any], list[Any], list[int], Any]:
    """Prompts, completions, the prompt of each completion, and the lengths of completions."""
    import torch

    prompts = [tokens(n, i) for i, (n, _) in enumerate(GROUPS)]
    completions = [tokens(n, 100 * i + j) for i, (_, lengths) in enumerate(GROUPS) for j, n in enumerate(lengths)]
    group = [i for i, (_, lengths) in enumerate(GROUPS) for _ in lengths]
    return prompts, completions, group, torch.tensor([len(c) for c in completions])


def gradient(model: Any) -> dict[str, Any]:
    """The gradients by name. The model keeps none."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """|found - wanted| / |wanted| over all gradients. One that is missing is 0."""
    difference = size = 0.0
    for name in found.keys() | wanted.keys():
        a, b = found.get(name, 0.0), wanted.get(name, 0.0)
        difference += float(((a - b) ** 2).sum())
        size += float((b**2).sum()) if name in wanted else 0.0
    return (difference / size) ** 0.5


# --- one architecture -------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, **settings: Any) -> Any:
    """A trainer of the model, with prompts of unequal lengths."""
    from grouprl.lm import GRPOConfig, GRPOTrainer
    from grouprl.lm.models.tiny import tiny_tokenizer

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [len(ids) + sum(i * token for i, token in enumerate(ids, 1)) % 11 / 11 for ids in completion_ids]

    fixed: dict[str, Any] = {
        "num_generations": 4, "prompts_per_step": 2, "max_completion_length": 6, "max_steps": 4, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "logging_steps": 10,
    }  # fmt: skip
    rows = [{"prompt": text} for text in ("abc", "bcdefghbcdefghabc", "c", "defa")]
    config = GRPOConfig(output_dir=str(folder), **{**fixed, **settings})
    return GRPOTrainer(model, reward, config, rows, processing_class=tiny_tokenizer())


def ways(policy: Any) -> tuple[str, str]:
    """What the learner and the sampler run."""
    learner = "plain" if not policy.packed else "packed" if policy.log_probs.layers is None else "packed, fused layers"
    return learner, policy.sampler.steps


def learned(policy: Any, *, backward: bool) -> tuple[Any, Any]:
    """Log-probabilities of the samples, and the gradient of their weighted sum."""
    import torch

    from grouprl.lm.policy.log_probs import steps_of

    prompts, completions, group, lengths = samples()
    weights = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(3))
    policy.model.zero_grad(set_to_none=True)
    found = torch.full((len(weights),), torch.nan)
    with policy.log_probs.learning():
        for part in policy.log_probs.micro_batches(prompts, completions, group):
            steps = steps_of(part.samples, lengths)
            logp = policy.log_probs.evaluate(part).logp
            if backward:
                (weights[steps] * logp).sum().backward()
            found[steps] = logp.detach()
    return found, gradient(policy.model)


def wanted(model: Any, *, backward: bool, low: bool = False) -> tuple[Any, Any]:
    """The same, the naive way."""
    import torch

    prompts, completions, group, lengths = samples()
    weights = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(3)).split(lengths.tolist())
    model.zero_grad(set_to_none=True)
    found = []
    for index, completion, weight in zip(group, completions, weights, strict=True):
        with torch.set_grad_enabled(backward):
            logp = naive(model, prompts[index], completion, low)
        if backward:
            (weight * logp).sum().backward()
        found.append(logp.detach())
    return torch.cat(found), gradient(model)


def sampled(policy: Any) -> float:
    """The largest difference between the log-probabilities of drawn tokens and the naive ones."""
    import torch

    prompts = [tokens(n, n) for n in (30, 3, 11)]
    drawn = policy.sample(prompts, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return max(
            float((c.logp - naive(policy.model, prompts[i // 3], c.ids)).abs().max()) for i, c in enumerate(drawn)
        )


def weights_of(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unequal(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    import torch

    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]


def check(name: str) -> dict[str, Any]:
    """The row of one architecture."""
    import torch

    from grouprl.errors import UsageError
    from grouprl.lm import GRPOConfig
    from grouprl.lm.models.tiny import tiny_tokenizer
    from grouprl.lm.policy.policy import Policy

    row: dict[str, Any] = {}
    try:
        model = build(name)
    except RuntimeError as error:
        return {"unbuilt": str(error)}
    row["class"], row["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            first = trainer(model, folder / "run", save_strategy="steps", save_steps=2)
        except UsageError as error:
            return {**row, "refused": str(error)}
        policy = first.policy
        row["learner"], row["sampler"] = ways(policy)
        row["why_plain"] = policy.why_plain
        exact = wanted(model, backward=True)
        row["deviation"] = float(exact[0].std())
        found = learned(policy, backward=True)
        row["log_probs"] = float((found[0] - exact[0]).abs().max())
        row["gradient"] = relative(found[1], exact[1])
        row["sampling"] = sampled(policy)
        row.update(in_bf16(Policy, model, tiny_tokenizer(), GRPOConfig, exact[0]))
        first.train()
        trained = weights_of(model)
        first.save_model(folder / "saved")
        loaded = type(model).from_pretrained(folder / "saved", dtype=torch.float32)
        row["saved_unequal"] = unequal(trained, weights_of(loaded))
        again = build(name)
        row["moved"] = len(unequal(trained, weights_of(again)))
        trainer(again, folder / "run2").train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
        row["resumed_unequal"] = unequal(trained, weights_of(again))
    return row


def in_bf16(policy_class: Any, model: Any, tokenizer: Any, config: Any, exact: Any) -> dict[str, Any]:
    """How far log-probabilities with bfloat16 products are from exact ones, beside the model's own under autocast."""
    from grouprl.errors import UsageError

    def rms(x: Any) -> float:
        return float((x - exact).square().mean().sqrt())

    try:
        policy = policy_class(model, tokenizer, config(bf16=True, use_cpu=True, max_completion_length=6))
    except UsageError as error:
        return {"bf16_refused": str(error)}
    learner, sampler = ways(policy)
    out = {"bf16_learner": learner, "bf16_sampler": sampler, "bf16": rms(learned(policy, backward=True)[0])}
    out["bf16_sampling"] = sampled(policy)
    try:
        out["bf16_own"] = rms(wanted(model, backward=False, low=True)[0])
    except RuntimeError as error:
        out["bf16_own_failed"] = " ".join(str(error).split())[:100]
    return out


# --- many -------------------------------------------------------------------------------------------------------------


def _in_a_process(name: str, out: Any) -> None:
    import torch
    import transformers

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    try:
        row = check(name)
    except Exception as error:
        lines = traceback.format_exc().strip().splitlines()
        row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "where": lines[-12:-1]}
    out.send(row)
    out.close()


def measure(names: Sequence[str], jobs: int) -> None:
    """Run each architecture in a process forked from this one, and append its row."""
    import torch

    import grouprl.lm.policy.policy
    import grouprl.lm.train.trainer  # noqa: F401, so that the forks need not import it

    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    shared = {"versions": measuring.versions("grouprl", "torch", "transformers"), "commit": measuring.commit()}
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            receive, send = fork.Pipe(duplex=False)
            process = fork.Process(target=_in_a_process, args=(name, send))
            process.start()
            send.close()
            running[name] = process, receive, time.monotonic()
        for name, (process, receive, began) in list(running.items()):
            row: dict[str, Any] | None = None
            if receive.poll(0.05):
                try:
                    row = receive.recv()
                except EOFError:
                    process.join()
                    row = {"failed": f"the process ended with code {process.exitcode}"}
            elif time.monotonic() - began > SECONDS:
                process.kill()
                row = {"failed": f"not done after {SECONDS} s"}
            if row is not None:
                process.join()
                del running[name]
                row = {"architecture": name, **row, "seconds": round(time.monotonic() - began, 1), **shared}
                with LOG.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name:24} {verdict(row)[0]:8} {verdict(row)[1][:150]}", flush=True)


def verdict(row: dict[str, Any]) -> tuple[str, str]:
    """One word for a row, and what is wrong with it."""
    if "unbuilt" in row:
        return "unbuilt", row["unbuilt"]
    if "refused" in row:
        return "refused", row["refused"]
    if "failed" in row:
        return "failed", row["failed"]
    limits = {"log_probs": EXACT, "gradient": EXACT, "sampling": SAMPLED}
    wrong = [f"{key} {row[key]:.2g}" for key, limit in limits.items() if not row[key] < limit]
    if "bf16" in row:
        limit = max(0.05, 3 * row.get("bf16_own", 0.0))
        wrong += [f"bf16 {row['bf16']:.2g} beside {row.get('bf16_own', 0.0):.2g}"] if not row["bf16"] < limit else []
    wrong += [f"{key} {row[key][:2]} of {len(row[key])}" for key in ("saved_unequal", "resumed_unequal") if row[key]]
    wrong += ["nothing moved"] if not row["moved"] else []
    return ("wrong", "; ".join(wrong)) if wrong else ("right", f"{row['learner']} | {row['sampler']}")


def rows() -> dict[str, dict[str, Any]]:
    """The newest row of each architecture."""
    if not LOG.exists():
        return {}
    return {row["architecture"]: row for row in map(json.loads, LOG.read_text(encoding="utf-8").splitlines())}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The Markdown page."""
    newest = next(reversed(found.values()))
    counts = Counter(verdict(row)[0] for row in found.values())
    lines = [
        "# Every causal architecture of transformers", "",
        f"Made by `python benchmarks/lm_architectures.py --table` from `{LOG.name}`. Each model is tiny and random. "
        "Numbers are the largest differences from the model's own forward pass in float32, one sequence at a time: of "
        "log-probabilities in nats, of the gradient relative to its size, and of log-probabilities of sampled tokens. "
        "bf16: the root of the mean squared error of log-probabilities with bfloat16 products, beside that of the "
        "model under autocast. Saved: `from_pretrained` reads equal weights. Resumed: two steps, a checkpoint and two "
        "more steps give the weights of four steps, bit for bit.  ",
        f"{len(found)} architectures: " + ", ".join(f"{n} {word}" for word, n in counts.most_common()) + ". "
        + ", ".join(f"{k} {v}" for k, v in sorted(newest["versions"].items())) + ".", "",
        "| architecture | verdict | learner | sampler | log-probs | gradient | sampling | bf16 (own) | saved | resumed "
        "|",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    others = ["", "## Not run", "", "| architecture | why |", "| --- | --- |"]
    for name, row in sorted(found.items()):
        word, what = verdict(row)
        if word in ("unbuilt", "refused", "failed"):
            others.append(f"| {name} | {word}: {what.replace('|', '/')} |")
            continue
        own = f"{row['bf16_own']:.1g}" if "bf16_own" in row else "fails"
        cells = [
            name, word, row["learner"], row["sampler"],
            *(f"{row[k]:.1g}" for k in ("log_probs", "gradient", "sampling")),
            f"{row['bf16']:.1g} ({own})" if "bf16" in row else "refused",
            *("no" if row[k] else "yes" for k in ("saved_unequal", "resumed_unequal")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *others]) + "\n"


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures by model_type; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, with one thread each")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument(
        "--show", action="store_true", help="run the architectures in this process and print their rows"
    )
    parser.add_argument("--table", action="store_true", help="write the table, measure nothing")
    given = parser.parse_args()
    names = given.names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if given.show:
        for name in names:
            print(json.dumps(check(name), indent=1))
        return
    if not given.table:
        known = {} if given.again else rows()
        measure([name for name in names if name not in known], given.jobs)
    PAGE.write_text(table(rows()), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
