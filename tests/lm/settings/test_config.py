import copy
import inspect
import logging
import math
import pickle
import re
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grouprl.errors import UsageError
from grouprl.lm.settings.batch_plan import BatchPlan, batch_plan, interval, total_steps
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.other_libraries import ELSEWHERE
from grouprl.lm.settings.trl import FOREIGN, FOREIGN_ARGUMENTS, RENAMED, TRAINER_ARGUMENTS, check_arguments
from grouprl.lm.train.trainer import GRPOTrainer
from grouprl.objective import Objective


def plan(world_size: int = 1, **values: Any) -> BatchPlan:
    return batch_plan(GRPOConfig(**values), world_size)


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_trl() -> None:
    c = GRPOConfig()
    assert (c.learning_rate, c.num_generations, c.max_completion_length, c.temperature) == (1e-6, 8, 512, 1.0)
    assert (c.beta, c.num_iterations, c.epsilon, c.epsilon_high, c.delta) == (0.0, 1, 0.2, None, None)
    assert (c.loss_type, c.scale_rewards, c.importance_sampling_level) == ("dapo", "group", "token")
    assert (c.per_device_train_batch_size, c.gradient_accumulation_steps, c.num_train_epochs, c.max_steps) == (
        8,
        1,
        3,
        -1,
    )
    assert (c.weight_decay, c.max_grad_norm, c.lr_scheduler_type, c.warmup_steps) == (0.0, 1.0, "linear", 0)
    assert (c.seed, c.logging_steps, c.save_steps, c.eval_strategy) == (42, 10, 500, "no")


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in GRPOConfig.model_fields.items() if not field.description] == []


def test_no_name_is_both_a_setting_and_something_else() -> None:
    assert set(GRPOConfig.model_fields).isdisjoint([*FOREIGN, *RENAMED, *TRAINER_ARGUMENTS])
    assert set(RENAMED.values()) <= set(GRPOConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "given", "becomes"),
    [
        ("scale_rewards", True, "group"),
        ("scale_rewards", False, "none"),
        ("report_to", "wandb", ("wandb",)),
        ("report_to", ["tensorboard", "wandb"], ("tensorboard", "wandb")),
        ("report_to", "none", ()),
        ("report_to", ["trackio", "comet", "comet_ml"], ("trackio", "comet_ml")),
        ("report_to", None, ()),
        ("top_k", None, 0),
        ("eval_strategy", False, "no"),
        ("output_dir", Path("runs") / "x", "runs/x"),
        ("learning_rate", "3e-6", 3e-6),
        ("lr_scheduler_type", Enum("Schedule", {"COSINE": "cosine"})["COSINE"], "cosine"),
    ],
)
def test_the_usual_spellings_of_a_value_are_understood(name: str, given: Any, becomes: Any) -> None:
    assert getattr(GRPOConfig(**{name: given}), name) == becomes


@pytest.mark.parametrize(
    ("old", "value", "name", "becomes"),
    [
        ("warmup_ratio", 0.1, "warmup_steps", 0.1),
        ("evaluation_strategy", "steps", "eval_strategy", "steps"),
        ("no_cuda", True, "use_cpu", True),
        ("activation_checkpointing", True, "gradient_checkpointing", True),
    ],
)
def test_former_names_are_translated(old: str, value: Any, name: str, becomes: Any) -> None:
    assert getattr(GRPOConfig(**{old: value}), name) == becomes


def test_a_setting_under_two_names_is_refused_unless_the_old_one_says_nothing() -> None:
    with pytest.raises(UsageError, match=r"warmup_ratio=0\.1 and warmup_steps=5 are one setting"):
        GRPOConfig(warmup_steps=5, warmup_ratio=0.1)
    assert GRPOConfig(warmup_ratio=0.0, warmup_steps=5).warmup_steps == 5
    for both in ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.0, "warmup_ratio": 0.1}):
        assert GRPOConfig(**both).warmup_steps == 0.1


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        raise ZeroDivisionError


