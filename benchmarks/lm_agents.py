"""Seconds and memory of a GRPO step on episodes of several turns: grouprl beside TRL's ``environment_factory``.

    python benchmarks/lm_agents.py                              # both works, both sides in turn
    python benchmarks/lm_agents.py --work SHORT --rounds 3
    python benchmarks/lm_agents.py --side trl --work SHORT --steps 3 --warmup 1     # one process; JSON in its last line

Both sides play the same environment with the same weights, the same chat template and response template, the same turns
of the same lengths and the same rewards, and make one optimizer step of all samples. A turn is FREE sampled tokens and
then a tool call that is given token by token; the last turn is FREE sampled tokens and as many more. No token with "<"
is sampled, or the model would begin calls of its own: it has seen some. Each measurement
is a process of its own, and the two sides take turns. Results are appended to results/lm_agents.jsonl; the table of all
of them is printed.

| work | prompts | episodes each | turns | tokens of a turn | tokens of a first prompt |
| --- | --- | --- | --- | --- | --- |
| SHORT | 2 | 8 | 4 | FREE + call | a question, and the tool |
| LONG | 2 | 8 | 4 | FREE + call | 512, and the tool |
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import lm_work
import measuring

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "lm_agents.jsonl"
OURS = HERE.parent / ".venv" / "bin" / "python"
PEER = HERE.parent / ".venv-peers-lm" / "bin" / "python"
WORKS = {"SHORT": lm_work.WORKS["W1"], "LONG": lm_work.WORKS["LONG"]}
MICRO_BATCH = {"SHORT": 16, "LONG": 4}  # of TRL: the best found for one turn on prompts of these lengths
TURNS, FREE, BUDGET = 4, 16, 384
CALL = '<tool_call>\n{"name": "look", "arguments": {"place": 3}}\n</tool_call>'

CHAT_TEMPLATE = """
{%- if tools -%}
<|im_start|>system
You can call functions. They are:
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
To call one, write <tool_call>{"name": its name, "arguments": an object}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == "tool" -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls -%}
<|im_start|>assistant
{{ message.content }}
{%- for call in message.tool_calls -%}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>
{%- endfor -%}<|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}  # fmt: skip


class Shelf:
    """The environment, of TRL's shape: a shelf whose places can be looked at."""

    looked: ClassVar[list[int]] = []  # appending is safe from several threads
    ended = itertools.count()

    def reset(self, **_: Any) -> None:
        """Nothing has been looked at."""

    def look(self, place: int) -> str:
        """Look at a place of the shelf.

        Args:
            place: the number of the place, counted from 1.
        """
        Shelf.looked.append(place)
        return f"At place {place} there are a red apple, a heavy stone and a small silver bell."

    def get_reward(self) -> float:
        """Another number for each episode, so that no group has equal rewards."""
        return next(Shelf.ended) * 0.6180339887 % 1.0


class Turns:
    """Which token each turn goes on with: None while it is free."""

    def __init__(self, tokenizer: Any) -> None:
        self.end = int(tokenizer.eos_token_id)
        self.call = [*tokenizer(CALL, add_special_tokens=False)["input_ids"], self.end]
        self.marks = [i for token, i in tokenizer.get_vocab().items() if "<" in token]
        self.drawn = 0

    def given(self, turn: int, at: int) -> int | None:
        """The token at a place of a turn."""
        self.drawn += 1
        if at < FREE:
            return None
        if turn < TURNS - 1:
            return int(self.call[at - FREE])
        return None if at < FREE + len(self.call) - 1 else self.end

    def force(self, logits: Any, turns: list[tuple[int, int]]) -> Any:
        """Leave each row ``[n, V]`` the tokens that it may take, at its turn and its place there."""
        logits[:, self.marks] = -float("inf")
        for row, where in enumerate(turns):
            token = self.given(*where)
            if token is not None:
                logits[row] = -float("inf")
                logits[row, token] = 0.0
        return logits


