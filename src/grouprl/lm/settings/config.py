"""The one configuration of the language-model arena: its settings, checked, in the shape of TRL's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import PrivateAttr, ValidationError

from grouprl.errors import UsageError, refuse, shown
from grouprl.lm.settings.as_dataclass import DataclassLike
from grouprl.lm.settings.checks import problems
from grouprl.lm.settings.fields import Fields
from grouprl.lm.settings.fsdp import Sharding, read_sharding
from grouprl.lm.settings.launcher import of_launcher
from grouprl.lm.settings.trl import FOREIGN, OF_PROCESS, RENAMED, translate
from grouprl.lm.settings.unread import RULES
from grouprl.machine.ranks import Ranks, here, join
from grouprl.redaction import with_secrets, without_secrets
from grouprl.settings.describe import explain
from grouprl.settings.unread import without_effect


class GRPOConfig(Fields, metaclass=DataclassLike):
    """Every choice of a training run in the language-model arena.

    It reads as a dataclass, for transformers' HfArgumentParser, TRL's parser, ``dataclasses.asdict`` and ``replace``.

    Raises UsageError for an unknown or unsupported setting, or a value that is not allowed. An option of TRL's that is
    no setting here reads as its "off" value, so that callbacks written for transformers find what they look for.
    """

    _in_use: bool = PrivateAttr(False)
    _chosen: frozenset[str] | None = PrivateAttr(None)

    def __init__(self, output_dir: str | os.PathLike[str] | None = None, /, **values: Any) -> None:
        if output_dir is not None:
            if "output_dir" in values:
                raise UsageError(
                    f"output_dir is given twice: {output_dir!r} and {values['output_dir']!r}; give it once"
                )
            values["output_dir"] = output_dir
        fields = type(self).model_fields
        settings, refused = translate(values, fields)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            refused.append(explain(error, fields))
        else:
            if self.eval_strategy != "no":
                self.do_eval = True
            for name, value in of_launcher(self).items():
                setattr(self, name, value)
            if found := problems(self):
                refused.append("; ".join(found))
        refuse(refused)

    def __getattr__(self, name: str) -> Any:
        if name in OF_PROCESS:
            return OF_PROCESS[name](here())
        if name == "warmup_ratio":
            return self.warmup_steps if self.warmup_steps < 1 else 0.0
        if name in RENAMED:
            return getattr(self, RENAMED[name])
        return FOREIGN[name].off if name in FOREIGN else super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting. Its value is checked now, what it does not go together with when a trainer is made."""
        if name.startswith("_"):
            super().__setattr__(name, value)
            return
        if self._in_use:
            raise UsageError(
                f"{name}={shown(value)}: these settings are a trainer's; change them before it is made"
                + (f", or {_MEANWHILE[name]}" if name in _MEANWHILE else "")
            )
        settings, refused = translate({name: value}, type(self).model_fields)
        refuse(refused)
        for setting, translated in settings.items():
            try:
                super().__setattr__(setting, translated)
            except ValidationError as error:
                raise UsageError(explain(error, type(self).model_fields)) from None

    def in_use(self) -> GRPOConfig:
        """A copy for a trainer: completed, checked once more, and not to be changed. Raises UsageError."""
        made = self.with_secrets()
        if made.load_best_model_at_end and made.metric_for_best_model is None:
            made.metric_for_best_model = "reward"
        if made.metric_for_best_model is not None and made.greater_is_better is None:
            made.greater_is_better = not made.metric_for_best_model.endswith("loss")
        made._in_use = True
        return made

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain types; ``GRPOConfig(**config.to_dict())`` equals it, but for secrets.

        An access token or a password among the arguments of the model has "(secret)" in its place. A trainer reads it
        from the environment, or says in which variable it looked.

        Raises UsageError if the arguments of the model, chat template or scheduler hold what no file could.
        """
        values = {}
        for name in type(self).model_fields:
            try:
                values[name] = without_secrets(_plain(name, getattr(self, name)), name)
            except RecursionError:
                raise UsageError(f"{name} is nested too deeply, or holds itself; use plain values") from None
        return values

    def with_secrets(self) -> GRPOConfig:
        """A copy with the secrets that `to_dict` leaves out, from the environment.

        Raises UsageError for one that is nowhere.
        """
        try:
            return self.replace(**{name: with_secrets(getattr(self, name), name) for name in _ARGUMENTS})
        except ValueError as error:
            raise UsageError(str(error)) from None

    def replace(self, **changes: Any) -> GRPOConfig:
        """A copy with some settings changed, validated anew. Raises UsageError as the class does."""
        made = type(self)(**{**dict(self), **changes})
        made._chosen = self._chosen
        return made

    def with_chosen(self, names: Iterable[str]) -> GRPOConfig:
        """A copy of which only the settings of these names count as chosen, in warnings of what has no effect."""
        made = self.replace()
        made._chosen = frozenset(names)
        return made

    def without_effect(self, about: Mapping[str, bool]) -> list[str]:
        """What to say of chosen settings that nothing reads; see :mod:`grouprl.lm.settings.unread` for ``about``."""
        return without_effect(RULES, self, self._chosen, about)

    # --- what scripts and transformers' callbacks ask TrainingArguments for ------------------------------------------

    @property
    def device(self) -> Any:
        """The torch device that a trainer trains on."""
        import torch

        if self.use_cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        place = here()
        if place.world == 1:
            return torch.device("cuda")
        return torch.device("cuda", place.local % torch.cuda.device_count())

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether entropies are part of the loss, in all steps or in some."""
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @property
    def sharding(self) -> Sharding | None:
        """How to shard the weights, or None."""
        return read_sharding(self.fsdp, self.fsdp_config) if self.fsdp else None

    @property
    def n_gpu(self) -> int:
        """1 if that is a GPU, else 0."""
        return int(self.device.type == "cuda")

    def join(self) -> Ranks:
        """Meet the other processes of this training: :func:`grouprl.machine.ranks.join` on the device of this one."""
        return join(gpu=self.device.type == "cuda", timeout=self.ddp_timeout, backend=self.ddp_backend)

    def get_process_log_level(self) -> int:
        """The level of transformers' loggers."""
        from transformers.utils import logging

        return logging.get_verbosity()

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "") -> Iterator[None]:
        """A context that the first process goes through before the others, such as to prepare a dataset."""
        ranks = self.join()
        if not ranks.first:
            ranks.wait()
        try:
            yield
        finally:
            if ranks.first:
                ranks.wait()

    def __repr_args__(self) -> Any:
        """What its representation shows: no secrets."""
        return [(name, without_secrets(value, str(name))) for name, value in super().__repr_args__()]

    def to_json_string(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """:meth:`to_dict` with text for what is no number, as hyperparameters of trackers are."""
        return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.to_dict().items()}


_ARGUMENTS = ("model_init_kwargs", "chat_template_kwargs", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
"""Settings that are handed on to other libraries, and may hold objects that only these know."""

_MEANWHILE = {
    "learning_rate": "let lr_scheduler_type or optimizers=(optimizer, scheduler) change it from step to step",
    "temperature": "train in stages: a trainer for each temperature, each made of the model of the one before",
    "max_steps": "set control.should_training_stop in a callback to end earlier",
    "num_train_epochs": "set control.should_training_stop in a callback to end earlier",
}
"""Settings that scripts change in the middle of a run, and what to do instead."""


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")  # from_pretrained takes the name as well
    raise UsageError(
        f"{name} holds {shown(value)} of type {type(value).__name__}, which config.yaml cannot hold; "
        "use numbers, text, lists and mappings, or pass a model that is loaded already"
    )
