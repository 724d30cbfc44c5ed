"""What a checkpoint belongs to: the model, tokenizer, rewards and data it was trained with, and the run it is of."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grouprl.errors import UsageError, shown
from grouprl.lm.fingerprint import digest
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train import checkpoint
from grouprl.lm.train.setup import Setup

_log = logging.getLogger("grouprl")

_NO_PART_OF_A_MODEL = {
    "_name_or_path", "architectures", "auto_map", "base_model_name_or_path", "dtype", "inference_mode", "revision",
    "torch_dtype", "transformers_version", "peft_version", "use_cache", "_attn_implementation",
    "_attn_implementation_internal", "attn_implementation", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip
"""Entries of configurations that do not say what a model computes."""

_MAY_CHANGE = {
    "output_dir", "run_name", "report_to", "disable_tqdm", "use_cpu", "max_steps", "num_train_epochs", "transcripts",
    "tokens_per_micro_batch", "max_rows_per_decode", "native", "attention", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "metric_for_best_model", "greater_is_better", "load_best_model_at_end",
    "do_train", "do_eval", "do_predict", "ddp_timeout", "fsdp", "fsdp_config", "num_generations_eval", "reward_timeout",
    "ddp_backend", "solved_reward", "solved_by", "project", "vllm_gpu_memory_utilization",
}  # fmt: skip
"""Settings that do not change what is learned, or are what a run is resumed to change."""
_MAY_CHANGE_BY_PREFIX = (
    "logging_", "log_", "eval_", "save_", "num_completions", "per_device_eval", "trackio_", "vllm_server_",
)  # fmt: skip


def describe(setup: Setup, rows_read: int | None = None) -> dict[str, Any]:
    """What a run is made of, as plain values.

    Args:
        rows_read: of a stream as many rows count as the run has read, or as many as are given here.
    """
    tokenizer, adapters = setup.tokenizer, getattr(setup.model, "peft_config", None) or {}
    return {
        "model": _entries(setup.model.config),
        "adapters": {name: _entries(config) for name, config in adapters.items()},
        "tokenizer": {
            "vocabulary": digest(tokenizer.get_vocab()),
            "chat template": digest(getattr(tokenizer, "chat_template", None)),
        },
        "ends": sorted(setup.policy.sampler.end_ids),
        "rewards": list(setup.player.names),
        "acting": setup.acting,
        "functions": {"advantage": _name(setup.functions.advantage), "surrogate": _name(setup.functions.surrogate)},
        "optimizer": {"class": type(setup.optimizer).__name__, "parameters": _order(setup)},
        "data": None if setup.prompts is None else setup.prompts.fingerprint(rows_read),
    }


def check(saved: Mapping[str, Any], setup: Setup, place: Path) -> None:
    """Raise UsageError, with what differs, if the checkpoint in ``place`` belongs to something else than ``setup``.

    Args:
        saved: what :func:`describe` said when it was written.
    """
    data = saved["data"] or {}
    here = describe(setup, data.get("rows"))
    differences = [*_differences(saved, here)]
    if differences:
        raise UsageError(
            f"{place} belongs to another run: {'; '.join(differences[:3])}. Resume with the same model, tokenizer, "
            "rewards, tools, environments, optimizer and dataset; to train its weights on in another way, give the "
            "folder as the model"
        )
    if here["data"] and data.get("columns") != here["data"]["columns"]:
        _log.warning(
            "the prompts are those of the checkpoint, and other columns of the dataset are not: rewards that read them "
            "change from here on"
        )


def tell_changes(before: dict[str, Any], config: GRPOConfig) -> None:
    """Say which settings are others than those of the checkpoint: they hold from here on."""
    now = config.to_dict()
    changed = [
        f"{name}={value!r} (was {before[name]!r})"
        for name, value in now.items()
        if value != before.get(name, value) and name not in _MAY_CHANGE and not name.startswith(_MAY_CHANGE_BY_PREFIX)
    ]
    if changed:
        _log.warning("resumed with other settings than the checkpoint's, from here on: %s", ", ".join(changed))


def _entries(config: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(config.to_dict(), default=_named, skipkeys=True))
    return {name: value for name, value in values.items() if name not in _NO_PART_OF_A_MODEL}


def _named(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _name(function: Any) -> str | None:
    return None if function is None else str(getattr(function, "__name__", type(function).__name__))


def _order(setup: Setup) -> str:
    """Which parameters the optimizer steps, in its order, in which it keeps their state."""
    names = {id(p): name for name, p in setup.model.named_parameters()}
    return digest([[names.get(id(p)) for p in group["params"]] for group in setup.optimizer.param_groups])


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    yield from _of_entries("the model's", saved["model"], here["model"])
    for name in saved["adapters"].keys() & here["adapters"].keys():
        yield from _of_entries(f"the adapter {name}'s", saved["adapters"][name], here["adapters"][name])
    for what, value in saved["tokenizer"].items():
        if value != here["tokenizer"][what]:
            yield f"the tokenizer has another {what}"
    if saved["ends"] != here["ends"]:
        yield f"its completions end with one of the tokens {saved['ends']}, here with one of {here['ends']}"
    for what, name in saved["functions"].items():
        if name != here["functions"][what]:
            yield f"its {what}_function was {name}, here it is {here['functions'][what]}"
    for what, value in saved["acting"].items():
        if value != here["acting"].get(what):
            yield f"it was played with other {what}: {shown(value)}, here {shown(here['acting'].get(what))}"
    optimizer = saved["optimizer"]
    if optimizer["class"] != here["optimizer"]["class"]:
        yield f"its optimizer is {optimizer['class']}, here it is {here['optimizer']['class']}"
    elif optimizer != here["optimizer"]:
        yield "its optimizer steps other parameters, or the same in another order"
    if saved["rewards"] != here["rewards"]:
        yield f"its reward functions are {', '.join(saved['rewards'])}, here they are {', '.join(here['rewards'])}"
    data, rows = saved["data"], here["data"]
    if data and rows and data["rows"] != rows["rows"]:
        yield f"its train_dataset has {data['rows']} rows, here it has {rows['rows']}"
    elif data and rows and data["prompts"] != rows["prompts"]:
        yield "its train_dataset has other prompts, or the same in another order"


def _of_entries(whose: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name in saved.keys() & here.keys():  # others come and go with versions
        if saved[name] != here[name]:
            yield f"{whose} {name} was {shown(saved[name])}, here it is {shown(here[name])}"


def keep_apart(folder: Path) -> None:
    """Tell of checkpoints of an earlier run in the folder of a new one, and put its transcripts aside."""
    earlier = [path.name for path in checkpoint.existing(folder)]
    if earlier:
        _log.warning(
            "%s holds %s of an earlier run. This run begins anew and replaces those whose number it comes to. "
            "From its first checkpoint on resume_from_checkpoint=True means this run. Give another "
            "output_dir to keep both apart, or resume_from_checkpoint=True to go on with the earlier one",
            folder, ", ".join(earlier),
        )  # fmt: skip
    transcripts = folder / "transcripts.jsonl"
    if transcripts.exists():
        places = (folder / f"transcripts-{n}.jsonl" for n in itertools.count(1))
        place = next(place for place in places if not place.exists())
        transcripts.rename(place)
        _log.warning("%s holds transcripts of an earlier run; they are in %s now", transcripts, place.name)