HIMSELF: list[Any] = []
HIMSELF.append(HIMSELF)
STRANGE = (
    torch.ones(2), torch.tensor(1.0), np.ones(3), np.float32(1), Fraction(1, 2), Decimal("1.5"), math.inf, -math.inf,
    math.nan, 10**400, 1j, b"x", "\ud800", "x" * 1000, {"a": 1}, {1: 2}, set(), object(), Incomparable(), len, type,
    HIMSELF, range(3), 1, True, False, -1, 0.5, {"a": torch.ones(2)}, {"a": Incomparable()}, {"a": HIMSELF}, [HIMSELF],
)  # fmt: skip
"""What nobody means."""


@pytest.mark.parametrize("name", [*GRPOConfig.model_fields, *FOREIGN, *RENAMED, "generation_kwargs", "tempature"])
def test_a_strange_value_is_taken_or_refused_in_a_line(name: str) -> None:
    said: list[str] = []
    for value in STRANGE:
        try:
            made = GRPOConfig(**{name: value})
            made.to_dict()
            setattr(made, name, value)
        except UsageError as error:
            said.append(str(error))
    assert not [message for message in said if "\n" in message or len(message) > 2000]


@pytest.mark.parametrize("value", [True, 1, 0.5, {"tensorboard": 1}, ["tensorboard", 3], "sacred"])
def test_what_is_no_tracker_is_refused_with_those_there_are(value: Any) -> None:
    with pytest.raises(UsageError, match=r"report_to=.*choose tensorboard, wandb, trackio, .*in a list, all, or none"):
        GRPOConfig(report_to=value)
    assert GRPOConfig(report_to=False).report_to == GRPOConfig(report_to=None).report_to == ()


@pytest.mark.parametrize("given", ["</answer>", ["</answer>", "\n\n"]])
def test_stop_strings_are_a_setting_and_a_generation_argument(given: Any) -> None:
    wanted = GRPOConfig(stop_strings=given)
    assert wanted.stop_strings == ((given,) if isinstance(given, str) else tuple(given))
    assert GRPOConfig(generation_kwargs={"stop_strings": given}) == GRPOConfig(generation_kwargs={"stop": given})
    assert GRPOConfig(generation_kwargs={"stop": given}) == wanted
    assert GRPOConfig(stop_strings=[]).stop_strings is None
    with pytest.raises(UsageError, match="must hold no empty text"):
        GRPOConfig(stop_strings=["a", ""])


@pytest.mark.parametrize("name", ["stop_token_ids", "eos_token_id"])
def test_an_option_that_ends_completions_is_refused_with_what_does(name: str) -> None:
    with pytest.raises(UsageError, match=r"the sampler does not know it; .*generation_config\.eos_token_id is heard"):
        GRPOConfig(generation_kwargs={name: "x"})


