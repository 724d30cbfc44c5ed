import json
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from xxhash import xxh3_64

from grouprl.errors import DamagedFileError, TrainingError, UsageError
from grouprl.runs.state import check_like, load_state, read_meta, save_state, taking_up

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).abs().to(dtype)
    save_state(tmp_path / "x.safetensors", {"a": tensor}, {})
    tensors, meta = load_state(tmp_path / "x.safetensors")
    assert meta == {}
    assert tensors["a"].dtype == dtype
    assert tensors["a"].shape == tensor.shape
    assert torch.equal(tensors["a"], tensor)


def test_meta_comes_back_with_large_integers_and_infinities(tmp_path: Path) -> None:
    meta = {"rng": {"state": 2**127 + 1, "inc": -5}, "best": float("-inf"), "text": "é\n", "list": [1, 0.1, None, True]}
    save_state(tmp_path / "x.safetensors", {}, meta)
    assert load_state(tmp_path / "x.safetensors") == ({}, meta)
    assert read_meta(tmp_path / "x.safetensors") == meta


def test_tensors_that_share_memory_are_not_contiguous_or_need_gradients_are_stored(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    weight = torch.nn.Parameter(torch.ones(2))
    tensors = {"all": base, "same": base, "head": base[:2], "tail": base[2:], "t": base.view(2, 3).T, "w": weight}
    save_state(tmp_path / "x.safetensors", tensors, {})
    loaded, _ = load_state(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    loaded["all"][0] = 9
    assert loaded["same"][0] == 0


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    for number in range(12):
        save_state(tmp_path / f"{number}", {"b": torch.ones(2), "a": torch.zeros(3)}, {"step": 1})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_what_was_loaded_does_not_change_when_the_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.ones(3)}, {})
    loaded, _ = load_state(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert loaded["a"].tolist() == [1, 1, 1]


def whole_file(folder: Path) -> bytes:
    save_state(folder / "whole", {"a": torch.arange(100.0)}, {"step": 1})
    return (folder / "whole").read_bytes()


def write_torch(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)


def write_old_torch(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def write_foreign(path: Path) -> None:
    save_file({"a": torch.ones(2)}, str(path), metadata={"format": "pt"})


def write_newer(path: Path) -> None:
    save_file({}, str(path), metadata={"grouprl_format": "99", "meta": "{}"})


def write_bad_meta(path: Path) -> None:
    found = {"grouprl_format": "2", "meta": "{", "checksums": "{}"}
    header = json.dumps({"__metadata__": found}, sort_keys=True)
    save_file({}, str(path), metadata={**found, "header": xxh3_64(header.encode()).hexdigest()})


def write_without_checksum(path: Path) -> None:
    save_file({}, str(path), metadata={"grouprl_format": "2", "meta": "{}", "checksums": "{}"})


FOREIGN = {
    "missing": (lambda path: None, "no file"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut in the header": (lambda path: path.write_bytes(whole_file(path.parent)[:40]), "cut short or damaged"),
    "cut in the data": (lambda path: path.write_bytes(whole_file(path.parent)[:-1]), "cut short or damaged"),
    "one byte": (lambda path: path.write_bytes(b"\x07"), "not a safetensors file"),
    "text": (lambda path: path.write_text("step,return\n1,2\n"), "not a safetensors file"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "not a safetensors file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": [1] * 100})), "a Python pickle"),
    "torch.save": (write_torch, "a zip archive"),
    "old torch.save": (write_old_torch, "a Python pickle"),
    "foreign safetensors": (write_foreign, "holds no state of a run"),
    "newer format": (write_newer, "'99'"),
    "damaged meta": (write_bad_meta, "its meta data is not JSON"),
    "no checksum": (write_without_checksum, "its header has lost its checksum"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_state_file_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    write, words = FOREIGN[kind]
    path = tmp_path / "state.safetensors"
    write(path)
    with pytest.raises(UsageError, match=words) as caught:
        load_state(path)
    assert str(path) in str(caught.value)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "state").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UsageError, match="pickle"):
        load_state(tmp_path / "state")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", [[1.0], torch.eye(2).to_sparse()], ids=["list", "sparse"])
def test_what_is_no_dense_tensor_is_refused_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(UsageError, match="'weights'"):
        save_state(tmp_path / "x", {"weights": value}, {})  # type: ignore[dict-item]


