"""GRPO in one page: one loop that teaches a network to balance a pole and a language model to follow its prompt.

    python examples/grpo_in_one_page.py [SEED]

The objective is equation 3 of DeepSeekMath, https://arxiv.org/abs/2402.03300, to be maximised:

    J = mean over samples i of 1/n_i sum over steps t of ( min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL )

    rho = pi(a | s) / pi_old(a | s)        how much likelier the action has become since it was sampled
    A   = (R_i - mean R) / std R           return R_i compared with the returns of its group: no critic is needed
    KL  = an estimate of KL(pi || pi_ref)  how far the policy has moved from a frozen reference

A sample is an episode or a completion; a step is an action or a token. Shapes are in brackets: P groups (starts or
prompts) of G samples make N = P G samples of n_1..n_N steps, stored end to end without padding: S = n_1 + ... + n_N
steps in all. K is the number of actions, or of tokens in the vocabulary.
"""

import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers import LlamaConfig, LlamaForCausalLM

from grouprl.objective import clipped, last_index, outcome, sample_mean, sampled_kl_loss, segment_sum


class Batch(NamedTuple):
    """What the current policy has sampled. The two halves below differ in how they make it, and in nothing else."""

    logits: Callable[[nn.Module], Tensor]  # takes a model, gives [S, K]: its logits at every step
    actions: Tensor  # [S] the action (or token) that was sampled
    rewards: Tensor  # [S]
    lengths: Tensor  # [N] n_i
    group: Tensor  # [N] which group a sample belongs to, 0..P-1

    def log_probs(self, model: nn.Module) -> Tensor:
        """[S]: log pi(a | s) of the sampled actions."""
        return Categorical(logits=self.logits(model)).log_prob(self.actions)


# --- GRPO -------------------------------------------------------------------------------------------------------------
def update(model: nn.Module, reference: nn.Module, optimizer, batch: Batch, epochs: int, beta: float) -> None:
    """Take `epochs` gradient steps on the objective of one batch."""
    advantages = outcome(batch.rewards, batch.lengths, batch.group)  # [S] A, the same at every step of a sample
    weights = sample_mean(batch.lengths)  # [S] 1 / (N n_i)
    with torch.no_grad():
        logp_old = batch.log_probs(model)  # [S]
        logp_ref = batch.log_probs(reference)  # [S]
    for _ in range(epochs):
        logp = batch.log_probs(model)  # [S]; rho is 1 in the first epoch, so the clip acts from the second on
        losses = clipped(logp, logp_old, advantages, 0.2, 0.2)  # [S] -min(rho A, clip(rho) A)
        losses = losses + beta * sampled_kl_loss(logp, logp_ref, "k3", logp_old)  # [S] the gradient is that of the KL
        optimizer.zero_grad()
        (weights * losses).sum().backward()  # []
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def train(model, sample: Callable[[int], Batch], updates: int, learning_rate: float, epochs: int, beta: float):
    """Sample a batch, learn from it, repeat. Returns the mean return of every batch."""
    reference, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), learning_rate)
    means = []
    for i in range(updates):
        with torch.no_grad():
            batch = sample(i)
        means.append(float(segment_sum(batch.rewards, batch.lengths).mean()))  # of [N] returns
        if i % 10 == 0 or i == updates - 1:
            print(f"  update {i:2d}: mean return {means[-1]:6.2f}")
        update(model, reference, optimizer, batch, epochs, beta)
    return means


# --- An environment: a group is G episodes from the same start --------------------------------------------------------
def episodes(model: nn.Module, envs: list[gym.Env], group: Tensor, seed: int) -> Batch:
    """Play one episode in each of the N environments; the same seed gives a group the same start."""
    states = [env.reset(seed=seed + int(g))[0] for env, g in zip(envs, group, strict=True)]  # N of [4]
    steps, alive = [[] for _ in envs], list(range(len(envs)))
    while alive:
        observations = torch.tensor([states[i].tolist() for i in alive])  # [alive, 4]
        actions = Categorical(logits=model(observations)).sample()  # [alive]
        for i, observation, action in zip(tuple(alive), observations, actions, strict=True):
            states[i], reward, terminated, truncated, _ = envs[i].step(int(action))
            steps[i].append((observation, action, torch.tensor(reward)))
            if terminated or truncated:
                alive.remove(i)
    packed = [step for episode in steps for step in episode]  # S of (observation [4], action [], reward [])
    observations, actions, rewards = map(torch.stack, zip(*packed, strict=True))  # [S, 4], [S], [S]
    lengths = torch.tensor([len(episode) for episode in steps])  # [N]
    return Batch(lambda model: model(observations), actions, rewards, lengths, group)


def learn_cartpole(updates: int = 30, starts: int = 4, size: int = 8, seed: int = 0) -> list[float]:
    """P = 4 starts, G = 8 episodes of each; the return is the number of steps the pole stays up, 500 at most."""
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))  # to [S, 2]
    envs = [gym.make("CartPole-v1") for _ in range(starts * size)]
    group = torch.arange(starts).repeat_interleave(size)  # [N]
    # beta = 0: the untrained network is nothing to stay close to.
    return train(model, lambda i: episodes(model, envs, group, 1000 * seed + starts * i), updates, 5e-3, 4, 0.0)


# --- A language model: a group is G completions of the same prompt ----------------------------------------------------
WORDS, END, LONGEST = "abcd1234.", 8, 6  # the vocabulary, the token that ends a completion, the most tokens of one


def score(prompt: str, completion: str) -> float:
    """The prompt "b3" asks for "bbb."; the score is the share of places at which answer and completion agree."""
    answer = prompt[0] * int(prompt[1]) + "."
    return sum(a == b for a, b in zip(answer, completion, strict=False)) / max(len(answer), len(completion))


def completions(model: nn.Module, prompts: list[str], group: Tensor) -> Batch:
    """Complete each of the N prompts, token by token, and score the completions."""
    tokens = torch.tensor([[WORDS.index(word) for word in prompt] for prompt in prompts])  # [N, 2]
    for _ in range(LONGEST):
        logits = model(tokens).logits[:, -1]  # [N, K]
        tokens = torch.cat([tokens, Categorical(logits=logits).sample()[:, None]], 1)  # [N, 2 + tokens so far]
    kept = (tokens[:, 1:-1] != END).cumprod(1).bool()  # [N, LONGEST] tokens that no end comes before
    lengths = kept.sum(1)  # [N]
    texts = ["".join(WORDS[t] for t in row[:n]) for row, n in zip(tokens[:, 2:].tolist(), lengths, strict=True)]
    rewards = torch.zeros(int(lengths.sum()))  # [S] 0 but at the last token, which gets the score
    rewards[last_index(lengths)] = torch.tensor([score(p, text) for p, text in zip(prompts, texts, strict=True)])
    # The logits at a token say what comes after it: those of the completion begin at the prompt's last token.
    return Batch(lambda model: model(tokens).logits[:, 1:-1][kept], tokens[:, 2:][kept], rewards, lengths, group)


def learn_language(updates: int = 100, size: int = 16) -> list[float]:
    """P = 16 prompts, G = 16 completions of each; the return is the score, 1 at most."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes))  # random weights: [N, T] to logits [N, T, K]
    prompts = [letter + number for letter in "abcd" for number in "1234" for _ in range(size)]  # N
    group = torch.arange(len(prompts)) // size  # [N]
    return train(model, lambda i: completions(model, prompts, group), updates, 1e-3, 2, 0.01)


def main(seed: int = 0) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # models this small are fastest on one
    print("CartPole:")
    learn_cartpole(seed=seed)
    print("Language model:")
    learn_language()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