def test_a_setting_that_changes_in_a_run_is_refused_with_what_takes_its_place() -> None:
    used = GRPOConfig().in_use()
    for name, advice in (("learning_rate", "lr_scheduler_type"), ("temperature", "in stages"), ("max_steps", "stop")):
        with pytest.raises(UsageError, match=f"{name}=1.*these settings are a trainer's.*{advice}"):
            setattr(used, name, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0}, r"learning_rate=0: .*greater than 0.*default 1e-06"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"num_generations": "many"}, "num_generations='many'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"loss_type": "vesp"}, r"loss_type='vesp': .*'dapo'.*did you mean 'vespo'"),
        ({"advantage": "gae"}, r"advantage='gae': .*'leave_one_out'"),
        ({"report_to": "sacred"}, "'sacred' is no tracker here; choose tensorboard"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1, or -1"),
        ({"logging_steps": 2.5}, r"logging_steps=2\.5: must be a whole number"),
        ({"transcripts": -1}, "transcripts=-1: must be at least 0"),
        ({"save_strategy": "best"}, "save_strategy='best': .*'epoch'; .* load_best_model_at_end=True and save_tot"),
        ({"epsilon": 2, "beta": -1}, r"epsilon=2: .*; beta=-1: "),
    ],
)
def test_a_bad_value_is_a_usage_error_that_names_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 1}, "nothing to compare with; set num_generations=2"),
        ({"num_generations": 1, "advantage": "reinforce_pp", "dynamic_sampling": True}, "compares the rewards"),
        ({"prompts_per_step": 4, "gradient_accumulation_steps": 2}, "both say how large a step is"),
        ({"prompts_per_step": 4, "generation_batch_size": 32}, "leave generation_batch_size at None"),
        ({"generation_batch_size": 32, "steps_per_generation": 5}, "give one of them"),
        ({"pass_k": 2}, "pass_k=2 is for advantage='pass_at_k'"),
        ({"pass_k": 9, "advantage": "pass_at_k"}, "must not exceed num_generations=8"),
        ({"scale_rewards": "batch", "advantage": "opo"}, "scale_rewards='batch' is for advantage='outcome'"),
        ({"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"}, "has no effect"),
        ({"advantage": "opo", "multi_objective_aggregation": "normalize_then_sum"}, "an estimator of its own"),
        ({"loss_type": "cispo"}, "epsilon_high=None: .*the cap of the ratio itself.*5.0 is usual"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, r"epsilon_high=0\.28: "),
        ({"num_generations": 1, "advantage": "reinforce_pp_baseline"}, "nothing to compare with"),
        ({"loss_type": "sapo", "delta": 4.0}, "delta=4.0 is for loss_type 'grpo' or"),
        ({"delta": 1.25, "epsilon_high": 0.28}, r"delta=1\.25 must exceed 1 \+ epsilon_high = 1\.28"),
        ({"sync_ref_model": True}, "needs a reference model"),
        ({"soft_overlong_cache": 512}, "must be below max_completion_length=512"),
    ],
)
def test_settings_that_do_not_go_together_are_a_usage_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**values)


def test_the_upper_bound_is_epsilon_until_it_is_given() -> None:
    assert Objective.of(GRPOConfig(epsilon=0.1)).high == 0.1
    assert Objective.of(GRPOConfig(epsilon=0.1, epsilon_high=0.28)).high == 0.28


# --- what TRL has and this has not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_foreign_option_at_its_off_value_changes_nothing_and_reads_as_it(name: str) -> None:
    option = FOREIGN[name]
    for value in (option.off, None, *option.also_off):
        assert GRPOConfig(**{name: value}) == GRPOConfig()
    assert getattr(GRPOConfig(), name) == option.off


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("push_to_hub", True, "push_to_hub=True: upload when training is done"),
        ("restore_callback_states_from_checkpoint", True, "callbacks begin anew when a run is resumed"),
        ("fp16", True, "set bf16=True"),
        ("optim", "adafactor", "pass optimizers="),
        ("generation_kwargs", {"num_beams": 4}, "it knows max_completion_length, min_new_tokens"),
        ("deepspeed", "zero3.json", "start several processes by torchrun .*fsdp=True"),
        ("auto_find_batch_size", True, "tokens_per_micro_batch"),
        ("use_bias_correction_kl", False, "the gradient of KL"),
    ],
)
def test_a_foreign_option_at_another_value_is_refused_with_what_to_do(name: str, value: Any, advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        GRPOConfig(**{name: value})


def test_a_start_says_all_that_it_refuses_each_on_its_line() -> None:
    with pytest.raises(UsageError) as refusal:
        GRPOConfig(
            push_to_hub=True, fp16=True, learning_rat=1, lr=2, model=3, warmup_ratio=0.1, warmup_steps=5,
            temperature=-1, generation_kwargs={"num_beams": 4, "stop_token_ids": [1]}, logging_dir="logs",
        )  # fmt: skip
    first, *others = str(refusal.value).splitlines()
    assert first == "these cannot stay as they are:"
    assert [line.split()[0].split("=")[0].strip("'") for line in others] == [
        "generation_kwargs", "generation_kwargs", "push_to_hub", "fp16", "unknown", "lr", "model", "warmup_steps",
        "temperature",
    ]  # fmt: skip
    with pytest.raises(UsageError) as refusal:  # what does not go together is said beside them
        GRPOConfig(push_to_hub=True, num_generations=8, prompts_per_step=2, per_device_train_batch_size=3)
    assert [line.split("=")[0].strip() for line in str(refusal.value).splitlines()[1:]] == [
        "push_to_hub", "prompts_per_step",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"(?s)no argument 'modl'.*quantization_config: weights"):
        check_arguments({"modl": 1, "quantization_config": "4 bits"})


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("logging_dir", "logs", "everything that a run leaves is in output_dir"),
        ("use_liger_kernel", True, "log-probabilities never hold"),
        ("optim", "adamw_8bit", "torch's AdamW trains"),
        ("optim", "paged_adamw_8bit", "torch's AdamW trains"),
        ("torch_compile", True, "compiled"),
        ("pad_to_multiple_of", 8, "without padding"),
    ],
)
def test_what_says_only_where_or_how_fast_is_left_out_with_a_warning(
    name: str, value: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "grouprl"):
        assert GRPOConfig(**{name: value}) == GRPOConfig()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{name}={value!r} is left out: ")
    assert why in said