def test_meta_that_is_not_json_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="JSON"):
        save_state(tmp_path / "x", {}, {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_does_not_fit_on_the_disk_leaves_the_old_state(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX feature")
    path = tmp_path / "x.safetensors"
    save_state(path, {"a": torch.ones(3)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(TrainingError, match=r"x\.safetensors"):
            save_state(path, {"a": torch.ones(1 << 20)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_state(path)[1] == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_header_is_plain_json_that_any_safetensors_reader_sees(tmp_path: Path) -> None:
    save_state(tmp_path / "x", {"a": torch.ones(1)}, {"step": 7})
    data = (tmp_path / "x").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["meta"] == '{"step": 7}'
    assert json.loads(header["__metadata__"]["checksums"]).keys() == {"a"}


def test_no_bit_of_a_file_can_change_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_state(path, {"a": torch.arange(6.0), "b": torch.ones(0), "c": torch.tensor(3)}, {"step": 7})
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with suppress(DamagedFileError):  # blanks behind the header's end, say, mean nothing
            tensors, meta = load_state(path)
            assert (tensors["a"].tolist(), tensors["c"].item(), meta) == (list(range(6)), 3, {"step": 7})


@pytest.mark.parametrize("change", ["dropped", "reshaped", "other meta"])
def test_a_file_that_was_saved_again_by_others_is_damaged(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x"
    save_state(path, {"a": torch.arange(6.0), "b": torch.ones(2)}, {"step": 7})
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in ("a", "b")}
    if change == "dropped":
        del tensors["b"]
    elif change == "reshaped":
        tensors["a"] = tensors["a"].reshape(2, 3)
    else:
        header["meta"] = '{"step": 8}'
    save_file(tensors, path, metadata=header)
    with pytest.raises(DamagedFileError, match="its header is not what was saved"):
        load_state(path)


LIKE = {"a": torch.zeros(3), "n": torch.tensor(0)}


@pytest.mark.parametrize(
    ("tensors", "meta", "said"),
    [
        ({"a": torch.zeros(3)}, {}, "lacks the tensor 'n'"),
        ({"a": torch.zeros(4), "n": torch.tensor(1)}, {}, r"'a' is float32 \[4\] there and float32 \[3\] here"),
        ({"a": torch.zeros(3), "n": torch.tensor(1.0)}, {}, r"'n' is float32 \[\] there and int64 \[\] here"),
        ({"a": torch.tensor([0, float("nan"), 0]), "n": torch.tensor(1)}, {}, "'a' holds NaN"),
        ({**LIKE}, {"steps": "3"}, "steps is '3', not of the kind of 5"),
        ({**LIKE}, {"rng": {"act": None}}, r"rng.act is None, not of the kind of \{\}"),
        ({**LIKE}, [], "its meta data is"),
    ],
)
def test_what_a_run_cannot_have_saved_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], meta: object, said: str
) -> None:
    like_meta = {"steps": 5, "rng": {"act": {}}, "solved": None}
    check_like(tmp_path / "x", LIKE, {"steps": 0.5, "solved": 3, "more": 1}, LIKE, like_meta)
    with pytest.raises(DamagedFileError, match=said):
        check_like(tmp_path / "x", tensors, meta, LIKE, like_meta)


@pytest.mark.parametrize(
    "error", [KeyError("rng"), IndexError("no 3"), ZeroDivisionError("by 0"), RuntimeError("size")]
)
def test_whatever_goes_wrong_in_taking_up_a_file_names_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DamagedFileError, match=rf"{tmp_path}.* is damaged: .*{error.args[0]}"), taking_up(tmp_path):
        raise error
    with pytest.raises(TrainingError, match="mine"), taking_up(tmp_path):
        raise TrainingError("mine")


def special(path: Path, kind: str) -> None:
    """Something else than a file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to nothing":
        path.symlink_to(path.parent / "nothing")
    else:
        path.symlink_to(path)


@pytest.mark.parametrize("kind", ["folder", "named pipe", "socket", "device", "link to nothing", "symbolic link"])
@pytest.mark.parametrize("read", [load_state, read_meta])
def test_what_is_no_file_is_named_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    special(tmp_path / "x", kind)
    with pytest.raises(DamagedFileError, match=f"{tmp_path}.*{kind}"):
        read(tmp_path / "x")
