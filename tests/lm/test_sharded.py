"""Two processes with sharded weights train as one process does, save, go on in other numbers, and fail together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sharded_cases
import torch
from compared import check_learned_alike, furthest
from sharded_cases import SAME
from small_runs import warm
from transformers import AutoModelForCausalLM

from grouprl.errors import DamagedFileError, UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.models.load import load
from grouprl.lm.train.setup import _sharded
from grouprl.machine.ranks import Place, Ranks
from several import of_two


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes gave of all cases, and the folder they did them in."""
    out = tmp_path_factory.mktemp("sharded")
    return out, of_two(Path(sharded_cases.__file__), out)


@pytest.mark.parametrize("name", SAME)
def test_two_sharded_processes_train_as_one_does(name: str, both: Any, tmp_path: Path) -> None:
    first, second = (found[name] for found in both[1])
    one = sharded_cases.run(name, tmp_path / "run")
    assert first["texts"] == second["texts"] == one["texts"]
    check_learned_alike(one, first, second)


def test_agents_play_and_learn_as_in_one_process(both: Any, tmp_path: Path) -> None:
    one = sharded_cases.agents(tmp_path)
    for found in both[1]:
        assert found["agents"]["completions"] == one["completions"]
        assert furthest(found["agents"]["weights"], one["weights"]) < 1e-5


@pytest.mark.parametrize("name", SAME)
def test_each_holds_its_part(name: str, both: Any) -> None:
    held = [found[name]["held"] for found in both[1]]
    whole = sum(value.numel() for value in both[1][0][name]["weights"].values())
    assert sum(held) == whole
    assert max(held) < 0.51 * whole


