"""Each loss beside TRL's own, on the same completions: value, gradient and what is logged of the clip.

    .venv-peers-lm/bin/pip install --no-deps --editable .
    .venv-peers-lm/bin/python benchmarks/lm_losses.py

TRL's numbers come from its `GRPOTrainer._compute_loss`, which is handed log-probabilities instead of a model.
Both sides compute in float32, 20 draws of 8 completions a row. Writes results/lm_losses.md.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig as Theirs
from trl import GRPOTrainer

from grouprl.lm import GRPOConfig
from grouprl.lm.learn.metrics import StepSums, cut_metrics, sums_of
from grouprl.lm.learn.step import step_weights
from grouprl.objective import Fixed, Objective, policy_loss

RESULTS = Path(__file__).resolve().parent / "results" / "lm_losses.md"
LENGTHS = torch.tensor([3, 1, 7, 4, 4, 2, 6, 5])
DRAWS = 20

ROWS: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
    {"loss_type": "cispo", "epsilon_high": 1.3},
    {"loss_type": "sapo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
    {"loss_type": "vespo"},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.0},
    {"loss_type": "dapo", "beta": 0.1},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.05},
]


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, logp_old, logp_ref [S] and advantages [N]."""
    generator = torch.Generator().manual_seed(seed)
    steps = int(LENGTHS.sum())
    old = -3 * torch.rand(steps, generator=generator) - 0.5
    logp, ref = (old + 0.15 * torch.randn(steps, generator=generator) for _ in range(2))
    return logp, old, ref, torch.randn(len(LENGTHS), generator=generator)


def padded(x: Tensor) -> Tensor:
    """[N, T] from [S], with zeros."""
    out = x.new_zeros(len(LENGTHS), int(LENGTHS.max()))
    out[torch.arange(out.shape[1]) < LENGTHS[:, None]] = x
    return out


def theirs(settings: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """TRL's loss, its gradient [S] and its metrics."""
    logp, old, ref, advantages = draw(seed)
    args = Theirs(
        output_dir="unused", report_to="none", use_cpu=True, bf16=False, use_bias_correction_kl=True, **settings
    )
    leaf = logp.requires_grad_()
    mask = padded(torch.ones_like(logp))
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        args=args, loss_type=args.loss_type, importance_sampling_level=args.importance_sampling_level, beta=args.beta,
        epsilon_low=args.epsilon, epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        off_policy_mask_threshold=args.off_policy_mask_threshold, top_entropy_quantile=1.0, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, max_completion_length=args.max_completion_length,
        current_gradient_accumulation_steps=1, model=torch.nn.Identity(), _metrics={"train": metrics},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        get_gamma_weights=GRPOTrainer.get_gamma_weights, get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded(leaf), padded(torch.ones_like(leaf)), None),
    )  # fmt: skip
    args.steps_per_generation = 1
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": padded(old), "ref_per_token_logps": padded(ref),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = MethodType(GRPOTrainer._compute_loss, trainer)(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, {name: values[-1] for name, values in metrics.items()}


def ours(settings: dict[str, Any], seed: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The same by grouprl."""
    logp, old, ref, advantages = draw(seed)
    objective = Objective.of(GRPOConfig(use_cpu=True, bf16=False, **settings))
    leaf = logp.requires_grad_()
    weights = step_weights(objective, LENGTHS, torch.ones(len(LENGTHS), dtype=torch.bool))
    kept = ref if objective.beta > 0 else None
    fixed = Fixed(torch.repeat_interleave(advantages, LENGTHS), weights, old, kept, LENGTHS)
    terms = policy_loss(objective, leaf, fixed)
    (gradient,) = torch.autograd.grad(terms.loss, leaf)
    sums = StepSums()
    sums.add(sums_of(objective, terms, torch.ones_like(logp), LENGTHS))
    metrics = cut_metrics(objective, sums, len(logp), len(LENGTHS), all_active=True)
    return terms.loss.detach(), gradient, metrics


def main() -> None:
    """Compare every row and write the table."""
    lines = []
    for settings in ROWS:
        apart, steep, logged = 0.0, 0.0, 0.0
        for seed in range(DRAWS):
            (a, da, ma), (b, db, mb) = theirs(settings, seed), ours(settings, seed)
            apart = max(apart, float((a - b).abs() / a.abs().clamp(min=1e-3)))
            steep = max(steep, float((da - db).norm() / da.norm()))
            logged = max([logged, *(abs(ma[name] - mb[name]) for name in mb)])
        said = ", ".join(f"`{name}={value}`" for name, value in settings.items())
        lines.append(f"| {said} | {apart:.1e} | {steep:.1e} | {logged:.1e} |")
        print(lines[-1])
    text = (
        "# Losses beside TRL's\n\n"
        f"`python benchmarks/lm_losses.py`, TRL {version('trl')}, torch {version('torch')}: the largest difference "
        f"over {DRAWS} draws of {len(LENGTHS)} completions of {int(LENGTHS.sum())} tokens in all, float32.\n\n"
        "| settings | loss, relative | gradient, relative | clip metrics |\n| --- | --- | --- | --- |\n"
    )
    RESULTS.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
