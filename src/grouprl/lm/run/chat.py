"""Talking to a model: the questions are put as those it was trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.messages import text_of
from grouprl.lm.models.context import context_length
from grouprl.lm.models.load import load
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import prepare_prompts
from grouprl.lm.run import recipe as recipes
from grouprl.lm.run.data import load_task_data
from grouprl.lm.run.models import hide_file_bars, load_trained
from grouprl.lm.run.saved import settings_for_use
from grouprl.lm.sample.streams import Stream
from grouprl.lm.settings.config import GRPOConfig
from grouprl.runs import RunFolder
from grouprl.runs.files import user_path


class Chat:
    """One model that answers single questions.

    Args:
        before: messages that go before every question. text: ask with the bare text instead.
        about: what to tell a person first.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: GRPOConfig, before: list[dict[str, Any]], text: bool, sampled: bool,
        about: str,
    ) -> None:  # fmt: skip
        self.policy, self.tokenizer, self.config = Policy(model, tokenizer, config), tokenizer, config
        self.before, self.text, self.about = before, text, about
        self.settings = self.policy.sampling(greedy=not sampled)
        self.stream = Stream(config.seed)

    @classmethod
    def open(cls, source: str, *, sampled: bool = False, max_tokens: int | None = None, bare: bool = False) -> Chat:
        """A run's model, asked as its task asks, or any other model.

        Raises UsageError if there is no such run or model.
        """
        hide_file_bars()
        if not (user_path(source) / "config.yaml").is_file():
            model, tokenizer = load(source)
            config = GRPOConfig(max_completion_length=max_tokens or 256)
            text = getattr(tokenizer, "chat_template", None) is None
            return cls(model, tokenizer, config, [], text, sampled, f"{source}, as it is")
        folder = RunFolder.open(source)
        recipe = recipes.load(folder.path).with_secrets()
        config = settings_for_use(folder).with_secrets()
        if max_tokens is not None:
            config = config.replace(max_completion_length=max_tokens)
        data = load_task_data(recipe.changed({} if recipe.task.endswith(".jsonl") else {"n_train": 1, "n_eval": 1}))
        model, tokenizer = load_trained(folder, recipe, config, data.task)
        example: Any = data.held_out[0]["prompt"]
        before = [] if bare or isinstance(example, str) else example[:-1]
        shown = example if isinstance(example, str) else text_of(example[-1].get("content"))
        return cls(model, tokenizer, config, before, isinstance(example, str), sampled, f"{recipe.task}; try: {shown}")

    def ask(self, question: str) -> str:
        """The model's reply. Raises UsageError for a question that the model cannot read, such as one too long."""
        prompt = question if self.text else [*self.before, {"role": "user", "content": question}]
        source = prepare_prompts(
            [{"prompt": prompt}], self.tokenizer, chat_template_kwargs=self.config.chat_template_kwargs,
            name="the question",
        )  # fmt: skip
        ids = source[0].ids
        context = context_length(self.policy.model)
        settings = self.settings
        if context is not None:
            if len(ids) >= context:
                raise UsageError(
                    f"the question has {len(ids)} tokens, but the model reads {context}; ask a shorter one"
                )
            settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, context - len(ids)))
        reply = self.policy.sample([ids], 1, self.stream, settings)[0]
        return str(self.tokenizer.decode(reply.ids, skip_special_tokens=True)).strip()
