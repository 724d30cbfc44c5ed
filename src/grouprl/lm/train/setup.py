"""What one trainer is made of, fixed once from what it is given: what its loop and its bookkeeper are handed."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from grouprl.errors import UsageError, first_line
from grouprl.extras import how_to_install
from grouprl.learning.parameters import TrainedParameters
from grouprl.learning.sharded_parameters import ShardedParameters
from grouprl.lm.generate.collect import Player
from grouprl.lm.generate.play import TURN_REWARDS
from grouprl.lm.generate.scored_groups import evaluation_metrics
from grouprl.lm.generate.shared import shared_out
from grouprl.lm.learn.optimizer import check_schedule, make_optimizer, warn_if_steps_vanish
from grouprl.lm.models.load import load
from grouprl.lm.models.read_back import check_read_back
from grouprl.lm.models.restore import load_weights
from grouprl.lm.models.tokenizer import tokenizer_of
from grouprl.lm.policy.policy import Policy
from grouprl.lm.policy.sharded import ShardedModels
from grouprl.lm.prompts import PromptSource
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.sample.finite import not_finite
from grouprl.lm.settings.batch_plan import BatchPlan, batch_plan, least_bytes
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train.acting import (
    Acting,
    Judges,
    about_acting,
    check_readable,
    make_interactions,
    make_player,
    make_rewards,
    read_starts,
    starts_without_rows,
)
from grouprl.lm.train.datasets import Read, read_eval_prompts, read_prompts
from grouprl.lm.train.wrappers import unwrapped
from grouprl.machine.busy import sleeping_when_busy
from grouprl.machine.ranks import Ranks
from grouprl.machine.room import check_room
from grouprl.objective.user_functions import UserFunctions
from grouprl.runs.files import user_path
from grouprl.runs.folder import default_run_path

_log = logging.getLogger("grouprl")


@dataclass(frozen=True)
class Setup:
    """A model, what it learns from, and how.

    Attributes:
        config: the settings, completed. plan: what a batch is.
        model: a transformers or PEFT model, on its device. tokenizer: its tokenizer.
        policy: samples from the model and differentiates it. parameters: its trained weights.
        optimizer: steps the weights. default_optimizer: whether it is AdamW by the configuration.
        own_scheduler: a schedule of the user's own, or None for the configuration's, made anew for each run.
        rewards: the reward functions. eval_rewards: those of evaluations.
        player: samples, and has the reward functions judge.
        eval_player: the same for evaluations, which other functions may judge.
        read: the prompts of a dataset, which it is given with the name of the argument.
        functions: an estimator and a surrogate of the user's own.
        prompts: what is trained on, or None. eval_prompts: what is evaluated on, by name ("" if there is one).
        output_dir: the folder of checkpoints and of what is recorded, the same wherever the process goes.
        acting: what the model acts with, as plain values.
        reads: the columns that environments read, or None if nobody can tell.
    """

    config: GRPOConfig
    plan: BatchPlan
    model: Any
    tokenizer: Any
    policy: Policy
    parameters: TrainedParameters
    optimizer: Any
    default_optimizer: bool
    own_scheduler: Any
    rewards: RewardCaller
    eval_rewards: RewardCaller
    player: Player
    eval_player: Player
    read: Read
    functions: UserFunctions
    prompts: PromptSource | None
    eval_prompts: Mapping[str, PromptSource]
    output_dir: Path
    acting: Mapping[str, Any]
    reads: Set[str] | None

    def check_weights(self) -> None:
        """Check that the model has the parameters it had at first, and finite weights.

        Raises UsageError about the first, TrainingError about the second.
        """
        self.parameters.check()
        self.check_finite()

    def check_columns(self) -> None:
        """Warns of columns that nobody reads, which a text environment may have been meant to read.

        A ``rollout_func`` may give columns of its own, so of one only a call tells.

        Raises UsageError if a reward function needs a column that a dataset lacks, or cannot be given one it has.
        """
        if self.acting["rollout_func"] is not None:
            return
        judged = [(self.prompts, self.rewards), *((one, self.eval_rewards) for one in self.eval_prompts.values())]
        for prompts, rewards in judged:
            if prompts is None or prompts.columns is None:
                continue
            read = rewards.check_columns(prompts.columns, prompts.name, environments="environments" in self.acting)
            unread = [name for name in prompts.columns if name not in read and name not in (self.reads or ())]
            if unread and self.reads is not None and self.policy.ranks.first:
                _log.warning(
                    "%s has columns that neither the environment nor a reward function reads: %s; put what its reset "
                    "is to be given into a column 'options', a mapping, and remove the others",
                    prompts.name, ", ".join(map(repr, unread)),
                )  # fmt: skip

    def check_finite(self) -> None:
        """Raises TrainingError if a trained weight is not finite."""
        if self.parameters.not_finite():
            raise not_finite("the model's weights", self.model)

    def load_weights(self, folder: Path) -> None:
        """Go on with the weights in ``folder``. Raises UsageError if they are damaged or those of another model."""
        load_weights(self.model, folder)


@sleeping_when_busy()
def make_setup(
    model: Any, judges: Judges, args: Any, train_dataset: Any, eval_dataset: Any, tokenizer: Any, *,
    optimizers: tuple[Any, Any] | None, peft_config: Any, ref_model: Any, functions: UserFunctions, acting: Acting,
) -> Setup:  # fmt: skip
    """From the arguments of a GRPOTrainer, which has them described.

    Raises UsageError for whatever cannot work.
    """
    config = _configuration(args)
    ranks = config.join()
    with ranks.telling():
        return _make_setup(
            config, ranks, model, judges, train_dataset, eval_dataset, tokenizer, optimizers=optimizers,
            peft_config=peft_config, ref_model=ref_model, functions=functions, acting=acting,
        )  # fmt: skip


def _make_setup(
    config: GRPOConfig, ranks: Ranks, model: Any, judges: Judges, train_dataset: Any, eval_dataset: Any,
    tokenizer: Any, *, optimizers: tuple[Any, Any] | None, peft_config: Any, ref_model: Any, functions: UserFunctions,
    acting: Acting,
) -> Setup:  # fmt: skip
    ranks.check_same("settings", _compared(config), "start every rank with the same configuration")
    tokenizer = tokenizer_of(tokenizer)
    plan = batch_plan(config, ranks.world)
    check_room(least_bytes(config, plan))
    if optimizers is None or optimizers[1] is None:
        check_schedule(config)
    interactions = make_interactions(config, acting)
    rewards, eval_rewards = make_rewards(judges, config, interactions)
    torch.manual_seed(config.seed)
    model, tokenizer = _prepare_model(model, tokenizer, config, peft_config, ranks)
    if interactions is None:
        read: Read = functools.partial(read_prompts, model, tokenizer, config)
    else:
        read = functools.partial(read_starts, interactions, needs_prompt=acting.environment_factory is None)
        if train_dataset is None and acting.environment_factory is not None:
            train_dataset = starts_without_rows(config, plan, interactions)
    prompts = None if train_dataset is None else read(train_dataset, "train_dataset")
    eval_prompts = read_eval_prompts(read, eval_dataset)
    if not eval_prompts and (config.eval_strategy != "no" or config.eval_on_start):
        setting = "eval_on_start=True" if config.eval_strategy == "no" else f"eval_strategy={config.eval_strategy!r}"
        raise UsageError(f"{setting} needs an eval_dataset; give one to GRPOTrainer, or leave the setting out")
    check_readable(prompts, rewards, eval_rewards)
    names = (*eval_rewards.names, *((TURN_REWARDS,) if interactions is not None and interactions.gives_rewards else ()))
    _check_best_metric(config, eval_prompts, names)
    if config.solved_by is not None and config.solved_by not in names:
        raise UsageError(f"solved_by={config.solved_by!r} is no reward function of evaluations; they are {list(names)}")
    optimizer, scheduler = optimizers or (None, None)
    parameters = TrainedParameters(model)
    _check_same_weights(model, parameters, ranks)
    sharded = _sharded(config, ranks, optimizer)
    if sharded is not None:
        sharded.take(model)
        parameters = ShardedParameters(model, ranks)
    typed_by_settings = isinstance(ref_model, str | Path) or any(
        p.dtype == getattr(torch, config.master_dtype) for p in model.parameters()
    )
    if isinstance(ref_model, str | Path):
        ref_model, _ = load(ref_model, tokenizer=tokenizer, dtype=config.master_dtype)
    policy = Policy(model, tokenizer, config, unwrapped(ref_model), ranks, sharded)
    if optimizer is None and scheduler is not None:
        raise UsageError("optimizers holds a scheduler without the optimizer it steps; give both, or neither")
    if optimizer is not None:
        _check_optimizer(optimizer, parameters)
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise UsageError("optimizers holds a scheduler of another optimizer; make it of the optimizer beside it")
    else:
        warn_if_steps_vanish(parameters, config.learning_rate)
    about = {
        "episodes": any(vars(acting).values()), "own_optimizer": optimizer is not None,
        "own_schedule": scheduler is not None, "own_advantage": functions.advantage is not None,
        "own_surrogate": functions.surrogate is not None, "streamed": prompts is not None and prompts.streamed,
        "other_dtype": not typed_by_settings,
    }  # fmt: skip
    for said in (*config.without_effect(about), *_dropout_left_out(config, peft_config)) if ranks.first else ():
        _log.warning(said)
    player = make_player(policy, tokenizer, rewards, config, interactions, acting, prompts)
    eval_player = player if eval_rewards is rewards else player.judged_by(eval_rewards)
    setup = Setup(
        config=config, plan=plan, model=model, tokenizer=tokenizer, policy=policy, parameters=parameters,
        optimizer=make_optimizer(parameters, config) if optimizer is None else optimizer,
        default_optimizer=optimizer is None, own_scheduler=scheduler, rewards=rewards,
        eval_rewards=eval_rewards, player=shared_out(player, policy), eval_player=shared_out(eval_player, policy),
        read=read, functions=functions, prompts=prompts, eval_prompts=eval_prompts,
        output_dir=ranks.once(lambda: _output_dir(model, config)), acting=about_acting(acting, interactions),
        reads=None if interactions is None else interactions.reads,
    )  # fmt: skip
    setup.check_columns()
    return setup


_FROM_FIRST = ("output_dir", "run_name")
"""Settings that only the first rank reads."""


def _compared(config: GRPOConfig) -> dict[str, Any]:
    """What must be the same on every rank: the settings, and the versions of what computes."""
    versions = {name: version(name) for name in ("grouprl", "torch", "transformers")}
    return versions | {name: value for name, value in config.to_dict().items() if name not in _FROM_FIRST}


def _check_same_weights(model: Any, parameters: TrainedParameters, ranks: Ranks) -> None:
    """Give every rank the trained weights of the first. Raises UsageError if other weights differ."""
    if ranks.world == 1:
        return
    with torch.no_grad():
        trained = {id(p) for p in parameters.tensors}
        others = {name: p for name, p in model.named_parameters() if id(p) not in trained}
        sums = {name: float(p.detach().double().sum()) for name, p in others.items()}
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        ranks.check_same("models", shapes | sums, "give every rank the same model")
        ranks.spread(*(p.detach() for p in parameters.tensors))


def _sharded(config: GRPOConfig, ranks: Ranks, optimizer: Any) -> ShardedModels | None:
    """What shards models, if the settings ask for it and there are several processes."""
    sharding = config.sharding
    if sharding is None:
        if any((config.fsdp_config or {}).values()) and ranks.first:
            _log.warning("fsdp_config says how to shard, and nothing is sharded; set fsdp=True, or leave it out")
        return None
    if ranks.world == 1:
        _log.warning("fsdp shards weights among processes, and this is one; start several by torchrun to share them")
        return None
    if sharding.lean_start and ranks.first:
        _log.warning(
            "fsdp_config: cpu_ram_efficient_loading=True is left out: while it starts, each process holds the whole "
            "model in main memory"
        )
    if optimizer is not None:
        raise UsageError(
            "optimizers holds an optimizer of whole weights, and fsdp shards them; leave optimizers out (torch's AdamW "
            "trains), or leave fsdp out"
        )
    return ShardedModels(ranks, sharding, config.device)


def _check_best_metric(config: GRPOConfig, eval_prompts: Mapping[str, Any], functions: Sequence[str]) -> None:
    """Raises UsageError if no evaluation will have the metric that says which model is best.

    Reward functions may log metrics of any name. So with one dataset only what is nearly a known name is refused.
    """
    if config.metric_for_best_model is None or not eval_prompts:
        return
    metric, said = config.metric_for_best_model.removeprefix("eval_"), config.metric_for_best_model
    if "" not in eval_prompts:
        if not any(metric.startswith(f"{name}_") for name in eval_prompts):
            raise UsageError(
                f"metric_for_best_model={said!r}: there are several datasets to evaluate on, whose numbers have their "
                f"names; give one of these several, such as {next(iter(eval_prompts)) + '_reward'!r}"
            )
        return
    known = evaluation_metrics(functions)
    close = [] if metric in known else difflib.get_close_matches(metric, known, n=1, cutoff=0.85)
    if close:
        raise UsageError(f"metric_for_best_model={said!r} is no number of an evaluation; did you mean {close[0]!r}?")


def _output_dir(model: Any, config: GRPOConfig) -> Path:
    if config.output_dir is not None:
        return user_path(config.output_dir).absolute()
    name = str(getattr(model.config, "_name_or_path", "") or "model").rstrip("/").split("/")[-1]
    return default_run_path("runs", f"{name}-grpo", config.seed).absolute()


_RECOMPUTATION = ("gradient_checkpointing", "activation_checkpointing")


def _configuration(args: Any) -> GRPOConfig:
    if args is None:
        args = GRPOConfig()
    of_trl = next((kind for kind in type(args).__mro__ if kind.__module__.startswith("trl.")), None)
    if of_trl is not None and hasattr(args, "to_dict"):
        settings = args.to_dict()
        mine, theirs = (getattr(kind, "__dataclass_fields__", {}) for kind in (type(args), of_trl))
        if own := [name for name in mine if name not in theirs]:
            name = type(args).__name__
            _log.warning("%s is left to your program: %s adds it to TRL's settings", ", ".join(own), name)
        # TRL's default for recomputation costs time and changes no number.
        left_out = {*own, *(name for name in settings if name.removesuffix("_kwargs") in _RECOMPUTATION)}
        args = GRPOConfig(**{name: value for name, value in settings.items() if name not in left_out})
    if not isinstance(args, GRPOConfig):
        raise UsageError(
            f"args is a {type(args).__module__}.{type(args).__name__}; give a grouprl.lm.GRPOConfig, which takes the "
            "same settings" + (": GRPOConfig(**args.to_dict())" if hasattr(args, "to_dict") else "")
        )
    return args.in_use()


def _dropout_left_out(config: GRPOConfig, peft_config: Any) -> list[str]:
    """What to say of dropout that an adapter was asked to have, and does not have in training."""
    rates = [field for field in getattr(peft_config, "__dataclass_fields__", {}).values() if "dropout" in field.name]
    return [
        f"peft_config: {rate.name}={value} has no effect: disable_dropout trains without dropout; set "
        "disable_dropout=False, or leave it out"
        for rate in rates
        if config.disable_dropout and (value := getattr(peft_config, rate.name)) and value != rate.default
    ]


_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def _check_optimizer(optimizer: Any, parameters: TrainedParameters) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizers holds {optimizer!r}, which is no optimizer; give torch.optim.SGD(...) or the like"
        )
    if inspect.signature(optimizer.step).parameters.get("closure", _OPTIONAL).default is inspect.Parameter.empty:
        raise UsageError(
            f"{type(optimizer).__name__} evaluates the loss several times in a step, which is not done here; give "
            "another optimizer"
        )
    own = {id(parameter) for parameter in parameters.tensors}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer holds no parameter that is trained here; make it of the parameters of the very model that "
            "is given, and with an adapter of the model that get_peft_model returns"
        )


def _prepare_model(
    model: Any, tokenizer: Any, config: GRPOConfig, peft_config: Any, ranks: Ranks
) -> tuple[Any, Any]:  # fmt: skip
    """The model on its device, with adapter and frozen embeddings as asked for, and the tokenizer."""
    model = unwrapped(model)
    options: dict[str, Any] = {} if not isinstance(model, str | Path) else {"dtype": config.master_dtype}
    loaded: Any
    loaded, tokenizer = load(model, tokenizer=tokenizer, model_init_kwargs=config.model_init_kwargs, **options)
    if peft_config is not None:
        if hasattr(loaded, "peft_config"):
            raise UsageError(
                "the model has an adapter already, and peft_config asks for another; leave peft_config out to train "
                "that one, or give model.merge_and_unload()"
            )
        if isinstance(peft_config, Mapping):
            raise UsageError("peft_config is a mapping; give peft.LoraConfig(...) or another configuration of PEFT's")
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise UsageError(f"peft_config needs PEFT; run: {how_to_install('lm')}") from error
        try:
            loaded = get_peft_model(loaded, peft_config)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"peft_config does not fit the model: {first_line(error)}") from error
    if any(x.is_meta for x in itertools.chain(loaded.parameters(), loaded.buffers())):
        raise UsageError(
            "the model is on the meta device, or a part of it is: it has no values; load it without device_map and "
            "torch.device('meta')"
        )
    if not config.fsdp or ranks.world == 1:  # a model to be sharded may fit into no device
        loaded = loaded.to(config.device)
    if config.freeze_embeddings:
        loaded.get_input_embeddings().weight.requires_grad_(False)
    check_read_back(loaded)
    return loaded, tokenizer
