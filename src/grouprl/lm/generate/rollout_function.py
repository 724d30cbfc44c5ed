"""A function of the user's that samples in the place of the trainer: TRL's ``rollout_func``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grouprl.errors import GrouprlError, TrainingError, error_text, shown
from grouprl.lm.generate.completions import as_messages, texts_of
from grouprl.lm.generate.episodes import Episode, overlong
from grouprl.lm.generate.play import EpisodeGroups, samples_of_groups
from grouprl.lm.generate.samples import Samples
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.arguments import copied
from grouprl.lm.rewards.call import RewardCaller, total
from grouprl.lm.rewards.returned import plain_float
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.sample.turns import Sampled
from grouprl.lm.settings.config import GRPOConfig
from grouprl.machine.torch_defaults import torch_defaults
from grouprl.objective.user_functions import TensorFunction
from grouprl.runs.watchdog import Watch

RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]
_REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
_KNOWN = (*_REQUIRED, "logprob_token_ids", "env_mask")


class RolloutPlayer:
    """Plays by a function ``(prompts, trainer)``, which is given each prompt once for every completion that is wanted.

    It returns a mapping with an entry for each of them: ``prompt_ids``, ``completion_ids``, ``logprobs`` (None: the
    trainer computes them), perhaps ``env_mask`` (1 for tokens of the model, 0 for those it was told), and further
    columns, which go to the reward functions: a list or an array with an entry for each, or something else for all.

    Args:
        policy: learns. tokenizer: decodes. rewards: score. function: the function.

    Attributes:
        trainer: what the function is given; set when the trainer is complete.
    """

    def __init__(
        self, policy: Policy, tokenizer: Any, rewards: RewardCaller, config: GRPOConfig, function: RolloutFunction
    ) -> None:
        self.policy, self.tokenizer, self.rewards, self.config = policy, tokenizer, rewards, config
        self.function, self.names = function, rewards.names
        self.trainer: Any = None
        self._watch = Watch("rollout_func")
        self._vocabulary = int(policy.model.get_input_embeddings().weight.shape[0])

    def draw(
        self, prompts: list[Prompt], group_size: int, stream: Stream | Draws, numbers: Sequence[int],
        settings: SamplingSettings | None = None, state: Any = None,
    ) -> EpisodeGroups:  # fmt: skip
        """As `Player.draw`. Draws are the function's own, so a run is reproducible as far as these are."""
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        output = self._call([copied(row.prompt) for row in rows])
        completions = [
            _ids(ids, f"completion_ids of completion {i} of rollout_func", self._vocabulary)
            for i, ids in enumerate(output["completion_ids"])
        ]
        sampled = [self._sampled(output, i, ids) for i, ids in enumerate(completions)]
        self._fill(sampled)
        extra = {
            name: column if _is_column(column) else [column] * len(rows)
            for name, column in output.items()
            if name not in _KNOWN
        }
        rows = [
            replace(row, columns={**row.columns, **{name: column[i] for name, column in extra.items()}})
            for i, row in enumerate(rows)
        ]
        ends = set(self.policy.sampler.end_ids)
        whole = [Completion(ids, s.logp, ids[-1] in ends) for ids, s in zip(completions, sampled, strict=True)]
        texts = texts_of(whole, self.tokenizer, self.config.skip_special_tokens)
        said = as_messages(texts, rows, whole, self.tokenizer, self.config.skip_special_tokens)
        judged = self.rewards(rows, said, completions, state)
        returns = total(judged.values, self.rewards.weights).tolist()
        episodes = [
            Episode(
                start=replace(prompts[i // group_size], ids=tuple(s.prompt)), group=i // group_size, samples=[s],
                rewards=[*[0.0] * (len(s.turns) - 1), returns[i]], terminated=s.finished[-1],
                truncated=not s.finished[-1], states=[None] * len(s.turns), messages=_messages(rows[i], texts[i]),
                spoken=[len(_messages(rows[i], texts[i])) - 1],
            )
            for i, s in enumerate(sampled)
        ]  # fmt: skip
        return EpisodeGroups(prompts, group_size, episodes, texts, judged, self.rewards.weights)

    def returns(self, groups: EpisodeGroups) -> Tensor:
        """As `Player.returns`."""
        return groups.returns + overlong(groups.completions, self.config)

    def samples(self, groups: EpisodeGroups, own: TensorFunction | None) -> Samples:
        """As `Player.samples`."""
        return replace(samples_of_groups(groups, self.policy, self.config, own), sampled_elsewhere=True)

    def judged_by(self, rewards: RewardCaller) -> RolloutPlayer:
        """As `Player.judged_by`."""
        return RolloutPlayer(self.policy, self.tokenizer, rewards, self.config, self.function)

    def close(self) -> None:
        """As `Player.close`: there is nothing."""

    def _call(self, prompts: list[Any]) -> Mapping[str, Any]:
        try:
            with self.policy.sampler.ready(), torch_defaults(), self._watch:
                output = self.function(prompts, self.trainer)
        except GrouprlError:
            raise
        except Exception as error:
            raise TrainingError(f"rollout_func raised {error_text(error)}") from error
        wanted = f"a mapping with {', '.join(_REQUIRED)}, each with {len(prompts)} entries, one for each prompt"
        if not isinstance(output, Mapping):
            raise TrainingError(f"rollout_func returned {shown(output)}; return {wanted}")
        for name in _REQUIRED:
            if name not in output:
                raise TrainingError(f"rollout_func returned no {name!r}; return {wanted}")
        for name, column in output.items():
            if column is None and name in ("logprobs", "logprob_token_ids", "env_mask"):
                continue
            if name not in _KNOWN and not _is_column(column):
                continue
            n = len(column) if hasattr(column, "__len__") else None
            if n != len(prompts):
                advice = wanted if name in _KNOWN else f"a list of {len(prompts)} entries as {name!r}"
                raise TrainingError(
                    f"rollout_func returned {shown(column)} as {name!r} for {len(prompts)} prompts; return {advice}"
                )
        return output

    def _sampled(self, output: Mapping[str, Any], i: int, ids: list[int]) -> Sampled:
        """What is learned from: nothing can be learned from what the model was told after its last turn."""
        where = f"of completion {i} of rollout_func"
        prompt = _ids(output["prompt_ids"][i], f"prompt_ids {where}", self._vocabulary)
        mask = output.get("env_mask")
        own = [True] * len(ids) if mask is None else [bool(entry) for entry in mask[i]]
        if len(own) != len(ids) or not any(own):
            raise TrainingError(
                f"env_mask {where} has {len(own)} entries, {sum(own)} of them not 0, for {len(ids)} tokens; give 1 for "
                "each token of the model, of which there must be one, and 0 for each other one"
            )
        changes = [0, *(t for t in range(1, len(ids)) if own[t] != own[t - 1]), len(ids)]
        turns = [(start, stop) for start, stop in pairwise(changes) if own[start]]
        last = turns[-1][1]
        ends = set(self.policy.sampler.end_ids)
        logp = self._log_probs(output, i, ids, where)
        kept = torch.cat([logp[start:stop] for start, stop in turns])
        return Sampled(prompt, ids[:last], turns, kept, [ids[stop - 1] in ends for _, stop in turns])

    @staticmethod
    def _log_probs(output: Mapping[str, Any], i: int, ids: Sequence[int], where: str) -> Tensor:
        """``[n]`` float32, NaN where the function gives none."""
        if output["logprobs"] is None or output["logprobs"][i] is None:
            return torch.full((len(ids),), torch.nan)
        given, candidates = output["logprobs"][i], output.get("logprob_token_ids")
        if len(given) != len(ids):
            raise TrainingError(f"logprobs {where} has {len(given)} entries for {len(ids)} tokens; give one for each")
        found = []
        for t, entry in enumerate(given):
            if isinstance(entry, list | tuple):  # several candidates for a token
                tokens = [] if candidates is None else list(candidates[i][t])
                entry = entry[tokens.index(ids[t])] if ids[t] in tokens else entry[0]
            value = math.nan if entry is None else plain_float(entry)
            if value is None or math.isinf(value):
                raise TrainingError(f"logprobs {where} has {shown(entry)} for token {t}; give a finite number, or None")
            found.append(value)
        return torch.tensor(found, dtype=torch.float32)

    def _fill(self, sampled: list[Sampled]) -> None:
        """Compute the log-probabilities that are not there, as the policy learns."""
        missing = [i for i, s in enumerate(sampled) if bool(torch.isnan(s.logp).any())]
        if not missing:
            return
        of = [sampled[i] for i in missing]
        log_probs, spans = self.policy.log_probs, [s.turns for s in of]
        batches = log_probs.micro_batches([s.prompt for s in of], [s.ids for s in of], list(range(len(of))), spans)
        lengths = torch.tensor([len(s.logp) for s in of])
        computed = torch.split(log_probs.without_gradient(batches, lengths).cpu(), lengths.tolist())
        for i, s, logp in zip(missing, of, computed, strict=True):
            sampled[i] = replace(s, logp=torch.where(torch.isnan(s.logp), logp.float(), s.logp))


def _is_column(value: Any) -> bool:
    """Whether a further column has an entry for each completion; anything else, as in TRL, is the same for all."""
    if hasattr(value, "ndim"):
        return bool(value.ndim)
    indexed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return indexed and not isinstance(value, str | bytes | Mapping)


def _ids(given: Any, what: str, vocabulary: int) -> list[int]:
    entries = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(entries, list | tuple) or not entries or not all(type(token) is int for token in entries):
        raise TrainingError(f"{what} is {shown(given)}; give a list of token ids, at least one")
    if not all(0 <= token < vocabulary for token in entries):
        strange = next(token for token in entries if not 0 <= token < vocabulary)
        raise TrainingError(f"{what} has the token {strange}; the model's tokens are 0 to {vocabulary - 1}")
    return list(entries)


def _messages(row: Prompt, text: str) -> list[Mapping[str, Any]]:
    prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    return [*prompt, {"role": "assistant", "content": text}]
