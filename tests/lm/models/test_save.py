import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.models.load import load
from grouprl.lm.models.save import independent_state, save_model
from grouprl.lm.models.tiny import build_tiny
from grouprl.runs.atomic_folder import atomic_folder


def flatten(model: torch.nn.Module) -> torch.Tensor:
    """Make every parameter a view into one tensor, as a learner does that steps all of them at once."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return flat


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return peft_model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saving") / "base"
    save_model(*build_tiny(0), path)
    return path


def test_parameters_that_are_views_into_one_tensor_are_saved(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(0)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    flat = flatten(model)
    save_model(model, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert model.model.norm.weight.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 4 * 100_672 + 10_000


def test_only_parts_of_larger_tensors_are_copied_and_tied_weights_once() -> None:
    model, _ = build_tiny(0)
    assert all(v.data_ptr() == model.state_dict()[k].data_ptr() for k, v in independent_state(model).items())
    flatten(model)
    state = independent_state(model)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    places = {value.untyped_storage().data_ptr() for value in state.values()}
    assert len(places) == len(list(model.parameters()))


def test_saving_replaces_an_older_model_and_leaves_nothing_else(tmp_path: Path) -> None:
    for seed in range(2):
        save_model(*build_tiny(seed), tmp_path / "m")
    model, _ = load(tmp_path / "m")
    assert torch.equal(model.lm_head.weight, build_tiny(1)[0].lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "usual").touch()
    modes = {file.stat().st_mode for file in [*(tmp_path / "m").iterdir(), tmp_path / "usual"]}
    assert len(modes) == 1


def test_the_older_model_stays_when_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(*build_tiny(0), tmp_path / "m")
    model, tokenizer = build_tiny(1)
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, tokenizer, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")[0].lm_head.weight, build_tiny(0)[0].lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def small_disk() -> Iterator[int]:
    """No file may grow past 100 kB; what the operating system then answers is what a full disk answers."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_full_disk_is_a_training_error_and_leaves_nothing(tmp_path: Path, small_disk: int, what: str) -> None:
    model, tokenizer = build_tiny(0)
    if what == "tokenizer":
        model.half()
        model.model.layers = model.model.layers[:0]
        model.config.num_hidden_layers = 0
        tokenizer.add_tokens([f"a token that takes some room {i}" for i in range(2000)])
    with pytest.raises(TrainingError, match=r"Cannot write .*m: .*Free some space"):
        save_model(model, tokenizer, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    for name, content in (("notes.odt", "config.json"), ("thesis.txt", "thesis.txt")):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        (folder / content).touch()
        with pytest.raises(UsageError, match=f"holds {name}"):
            save_model(*build_tiny(0), folder)
        assert (folder / name).read_text() == "mine"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(UsageError, match="that is a file"):
        save_model(*build_tiny(0), tmp_path / "m")


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_model(*build_tiny(0), tmp_path / "empty")
    save_model(*build_tiny(0), tmp_path / "a" / "b")
    assert load(tmp_path / "empty")[0].num_parameters() == load(tmp_path / "a" / "b")[0].num_parameters()


@pytest.mark.parametrize(
    ("own", "saved"),
    [
        ({"do_sample": False, "top_k": 50}, {"do_sample": False, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.0}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": None, "temperature": None, "top_p": None}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 7}, {"do_sample": True, "temperature": 0.6, "top_k": 7}),
        ({"penalty_alpha": 0.6, "top_k": 4}, {"do_sample": None, "penalty_alpha": 0.6, "top_k": 4}),
        ({"length_penalty": 2.0, "max_new_tokens": 5}, {"length_penalty": None, "max_new_tokens": 5}),
        ({"num_beams": 2, "length_penalty": 2.0, "min_p": 0.1}, {"num_beams": 2, "length_penalty": 2.0, "min_p": None}),
        ({"num_return_sequences": 2}, {"num_return_sequences": None, "do_sample": None}),
    ],
)
def test_a_generation_config_keeps_its_way_of_decoding(
    tmp_path: Path, own: dict[str, Any], saved: dict[str, Any]
) -> None:
    model, tokenizer = build_tiny(0)
    model.generation_config = given = GenerationConfig(eos_token_id=[1, 2])
    for name, value in own.items():
        setattr(given, name, value)
    before = given.to_dict()
    save_model(model, tokenizer, tmp_path / "m")
    assert model.generation_config is given
    assert given.to_dict() == before
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config
    assert {name: getattr(loaded, name) for name in saved} == saved
    assert loaded.eos_token_id == [1, 2]


def test_an_invalid_generation_config_does_not_cost_the_model(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(0)
    assert model.generation_config is not None
    model.generation_config.max_new_tokens = 0
    with pytest.warns(UserWarning, match="max_new_tokens"):
        save_model(model, tokenizer, tmp_path / "m")
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config
    assert (saved.max_new_tokens, saved.eos_token_id) == (None, model.generation_config.eos_token_id)


def test_a_published_generation_config_is_saved_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(0)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 2]}')
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    save_model(model, tokenizer, tmp_path / "m")
    saved = GenerationConfig.from_pretrained(tmp_path / "m")
    assert (saved.temperature, saved.do_sample, saved.eos_token_id) == (0.6, None, [1, 2])


def test_an_adapter_is_saved_alone_and_loaded_onto_its_base(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base)
    trained = with_adapter(model)
    flatten(trained)
    save_model(trained, tokenizer, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded, again = load(tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(trained))
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in trained.named_parameters() if p.requires_grad
    ]
    assert again("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base)
    save_model(with_adapter(model), None, tmp_path / "adapter")
    assert load(tmp_path / "adapter")[1]("ab")["input_ids"] == tokenizer("ab")["input_ids"]


def test_an_adapter_of_an_unnamed_base_is_refused(tmp_path: Path) -> None:
    model, tokenizer = build_tiny(0)
    save_model(with_adapter(model), tokenizer, tmp_path / "adapter")
    with pytest.raises(UsageError, match="does not say which model"):
        load(tmp_path / "adapter")


DIE = """
import os, sys
from pathlib import Path
from grouprl.runs.atomic_folder import atomic_folder
with atomic_folder(Path(sys.argv[1]), lambda path: None) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    os._exit(9)
"""


def test_what_a_killed_process_left_of_a_model_is_removed_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_model(*build_tiny(0), path)
    assert subprocess.run([sys.executable, "-c", DIE, str(path)], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    save_model(*build_tiny(1), path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_was_moved_away_when_its_process_was_killed_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_model(*build_tiny(0), path)
    path.rename(tmp_path / f".m.{2**22 + 1}-0123abcd-0.old")
    with pytest.raises(RuntimeError, match="broken"), atomic_folder(path, lambda path: None):
        raise RuntimeError("broken")
    assert load(str(path))[0] is not None
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_another_library_wrote_over_is_used_once_its_checksums_are_deleted(tmp_path: Path) -> None:
    """A person trains a folder on in place; nothing tells that from damage, so the error says what to do."""
    path = tmp_path / "m"
    save_model(*build_tiny(0), path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(path)
    with pytest.raises(
        UsageError, match=r"If another program saved a model there on purpose, delete (\S+)\.$"
    ) as error:
        load(str(path))
    Path(str(error.value).split()[-1].rstrip(".")).unlink()
    assert torch.equal(next(load(str(path))[0].parameters()), next(model.parameters()))
