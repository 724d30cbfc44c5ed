"""Samples of episodes of several turns, as a generation could have yielded them."""

import torch
from architectures import EPISODES, random_episodes
from torch import Tensor

from grouprl.lm.generate.samples import Samples, Turns
from grouprl.lm.prompts import Prompt

PLAYED = random_episodes(*EPISODES)
OF_EPISODE = torch.tensor([0, 0, 1, 2, 3, 4])
"""The history of the first was rewritten: two samples, each with a prompt of its own."""
CONTEXTS = [[7, 8, 9], *[g.prompt for g in PLAYED for _ in g.completions][1:]]
SPANS = [g.spans(j) for g in PLAYED for j in range(len(g.completions))]


def episodes(truncated: Tensor | None = None) -> Samples:
    """What a generation of PLAYED could have yielded; the advantages of turns differ."""
    completions = [list(c) for g in PLAYED for c in g.completions]
    n_tokens = [stop - start for spans in SPANS for start, stop in spans]
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.1, 0.9, 0.3, -0.2, 0.8, -0.5, -1.3, 0.6])
    cut = torch.zeros(5).bool() if truncated is None else truncated
    n, s, t = len(completions), sum(n_tokens), len(n_tokens)
    return Samples(
        prompts=[Prompt(i, "", {}, tuple(g.prompt)) for i, g in enumerate(PLAYED)],
        group=torch.tensor([i for i, g in enumerate(PLAYED) for _ in g.completions]),
        completions=completions, finished=~cut[OF_EPISODE],
        logp_sampled=torch.zeros(s), texts=[""] * n, rewards=torch.zeros(n, 1), returns=torch.zeros(n),
        advantages=torch.repeat_interleave(advantages, torch.tensor(n_tokens)), logp_old=torch.zeros(s),
        logp_ref=torch.zeros(s), known_old=torch.zeros(s).bool(), known_ref=torch.zeros(s).bool(),
        turns=Turns(
            spans=SPANS, contexts=CONTEXTS, episode=OF_EPISODE, rewards=torch.zeros(t).double(), advantages=advantages,
            finished=torch.ones(t).bool(), terminated=~cut, truncated=cut, messages=[[]] * 5, metrics=[{}] * 5,
            spoken=[[]] * 5,
        ),
    )  # fmt: skip
