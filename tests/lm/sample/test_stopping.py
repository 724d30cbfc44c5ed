"""Stop strings: which token completes one, and that every sampler ends with it, learns it and shows it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_runs
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grouprl.lm.models.tiny import build_tiny, tiny_tokenizer
from grouprl.lm.policy.policy import Policy
from grouprl.lm.sample.plain import PLAIN_STEPS, PlainSampler
from grouprl.lm.sample.stopping import Stops
from grouprl.lm.sample.streams import Stream
from grouprl.lm.sample.turns import Reply, Turn
from grouprl.lm.settings.config import GRPOConfig


def words() -> Any:
    """A byte-level tokenizer whose tokens are pieces of words, spaces, and single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["Ġa", "st", "stop", "op", "ops", "Ġst", "><", "</", "answer", "></"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate([*alphabet, *pieces])}, alphabet[0]))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def ids(tokenizer: Any, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("strings", "pieces", "ends"),
    [
        (["stop"], ["st", "op"], True),
        (["stop"], ["a", "stop"], True),
        (["stop"], ["st", "ops"], True),  # the token goes on behind it
        (["stop"], ["Ġst", "op"], True),
        (["stop"], ["st", "st"], False),
        (["stop"], ["st", "op", "a"], False),  # it was completed before
        (["</answer>"], ["</", "answer", "></"], True),
        (["</answer>"], ["</", "answer", "<"], False),
        (["b", "op"], ["st", "op"], True),
        (["a "], ["a", "Ġst"], True),  # a space that belongs to the next word
        (["é"], ["Ã", "©"], True),  # one character of two tokens
        (["é"], ["a", "Ã"], False),
    ],
)
def test_a_token_that_completes_a_string_ends_and_no_other(strings: list[str], pieces: list[str], ends: bool) -> None:
    tokenizer = words()
    stops, tokens = Stops(strings, tokenizer), ids(tokenizer, *pieces)
    assert stops.ends(tokens) is ends
    if ends:
        assert bool(stops.may_end(len(tokenizer) + 3)[tokens[-1]])
    assert bool(stops.may_end(len(tokenizer) + 3)[-1])  # a token that the tokenizer does not know


def test_most_tokens_need_no_look_at_the_text() -> None:
    tokenizer = words()
    may = Stops(["</answer>"], tokenizer).may_end(len(tokenizer))
    text = {piece: bool(may[i]) for piece, i in tokenizer.get_vocab().items()}
    assert not any(text[piece] for piece in ("a", "Ġa", "st", "stop", "</"))
    assert text["answer"] is False
    assert text["></"]
    assert text["><"]


def cut(said: str, strings: tuple[str, ...]) -> str:
    """A text up to the end of the first of the strings in it."""
    ends = [said.index(string) + len(string) for string in strings if string in said]
    return said[: min(ends)] if ends else said


STRINGS = ("a", "bc", "1+")


def drawn(**settings: Any) -> list[Any]:
    model, tokenizer = build_tiny(0)
    config = GRPOConfig(use_cpu=True, bf16=False, max_completion_length=24, **settings)
    policy = Policy(model, tokenizer, config)
    prompts = [tokenizer(text)["input_ids"] for text in ("abc", "ponm", "12")]
    return [policy.sample(prompts, 6, Stream(5)), tokenizer, policy, prompts]


@pytest.mark.parametrize("how", [{}, {"native": False}, {"attention": "plain"}])
def test_a_completion_ends_with_the_token_that_completes_a_string(how: dict[str, Any]) -> None:
    whole, tokenizer, *_ = drawn(**how)
    ended, *_ = drawn(**how, stop_strings=STRINGS)
    strings = 0
    for before, after in zip(whole, ended, strict=True):
        said = tokenizer.decode(before.ids)
        assert tokenizer.decode(after.ids) == cut(said, STRINGS)
        torch.testing.assert_close(after.logp, before.logp[: len(after.ids)])
        assert after.stopped == any(string in said for string in STRINGS)
        assert after.finished == (after.stopped or before.finished)
        strings += after.stopped
    assert strings > 3