def test_the_model_at_the_end_is_saved_whole(both: Any) -> None:
    found = both[1][0]["usual"]
    model = AutoModelForCausalLM.from_pretrained(found["saved"])
    read = dict(model.named_parameters())
    assert all(torch.equal(read[name], value) for name, value in found["weights"].items())
    assert json.loads((Path(found["saved"]) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_sharded_weights_cannot_be_saved_by_one_process_and_the_error_says_so(both: Any) -> None:
    assert "with fsdp save_model too, in every process" in both[1][0]["saved by one"]
    assert not (both[0] / "of one" / "model").exists()


def test_an_adapter_at_the_end_is_saved_alone(both: Any) -> None:
    from peft import PeftModel

    found = both[1][0]["adapter"]
    model = PeftModel.from_pretrained(warm()[0], found["saved"])
    read = dict(model.named_parameters())
    trained = {name: value for name, value in found["weights"].items() if "lora" in name}
    assert trained
    assert all(torch.equal(read[name], value) for name, value in trained.items())


def test_a_run_goes_on_as_if_it_had_never_stopped(both: Any) -> None:
    """In the middle of a generation, with a reference that has moved; the weights whole in the checkpoint or not."""
    for found in both[1]:
        assert found["stopped"]["step"] == found["parts"]["step"] == 3
        for gone_on in (found["on"], found["parts on"]):
            assert furthest(gone_on["weights"], found["straight"]["weights"]) == 0


def test_a_chain_of_two_processes_one_and_two_again(both: Any, tmp_path: Path) -> None:
    """Sharded checkpoints are read by one process, and its own by two that shard them."""
    out, found = both
    shutil.copytree(out / "parts at 3", tmp_path / "chain")
    middle = sharded_cases.chain(tmp_path / "chain", stop=6, resume=True)
    assert middle["step"] == 6
    last = of_two(Path(sharded_cases.__file__), tmp_path, tmp_path / "chain")
    straight = sharded_cases.chain(tmp_path / "alone", stop=None, resume=False)
    assert last[0]["step"] == straight["step"] == 7
    assert furthest(last[0]["weights"], last[1]["weights"]) == 0
    assert furthest(last[0]["weights"], straight["weights"]) < 1e-5
    assert furthest(found[0]["straight"]["weights"], straight["weights"]) < 1e-5


def test_a_damaged_shard_is_named(both: Any, tmp_path: Path) -> None:
    place = shutil.copytree(both[0] / "parts at 3" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    shard = sorted((place / "shards").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-8] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"shards/.*damaged"):
        sharded_cases._trainer(tmp_path / "run", **sharded_cases.CHAIN).train(resume_from_checkpoint=place)
    assert not list(both[0].rglob("*.metadata"))  # a pickle, which runs code


def test_a_checkpoint_in_parts_is_no_model_to_begin_with(both: Any) -> None:
    with pytest.raises(UsageError, match="is a checkpoint of a sharded model, in parts; give it to train"):
        load(both[0] / "parts at 3" / "checkpoint-3")
    model, _ = load(both[0] / "stopped" / "checkpoint-3")  # one that holds the model whole
    assert furthest(dict(model.named_parameters()), both[1][0]["stopped"]["weights"]) == 0


ERRORS = {
    "reward": "rank 1: step 1: reward function",
    "loss": "rank 1: ",
    "callback": "rank 1: KeyError: ",
    "data": "30 on rank 0 and 31 on rank 1",
    "quantised": "LlamaForCausalLM is quantised",
    "optimizer": "leave optimizers out",
    "layer": "names 'BertLayer', and LlamaForCausalLM has no such module; its layers are LlamaDecoderLayer",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_go_on_ends_both_in_words(name: str, both: Any) -> None:
    assert ERRORS[name] in both[1][0][f"error {name}"]
    assert "Error: " in both[1][1][f"error {name}"]


def test_one_process_shards_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sharded_cases._trainer(tmp_path)
    assert "fsdp shards weights among processes, and this is one" in caplog.text


@pytest.mark.parametrize(
    ("fsdp", "config", "reshard", "whole"),
    [
        (True, None, True, True),
        ("full_shard auto_wrap", None, True, True),
        (["shard_grad_op"], {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, False, False),
        (True, {"reshard_after_forward": "false", "xla": False, "min_num_params": 0, "version": 2}, False, True),
        ("true", '{"reshard_after_forward": false}', False, True),
    ],
)
def test_settings_of_transformers_are_understood(fsdp: Any, config: Any, reshard: bool, whole: bool) -> None:
    made = GRPOConfig(fsdp=fsdp, fsdp_config=config)
    assert made.sharding is not None
    assert (made.sharding.reshard, made.sharding.whole) == (reshard, whole)
    assert GRPOConfig(**made.to_dict()).sharding == made.sharding


@pytest.mark.parametrize(
    ("fsdp", "words"),
    [(True, "cpu_ram_efficient_loading=True is left out"), (False, "nothing is sharded; set fsdp=True")],
)
def test_what_of_the_configuration_has_no_effect_is_said(
    fsdp: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"fsdp_cpu_ram_efficient_loading": "true"}
    _sharded(GRPOConfig(fsdp=fsdp, fsdp_config=config), Ranks(Place(0, 2)), None)
    assert words in caplog.text
    caplog.clear()
    _sharded(GRPOConfig(fsdp=fsdp, fsdp_config={"xla": False, "min_num_params": 0}), Ranks(Place(0, 2)), None)
    assert not caplog.text


@pytest.mark.parametrize("off", [None, False, "", [], "false"])
def test_it_is_off(off: Any) -> None:
    assert GRPOConfig(fsdp=off, fsdp_config={"cpu_offload": True}).sharding is None


@pytest.mark.parametrize(
    ("fsdp", "config", "words"),
    [
        ("hybrid_shard", None, "must be true or false, got 'hybrid_shard'"),
        (3, None, "must be true or false, got 3"),
        ("full_shard offload", None, "cpu_offload=True is not offered; start more processes"),
        (True, {"version": 1}, "version=1 is not offered"),
        (True, {"auto_wrap_policy": "SIZE_BASED_WRAP"}, "must be one of TRANSFORMER_BASED_WRAP, NO_WRAP"),
        (True, {"reshard": True}, "has no entry 'reshard'; it has reshard_after_forward"),
        (True, {"reshard_after_forward": 2}, "reshard_after_forward=2 must be true or false"),
        (True, "/nowhere.json", "names no JSON file of a mapping"),
        (True, [1], "must be a mapping"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(fsdp: Any, config: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GRPOConfig(fsdp=fsdp, fsdp_config=config)
