"""A TRL script in a Ray TorchTrainer: Ray starts the processes, and grouprl takes the group that they have met in.

pip install ray, then: python examples/ray_train.py [PROCESSES]

Nothing in the training function differs from a script of one process: counts are those of the whole job.
"""

from __future__ import annotations

import sys
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """What each process runs."""
    from grouprl.lm import GRPOConfig, GRPOTrainer, tasks
    from grouprl.lm.models.tiny import build_tiny

    model, tokenizer = build_tiny(0)
    task = tasks.get("reverse", length=3)
    trainer = GRPOTrainer(
        model, task.reward, GRPOConfig(**settings), tasks.dataset(task, "train", 40, form="text"),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    print(f"rank {trainer.args.process_index} of {trainer.args.world_size}: {trainer.state.global_step} steps")


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    settings = {"output_dir": "/tmp/ray-grpo", "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 4,
                "max_steps": 3, "report_to": "none", "save_strategy": "no"}  # fmt: skip
    scaling = ScalingConfig(num_workers=processes)
    TorchTrainer(
        train, train_loop_config=settings, scaling_config=scaling, torch_config=TorchConfig(backend="gloo")
    ).fit()


if __name__ == "__main__":
    main()
