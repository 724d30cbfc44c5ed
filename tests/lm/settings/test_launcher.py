"""What `accelerate launch` asks for is done or refused, as accelerate's own launcher says it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.settings.fsdp import Sharding

launch = pytest.importorskip("accelerate.commands.launch")


def launched(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """Put into the environment what the launcher puts there for some of its options."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    usual: dict[str, Any] = {
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": 0,
        "num_cpu_threads_per_process": 1,
    }
    usual |= {"mixed_precision": "no", "dynamo_backend": "no"}
    words = [word for name, value in usual.items() for word in (f"--{name}", str(value))]
    args = launch.launch_command_parser().parse_args([*words, *options.split(), "script.py"])
    for name, value in prepare_multi_gpu_env(args).items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def test_a_launcher_that_asks_for_processes_alone_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = GRPOConfig()
    launched(monkeypatch, "")
    assert "ACCELERATE_MIXED_PRECISION" in os.environ
    assert GRPOConfig() == usual


@pytest.mark.parametrize(
    ("options", "settings", "sharding"),
    [
        ("", {}, Sharding(whole=False, wrap=False, lean_start=True)),
        (
            "--fsdp_reshard_after_forward false --fsdp_state_dict_type FULL_STATE_DICT --fsdp_auto_wrap_policy "
            "TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap A,B --fsdp_activation_checkpointing true "
            "--fsdp_cpu_ram_efficient_loading false",
            {},
            Sharding(reshard=False, layers=("A", "B"), recompute=True),
        ),
        (
            "--fsdp_state_dict_type SHARDED_STATE_DICT",
            {"fsdp": False, "fsdp_config": {"fsdp_state_dict_type": "FULL_STATE_DICT"}},
            Sharding(wrap=False, lean_start=True),
        ),
        (
            "--fsdp_reshard_after_forward true",
            {"fsdp": "shard_grad_op auto_wrap"},
            Sharding(reshard=False, whole=False, lean_start=True),
        ),
    ],
)
def test_use_fsdp_shards_as_the_launcher_says_unless_the_script_says_how(
    options: str, settings: dict[str, Any], sharding: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, f"--use_fsdp --fsdp_version 2 {options}")
    config = GRPOConfig(**settings)
    assert config.fsdp
    assert config.sharding == config.in_use().sharding == sharding


def test_precision_and_processor_are_those_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GRPOConfig().bf16 is None
    assert not GRPOConfig().use_cpu
    launched(monkeypatch, "--mixed_precision bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # of a launcher with --cpu
    assert GRPOConfig().bf16 is GRPOConfig(bf16=True).bf16 is True
    assert GRPOConfig().use_cpu
    with pytest.raises(UsageError, match=r"--mixed_precision bf16 .* and bf16=False say two things; leave one"):
        GRPOConfig(bf16=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--use_fsdp", r"asks for version 1 of FSDP \(FSDP_VERSION=1\).* launch with --fsdp_version 2"),
        ("--use_fsdp --fsdp_version 2 --fsdp_offload_params true", r"cpu_offload=True is not offered; start more"),
        (
            "--use_fsdp --fsdp_version 2 --fsdp_activation_checkpointing_offload true",
            r"activation_checkpointing_offload=True is not offered; set activation_checkpointing=True",
        ),
        ("--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy SIZE_BASED_WRAP", r"auto_wrap_policy='SIZE_BASED_WRAP'"),
        ("--mixed_precision fp16", r"--mixed_precision \(ACCELERATE_MIXED_PRECISION=fp16\) is not offered; leave it"),
        ("--dynamo_backend inductor", r"--dynamo_backend \(ACCELERATE_DYNAMO_BACKEND=INDUCTOR\) is not offered"),
        ("--use_megatron_lm", r"--use_megatron_lm \(ACCELERATE_USE_MEGATRON_LM=true\) is not offered; leave it out"),
        ("--use_parallelism_config", r"--use_parallelism_config \(ACCELERATE_USE_PARALLELISM_CONFIG=true\)"),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, options)
    with pytest.raises(UsageError, match=said):
        GRPOConfig()


def test_deepspeed_and_steps_of_accumulation_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert GRPOConfig(gradient_accumulation_steps=4).gradient_accumulation_steps == 4
    with pytest.raises(UsageError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 and gradient_accumulation_steps=3"):
        GRPOConfig(gradient_accumulation_steps=3)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"--use_deepspeed .* is not offered.*; ACCELERATE_GRADIENT_ACCUMULATION"):
        GRPOConfig(gradient_accumulation_steps=3)