def test_options_that_could_change_no_number_are_accepted_at_any_value() -> None:
    assert GRPOConfig(dataloader_num_workers=4, log_level="info", ddp_static_graph=True, local_rank=3) == GRPOConfig()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rat", "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ("chat_template_path", "set tokenizer.chat_template to the text of the template"),
        ("quantization_config", "weights are trained in float32 or bfloat16; leave it out"),
        ("vllm_gpu_memory", "did you mean 'vllm_gpu_memory_utilization'"),
        ("xyzzy", r"help\(GRPOConfig\) and `grouprl settings --lm` list"),
        ("reward_funcs", "is an argument of GRPOTrainer"),
        ("max_seq_length", "no setting 'max_seq_length': max_completion_length"),
        ("batch_size", "no setting 'batch_size': prompts_per_step"),
        ("use_peft", "no setting 'use_peft': pass GRPOTrainer"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest_known_one(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**{name: 1})


def test_what_is_said_of_names_of_other_libraries_names_settings_that_exist_and_hides_none() -> None:
    known = {*GRPOConfig.model_fields, *RENAMED, *FOREIGN, *TRAINER_ARGUMENTS}
    assert not set(ELSEWHERE) & known
    for text in ELSEWHERE.values():
        for name in re.findall(r"\b([a-z0-9]+(?:_[a-z0-9]+)+)\b", text):
            assert name in known or name in ("leave_one_out", "chat_template"), text


def test_what_is_neither_setting_nor_option_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="xyzzy"):
        _ = GRPOConfig().xyzzy


# --- files and copies ------------------------------------------------------------------------------------------------


def test_a_configuration_survives_its_file_and_being_copied() -> None:
    c = GRPOConfig(
        output_dir="x",
        report_to=["wandb"],
        reward_weights=[1, 0.5],
        model_init_kwargs={"attn_implementation": "sdpa", "max_memory": {"cpu": 1}},
        eval_strategy="no",
        transcripts="all",
        warmup_steps=0.1,
    )
    assert GRPOConfig(**yaml.safe_load(yaml.safe_dump(c.to_dict()))) == c
    assert copy.deepcopy(c) == c
    assert pickle.loads(pickle.dumps(c)) == c


def test_a_torch_type_is_kept_by_its_name_and_an_object_that_no_file_can_hold_is_refused() -> None:
    import torch

    assert GRPOConfig(model_init_kwargs={"dtype": torch.bfloat16}).to_dict()["model_init_kwargs"] == {
        "dtype": "bfloat16"
    }
    with pytest.raises(UsageError, match=r"model_init_kwargs holds .*object.*config\.yaml cannot hold"):
        GRPOConfig(model_init_kwargs={"quantization_config": object()}).to_dict()


