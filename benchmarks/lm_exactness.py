"""How exact grouprl's numbers are on SmolLM2-135M-Instruct, beside transformers alone in float32 and under autocast.

    python benchmarks/lm_exactness.py            # ten draws of each kind: about five minutes
    python benchmarks/lm_exactness.py --table    # write the table of what was measured

The measure of everything is the naive way: transformers' own forward pass in float32, one sequence after the other, no
padding, no cache, the softmax over all logits, torch's gradients. Of that, per draw:

- log-probabilities of the completions' tokens: the largest difference, and the root of the mean square;
- the gradient of ``sum(w * logp)``, with weights ``w`` of one normal number per completion, as advantages are: norm of
  the difference of all parameters' gradients, relative to the norm of the gradient.

Four ways are measured: grouprl in float32 and with bfloat16 products, the naive way under bfloat16 autocast, and what
grouprl's sampler says of the tokens that it draws, with bfloat16 products.

Kinds of draws: ``sampled``, questions and what the model says to them; ``random``, completions of random tokens, which
the model finds unlikely; ``long``, a prompt of 512 tokens and what the model says to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lm_work
import measuring

RESULTS = Path(__file__).resolve().parent / "results"
LOG, PAGE = RESULTS / "lm_exactness.json", RESULTS / "lm_exactness.md"
KINDS = {"sampled": (2, 4, 32, "W1"), "random": (2, 4, 32, "W1"), "long": (1, 4, 32, "LONG")}
"""Prompts, completions of each, most tokens of a completion, whose prompts."""
TITLES = {
    "float32": "grouprl, float32",
    "bfloat16": "grouprl, bfloat16",
    "autocast": "transformers, bfloat16 autocast",
    "sampler": "grouprl's sampler, bfloat16",
}
NUMBERS = {"largest": "log-prob, largest", "rms": "log-prob, RMS", "gradient": "gradient, relative"}


class Draw:
    """Prompts, the completions of each, and a weight per completion; everything is measured on these."""

    def __init__(self, prompts: list[list[int]], completions: list[list[int]], group: list[int], seed: int) -> None:
        import torch

        self.prompts, self.completions, self.group = prompts, completions, group
        self.lengths = torch.tensor([len(c) for c in completions])
        noise = torch.randn(len(completions), generator=torch.Generator().manual_seed(seed))
        self.weights = noise.repeat_interleave(self.lengths)


def naive(model: Any, draw: Draw, autocast: bool) -> tuple[Any, dict[str, Any]]:
    """Log-probabilities ``[S]`` and gradients, one sequence after the other."""
    import torch

    model.zero_grad(set_to_none=True)
    parts = []
    weights = draw.weights.split(draw.lengths.tolist())
    for index, completion, weight in zip(draw.group, draw.completions, weights, strict=True):
        prompt = draw.prompts[index]
        ids = torch.tensor([[*prompt, *completion]])
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logp = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        (weight * logp).sum().backward()
        parts.append(logp.detach())
    return torch.cat(parts), gradients(model)


def ours(policy: Any, draw: Draw) -> tuple[Any, dict[str, Any]]:
    """The same by grouprl's log_probs."""
    import torch

    from grouprl.lm.policy.log_probs import steps_of

    policy.model.zero_grad(set_to_none=True)
    found = torch.zeros(int(draw.lengths.sum()))
    log_probs = policy.log_probs
    with log_probs.learning():
        for part in log_probs.micro_batches(draw.prompts, draw.completions, draw.group):
            steps = steps_of(part.samples, draw.lengths)
            logp = log_probs.evaluate(part).logp
            (draw.weights[steps] * logp).sum().backward()
            found[steps] = logp.detach()
    return found, gradients(policy.model)


def gradients(model: Any) -> dict[str, Any]:
    """Gradients by name; the model keeps none."""
    out = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out


def errors(found: Any, wanted: Any) -> dict[str, float]:
    """The numbers of one draw, by way of comparison with ``wanted``."""
    logp = (found[0] - wanted[0]).double()
    out = {"largest": float(logp.abs().max()), "rms": float(logp.square().mean().sqrt())}
    if found[1]:
        if found[1].keys() != wanted[1].keys():
            raise RuntimeError(f"gradients of different parameters: {found[1].keys() ^ wanted[1].keys()}")
        difference = sum(float((found[1][name] - g).double().square().sum()) for name, g in wanted[1].items())
        out["gradient"] = (difference / sum(float(g.double().square().sum()) for g in wanted[1].values())) ** 0.5
    return out


