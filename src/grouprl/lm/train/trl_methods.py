"""What training scripts ask transformers' Trainer for before and after training."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError
from grouprl.learning.parameters import TrainedParameters
from grouprl.lm.generate.samples import Samples
from grouprl.lm.policy.policy import Policy
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.settings.batch_plan import BatchPlan
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train.attributes import ALIASES, FOR_CALLERS, INNER, MISSING, OWN_LOOP, is_setting
from grouprl.lm.train.bookkeeper import Bookkeeper
from grouprl.lm.train.checkpoint import trainer_state
from grouprl.lm.train.setup import Setup
from grouprl.objective.user_functions import UserFunctions
from grouprl.printing import show
from grouprl.redaction import redact
from grouprl.runs.files import write_json, write_text

_log = logging.getLogger("grouprl")


class ScriptMethods:
    """The base of a trainer: what scripts read of it, and what they ask for around training.

    Args:
        setup: what it is made of. book: where state, callbacks and logs are.

    Attributes:
        args, model, processing_class, policy, parameters, optimizer, rewards, plan, functions: those of ``setup``.
    """

    is_deepspeed_enabled = False
    setup: Setup
    book: Bookkeeper
    args: GRPOConfig
    plan: BatchPlan
    functions: UserFunctions
    model: Any
    processing_class: Any
    policy: Policy
    parameters: TrainedParameters
    rewards: RewardCaller
    optimizer: Any

    def __init__(self, setup: Setup, book: Bookkeeper) -> None:
        vars(self).update(  # what is assigned from outside is looked at
            setup=setup, book=book, args=setup.config, plan=setup.plan, functions=setup.functions, model=setup.model,
            processing_class=setup.tokenizer, policy=setup.policy, parameters=setup.parameters, rewards=setup.rewards,
            optimizer=setup.optimizer,
        )  # fmt: skip

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether the weights are sharded."""
        return self.policy.sharded is not None

    @property
    def state(self) -> Any:
        """transformers' TrainerState."""
        return self.book.state

    @property
    def control(self) -> Any:
        """transformers' TrainerControl."""
        return self.book.control

    @property
    def callback_handler(self) -> Any:
        """transformers' CallbackHandler."""
        return self.book.handler

    @property
    def lr_scheduler(self) -> Any:
        """The schedule of the learning rate; None before training, unless it was given."""
        return self.book.handler.lr_scheduler

    @property
    def last_samples(self) -> Samples | None:
        """What the last optimizer step learned from (its whole generation)."""
        return self.book.samples

    def get_num_trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def accelerator(self) -> Any:
        """accelerate's PartialState, by which scripts print, and ask whether they run in the main process."""
        from accelerate import PartialState

        return PartialState()

    def is_world_process_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self.policy.ranks.first

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its host."""
        return self.policy.ranks.local == 0

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print ``metrics`` of ``split`` (train, eval, ...), a line each."""
        if not self.policy.ranks.first:
            return
        width = max((len(name) for name in metrics), default=0)
        show(f"***** {split} metrics *****")
        for name, value in sorted(metrics.items()):
            show(f"  {name:<{width}} = {value:.4f}" if isinstance(value, float) else f"  {name:<{width}} = {value}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write ``metrics`` to ``{split}_results.json`` in the output folder, and add them to ``all_results.json``.

        Raises UsageError if they cannot be written there, or added to what is there; TrainingError if the disk is full.
        """
        if not self.policy.ranks.first:
            return
        folder = self.setup.output_dir
        write_json(folder / f"{split}_results.json", dict(metrics))
        if combined:
            path = folder / "all_results.json"
            try:
                before = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
            except (ValueError, TypeError, RecursionError) as error:
                raise UsageError(f"{path} is no JSON ({error}); remove it, or give combined=False") from None
            write_json(path, {**before, **metrics})

    def save_state(self) -> None:
        """Write transformers' TrainerState to ``trainer_state.json`` in the output folder."""
        if self.policy.ranks.first:
            write_json(self.setup.output_dir / "trainer_state.json", trainer_state(self.state))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None, **others: Any,
    ) -> None:  # fmt: skip
        """Write ``README.md`` with the model hub's metadata to the output folder.

        Args:
            others: what transformers writes there besides; it has no place here.

        Raises UsageError if it cannot be written there, TrainingError if the disk is full.
        """
        from huggingface_hub import ModelCardData

        if not self.policy.ranks.first:
            return
        folder = self.setup.output_dir
        base = getattr(self.model.config, "_name_or_path", None) or None
        if base is not None and Path(base).exists():  # a folder of this machine is no name on the hub
            base = None
        labels = [tags] if isinstance(tags, str) else list(tags or [])
        datasets = dataset_name if dataset_name is None or isinstance(dataset_name, str) else list(dataset_name)
        about = ModelCardData(
            base_model=base, datasets=datasets, library_name="transformers", tags=[*labels, "grpo", "grouprl"]
        )
        origin = f" of {base}" if base else ""
        text = f"Trained{origin} with grouprl {version('grouprl')} by GRPO (arXiv 2402.03300)."
        card = f"---\n{about.to_yaml()}\n---\n\n# {model_name or folder.name}\n\n{text}\n"
        write_text(folder / "README.md", redact(card))

    def end(self) -> None:
        """Nothing: trackers are closed when training ends."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Warns of a method that overrides one which nothing here calls: the script would train without it."""
        super().__init_subclass__(**kwargs)
        kinds = [kind for kind in cls.__mro__ if kind is cls or not issubclass(kind, ScriptMethods)]
        own = {name for kind in kinds for name in vars(kind)}
        for name in sorted(own):
            if (name in MISSING and name not in FOR_CALLERS) or name in INNER:
                advice = MISSING.get(name, OWN_LOOP)
                _log.warning("%s.%s overrides a method that nothing calls here: %s", cls.__name__, name, advice)

    def __getattr__(self, name: str) -> Any:
        said = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name in MISSING:
            raise AttributeError(f"{said}: {MISSING[name]}")
        if "setup" in vars(self):  # it is complete
            if name in ALIASES:
                return ALIASES[name](self)
            if is_setting(name):
                return getattr(self.args, name)
        raise AttributeError(said)
