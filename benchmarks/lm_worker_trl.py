"""TRL's GRPOTrainer on the works of lm_work.py, in a fresh process; the last line of stdout is the result as JSON.

    .venv-peers-lm/bin/python benchmarks/lm_worker_trl.py --work W1 --steps 7 --warmup 2 --variant best
    .venv-peers-lm/bin/python benchmarks/lm_worker_trl.py --work nth-word --seed 0 --seconds 300
    .venv-peers-lm/bin/python benchmarks/lm_worker_trl.py --work lengths          # what NATURAL_LENGTHS was drawn from

The script starts itself again with the allocator of the variant. ``--set micro_batch=4`` changes a variant.
``--device cuda`` measures on a GPU: all samples of a step at once, a clock that waits for it, and its memory.

Seconds of a step: ``generate`` is `model.generate` alone, ``learn`` all that follows until the optimizer step is done
(forward, backward, clipping, AdamW), ``step`` the whole step; what remains is tokenizing, rewards and advantages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lm_work
import measuring


@dataclass(frozen=True)
class Variant:
    """How TRL is run. The last two change its code from outside, the others are settings."""

    micro_batch: int = 0  # samples per forward and backward; 0: the best found for this work
    bf16: bool = True  # autocast, weights stay fp32
    attention: str = "sdpa"
    checkpointing: bool = False
    malloc: str = "tuned"
    weights: str = "float32"  # "bfloat16": no fp32 master weights, so steps of 1e-6 are mostly rounded away
    hold_casts: bool = False  # one autocast region around generate: weights are cast once, not again for every token
    score_completions_only: bool = False  # off CUDA, TRL 1.16 puts the prompt's positions through the LM head as well


VARIANTS = {
    "best": Variant(),  # the fastest that settings alone can reach
    "patched": Variant(hold_casts=True, score_completions_only=True),  # and with its code changed from outside
    "lean": Variant(micro_batch=8),  # the same with parts of 8 samples: less memory at nearly the same speed
    "frugal": Variant(micro_batch=1, checkpointing=True),  # the least memory
    "plain": Variant(micro_batch=8, checkpointing=True, malloc="plain"),  # what GRPOConfig() does by itself
    "low": Variant(weights="bfloat16"),  # bfloat16 weights and moments of the optimizer too
}
BEST_MICRO_BATCH = {"W1": 16, "W2": 32, "LONG": 4, "nth-word": 16}


class FixedLengths:
    """Logits processor: row ``i`` ends after ``lengths[i]`` tokens. One column is written at each token."""

    def __init__(self, lengths: list[int], limit: int, prompt_tokens: int, eos: int) -> None:
        self.prompt_tokens, self.eos = prompt_tokens, eos
        self.ends: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            if length < limit:
                self.ends.setdefault(length, []).append(row)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, self.eos] = -float("inf")
        ending = self.ends.get(input_ids.shape[1] - self.prompt_tokens + 1)
        if ending:
            scores[ending] = -float("inf")
            scores[ending, self.eos] = 0.0
        return scores


class Clock:
    """Seconds of each part of each step, from hooks around TRL's own functions."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = {}
        self.began = measuring.now()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its seconds added to ``name``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = measuring.now(self.device)
            result = function(*args, **kwargs)
            self.current[name] = self.current.get(name, 0.0) + measuring.now(self.device) - began
            return result

        return wrapped

    def end_step(self) -> None:
        now = measuring.now(self.device)
        part = self.current
        part["step"] = now - self.began
        part["learn"] = part["step"] - part.pop("rollout")
        part["peak_rss_mb"] = measuring.peak_rss_mb()
        self.steps.append(part)
        self.current, self.began = {}, now


# --- TRL --------------------------------------------------------------------------------------------------------------
def load(folder: Path, variant: Variant) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, variant.weights)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=variant.attention)
    return model, AutoTokenizer.from_pretrained(folder)