@pytest.mark.parametrize("steps", PLAIN_STEPS)
def test_a_plain_sampler_ends_there_however_it_decodes(steps: Any) -> None:
    ended, tokenizer, policy, prompts = drawn(stop_strings=STRINGS)
    sampler = PlainSampler(policy.model, torch.float32, policy.sampler.end_ids, tokenizer.pad_token_id, steps)
    other = sampler.sample(prompts, 6, policy.sampling(), Stream(5))
    assert [(c.ids, c.finished, c.stopped) for c in other] == [(c.ids, c.finished, c.stopped) for c in ended]


def test_what_is_drawn_between_two_looks_is_left_out() -> None:
    wanted, _, policy, prompts = drawn(stop_strings=STRINGS)
    from grouprl.lm.sample import sampler

    before = sampler.STEPS_BETWEEN_LOOKS
    assert before > 1
    policy.sampler.recorder = SimpleNamespace()  # looks now and then; recording itself fails, and steps go on without
    policy.sampler._unrecorded = {(policy.sampling(), False)}
    got = policy.sample(prompts, 6, Stream(5))
    assert [(c.ids, c.finished) for c in got] == [(c.ids, c.finished) for c in wanted]


def test_no_string_ends_a_completion_before_min_new_tokens() -> None:
    ended, tokenizer, *_ = drawn(stop_strings=STRINGS, min_new_tokens=6)
    assert min(len(c.ids) for c in ended) >= 6
    assert any("a" in tokenizer.decode(c.ids[:5]) for c in ended)


class Hearing:
    """A partner that answers twice with a letter, and keeps what it was told."""

    def __init__(self) -> None:
        self.turns: dict[int, list[Turn]] = {}

    def reply(self, episode: int, turn: Turn) -> Reply:
        self.turns.setdefault(episode, []).append(turn)
        return Reply(over=True) if len(self.turns[episode]) == 3 else Reply(tiny_tokenizer()("p")["input_ids"])


@pytest.mark.parametrize("how", [{}, {"attention": "plain"}])
def test_a_turn_ends_there_too_and_a_string_of_an_earlier_turn_ends_no_later_one(how: dict[str, Any]) -> None:
    model, tokenizer = build_tiny(0)
    policy = Policy(
        model, tokenizer, GRPOConfig(use_cpu=True, bf16=False, max_completion_length=40, stop_strings=STRINGS, **how)
    )  # fmt: skip
    partner = Hearing()
    policy.sample_episodes([tokenizer("abc")["input_ids"]], 8, Stream(5), partner)
    turns = [turn for some in partner.turns.values() for turn in some]
    assert sum(turn.stopped for turn in turns) > 3
    for turn in turns:
        said = tokenizer.decode(turn.ids)
        assert turn.stopped == any(said.endswith(string) for string in STRINGS)
        assert cut(said, STRINGS) == said
        assert turn.closed == (turn.ids[-1] == tokenizer.eos_token_id)


def test_a_run_learns_from_what_ended_so_and_rewards_read_the_string(tmp_path: Path) -> None:
    read: list[str] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        read.extend(completions)
        return [float(len(text)) for text in completions]

    made = small_runs.trainer(
        tmp_path, reward=reward, stop_strings=["c"], max_completion_length=12, mask_truncated_completions=True
    )
    made.train()
    samples = made.last_samples
    assert samples is not None
    ended = [text for text in read if "c" in text]
    assert ended
    assert all(text.index("c") == len(text) - 1 for text in ended)
    for text, ids, finished in zip(samples.texts, samples.completions, samples.finished.tolist(), strict=True):
        if "c" in text:
            assert finished
            assert len(ids) == len(text)  # the string is a token like any other, and learned from
