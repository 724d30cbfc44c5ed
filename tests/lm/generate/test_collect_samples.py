"""A generation, on a scripted policy whose every completion is known beforehand."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from grouprl.lm.generate.collect import Collector
from grouprl.lm.generate.completions import CompletionPlayer, sample_and_score
from grouprl.lm.generate.estimate import groups_with_signal
from grouprl.lm.generate.scored_groups import describe_scored, evaluation_metrics
from grouprl.lm.prompts import Prompt, PromptOrder
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.sample.rows import Completion
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.ranks import ALONE

EOS = 0


class Script:
    """Says what it was told to: for each prompt, in the order they come, the tokens of its completions.

    A completion that ends with EOS has ended by itself. The divergence to its reference is 0.1 per token.
    """

    def __init__(self, *groups: list[list[int]]) -> None:
        self.groups, self.asked, self.ranks = list(groups), [], ALONE
        self.log_probs = SimpleNamespace(
            micro_batches=lambda prompts, completions, group, turns: [], without_gradient=self._log_probs
        )
        self.share = lambda sizes, group: list(range(len(sizes)))
        self.together = nullcontext
        self.reference = SimpleNamespace(
            in_place=nullcontext, log_probs=lambda parts, lengths: self._log_probs(parts, lengths) - 0.1
        )

    def sample(self, prompts, group_size, generator, settings=None):
        self.asked.append([list(p) for p in prompts])
        out = []
        for _ in prompts:
            group = self.groups.pop(0)
            assert len(group) == group_size
            out += [Completion(ids, torch.full((len(ids),), -0.5), ids[-1] == EOS) for ids in group]
        return out

    def _log_probs(self, parts, lengths):
        return torch.full((int(lengths.sum()),), -1.0)


class Tokenizer:
    def batch_decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return [" ".join(str(i) for i in row if i != EOS) for row in ids]


class Source:
    """Prompt i reads [i, i, ..] of i + 1 tokens; no end of them."""

    size, streamed = None, True

    def __getitem__(self, i: int) -> Prompt:
        return Prompt(i, f"prompt {i}", {"answer": i}, tuple([i] * (i + 1)))


def first_token(completion_ids, **_):
    """The reward is the first token."""
    return [float(ids[0]) for ids in completion_ids]


def collector(script: Script, rewards=first_token, **settings) -> Collector:
    config = GRPOConfig(**{"num_generations": 2, "max_completion_length": 4, "scale_rewards": "none", **settings})
    player = CompletionPlayer(script, Tokenizer(), RewardCaller(rewards, config.reward_weights), config)
    return Collector(player, Source(), PromptOrder(None), config, torch.Generator())


def constant(token: int) -> list[list[int]]:
    """A group that teaches nothing."""
    return [[token, EOS], [token, EOS]]


SPREAD = [[1, EOS], [3, 9, EOS]]


def test_a_generation_holds_the_samples_prompt_after_prompt() -> None:
    script = Script(SPREAD, [[2, 5, 5, 5], [2, EOS]])
    samples, _ = collector(script).collect(2, 2)
    assert script.asked == [[[0], [1, 1]]]
    assert samples.completions == [[1, EOS], [3, 9, EOS], [2, 5, 5, 5], [2, EOS]]
    assert samples.group.tolist() == [0, 0, 1, 1]
    assert [p.index for p in samples.prompts] == [0, 1]
    assert samples.lengths.tolist() == [2, 3, 4, 2]
    assert len(samples) == 4
    assert samples.finished.tolist() == [True, True, False, True]
    assert samples.texts == ["1", "3 9", "2 5 5 5", "2"]
    assert samples.rewards.tolist() == [[1.0], [3.0], [2.0], [2.0]]
    assert samples.returns.tolist() == [1.0, 3.0, 2.0, 2.0]
    assert samples.advantages.tolist() == [-1.0] * 2 + [1.0] * 3 + [0.0] * 6
    assert samples.logp_sampled.tolist() == [-0.5] * 11
    assert not samples.known_old.any()
    assert not samples.known_ref.any()


def test_the_metrics_of_a_generation_by_hand() -> None:
    _, metrics = collector(Script(SPREAD, [[2, 5, 5, 5], [2, EOS]])).collect(2, 2)
    assert metrics == pytest.approx(
        {
            "completions/mean_length": 11 / 4,
            "completions/min_length": 2,
            "completions/max_length": 4,
            "completions/clipped_ratio": 1 / 4,
            "completions/mean_terminated_length": 7 / 3,
            "completions/min_terminated_length": 2,
            "completions/max_terminated_length": 3,
            "reward": 2,
            "reward_std": math.sqrt(2 / 3),  # of 1, 3, 2, 2
            "frac_reward_zero_std": 0.5,
            "rewards/first_token/mean": 2,
            "rewards/first_token/std": math.sqrt(2 / 3),
            "num_tokens": 11 + 2 * (1 + 2),  # prompts once per completion
        }
    )


def test_if_no_completion_has_ended_their_lengths_are_0() -> None:
    _, metrics = collector(Script([[1, 5, 5, 5], [2, 5, 5, 5]])).collect(1, 2)
    assert metrics["completions/clipped_ratio"] == 1.0
    for name in ("mean", "min", "max"):
        assert metrics[f"completions/{name}_terminated_length"] == 0.0


def test_rewards_are_weighed_and_where_a_function_does_not_apply_it_counts_for_nothing() -> None:
    def rarely(completion_ids, **_):
        return [4.0 if ids[0] == 3 else None for ids in completion_ids]

    script = Script(SPREAD)
    samples, metrics = collector(script, [first_token, rarely], reward_weights=(1.0, 0.5)).collect(1, 2)
    assert samples.returns.tolist() == [1.0, 5.0]
    assert math.isnan(samples.rewards[0, 1])
    assert samples.advantages.tolist() == [-2.0] * 2 + [2.0] * 3
    assert (metrics["rewards/rarely/mean"], metrics["rewards/rarely/std"]) == (4.0, 0.0)
    assert metrics["reward"] == 3.0


def test_reward_functions_see_texts_tokens_and_columns_and_log() -> None:
    seen = {}

    def reward(prompts, completions, completion_ids, answer, log_extra, log_metric, trainer_state):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, state=trainer_state)
        log_extra("parsed", ["a", "b"])
        log_metric("seen", 7)
        return [0.0, 1.0]

    samples, metrics = collector(Script(SPREAD), reward).collect(1, 2, state="state")
    assert seen == {
        "prompts": ["prompt 0"] * 2, "completions": ["1", "3 9"], "ids": [[1, EOS], [3, 9, EOS]], "answer": [0, 0],
        "state": "state",
    }  # fmt: skip
    assert samples.extras == {"parsed": ["a", "b"]}
    assert metrics["seen"] == 7.0


def test_tokens_and_prompts_go_on_from_one_generation_to_the_next() -> None:
    script = Script(SPREAD, SPREAD)
    maker = collector(script)
    maker.collect(1, 2)
    _, metrics = maker.collect(1, 2)
    assert script.asked == [[[0]], [[1, 1]]]
    assert metrics["num_tokens"] == 2 * 5 + 2 * 1 + 2 * 2


# --- dynamic sampling -------------------------------------------------------------------------------------------------


def test_groups_without_a_signal_are_replaced_by_further_prompts() -> None:
    script = Script(constant(1), SPREAD, constant(2), [[5, EOS], [6, EOS]], [[7, EOS], [9, EOS]])
    samples, metrics = collector(script, dynamic_sampling=True).collect(3, 2)
    # three prompts, then two for the two that failed, none of which fails
    assert [len(asked) for asked in script.asked] == [3, 2]
    assert [p.index for p in samples.prompts] == [1, 3, 4]
    assert samples.completions[2:] == [[5, EOS], [6, EOS], [7, EOS], [9, EOS]]
    assert samples.advantages.tolist() == [-1.0] * 2 + [1.0] * 3 + [-0.5] * 2 + [0.5] * 2 + [-1.0] * 2 + [1.0] * 2
    assert metrics["dynamic_sampling/batches"] == 2
    assert metrics["frac_reward_zero_std"] == 0.0
    assert metrics["num_tokens"] == (4 + 5 + 4) + 2 * (1 + 2 + 3) + (4 + 4) + 2 * (4 + 5)


@pytest.mark.parametrize(
    ("rewards", "settings", "wanted"),
    [
        ([[[1, 0], [0, 2]], [[1, 1], [1, 1]]], {}, [False, False]),
        ([[[1, 0], [0, 2]], [[1, 1], [1, 1]]], {"multi_objective_aggregation": "normalize_then_sum"}, [True, False]),
        ([[[0.1, 0.4], [0.3, 0.0]]], {}, [False]),  # but for rounding
        ([[[1, 0], [1, 0], [0, 0]], [[1, 0], [0, 0], [0, 0]]], {"advantage": "pass_at_k"}, [False, True]),
        ([[[0, 0], [2, 0]], [[float("nan"), 2], [1, float("nan")]]], {"scale_rewards": "batch"}, [True, False]),
    ],
)
def test_a_group_has_a_signal_if_its_rewards_give_an_advantage(rewards: list, settings: dict, wanted: list) -> None:
    values, size = torch.tensor(rewards, dtype=torch.float64), len(rewards[0])
    config = GRPOConfig(num_generations=size, prompts_per_step=1, **settings)
    found = groups_with_signal(config, values.flatten(0, 1), torch.tensor([1.0, 0.5]).double(), size)
    assert found.tolist() == wanted


def test_a_batch_with_signal_everywhere_is_not_drawn_again() -> None:
    script = Script(SPREAD, SPREAD)
    samples, metrics = collector(script, dynamic_sampling=True).collect(2, 2)
    assert metrics["dynamic_sampling/batches"] == 1
    assert [p.index for p in samples.prompts] == [0, 1]


@pytest.mark.parametrize("cap", [1, 3])
def test_at_the_cap_groups_without_a_signal_fill_the_batch(cap: int) -> None:
    groups = [constant(1), SPREAD, constant(2)] + [constant(10 + i) for i in range(10)]
    script = Script(*groups)
    samples, metrics = collector(script, dynamic_sampling=True, dynamic_sampling_max_batches=cap).collect(3, 2)
    assert metrics["dynamic_sampling/batches"] == cap == len(script.asked)
    assert [len(asked) for asked in script.asked] == [3, 2, 2][:cap]
    assert [p.index for p in samples.prompts] == [1, 0, 2]  # what has a signal comes first
    assert samples.completions[:2] == SPREAD
    assert samples.advantages.tolist() == [-1.0] * 2 + [1.0] * 3 + [0.0] * 8
    assert len(samples) == 6


def test_columns_logged_in_several_rounds_stay_with_their_completions() -> None:
    calls = []

    def reward(completion_ids, log_extra, **_):
        calls.append(1)
        log_extra("first", [ids[0] for ids in completion_ids])
        if len(calls) == 2:
            log_extra("late", [ids[0] for ids in completion_ids])
        return [float(ids[0]) for ids in completion_ids]

    script = Script(constant(1), SPREAD, [[5, EOS], [6, EOS]])
    samples, _ = collector(script, reward, dynamic_sampling=True).collect(2, 2)
    assert samples.extras["first"] == [1, 3, 5, 6]
    assert samples.extras["late"] == [None, None, 5, 6]


def test_metrics_logged_in_several_rounds_are_averaged() -> None:
    def reward(completion_ids, log_metric, **_):
        for ids in completion_ids:
            log_metric("first", ids[0])
        return [float(ids[0]) for ids in completion_ids]

    _, metrics = collector(Script(constant(1), SPREAD, [[5, EOS], [6, EOS]]), reward, dynamic_sampling=True).collect(
        2, 2
    )
    assert metrics["first"] == pytest.approx((1 + 1 + 1 + 3 + 5 + 6) / 6)


# --- what changes the reward ------------------------------------------------------------------------------------------


def test_completions_near_the_longest_allowed_lose_some_reward() -> None:
    script = Script([[1, EOS], [1, 9, EOS], [1, 9, 9, EOS], [1, 9, 9, 9]])
    samples, metrics = collector(script, soft_overlong_cache=2, num_generations=4).collect(1, 4)
    # 0 up to 2 tokens, 1/2 at 3, 1 at 4
    assert samples.returns.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert metrics["reward"] == 0.375
    assert metrics["rewards/first_token/mean"] == 1.0
    assert samples.advantages[0] == 0.625


def test_the_divergence_may_be_taken_from_the_reward() -> None:
    script = Script(SPREAD)
    samples, _ = collector(script, beta=0.5, kl_in="reward", kl_estimator="k1").collect(1, 2)
    # 0.5 * 0.1 per token: returns 1 - 0.1 and 3 - 0.15
    a = (3 - 0.15 - 1 + 0.1) / 2
    assert samples.advantages.tolist() == pytest.approx([-a] * 2 + [a] * 3, abs=1e-6)
    assert samples.returns.tolist() == [1.0, 3.0]
    assert bool(samples.known_old.all() and samples.known_ref.all())
    assert samples.logp_old.tolist() == [-1.0] * 5
    assert samples.logp_ref.tolist() == pytest.approx([-1.1] * 5)
    samples.known_old[0] = False
    assert bool(samples.known_ref.all())  # two masks, not one


def test_a_divergence_in_the_reward_gives_credit_token_by_token_where_the_estimator_does() -> None:
    script = Script([[1, 5, EOS]], [[1, EOS]])
    samples, _ = collector(
        script, beta=1.0, kl_in="reward", kl_estimator="k1", advantage="reinforce_pp", num_generations=1
    ).collect(2, 1)
    to_go = torch.tensor([0.7, 0.8, 0.9, 0.8, 0.9])
    expected = (to_go - to_go.mean()) / to_go.std()
    torch.testing.assert_close(samples.advantages, expected, rtol=1e-4, atol=1e-4)


def test_completions_can_be_judged_without_being_learned_from() -> None:
    script = Script(SPREAD)
    drawn = sample_and_score(
        script, Tokenizer(), RewardCaller(first_token), [Source()[0]], 2, torch.Generator(), None, None
    )  # fmt: skip
    assert drawn.texts == ["1", "3 9"]
    assert drawn.rewards.values.tolist() == [[1.0], [3.0]]


def test_the_names_of_an_evaluations_numbers_are_known_beforehand():
    script = Script([[1, EOS], [2, EOS]])
    drawn = sample_and_score(
        script, Tokenizer(), RewardCaller([first_token, first_token]), [Source()[0]], 2, torch.Generator()
    )
    assert set(describe_scored([drawn])) == set(evaluation_metrics(["first_token", "first_token_2"]))


@pytest.mark.parametrize("cut", [False, True])
def test_rewards_read_special_tokens_but_for_those_that_end_or_fill(cut):
    """With skip_special_tokens they read what they read in TRL."""
    words = ["</s>", "<pad>", "<think>", "one", "two"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<think>"]
    )
    seen = []

    def reward(completions, completion_ids, **_):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    script = Script([[2, 3, 0], [2, 1, 4]])
    sample_and_score(
        script, tokenizer, RewardCaller(reward), [Source()[0]], 2, torch.Generator(), skip_special_tokens=cut
    )
    assert seen == [("one" if cut else "<think> one", [2, 3, 0]), ("two" if cut else "<think> two", [2, 1, 4])]


RESPONSES = {
    "defaults": {"role": "assistant"}, "start_anchor": "<start> assistant",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "content": {"close_pattern": r"<end>\s*", "content": "text"},
    },
}  # fmt: skip


def as_judged(prompt, response_template, *completions):
    """What a reward function reads of completions in words, the last of which ends them."""
    words = ["<end>", "<pad>", "<start>", "<think>", "</think>", "user", "assistant", "go", "yes", "no"]
    ids = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    tokenizer.response_template = response_template
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [0.0] * len(completions)

    opening = "<start> user go <end> <start> assistant"
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        opening = f"{opening} {prompt[-1]['content']}"
    row = Prompt(0, prompt, {}, tuple(ids[word] for word in opening.split()))
    script = Script([[ids[word] for word in said.split()] for said in completions])
    drawn = sample_and_score(script, tokenizer, RewardCaller(reward), [row], len(completions), torch.Generator())
    assert drawn.texts == [said.removesuffix(" <end>") for said in completions]
    return seen


def test_a_response_template_makes_messages_of_completions_of_conversations() -> None:
    """The same messages as in TRL 1.16, for these completions."""
    asked, said = [{"role": "user", "content": "go"}], ("<think> no </think> yes <end>", "no no", "<think> no")
    assert as_judged(asked, RESPONSES, *said) == [
        [{"role": "assistant", "reasoning_content": "no", "content": "yes"}],
        [{"role": "assistant", "content": "no no"}],
        [{"role": "assistant", "reasoning_content": "no", "content": ""}],
    ]  # fmt: skip
    assert as_judged(asked, None, said[0])[0][0]["content"] == "<think> no </think> yes"
    assert as_judged("go", RESPONSES, said[0]) == ["<think> no </think> yes"]
    begun = [*asked, {"role": "assistant", "content": "<think> no"}]
    assert as_judged(begun, RESPONSES, "</think> yes <end>")[0][0]["content"] == "yes"


def test_a_completion_that_a_response_template_cannot_read_is_text() -> None:
    asked = [{"role": "user", "content": "go"}]
    assert as_judged(asked, {"fields": 3}, "yes <end>") == [[{"role": "assistant", "content": "yes"}]]