def test_a_setting_may_be_changed_until_a_trainer_has_it() -> None:
    c = GRPOConfig()
    assert c.replace(beta=0.1).beta == 0.1
    assert c.beta == 0.0
    c.beta, c.scale_rewards = 0.1, False  # type: ignore[assignment]
    c.no_cuda, c.warmup_ratio, c.push_to_hub = True, 0.25, False  # type: ignore[attr-defined]
    c.warmup_ratio = 0.0  # type: ignore[attr-defined]
    assert (c.beta, c.scale_rewards, c.use_cpu, c.warmup_steps, c.push_to_hub) == (0.1, "none", True, 0.25, False)
    before = c.to_dict()
    for name, value, why in (
        ("beta", -1, "beta=-1"), ("betta", 1, "did you mean 'beta'"), ("push_to_hub", True, "push_to_hub=True: upload"),
        ("loss_type", "grop", "loss_type='grop'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            setattr(c, name, value)
    assert c.to_dict() == before
    used = c.in_use()
    assert used.to_dict() == before
    with pytest.raises(UsageError, match=r"beta=0\.2: these settings are a trainer's; change them before"):
        used.beta = 0.2
    assert used.replace(beta=0.2).beta == 0.2


def test_what_does_not_go_together_is_found_when_a_trainer_is_made() -> None:
    c = GRPOConfig(load_best_model_at_end=True, eval_strategy="steps", eval_steps=100, save_steps=100)
    c.eval_steps = 40
    with pytest.raises(UsageError, match="needs an evaluation of every model that is saved"):
        c.in_use()
    c.save_steps = 80
    used = c.in_use()
    assert (used.metric_for_best_model, used.greater_is_better) == ("reward", True)
    assert c.metric_for_best_model is None
    c.load_best_model_at_end, c.eval_strategy = False, "no"
    assert c.in_use().metric_for_best_model is None


def test_what_scripts_ask_a_configuration_for() -> None:
    c = GRPOConfig(do_train=True, use_cpu=True)
    assert (c.do_train, c.do_eval, c.do_predict) == (True, False, False)
    assert GRPOConfig(eval_strategy="steps").do_eval
    assert (str(c.device), c.n_gpu) == ("cpu", 0)
    assert c.get_process_log_level() > 0


def test_what_a_switch_leaves_off_says_nothing() -> None:
    GRPOConfig(vllm_gpu_memory_utilization=0.9, hub_model_id="me/mine", hub_token="<HUB_TOKEN>", push_to_hub=False)
    with pytest.raises(UsageError, match="hub_model_id='me/mine'"):
        GRPOConfig(hub_model_id="me/mine", push_to_hub=True)
    GRPOConfig(gradient_checkpointing=True, activation_checkpointing=True, accelerator_config={"split_batches": False})
    with pytest.raises(UsageError, match="are one setting"):
        GRPOConfig(gradient_checkpointing=True, activation_checkpointing=False)
    GRPOConfig(generation_batch_size=16, steps_per_generation=2)
    assert GRPOConfig("somewhere").output_dir == "somewhere"
    assert "tensorboard" in GRPOConfig(report_to="all").report_to


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        # TRL's default: one prompt per step.
        ({}, 1, BatchPlan(8, 8, 1, 1, 1)),
        ({"gradient_accumulation_steps": 4}, 2, BatchPlan(8, 64, 1, 1, 2)),
        # 4 x 2 x 8 micro-steps = 64 completions at once, for 8 / 4 = 2 steps of 32.
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 8}, 2,
         BatchPlan(8, 32, 2, 1, 2)),
        # 64 completions are 64 / (4 x 2) = 8 micro-steps: the same again.
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "generation_batch_size": 64}, 2,
         BatchPlan(8, 32, 2, 1, 2)),
        # A step of 4 cuts through the group of 8 that two steps share.
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 3}, 1,
         BatchPlan(8, 4, 2, 3, 1)),
        # Two generations per step are one of twice the size.
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 1, BatchPlan(8, 16, 1, 1, 1)),
        ({"prompts_per_step": 6, "num_generations": 4, "num_iterations": 2}, 3, BatchPlan(4, 24, 1, 2, 3)),
        ({"prompts_per_step": 6, "num_generations": 4, "steps_per_generation": 3}, 1, BatchPlan(4, 24, 3, 1, 1)),
    ],
)  # fmt: skip
def test_a_batch_holds_what_it_holds_in_trl(values: dict[str, Any], world_size: int, expected: BatchPlan) -> None:
    assert plan(world_size, **values) == expected


