"""grouprl on the works of lm_work.py, in a fresh process; the last line of stdout is the result as JSON.

    .venv/bin/python benchmarks/lm_worker_grouprl.py --work W1 --steps 7 --warmup 2
    .venv/bin/python benchmarks/lm_worker_grouprl.py --work nth-word --seed 0 --seconds 150
    .venv/bin/python benchmarks/lm_worker_grouprl.py --work W1 --without shared-prompts --without compiled-code

``--without`` takes one shortcut away, for the ablation table; it may be repeated. ``--device cuda`` measures on a GPU:
bfloat16 products, a clock that waits for it, and its memory.

Seconds of a step: ``generate`` is the sampler alone, ``learn`` all that follows the rewards until the optimizer step is
done, ``step`` the whole step; what remains is tokenizing, rewards and advantages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_work
import measuring

SHORTCUTS = {
    "shared-prompts": "each completion carries a copy of its prompt through the learner",
    "prompts-read-once": "the sampler reads and stores a prompt once per completion",
    "compiled-code": "torch operations only",
    "low-precision": "all products in float32",
    "kept-memory": "freed memory goes back to the system, and pages are small",
    "packed-attention": "the plain path: transformers' own generate, one completion after another in the learner",
}


def take_away(shortcuts: list[str]) -> dict[str, Any]:
    """Change the library from outside; the settings that the rest needs."""
    from grouprl.lm.policy.log_probs import LogProbs
    from grouprl.lm.sample import sampler
    from grouprl.lm.train import trainer

    settings: dict[str, Any] = {}
    if "shared-prompts" in shortcuts:
        together = LogProbs.micro_batches

        def alone(self: Any, prompts: Any, completions: Any, group: Any) -> Any:
            return together(self, [prompts[p] for p in group], completions, list(range(len(completions))))

        LogProbs.micro_batches = alone
    if "prompts-read-once" in shortcuts:
        once = sampler.Sampler.sample

        def repeated(self: Any, prompts: Any, group_size: int, *args: Any) -> Any:
            return once(self, [p for p in prompts for _ in range(group_size)], 1, *args)

        sampler.Sampler.sample = repeated
    if "compiled-code" in shortcuts:
        settings["native"] = False
    if "low-precision" in shortcuts:
        settings["bf16"] = False
    if "kept-memory" in shortcuts:
        trainer.use_huge_pages = lambda: None
    if "packed-attention" in shortcuts:
        settings["attention"] = "plain"
    return settings


def timed(clock: dict[str, float], name: str, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``function``, its seconds added to ``clock[name]``."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = measuring.now(device)
        result = function(*args, **kwargs)
        clock[name] = clock.get(name, 0.0) + measuring.now(device) - began
        return result

    return wrapped


def run_work(
    work: lm_work.Work, steps: int, warmup: int, settings: dict[str, Any], cache: Path, device: str, lora: int
) -> dict[str, Any]:
    """``steps`` optimizer steps, the first ``warmup`` of them not measured; of adapters of rank ``lora``, if not 0."""
    import torch
    from transformers import TrainerCallback

    from grouprl.lm import GRPOConfig, GRPOTrainer
    from grouprl.lm.models.load import load

    model, tokenizer = load(lm_work.model_folder(cache))

    def count_tokens(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    rows = [{"prompt": p} for step in range(steps) for p in lm_work.prompts(work, step, count_tokens)]
    tokens: list[int] = []
    ends: dict[str, Any] = {}
    end = tokenizer.eos_token_id

    def lengths_on_gpu(logits: Any, rows: Any, step: Any) -> Any:
        """What ``given_lengths`` does, without waiting for the GPU."""
        logits[:, end] = -float("inf")
        if work.natural:
            ending = (ends["at"][rows] == step + 1) & (step + 1 < work.max_tokens)
            logits.masked_fill_(ending[:, None], -float("inf"))[:, end].masked_fill_(ending, 0.0)
        return logits

    def given_lengths(logits: Any, rows: Any, drawn: Any) -> Any:
        wanted, step = lm_work.lengths(work, len(tokens)), int(drawn)
        logits[:, end] = -float("inf")
        for place, row in enumerate(rows.tolist()):
            if wanted[row] == step + 1 < work.max_tokens:
                logits[place] = -float("inf")
                logits[place, end] = 0.0
        return logits

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        got, wanted = [len(ids) for ids in completion_ids], lm_work.lengths(work, len(tokens))
        if got != wanted:
            raise RuntimeError(f"step {len(tokens)} should have completions of {wanted} tokens and has {got}")
        tokens.append(sum(got))
        return lm_work.rewards(work, len(tokens) - 1)

    clock: dict[str, float] = {}
    measured: list[dict[str, float]] = []

    class EndOfStep(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.clear()
            clock["began"] = measuring.now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step = measuring.now(device) - clock.pop("began")
            learn = step - clock.pop("rollout")
            measured.append({**clock, "step": step, "learn": learn, "peak_rss_mb": measuring.peak_rss_mb()})

    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model,
            reward,
            GRPOConfig(
                output_dir=scratch,
                prompts_per_step=work.prompts,
                num_generations=work.group,
                max_completion_length=work.max_tokens,
                learning_rate=lm_work.LEARNING_RATE,
                temperature=lm_work.TEMPERATURE,
                lr_scheduler_type="constant",
                shuffle_dataset=False,
                max_steps=steps,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device == "cpu",
                **settings,
            ),
            rows,
            processing_class=tokenizer,
            callbacks=[EndOfStep()],
            peft_config=lm_work.adapters(lora) if lora else None,
        )
        sample = trainer.policy.sample
        plain = not trainer.policy.packed

        def with_lengths(prompts: Any, group_size: int, generator: Any, given: Any = None) -> Any:
            if plain:  # generate has no hook here: a minimum gives the lengths of W1 and LONG
                from dataclasses import replace

                from grouprl.lm.policy.policy import sampling_settings

                how = replace(sampling_settings(trainer.args), min_new_tokens=work.max_tokens)
                return sample(prompts, group_size, generator, how)
            ends["at"] = torch.tensor(lm_work.lengths(work, len(tokens)), device=device)
            adjust = given_lengths if device == "cpu" else lengths_on_gpu
            return sample(prompts, group_size, generator, given, adjust)

        trainer.policy.sample = timed(clock, "generate", with_lengths, device)
        from grouprl.lm.generate.collect import Collector

        Collector.collect = timed(clock, "rollout", Collector.collect, device)
        trainer.train()
    return {
        "work": work.name,
        "steps": measured[warmup:],
        "completion_tokens": tokens[warmup:],
        "warmup": measured[:warmup],
    }


def run_task(seed: int, seconds: float, settings: dict[str, Any], cache: Path, device: str) -> dict[str, Any]:
    """Learn lm_work.TASK for ``seconds`` of training, evaluation not counted; prints a line of JSON per evaluation."""
    import torch
    from transformers import TrainerCallback

    from grouprl.lm import GRPOConfig, GRPOTrainer
    from grouprl.lm.models.load import load
    from grouprl.lm.train.evaluation import evaluate_greedily

    hyper = lm_work.TASK
    model, tokenizer = load(lm_work.model_folder(cache))
    task, train, held_out = lm_work.task_data(seed)
    curve: list[dict[str, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        began = paused = 0.0

        def look(self, step: int) -> float:
            now = measuring.now(device)
            trained = now - self.began - self.paused
            accuracy = evaluate_greedily(trainer.setup, source).accuracy
            curve.append({"step": step, "seconds": trained, "accuracy": accuracy})
            print(json.dumps({"seed": seed, **curve[-1]}), flush=True)
            self.paused += measuring.now(device) - now
            return trained

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = measuring.now(device)
            self.look(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % hyper.evaluate_every == 0:
                control.should_training_stop = self.look(state.global_step) >= seconds

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            prompts_per_step=hyper.prompts,
            num_generations=hyper.group,
            max_completion_length=hyper.max_tokens,
            max_grad_norm=hyper.max_grad_norm,
            scale_rewards="none",
            shuffle_dataset=False,
            max_steps=hyper.max_steps,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=device == "cpu",
            **settings,
        )
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=hyper.learning_rate, betas=(0.9, hyper.beta2), weight_decay=0.0, fused=True
        )
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / hyper.warmup_steps))
        trainer = GRPOTrainer(
            model, task.reward, config, train, processing_class=tokenizer, callbacks=[Watch()],
            optimizers=(optimizer, warm),
        )  # fmt: skip
        source = trainer.prompts(held_out, "held_out")
        trainer.train()
    return {"work": "nth-word", "seed": seed, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, choices=[*lm_work.WORKS, "nth-word"])
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are run and not measured")
    parser.add_argument("--without", action="append", default=[], choices=list(SHORTCUTS), help="one shortcut less")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of GRPOConfig")
    parser.add_argument("--lora", type=int, default=0, help="train low-rank adapters of this rank instead")
    parser.add_argument("--seed", type=int, default=0, help="nth-word: of prompts and sampling")
    parser.add_argument("--seconds", type=float, default=300.0, help="nth-word: seconds of training")
    parser.add_argument("--malloc", default="plain", help="as in lm_work.environment; grouprl asks for what it needs")
    parser.add_argument("--threads", type=int, help=f"default: {lm_work.THREADS}, on cuda {lm_work.GPU_THREADS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cache", type=Path, default=lm_work.CACHE, help="where the model's folder is")
    given = parser.parse_args()
    lm_work.start_in(given.malloc, given.threads or (lm_work.THREADS if given.device == "cpu" else lm_work.GPU_THREADS))
    settings = take_away(given.without)
    settings |= {name: json.loads(value) for name, value in (item.split("=", 1) for item in given.set)}
    if given.work == "nth-word":
        result = run_task(given.seed, given.seconds, settings, given.cache, given.device)
    else:
        result = run_work(
            lm_work.WORKS[given.work], given.steps, given.warmup, settings, given.cache, given.device, given.lora
        )
    versions = measuring.versions("grouprl", "transformers", "torch", "numpy")
    measuring.report({**result, **measuring.gpu(given.device), "without": given.without, "versions": versions,
                      "weights": lm_work.weights(given.cache)})  # fmt: skip


if __name__ == "__main__":
    main()