def build(
    variant: Variant, device: str, model: Any, tokenizer: Any, rows: list[dict[str, Any]],
    reward: Callable[..., Any] | None, **options: Any,
) -> Any:  # fmt: skip
    """A GRPOTrainer for batches of ``samples``; other ``options`` go to GRPOConfig."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    logging.set_verbosity_error()
    samples, optimizers = options.pop("samples"), options.pop("optimizers", (None, None))
    peft_config = options.pop("peft_config", None)
    environment_factory = options.pop("environment_factory", None)
    if samples % variant.micro_batch:
        raise SystemExit(f"micro_batch={variant.micro_batch} does not divide the {samples} samples of a batch")
    if variant.score_completions_only:
        utils._use_triton = lambda device: True  # in this module it only decides whether the prompt is scored
    scratch = tempfile.TemporaryDirectory(prefix="trl-")
    config = GRPOConfig(
        output_dir=scratch.name,
        use_cpu=device == "cpu",
        bf16=variant.bf16,
        gradient_checkpointing=variant.checkpointing,
        per_device_train_batch_size=variant.micro_batch,
        gradient_accumulation_steps=samples // variant.micro_batch,
        temperature=lm_work.TEMPERATURE,
        beta=0.0,
        loss_type="dapo",
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=optimizers,
        peft_config=peft_config,
        environment_factory=environment_factory,
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.scratch = scratch  # removed with it
    return trainer


def left_padded(tokenizer: Any, prompts: list[list[dict[str, str]]]) -> Any:
    """Token ids and attention mask of ``prompts`` for `model.generate`."""
    text = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
    return tokenizer(text, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def one_autocast(variant: Variant, device: str) -> Any:
    """The context generation runs in."""
    import torch

    return torch.autocast(device, torch.bfloat16) if variant.bf16 and variant.hold_casts else nullcontext()


def run_work(
    work: lm_work.Work, variant: Variant, steps: int, warmup: int, cache: Path, device: str, lora: int
) -> dict[str, Any]:
    """``steps`` optimizer steps, the first ``warmup`` of them not measured; of adapters of rank ``lora``, if not 0."""
    from transformers import LogitsProcessorList, TrainerCallback

    model, tokenizer = load(lm_work.model_folder(cache), variant)

    def count_tokens(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    rows = [{"prompt": p} for step in range(steps) for p in lm_work.prompts(work, step, count_tokens)]
    clock, tokens = Clock(device), []
    generate = model.generate

    def given_lengths(*args: Any, **kwargs: Any) -> Any:
        prompt_tokens = kwargs["input_ids"].shape[1]
        wanted = lm_work.lengths(work, len(tokens))
        processor = FixedLengths(wanted, work.max_tokens, prompt_tokens, tokenizer.eos_token_id)
        with one_autocast(variant, device):
            return generate(*args, **kwargs, logits_processor=LogitsProcessorList([processor]))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        got, wanted = [len(ids) for ids in completion_ids], lm_work.lengths(work, len(tokens))
        if got != wanted:
            raise RuntimeError(f"step {len(tokens)} should have completions of {wanted} tokens and has {got}")
        tokens.append(sum(got))
        return lm_work.rewards(work, len(tokens) - 1)

    class EndOfStep(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.began = measuring.now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    trainer = build(
        variant,
        device,
        model,
        tokenizer,
        rows,
        reward,
        samples=work.samples,
        num_generations=work.group,
        max_completion_length=work.max_tokens,
        learning_rate=lm_work.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        peft_config=lm_work.adapters(lora) if lora else None,
    )
    model.generate = clock.timed("generate", given_lengths)
    trainer._generate_and_score_completions = clock.timed("rollout", trainer._generate_and_score_completions)
    trainer.add_callback(EndOfStep())
    trainer.train()
    measured = clock.steps[warmup:]
    return {"work": work.name, "steps": measured, "completion_tokens": tokens[warmup:], "warmup": clock.steps[:warmup]}


# --- learning ---------------------------------------------------------------------------------------------------------
def run_task(variant: Variant, seed: int, seconds: float, cache: Path, device: str) -> dict[str, Any]:
    """Learn lm_work.TASK for ``seconds`` of training, evaluation not counted; prints a line of JSON per evaluation."""
    import torch
    from transformers import TrainerCallback

    hyper = lm_work.TASK
    model, tokenizer = load(lm_work.model_folder(cache), variant)
    task, train, held_out = lm_work.task_data(seed)
    generate = model.generate

    def cast_once(*args: Any, **kwargs: Any) -> Any:
        with one_autocast(variant, device):
            return generate(*args, **kwargs)

    def accuracy() -> float:
        was_training = model.training
        model.eval()
        inputs = left_padded(tokenizer, [row["prompt"] for row in held_out]).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=variant.bf16):
            out = generate(**inputs, max_new_tokens=hyper.max_tokens, do_sample=False)
        said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        model.train(was_training)
        return sum(task.score(reply, row) for reply, row in zip(said, held_out, strict=True)) / len(held_out)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = self.paused = 0.0
            self.curve: list[dict[str, float]] = []

        def look(self, step: int) -> float:
            now = measuring.now(device)
            trained = now - self.began - self.paused
            self.curve.append({"step": step, "seconds": trained, "accuracy": accuracy()})
            print(json.dumps({"seed": seed, **self.curve[-1]}), flush=True)
            self.paused += measuring.now(device) - now
            return trained

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = measuring.now(device)
            self.look(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % hyper.evaluate_every == 0:
                control.should_training_stop = self.look(state.global_step) >= seconds

    # An optimizer of our own, as the Trainer's warm-up starts from 0 and would spend its first step on nothing.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=hyper.learning_rate, betas=(0.9, hyper.beta2), weight_decay=0.0, fused=True
    )
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / hyper.warmup_steps))
    trainer = build(
        variant,
        device,
        model,
        tokenizer,
        train,
        task.reward,
        samples=hyper.prompts * hyper.group,
        num_generations=hyper.group,
        max_completion_length=hyper.max_tokens,
        max_grad_norm=hyper.max_grad_norm,
        scale_rewards="none",
        optimizers=(optimizer, warm),
        max_steps=hyper.max_steps,
        seed=seed,
    )
    model.generate = cast_once
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return {"work": "nth-word", "seed": seed, "curve": watch.curve, "hyperparameters": asdict(hyper)}


def run_lengths(cache: Path, count: int = 200) -> dict[str, Any]:
    """Lengths of ``count`` completions of W2's questions, sampled from the model: the source of NATURAL_LENGTHS."""
    import torch

    work = lm_work.WORKS["W2"]
    model, tokenizer = load(lm_work.model_folder(cache), Variant())
    torch.manual_seed(0)
    asked = [p for step in range(count // work.prompts) for p in lm_work.prompts(work, step, lambda _: 0)]
    inputs = left_padded(tokenizer, asked)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model.generate(**inputs, max_new_tokens=work.max_tokens, do_sample=True, temperature=1.0, top_k=0)
    ended = out[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id
    found = torch.where(ended.any(1), ended.int().argmax(1) + 1, work.max_tokens)
    return {"work": "lengths", "lengths": sorted(found.tolist())}


def changed(variant: Variant, settings: list[str], work: str, device: str) -> Variant:
    """``variant`` with ``name=value`` settings, and the micro-batch filled in."""
    types = {field.name: type(getattr(variant, field.name)) for field in fields(variant)}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in types or (types[name] is bool and value not in ("True", "False")):
            raise SystemExit(f"--set {setting} is not possible; it takes NAME=VALUE with a name of {', '.join(types)}")
        variant = replace(variant, **{name: value == "True" if types[name] is bool else types[name](value)})
    if device == "cpu" and not any(setting.startswith("bf16=") for setting in settings):
        import torch  # on a processor without instructions for bfloat16, products in float32 are the faster ones

        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        variant = replace(variant, bf16=variant.bf16 and fast)
    if device == "cuda":  # the allocators are those of the CPU's memory
        variant = replace(variant, malloc="plain")
        whole = lm_work.WORKS[work].samples if work in lm_work.WORKS else lm_work.TASK.prompts * lm_work.TASK.group
        return variant if variant.micro_batch else replace(variant, micro_batch=whole)
    return variant if variant.micro_batch else replace(variant, micro_batch=BEST_MICRO_BATCH.get(work, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, choices=[*lm_work.WORKS, "nth-word", "lengths"])
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are run and not measured")
    parser.add_argument("--variant", choices=list(VARIANTS), default="best")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one of the variant's")
    parser.add_argument("--lora", type=int, default=0, help="train low-rank adapters of this rank instead")
    parser.add_argument("--seed", type=int, default=0, help="nth-word: of prompts and sampling")
    parser.add_argument("--seconds", type=float, default=300.0, help="nth-word: seconds of training")
    parser.add_argument("--threads", type=int, help=f"default: {lm_work.THREADS}, on cuda {lm_work.GPU_THREADS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cache", type=Path, default=lm_work.CACHE, help="where the model's folder is")
    given = parser.parse_args()
    device = given.device
    variant = changed(VARIANTS[given.variant], given.set, given.work, device)
    lm_work.start_in(variant.malloc, given.threads or (lm_work.THREADS if device == "cpu" else lm_work.GPU_THREADS))
    if given.work == "lengths":
        result = run_lengths(given.cache)
    elif given.work == "nth-word":
        result = run_task(variant, given.seed, given.seconds, given.cache, device)
    else:
        result = run_work(
            lm_work.WORKS[given.work], variant, given.steps, given.warmup, given.cache, device, given.lora
        )
    versions = measuring.versions("trl", "transformers", "accelerate", "torch", "numpy")
    described = {"name": given.variant, **asdict(variant)}
    measuring.report({**result, **measuring.gpu(device), "variant": described, "versions": versions})


if __name__ == "__main__":
    main()