def test_the_sizes_of_a_plan_follow_from_each_other() -> None:
    p = BatchPlan(group_size=8, samples_per_step=4, steps_per_generation=6, num_iterations=2, world_size=1)
    assert (p.samples_per_generation, p.prompts_per_generation, p.prompts_per_step, p.updates_per_generation) == (
        24, 3, 0.5, 12,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        ({"per_device_train_batch_size": 6}, 1,
         r"=6 times 1 micro-step\(s\) are 6 completions.*num_generations=8; set num_generations to 3 or 6, "
         r"or per_device_train_batch_size to 8,"),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, 1,
         r"12 completions.*num_generations to 4 or 6, or per_device_train_batch_size to 4 or 8,"),
        ({"per_device_train_batch_size": 4}, 2, "on each of 2 processes, which hold whole groups, and not a multiple"),
        ({"generation_batch_size": 20}, 1, r"generation_batch_size=20 .* set it to 16 or 24"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, 1, "set steps_per_generation to 2 or 4"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, 1,
         "set steps_per_generation to 4 .*num_iterations above 1"),
        ({"prompts_per_step": 3}, 2, "cannot be shared out to 2 processes; set it to 2 or 4"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_divide_are_refused_with_the_nearest_that_do(
    values: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(world_size, **values)


@settings(deadline=None, max_examples=200)
@given(
    per_device=st.integers(1, 16),
    accumulation=st.integers(1, 6),
    steps=st.none() | st.integers(1, 12),
    group=st.integers(2, 12),
    world_size=st.integers(1, 4),
)
def test_no_plan_changes_the_batch_that_was_asked_for(
    per_device: int, accumulation: int, steps: int | None, group: int, world_size: int
) -> None:
    values = {"gradient_accumulation_steps": accumulation, "steps_per_generation": steps, "num_generations": group}
    try:
        p = plan(world_size, per_device_train_batch_size=per_device, **values)
    except UsageError:
        micro_steps = steps or accumulation
        fits = per_device * max(micro_steps, accumulation) % group == 0
        assert not fits or (micro_steps % accumulation and accumulation % micro_steps)
        return
    assert p.samples_per_step == per_device * accumulation * world_size
    assert p.prompts_per_generation * group == p.samples_per_generation
    assert p.prompts_per_generation % world_size == 0
    assert p.samples_per_generation == max(p.samples_per_step, per_device * world_size * (steps or 0))


def test_every_value_that_an_error_suggests_is_accepted() -> None:
    with pytest.raises(UsageError):
        plan(per_device_train_batch_size=10, gradient_accumulation_steps=3)
    for group in (6, 10):
        plan(per_device_train_batch_size=10, gradient_accumulation_steps=3, num_generations=group)
    for per_device in (8, 16):
        plan(per_device_train_batch_size=per_device, gradient_accumulation_steps=3)


@pytest.mark.parametrize(
    ("values", "n_prompts", "steps"),
    [
        ({"max_steps": 7}, None, 7),
        ({"prompts_per_step": 4, "num_train_epochs": 3}, 8, 6),
        ({"prompts_per_step": 4, "num_train_epochs": 3}, 10, 6),
        ({"prompts_per_step": 2, "num_train_epochs": 1.5}, 10, 8),
        # 10 prompts fill two batches of 4 and begin a third.
        ({"prompts_per_step": 4, "num_train_epochs": 1}, 10, 2),
        ({"prompts_per_step": 4, "num_train_epochs": 0.1}, 120, 3),
        ({"prompts_per_step": 4, "num_train_epochs": 1}, 3, 1),
        # A generation of 8 prompts serves 2 steps, twice over.
        ({"prompts_per_step": 4, "steps_per_generation": 2, "num_iterations": 2, "num_train_epochs": 1}, 16, 8),
    ],
)
def test_the_length_of_a_run_is_max_steps_or_that_of_its_epochs(
    values: dict[str, Any], n_prompts: int | None, steps: int
) -> None:
    c = GRPOConfig(**values)
    assert total_steps(c, batch_plan(c), n_prompts) == steps


def test_a_stream_without_max_steps_is_a_usage_error() -> None:
    c = GRPOConfig()
    with pytest.raises(UsageError, match="set max_steps"):
        total_steps(c, batch_plan(c), None)


@pytest.mark.parametrize(("steps", "total", "every"), [(10, 100, 10), (1, 100, 1), (0.1, 100, 10), (0.001, 100, 1)])
def test_an_interval_below_one_is_a_share_of_the_run(steps: float, total: int, every: int) -> None:
    assert interval(steps, total) == every


def test_generation_kwargs_are_settings_and_win_over_them() -> None:
    kwargs = {"temperature": 0.7, "min_new_tokens": 3, "max_new_tokens": 9}
    config = GRPOConfig(temperature=0.5, generation_kwargs=kwargs)
    assert (config.temperature, config.min_new_tokens, config.max_completion_length) == (0.7, 3, 9)


# --- arguments of the trainer ----------------------------------------------------------------------------------------


def test_arguments_of_trl_are_refused_by_name_unless_they_do_nothing() -> None:
    check_arguments({})
    check_arguments(dict.fromkeys(FOREIGN_ARGUMENTS))
    with pytest.raises(UsageError, match=r"^quantization_config: .*leave it out"):
        check_arguments({"quantization_config": [print]})
    with pytest.raises(UsageError, match="no argument 'callback'; did you mean 'callbacks'"):
        check_arguments({"callback": None})
    with pytest.raises(UsageError, match="no argument 'zzz'; it takes model, reward_funcs"):
        check_arguments({"zzz": None})


def test_the_arguments_named_in_errors_are_those_of_the_trainer() -> None:
    taken = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    assert sorted(taken) == sorted(["args", "others", *TRAINER_ARGUMENTS])


def test_a_folder_that_no_tokenizer_could_be_saved_in_is_refused() -> None:
    assert GRPOConfig("h\xe4").output_dir == "h\xe4"
    for folder in ("h\udce4", Path("h\udce4")):
        with pytest.raises(UsageError, match=r"output_dir=.*h.* the name is no text in UTF-8"):
            GRPOConfig(folder)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size=2: .* with --tensor-parallel-size",
        ),
        ({"vllm_importance_sampling_clip_min": 4.0}, r"clip_min=4\.0 is above vllm_importance_sampling_clip_max=3\.0"),
        ({"loss_type": "vespo"}, "loss_type='vespo' .* set vllm_importance_sampling_correction=False"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex='a[+]': vLLM samples"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True: vLLM samples"),
        ({"vllm_mode": "colocated"}, "vllm_mode='colocated'"),
        ({"vllm_importance_sampling_mode": "turn_mask"}, "vllm_importance_sampling_mode='turn_mask'"),
        ({"vllm_server_port": 70000}, "vllm_server_port=70000"),
    ],
)
def test_what_vllm_cannot_be_asked_for_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GRPOConfig(use_vllm=True, **given)


def test_the_settings_of_vllm_have_the_names_and_defaults_of_trl() -> None:
    c = GRPOConfig(use_vllm=True, vllm_importance_sampling_cap=2.0, vllm_group_port=51000)
    assert c.vllm_importance_sampling_clip_max == 2.0
    assert (c.vllm_mode, c.vllm_server_timeout, c.vllm_gpu_memory_utilization) == ("colocate", 240.0, 0.3)
    assert GRPOConfig(**c.to_dict()) == c
    without = GRPOConfig(use_vllm=True, vllm_importance_sampling_clip_max=None)
    assert without.vllm_importance_sampling_clip_max is None
    GRPOConfig(use_vllm=False, vllm_structured_outputs_regex="a+", vllm_tensor_parallel_size=2)
