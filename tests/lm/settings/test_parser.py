"""GRPOConfig as a dataclass: transformers' parser of command lines, TRL's, and the functions of `dataclasses`."""

from __future__ import annotations

import dataclasses
import os
import pickle
import pprint
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from transformers import HfArgumentParser

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig, TrlParser
from grouprl.lm.settings.trl import FOREIGN


@dataclasses.dataclass
class ScriptArguments:
    dataset_name: str = "letters"
    dataset_train_split: str = "train"


class Subclass(GRPOConfig):
    benchmarks: list[str] = Field(default_factory=list)
    shots: int | None = None


def parsed(*words: str, kind: Any = GRPOConfig) -> Any:
    return HfArgumentParser(kind).parse_args_into_dataclasses(list(words))[0]


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("", {}),
        ("--learning_rate 1e-6 --max-steps 20", {"learning_rate": 1e-6, "max_steps": 20}),
        ("--report_to wandb tensorboard", {"report_to": ("wandb", "tensorboard")}),
        ("--report_to none", {"report_to": ()}),
        ("--reward_weights 1 0.5", {"reward_weights": (1.0, 0.5)}),
        ("--bf16 --log_completions", {"bf16": True, "log_completions": True}),
        ("--bf16 false --no_native --shuffle_dataset no", {"bf16": False, "native": False, "shuffle_dataset": False}),
        ("--transcripts all --eval_strategy no --scale_rewards none", {"transcripts": "all", "scale_rewards": "none"}),
        ('--model_init_kwargs {"dtype":"bfloat16"}', {"model_init_kwargs": {"dtype": "bfloat16"}}),
        ('--generation_kwargs {"top_k":5}', {"top_k": 5}),
        ("--warmup_ratio 0.1", {"warmup_steps": 0.1}),
        ("--warmup_ratio 0.0 --warmup_steps 5", {"warmup_steps": 5}),
        ("--warmup_steps 5 --warmup_ratio 0.0", {"warmup_steps": 5}),
        ("--activation_checkpointing", {"gradient_checkpointing": True}),
        ("--fsdp", {"fsdp": True}),
        (
            '--fsdp true --fsdp_config {"reshard_after_forward":false}',
            {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}},
        ),
        ("--push_to_hub false --hub_model_id me/mine --dataloader_num_workers 4 --log_level info", {}),
    ],
)
def test_a_command_line_becomes_a_configuration(words: str, settings: dict[str, Any]) -> None:
    assert parsed(*words.split()) == GRPOConfig(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss_type vesp --fp16", r"(?s)fp16=True: set bf16.*loss_type='vesp': .*did you mean 'vespo'"),
        ("--eval_strategy sometimes", r"eval_strategy='sometimes': .*'no', 'steps' or 'epoch'"),
        ("--lr_scheduler_kwargs [1]", r"lr_scheduler_kwargs='\[1\]': must be a mapping, or one as JSON text"),
        ("--top_p 2", "top_p=2.0"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_as_it_is_elsewhere(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parsed(*words.split())


def test_a_setting_under_two_names_on_a_command_line_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--warmup_ratio", "0.1", "--warmup_steps", "5")
    assert "--warmup_ratio 0.1 and --warmup_steps 5.0 are one setting" in capsys.readouterr().err
    parser = HfArgumentParser(GRPOConfig)  # a second command line knows nothing of the first
    parser.parse_args_into_dataclasses(["--warmup_ratio", "0.1"])
    assert parser.parse_args_into_dataclasses(["--warmup_steps", "5"])[0].warmup_steps == 5


def test_help_says_what_every_setting_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name}" in said for name in (*GRPOConfig.model_fields, *FOREIGN))
    assert "ratio is clipped below 1 - epsilon; width of spo (default: 0.2)" in said
    assert "{no,steps,epoch}" in said


def test_a_subclass_has_settings_of_its_own_and_no_more() -> None:
    made = parsed("--benchmarks", "aime", "math", "--shots", "3", "--beta", "0.1", kind=Subclass)
    assert (made.benchmarks, made.shots, made.beta) == (["aime", "math"], 3, 0.1)
    assert set(Subclass.model_fields) - set(GRPOConfig.model_fields) == {"benchmarks", "shots"}
    with pytest.raises(UsageError, match="fp16=True"):
        Subclass(fp16=True)
    assert parsed("--beta", "0.1").beta == 0.1  # the class above is as it was


def test_dataclasses_functions_take_a_configuration() -> None:
    made = GRPOConfig(eval_strategy="steps", warmup_ratio=0.1, report_to="wandb")
    assert dataclasses.replace(made, eval_strategy="no", beta=0.1) == made.replace(eval_strategy="no", beta=0.1)
    values = dataclasses.asdict(made)
    assert {name: values[name] for name in GRPOConfig.model_fields} == dict(made)
    assert {name: values[name] for name in FOREIGN} == {name: option.off for name, option in FOREIGN.items()}
    assert pprint.pformat(made) == repr(made)
    assert pickle.loads(pickle.dumps(made)) == made


# --- TrlParser -------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRPO_TEST_VARIABLE", "before")
    path = tmp_path / "config.yaml"
    path.write_text(
        "dataset_name: numbers\nlearning_rate: 1e-6\nbeta: 0.04\nreport_to: [wandb]\nscale_rewards: false\n"
        "eval_strategy: no\nnative: false\nwarmup_ratio: 0.1\nmodel_init_kwargs: {dtype: bfloat16}\n"
        "env: {GRPO_TEST_VARIABLE: 7}\n"
    )
    return path


def own_parser() -> Any:
    return TrlParser


def trl_parser() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed").TrlParser


@pytest.mark.parametrize("parser", [own_parser, trl_parser])
def test_a_file_gives_defaults_and_the_command_line_wins(parser: Any, config_file: Path) -> None:
    if parser is trl_parser:  # which knows no former names
        config_file.write_text(config_file.read_text().replace("warmup_ratio", "warmup_steps"))
    script, made = parser()((ScriptArguments, GRPOConfig)).parse_args_and_config(
        ["--config", str(config_file), "--beta", "0.1"]
    )
    assert script == ScriptArguments("numbers")
    assert made == GRPOConfig(
        learning_rate=1e-6, beta=0.1, report_to="wandb", scale_rewards=False, native=False, warmup_steps=0.1,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    assert os.environ["GRPO_TEST_VARIABLE"] == "7"


def test_a_file_may_write_numbers_inside_a_mapping_without_a_dot(config_file: Path) -> None:
    with config_file.open("a") as file:
        file.write("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}\n")
    _, made = TrlParser((ScriptArguments, GRPOConfig)).parse_args_and_config(["--config", str(config_file)])
    assert made.lr_scheduler_kwargs == {"min_lr": 1e-7}


def test_the_parser_reads_the_scripts_own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset_name", "x"])
    script, made = TrlParser([ScriptArguments, GRPOConfig]).parse_args_and_config()
    assert (script.dataset_name, made) == ("x", GRPOConfig())


def test_what_nothing_takes_is_named_with_the_closest_or_returned(config_file: Path) -> None:
    config_file.write_text("learning_rat: 1\nmodel: x\n")
    words = ["--config", str(config_file), "--num_generation_s", "3"]
    parser = TrlParser(GRPOConfig)
    with pytest.raises(UsageError, match=r"(?s)'learning_rat'; did you mean 'learning_rate'.*'num_generation_s'; did"):
        parser.parse_args_and_config(words)
    made, rest = parser.parse_args_and_config(words, return_remaining_strings=True)
    assert (made, rest) == (GRPOConfig(), ["--learning_rat", "1", "--model", "x", "--num_generation_s", "3"])
    assert parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)[1:] == (
        ["--learning_rat", "1", "--model", "x"], ["--num_generation_s", "3"],
    )  # fmt: skip
    assert parser.parse_args_and_config(words[:2], fail_with_unknown_args=False) == (GRPOConfig(),)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "must hold settings"), ("env: 3", "must hold environment variables"), ("a: [", "is not YAML")],
)
def test_a_file_that_holds_no_settings_is_a_usage_error(config_file: Path, text: str, message: str) -> None:
    config_file.write_text(text)
    with pytest.raises(UsageError, match=message):
        TrlParser(GRPOConfig).parse_args_and_config([f"--config={config_file}"])
    with pytest.raises(UsageError, match="--config names no file"):
        TrlParser(GRPOConfig).parse_args_and_config(["--config"])


def test_a_dataclass_with_a_field_config_is_refused() -> None:
    kind = dataclasses.make_dataclass("Mine", [("config", str, "x")])
    with pytest.raises(UsageError, match="Mine has a field 'config'"):
        TrlParser((kind, GRPOConfig))
