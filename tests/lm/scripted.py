"""Partners that follow a script, and what must hold of the episodes that are sampled with them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

import torch
from architectures import EOS, VOCABULARY, naive_log_probs, random_ids

from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.turns import Reply, Sampled, Turn

ENDS = tuple(range(EOS, VOCABULARY, 6))
"""One token in six ends a turn."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPTS = [random_ids(n, seeded(n)) for n in (5, 1, 9, 3)]


class Scripted:
    """Says other things in each episode and turn, of unequal lengths, and some of it late.

    Args:
        turns: episode i has ``1 + i % turns``. anew: in which turns it begins a new sample.
        wait: seconds that a reply takes, by episode and turn.
    """

    def __init__(self, turns: int = 4, anew=(), wait=lambda episode, turn: 0.0) -> None:
        self.turns, self.anew, self.wait = turns, anew, wait
        self.heard: dict[int, list[Turn]] = defaultdict(list)
        self.said: dict[int, list[Reply]] = defaultdict(list)
        self.threads: set[int] = set()

    def reply(self, episode: int, turn: Turn) -> Reply:
        self.threads.add(threading.get_ident())
        at = len(self.heard[episode])
        self.heard[episode].append(turn)
        time.sleep(self.wait(episode, at))
        if at == episode % self.turns:
            reply = Reply(over=True)
        else:
            reply = Reply(random_ids(1 + (3 * episode + 5 * at) % 8, seeded(100 * episode + at)), anew=at in self.anew)
        self.said[episode].append(reply)
        return reply


def check(model, prompt: list[int], samples: list[Sampled], partner: Scripted, episode: int) -> None:
    """The samples hold what was said in order, and the log-probabilities of one forward pass over each."""
    heard, said = iter(partner.heard[episode]), iter(partner.said[episode])
    for k, sample in enumerate(samples):
        assert sample.prompt == prompt
        with torch.no_grad():
            wanted = naive_log_probs(model, sample.prompt, sample.ids)
        own = torch.cat([wanted[start:stop] for start, stop in sample.turns])
        torch.testing.assert_close(sample.logp, own, rtol=0, atol=1e-4)
        assert sample.logp.dtype == torch.float32
        assert len(sample.turns) == len(sample.finished)
        assert sample.turns[0][0] == 0
        assert sample.turns[-1][1] == len(sample.ids)
        end = None
        for (start, stop), finished in zip(sample.turns, sample.finished, strict=True):
            if end is not None:
                assert sample.ids[end:start] == list(next(said).ids)
            turn = next(heard)
            assert (sample.ids[start:stop], finished) == (turn.ids, turn.finished)
            assert finished is (turn.ids[-1] in ENDS)
            assert not set(turn.ids[:-1]) & set(ENDS)
            end = stop
        if k < len(samples) - 1:
            reply = next(said)
            assert reply.anew
            prompt = list(reply.ids)
    assert next(heard, None) is None


HOW = SamplingSettings(60, max_turn_tokens=7)


def same(one: list[list[Sampled]], other: list[list[Sampled]]) -> bool:
    """Whether two samplings agree bit for bit."""

    def flat(found: list[list[Sampled]]) -> list:
        return [(s.prompt, s.ids, s.turns, s.finished, s.logp.tolist()) for samples in found for s in samples]

    return flat(one) == flat(other)


def without_a_token(rows):
    """Rows that lose the first token of a stretch."""

    class Forgets(rows):
        def append(self, slots, stretches):
            return super().append(slots, [s[1:] if len(s) > 1 else s for s in stretches])

    return Forgets