def draws(kind: str, policy: Any, tokenizer: Any, count: int) -> Iterator[tuple[Draw, Any]]:
    """``count`` draws, and what the sampler said of their tokens, or None where it did not draw them."""
    import torch

    from grouprl.lm.sample.draw import SamplingSettings

    def encode(messages: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    n_prompts, n_each, n_tokens, work = KINDS[kind]
    for seed in range(count):
        texts = lm_work.prompts(lm_work.WORKS[work], seed, lambda messages: len(encode(messages)))[:n_prompts]
        prompts = [encode(text) for text in texts]
        group = [p for p in range(n_prompts) for _ in range(n_each)]
        generator = torch.Generator().manual_seed(seed)
        said = None
        if kind == "random":
            ids = torch.randint(0, len(tokenizer), (len(group), n_tokens), generator=generator)
            completions = [
                [int(i) for i in row[: int(n_tokens * (0.5 + 0.5 * g / len(group)))]] for g, row in enumerate(ids)
            ]
        else:
            drawn = policy.sampler.sample(prompts, n_each, SamplingSettings(n_tokens, temperature=1.0), generator)
            completions, said = [c.ids for c in drawn], torch.cat([c.logp for c in drawn])
        yield Draw(prompts, completions, group, seed), said


def measure(count: int, cache: Path) -> dict[str, Any]:
    """Everything, in this process."""
    import torch

    from grouprl.lm import GRPOConfig
    from grouprl.lm.models.load import load
    from grouprl.lm.policy.policy import Policy

    torch.set_num_threads(lm_work.THREADS)
    model, tokenizer = load(lm_work.model_folder(cache))
    model.eval()
    policies = {
        name: Policy(model, tokenizer, GRPOConfig(bf16=name == "bfloat16", use_cpu=True))
        for name in ("float32", "bfloat16")
    }
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for kind in KINDS:
        for draw, said in draws(kind, policies["bfloat16"], tokenizer, count):
            wanted = naive(model, draw, autocast=False)
            row = {name: errors(ours(policy, draw), wanted) for name, policy in policies.items()}
            row["autocast"] = errors(naive(model, draw, autocast=True), wanted)
            if said is not None:
                row["sampler"] = errors((said, {}), wanted)
            found.setdefault(kind, []).append(row)
            print(kind, {way: {k: f"{v:.2g}" for k, v in numbers.items()} for way, numbers in row.items()}, flush=True)
    versions = measuring.versions("grouprl", "torch", "transformers")
    return {"machine": measuring.machine(), "commit": measuring.commit(), "versions": versions, "draws": found}


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def table(data: dict[str, Any]) -> str:
    """The Markdown page."""
    count = len(next(iter(data["draws"].values())))
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data["versions"].items()))
    lines = [
        "# Exactness on SmolLM2-135M-Instruct", "",
        f"Made by `python benchmarks/lm_exactness.py --table` from `{LOG.name}`: differences from transformers' own "
        "forward and backward pass in float32, one sequence after the other. Median (range) of "
        f"{count} draws of each kind; what is drawn and compared is said in `lm_exactness.py`.  ",
        f"{data['machine']['cpu']}, {data['machine']['cores']} cores; {versions}.",
    ]  # fmt: skip
    for kind, rows in data["draws"].items():
        lines += ["", f"## {kind}", "", "| way | " + " | ".join(NUMBERS.values()) + " |", "| --- | --- | --- | --- |"]
        for way, title in TITLES.items():
            if way in rows[0]:
                cells = [spread([row[way][n] for row in rows]) if n in rows[0][way] else "" for n in NUMBERS]
                lines.append(f"| {title} | " + " | ".join(cells) + " |")
        ratios = [spread([row["bfloat16"][n] / row["autocast"][n] for row in rows]) for n in NUMBERS]
        lines.append("| *grouprl, bfloat16, divided by autocast* | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10, help="of each kind")
    parser.add_argument("--cache", type=Path, default=lm_work.CACHE)
    parser.add_argument("--table", action="store_true", help="write the table, measure nothing")
    given = parser.parse_args()
    if not given.table:
        LOG.write_text(json.dumps(measure(given.draws, given.cache), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(table(json.loads(LOG.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
