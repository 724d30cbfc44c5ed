"""Reward models: sequence classifiers with one label, as reward functions.

As in TRL, a reward model reads the prompt with its completion, rendered by its own tokenizer and chat template, without
special tokens beside those of the template and padded on the right; the reward is its one logit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import TrainingError, UsageError, first_line, shown
from grouprl.lm.messages import text_of
from grouprl.lm.models.context import context_length
from grouprl.lm.models.explain import explained
from grouprl.lm.models.find import HUB_KEYS, find
from grouprl.lm.models.tokenizer import tokenizer_of

TOKENS_AT_ONCE = 8192
"""The most tokens of a pass, padding included, longer texts aside. This limits the memory for activations."""


def with_models(
    functions: Any, tokenizers: Any, *, device: torch.device, model_init_kwargs: Mapping[str, Any] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[Any]:  # fmt: skip
    """The reward functions, with those that are models, or names of models, made functions.

    Args:
        functions: one or several. tokenizers: None, the tokenizer of the only one, or a list with one for each, in
            which None is the model's own.

    Raises UsageError if a model cannot be loaded, or is none that gives rewards.
    """
    given: list[Any] = [*functions] if isinstance(functions, list | tuple) else [functions]
    own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * (1 if tokenizers else len(given))
    if len(own) != len(given):
        raise UsageError(
            f"reward_processing_classes holds {len(own)} for {len(given)} reward functions; give a list with one for "
            "each, in which None is that of the model itself, and stands beside functions"
        )
    made: list[Any] = []
    for function, tokenizer in zip(given, own, strict=True):
        if not isinstance(function, str | os.PathLike | nn.Module):
            made.append(function)
            continue
        options = dict(model_init_kwargs or {})
        model = function if isinstance(function, nn.Module) else _load(os.fspath(function), options)
        made.append(RewardModel(model, tokenizer, device, chat_template_kwargs, options))
    return made


class RewardModel:
    """A reward function that asks a sequence classifier.

    Args:
        model: a classifier of transformers with one label; it is moved to ``device``, and never trained.
        tokenizer: default: the one that belongs to the model.
        device: where it runs. chat_template_kwargs: arguments of the chat template.
        options: of loading the tokenizer, if that is not given: ``revision`` and others of the hub.

    Raises UsageError if the model has not exactly one label, or no tokenizer can be found.
    """

    def __init__(
        self, model: Any, tokenizer: Any, device: torch.device, chat_template_kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        config = getattr(model, "config", None)
        name = str(getattr(config, "_name_or_path", "") or "")
        self.__name__ = name.rstrip("/").split("/")[-1] or type(model).__name__
        if config is None or any("ForCausalLM" in kind.__name__ for kind in type(model).__mro__):
            raise UsageError(
                f"reward_funcs holds a {type(model).__name__}, which is no sequence classifier of transformers; give "
                "an AutoModelForSequenceClassification with num_labels=1, or a function that calls the model"
            )
        if config.num_labels != 1:
            raise UsageError(
                f"the reward model {self.__name__} has {config.num_labels} labels, and nothing says which is the "
                "reward; give one with num_labels=1, or a function that calls it and picks a label"
            )
        if tokenizer is None:
            tokenizer = _tokenizer(name, self.__name__, options or {})
        self.tokenizer = tokenizer_of(tokenizer)
        found = [i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None]
        if not found:
            raise UsageError(f"the tokenizer of the reward model {self.__name__} has neither pad_token nor eos_token")
        # The model scores the last token that is no padding, by the id that its configuration names.
        self._padding = config.get_text_config().pad_token_id = found[0]
        self.model = model.to(device).eval()
        self._device, self._template = device, dict(chat_template_kwargs or {})
        self._longest = context_length(model)

    def check(self, prompt: Any) -> None:
        """Raises UsageError if it cannot read prompts such as this one."""
        if not isinstance(prompt, str) and getattr(self.tokenizer, "chat_template", None) is None:
            raise UsageError(
                f"the prompts are messages, and the tokenizer of the reward model {self.__name__} has no chat_template "
                "to render them; set tokenizer.chat_template and pass it as reward_processing_classes"
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The reward of each completion behind its prompt."""
        texts = [self._text(*both) for both in zip(prompts, completions, strict=True)]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if self._longest is not None and (longest := max(map(len, ids), default=0)) > self._longest:
            raise UsageError(
                f"a prompt and its completion are {longest} tokens for the reward model {self.__name__}, which reads "
                f"{self._longest} at most; lower max_completion_length, or leave out long prompts"
            )
        rewards = torch.zeros(len(ids))
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for some in _batches([len(row) for row in ids]):
                    rewards[some] = self._logits([ids[i] for i in some])
        finally:
            self.model.train(training)
        return rewards.tolist()

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + (completion if isinstance(completion, str) else text_of(completion[-1].get("content")))
        self.check(prompt)
        # A message that the prompt began is whole in the completion.
        begun = bool(prompt) and prompt[-1].get("role") == "assistant"
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        messages = [*(prompt[:-1] if begun else prompt), *said]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self._template))
        except Exception as error:  # templates are programs
            raise UsageError(
                f"the chat template of the reward model {self.__name__} cannot render {shown(messages)}: "
                f"{first_line(error)}"
            ) from error

    def _logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """``[B]`` the logit of each text."""
        lengths = torch.tensor([len(row) for row in ids])
        if not int(lengths.min()):
            raise TrainingError(f"the reward model {self.__name__} was given an empty prompt with an empty completion")
        tokens = torch.full((len(ids), int(lengths.max())), self._padding)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        tokens[mask] = torch.tensor([token for row in ids for token in row])
        out = self.model(input_ids=tokens.to(self._device), attention_mask=mask.long().to(self._device))
        logits: Any = getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape != (len(ids), 1):
            raise UsageError(
                f"the reward model {self.__name__} returned {shown(getattr(logits, 'shape', out))} for {len(ids)} "
                "texts and not one logit for each; give a function that calls it and returns floats"
            )
        return logits[:, 0].float().cpu()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of similar lengths that go through the model together."""
    some: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if some and lengths[some[0]] * (len(some) + 1) > TOKENS_AT_ONCE:
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def _load(name: str, options: Mapping[str, Any]) -> Any:
    """A classifier with one label. Raises UsageError if there is none of that name."""
    from transformers import AutoModelForSequenceClassification

    path = find(name, **{key: options[key] for key in HUB_KEYS if key in options})
    kept = {key: value for key, value in options.items() if key not in HUB_KEYS}
    with explained(f"the reward model {name}"):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, **{**kept, "ignore_mismatched_sizes": True}
        )
    model, about = loaded
    for weight, there, here in about["mismatched_keys"]:
        raise UsageError(
            f"{name} is no reward model with one label: its {weight} has the shape {[*there]}, and one label takes "
            f"{[*here]}; give a model with num_labels=1, or a function that calls it and picks a label"
        )
    if missing := sorted(about["missing_keys"]):
        raise UsageError(
            f"{name} is no reward model: {len(missing)} weights are missing and would be random "
            f"({', '.join(missing[:3])}); its config.json says {model.config.architectures}"
        )
    model.config._name_or_path = name
    return model


def _tokenizer(path: str, name: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if not path:
        raise UsageError(
            f"the reward model {name} was built in memory, so nothing says which tokenizer belongs to it; give it as "
            "reward_processing_classes"
        )
    place = find(path, **{key: options[key] for key in HUB_KEYS if key in options})
    with explained(
        f"the tokenizer of the reward model {path}",
        lambda error: f"{first_line(error)}; if it has none, give one as reward_processing_classes",
    ):
        return AutoTokenizer.from_pretrained(place, trust_remote_code=bool(options.get("trust_remote_code")))
