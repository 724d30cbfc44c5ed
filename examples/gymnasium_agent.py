"""A language model plays an environment of Gymnasium as it ships: observations become words, and words actions.

python examples/gymnasium_agent.py
"""

from __future__ import annotations

from typing import Any

from grouprl.lm import GRPOConfig, GRPOTrainer, text_environment
from grouprl.lm.models.tiny import build_tiny


def say(observation: Any) -> str:
    """One letter for each of the 16 places of the lake, because the model of this example reads only letters."""
    return "abcdefghijklmnop"[int(observation)]


def parse(text: str) -> int | None:
    """One of four digits; None for what is no action."""
    return "0123".index(text) if text and text in "0123" else None


def main() -> None:
    lake = text_environment(
        "FrozenLake-v1", env_kwargs={"is_slippery": False, "desc": ["SSSS", "SHSH", "SSSH", "HSSG"]},
        obs_to_text=say, action_parser=parse, instructions="", form="text", max_turns=12, invalid_reward=-0.1,
    )  # fmt: skip
    model, tokenizer = build_tiny(seed=0)
    config = GRPOConfig(
        output_dir="runs/lake", prompts_per_step=8, num_generations=16, max_turn_length=1, max_completion_length=40,
        learning_rate=1e-3, max_steps=150, scale_rewards="none", logging_steps=10, save_strategy="no",
        report_to="none",
    )  # fmt: skip
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, args=config, environment_factory=lake)
    trainer.train()
    curve = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"mean return: {curve[0]:.2f} at first, {curve[-1]:.2f} at last")


if __name__ == "__main__":
    main()