def rows_of(work: lm_work.Work, steps: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of the dataset. A template without tools gives LONG its 512 tokens; the tool comes on top."""

    def count_tokens(messages: list[dict[str, str]]) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    return [{"prompt": p} for step in range(steps) for p in lm_work.prompts(work, step, count_tokens)]


def ready(tokenizer: Any) -> Any:
    """The tokenizer with the chat template and the response template of both sides."""
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE.removeprefix("\n"), RESPONSE_TEMPLATE
    return tokenizer


# --- one process ------------------------------------------------------------------------------------------------------
def watched(function: Any, name: str, clock: dict[str, float], first: Any = None) -> Any:
    """``function``, its seconds added to ``clock[name]``; ``first`` is called before it."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if first is not None:
            first()
        began = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - began
        return result

    return wrapped


class Books:
    """What each step took, for a callback of either side."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.steps, self.clock, self.began = turns, list[dict[str, float]](), dict[str, float](), 0.0

    def begin(self) -> None:
        """The first step begins."""
        self.began, self.turns.drawn, Shelf.looked = time.perf_counter(), 0, []

    def end_step(self) -> None:
        """A step has ended."""
        step = time.perf_counter() - self.began
        counted = {"drawn": self.turns.drawn, "calls": len(Shelf.looked), "peak_rss_mb": measuring.peak_rss_mb()}
        self.steps.append({**self.clock, "step": step, "learn": step - self.clock["rollout"], **counted})
        self.clock.clear()
        self.begin()


def callback(books: Books) -> Any:
    """The callback that keeps the books."""
    from transformers import TrainerCallback

    class Keeps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            books.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            books.end_step()

    return Keeps()


def run_grouprl(work: lm_work.Work, steps: int) -> Books:
    """``steps`` optimizer steps of grouprl."""
    from grouprl.lm import GRPOConfig, GRPOTrainer
    from grouprl.lm.models.load import load
    from grouprl.lm.sample import episodes

    model, tokenizer = load(lm_work.model_folder(lm_work.CACHE))
    turns = Turns(ready(tokenizer))
    books, draw = Books(turns), episodes._Game._draw

    def forced(game: Any, rows: Any, logits: Any) -> None:
        draw(game, rows, turns.force(logits, [(len(row.own.turns), len(row.own.ids) - row.own.start) for row in rows]))

    episodes._Game._draw = forced
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model,
            args=GRPOConfig(
                output_dir=scratch,
                prompts_per_step=work.prompts,
                num_generations=work.group,
                max_completion_length=BUDGET,
                learning_rate=lm_work.LEARNING_RATE,
                temperature=lm_work.TEMPERATURE,
                lr_scheduler_type="constant",
                shuffle_dataset=False,
                max_steps=steps,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows_of(work, steps, tokenizer),
            processing_class=tokenizer,
            callbacks=[callback(books)],
            environment_factory=Shelf,
        )
        policy = trainer.policy
        policy.sample_episodes = watched(policy.sample_episodes, "generate", books.clock)
        from grouprl.lm.generate.collect import Collector

        Collector.collect = watched(Collector.collect, "rollout", books.clock)
        trainer.train()
    return books


def run_trl(name: str, work: lm_work.Work, steps: int, given: list[str]) -> Books:
    """``steps`` optimizer steps of TRL."""
    from transformers import LogitsProcessorList

    import lm_worker_trl

    variant = lm_worker_trl.changed(lm_worker_trl.VARIANTS["best"], given, name, "cpu")
    model, tokenizer = lm_worker_trl.load(lm_work.model_folder(lm_work.CACHE), variant)
    turns = Turns(ready(tokenizer))
    books, generate, turn = Books(turns), model.generate, itertools.count()

    def forced(*args: Any, **kwargs: Any) -> Any:
        n, now = kwargs["input_ids"].shape[1], next(turn)
        more = [lambda ids, scores: turns.force(scores, [(now, ids.shape[1] - n)] * len(ids))]
        return generate(*args, **kwargs, logits_processor=LogitsProcessorList(more))

    def first_turn() -> None:
        nonlocal turn
        turn = itertools.count()

    trainer = lm_worker_trl.build(
        variant, "cpu", model, tokenizer, rows_of(work, steps, tokenizer), None, samples=work.samples,
        num_generations=work.group, max_completion_length=BUDGET, learning_rate=lm_work.LEARNING_RATE,
        lr_scheduler_type="constant", max_steps=steps, environment_factory=Shelf,
    )  # fmt: skip
    model.generate = watched(forced, "generate", books.clock)
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = watched(score, "rollout", books.clock, first_turn)
    trainer.add_callback(callback(books))
    trainer.train()
    return books


def run_one(given: argparse.Namespace) -> None:
    """One process, its result in the last line."""
    work, steps = WORKS[given.work[0]], given.steps + given.warmup
    lm_work.start_in("tuned", lm_work.THREADS)
    if given.side == "grouprl":
        books = run_grouprl(work, steps)
    else:
        micro_batch = [f"micro_batch={MICRO_BATCH[given.work[0]]}", *given.set]
        books = run_trl(given.work[0], work, steps, micro_batch)
    names = ("grouprl",) if given.side == "grouprl" else ("trl", "transformers", "accelerate")
    versions = measuring.versions(*names, "torch", "numpy")
    measuring.report({"work": given.work[0], "steps": books.steps[given.warmup :], "versions": versions})


# --- both sides -------------------------------------------------------------------------------------------------------
def compare(given: argparse.Namespace) -> None:
    """Both sides in turn on every work, appended to the results."""
    RESULTS.parent.mkdir(exist_ok=True)
    batch = time.strftime("%Y-%m-%d %H:%M")
    sides = {"grouprl": given.python, "trl": given.peer_python}
    for work, _, side in itertools.product(given.work, range(given.rounds), sides):
        counts = "--steps", str(given.steps), "--warmup", str(given.warmup)
        more = [part for setting in given.set for part in ("--set", setting)] if side == "trl" else []
        line = [str(sides[side]), str(Path(__file__)), "--side", side, "--work", work, *counts, *more]
        load = os.getloadavg()[0]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"worker failed ({done.returncode}): {' '.join(line)}\n{done.stderr[-2000:]}")
        result = {**json.loads(done.stdout.strip().splitlines()[-1]), "side": side, "batch": batch, "load_before": load}
        with RESULTS.open("a", encoding="utf-8") as file:
            row = {**result, "machine": measuring.machine(), "commit": measuring.commit()}
            file.write(json.dumps(row) + "\n")
        median = statistics.median(step["step"] for step in result["steps"])
        print(
            f"{work:5s} {side:8s} {median:7.2f} s a step, {result['steps'][-1]['peak_rss_mb'] / 1e3:.2f} GB", flush=True
        )


def table() -> str:
    """The newest batch of each work, as Markdown."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    newest = {row["work"]: row["batch"] for row in rows}
    lines = [
        "| work | side | generate (s) | learn (s) | step (s) | range of steps | steps | peak memory (GB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    factors = []
    for work, batch in newest.items():
        found: dict[str, tuple[float, float]] = {}
        for side in ("grouprl", "trl"):
            steps = [s for r in rows if (r["work"], r["batch"], r["side"]) == (work, batch, side) for s in r["steps"]]
            if not steps:
                continue
            generate, learn, step = (
                statistics.median(s[name] for s in steps) for name in ("generate", "learn", "step")
            )
            seconds, gb = [s["step"] for s in steps], max(s["peak_rss_mb"] for s in steps) / 1e3
            found[side] = step, gb
            lines.append(
                f"| {work} | {side} | {generate:.2f} | {learn:.2f} | {step:.2f} | "
                f"{min(seconds):.2f}-{max(seconds):.2f} | {len(steps)} | {gb:.2f} |"
            )
        if len(found) == 2:
            (ours, our_gb), (theirs, their_gb) = found["grouprl"], found["trl"]
            factors.append(f"| {work} | {theirs / ours:.1f} | 4 | {our_gb / their_gb:.2f} | 0.6 |")
    head = ["| work | times faster | aim | share of memory | aim |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*lines, "", *head, *factors])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=list(WORKS), help="default: all; may be repeated")
    parser.add_argument("--side", choices=["grouprl", "trl"], help="measure one side in this process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a process before those")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of TRL's variant, such as micro_batch=8"
    )
    parser.add_argument("--python", type=Path, default=OURS, help="what grouprl is installed in")
    parser.add_argument("--peer-python", type=Path, default=PEER, help="what TRL is installed in")
    given = parser.parse_args()
    given.work = given.work or list(WORKS)
    if given.side:
        run_one(given)
        return
    subprocess.run([str(given.python), str(HERE / "lm_work.py")], check=True)
    compare(given)
    print(table())


if __name__ == "__main__":
    main()
