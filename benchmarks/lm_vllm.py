"""The built-in sampler beside vLLM on a CPU: tokens per second, mismatch, memory, and handing over weights.

Both sample the same prompts with the real SmolLM2 in bfloat16, two threads each, in turns. Mismatch is that of the
sampler's log-probabilities from transformers' own forward pass in float32, on what the sampler drew.

    python benchmarks/lm_vllm.py --out benchmarks/results/lm_vllm.md

It needs vLLM (docs/scale.md says how to install it) and takes less than ten minutes on a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch

from grouprl.lm import GRPOConfig
from grouprl.lm.engines.weights import hub_weights
from grouprl.lm.models.load import load
from grouprl.lm.packed.trial import own_pass, own_terms
from grouprl.lm.policy.policy import Policy
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Stream

SHAPES = {"16 x 32": (2, 8, 40, 32), "64 x 128": (8, 8, 40, 128), "64 x 64, prompts of 512": (8, 8, 512, 64)}
"""Prompts, completions of each, tokens of a prompt, tokens of a completion."""


def resident() -> float:
    """Megabytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def prompts_of(tokenizer: Any, n: int, tokens: int) -> list[list[int]]:
    """Prompts of text, all of one length, none of which begins as another one."""
    text = "Once there was a sailor who counted every island, and wrote down what grew there. " * 60
    ids = tokenizer(text)["input_ids"]
    return [ids[13 * i : 13 * i + tokens] for i in range(n)]


def timed(policy: Policy, shape: tuple[int, int, int, int], tokenizer: Any) -> tuple[float, list[Any], list[list[int]]]:
    """Seconds of one generation, what was drawn, and the prompts."""
    n, group, length, new = shape
    prompts = prompts_of(tokenizer, n, length)
    settings = SamplingSettings(new, min_new_tokens=new)  # all of one length, so that both have the same work
    began = time.perf_counter()
    drawn = policy.sampler.sample(prompts, group, settings, Stream(1))
    return time.perf_counter() - began, drawn, prompts


def mismatch(
    model: Any, drawn: list[Any], prompts: list[list[int]], group: int, most: int
) -> tuple[float, float, float]:
    """Mean and largest difference of log-probabilities, and the estimate k3 of the divergence, in nats a token."""
    some = range(0, len(drawn), max(1, len(drawn) // most))
    with own_pass(model):
        own = torch.cat([own_terms(model, prompts[i // group], drawn[i].ids).logp for i in some])
    apart = own - torch.cat([drawn[i].logp for i in some])
    return [float(apart.abs().mean()), float(apart.abs().max()), float((apart.exp() - 1 - apart).mean())]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each shape; medians are shown")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many shapes")
    parser.add_argument("--compared", type=int, default=16, help="completions whose log-probabilities are compared")
    parser.add_argument("--out", type=Path, help="a file for the table")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    model, tokenizer = load("smollm2")
    given = {"bf16": True, "use_cpu": True, "report_to": "none", "max_completion_length": 128}
    ours = Policy(model, tokenizer, GRPOConfig(**given))
    base = resident()
    began = time.perf_counter()
    theirs = Policy(model, tokenizer, GRPOConfig(**given, use_vllm=True, vllm_max_model_length=1024))
    started, memory = time.perf_counter() - began, resident() - base
    engine: Any = theirs.sampler
    transfers = []
    for _ in range(asked.rounds):
        began = time.perf_counter()
        with torch.no_grad():
            engine.engine.load(hub_weights(model))
        transfers.append(time.perf_counter() - began)
    rows = []
    for name, shape in list(SHAPES.items())[: asked.shapes]:
        seconds: dict[str, list[float]] = {"built in": [], "vLLM": []}
        last: dict[str, Any] = {}
        for turn in range(asked.rounds + 1):  # the first of each warms up
            for who, policy in (("built in", ours), ("vLLM", theirs)):
                taken, drawn, prompts = timed(policy, shape, tokenizer)
                last[who] = drawn, prompts
                if turn:
                    seconds[who].append(taken)
        for who in seconds:
            drawn, prompts = last[who]
            mean, most, kl = mismatch(model, drawn, prompts, shape[1], asked.compared)
            tokens = sum(len(c.ids) for c in drawn) / statistics.median(seconds[who])
            low, high = min(seconds[who]), max(seconds[who])
            rows.append(
                f"| {name} | {who} | {statistics.median(seconds[who]):.2f} ({low:.2f} to {high:.2f}) | {tokens:,.0f} | "
                f"{mean:.4f} | {most:.3f} | {kl:.5f} |"
            )
        gc.collect()
    table = "\n".join(
        [
            "# The built-in sampler beside vLLM",
            "",
            f"SmolLM2-135M, bfloat16, CPU, {torch.get_num_threads()} threads each, torch {torch.__version__}. Medians "
            f"of {asked.rounds} pairs in turns (smallest to largest). vLLM runs eagerly in this process, in blocks of "
            "32 tokens, and a generation of it includes handing over the weights. Log-probabilities are compared with "
            f"transformers in float32, on {asked.compared} completions. Made by `python benchmarks/lm_vllm.py`.",
            "",
            "| completions x tokens | sampler | seconds | tokens/s | mean difference | largest | KL (k3) |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Handing over the weights takes {statistics.median(transfers):.2f} s. Starting it takes {started:.0f} s, "
            f"and {memory:,.0f} MB beside a process of {base:,.0f} MB that has the model and the built-in sampler "
            f"({os.environ['VLLM_CPU_KVCACHE_SPACE']} GB of them are for keys and values, taken as they are used).",
            "",
        ]
    )
    print(table)
    if asked.out:
        asked.out.write_text(table)


if __name__ == "__main__":
    main()
