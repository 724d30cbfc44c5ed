import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from xxhash import xxh3_64

from grouprl.errors import TrainingError, UsageError
from grouprl.runs.appended import AppendedFile
from grouprl.runs.files import (
    atomic_path,
    file_checksum,
    read_bytes,
    rounded,
    user_path,
    write_bytes,
    write_json,
    write_text,
    write_yaml,
)  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise error


def test_a_failure_in_the_middle_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="broken"):
        write_half(target, RuntimeError("broken"))
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_an_interrupt_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "file.txt", KeyboardInterrupt())
    assert names(tmp_path) == []


def test_the_temporary_file_is_in_the_same_folder_and_has_the_same_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "curve.png") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert not (tmp_path / "curve.png").exists()
    assert names(tmp_path) == ["curve.png"]


def test_a_file_the_writer_made_private_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "file") as temporary:
        temporary.chmod(0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b" / "file", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, TrainingError), (errno.EDQUOT, TrainingError), (errno.EACCES, UsageError)],
)
def test_an_error_of_the_system_becomes_one_that_names_the_path(
    tmp_path: Path, number: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"file\.txt"), atomic_path(tmp_path / "file.txt"):
        raise OSError(number, "the reason")
    assert names(tmp_path) == []


def test_a_file_too_large_for_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX feature")
    target = tmp_path / "file"
    write_bytes(target, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(TrainingError, match="Cannot write"):
            write_bytes(target, bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_path_below_a_file_or_on_a_folder_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="Cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(UsageError, match="Cannot write"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_json_turns_nan_and_infinities_into_null_and_numpy_numbers_into_numbers(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": np.float32(0.5), "d": np.int64(3), "e": np.float64("nan")}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "c": 0.5, "d": 3, "e": None}


@pytest.mark.parametrize("write", [write_json, write_yaml])
def test_an_object_that_is_no_plain_data_is_refused_before_anything_is_written(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="Cannot write"):
        write(tmp_path / "x", {"a": object()})
    assert names(tmp_path) == []


def test_yaml_keeps_the_order_of_keys_and_exact_floats(tmp_path: Path) -> None:
    value = {"z": 1e-05, "a": {"lr": 3e-4, "name": "é"}, "n": None, "big": 1e22}
    write_yaml(tmp_path / "x.yaml", value)
    read = yaml.safe_load((tmp_path / "x.yaml").read_text(encoding="utf-8"))
    assert read == value
    assert list(read) == ["z", "a", "n", "big"]


# --- files that grow --------------------------------------------------------------------------------------------------


def test_a_file_that_grows_makes_its_folder_and_each_line_is_there_at_once(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "deep" / "log.txt")
    file.append("one\n")
    assert file.path.read_text() == "one\n"
    file.append("two\nthree\n")
    assert file.path.read_text() == "one\ntwo\nthree\n"
    file.close()
    file.close()
    file.append("four\n")
    assert file.path.read_text().splitlines()[-1] == "four"
    file.close()


def test_what_replaces_a_file_that_grows_is_gone_on_from(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "log.txt")
    file.append("one\ntwo\n")
    file.replace(b"one\n")
    file.append("three\n")
    file.close()
    assert file.path.read_bytes() == b"one\nthree\n"


@pytest.mark.parametrize(("held", "left"), [(b"a\nb", b"a\n"), (b"a\n", b"a\n"), (b"a", b""), (b"", b"")])
def test_only_a_torn_last_line_is_dropped(tmp_path: Path, held: bytes, left: bytes) -> None:
    file = AppendedFile(tmp_path / "log.txt")
    file.path.write_bytes(held)
    file.take_up(read_bytes(file.path, "log"))
    assert file.path.read_bytes() == left


def test_a_file_that_cannot_be_read_is_named_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no log .*none\.txt"):
        read_bytes(tmp_path / "none.txt", "log")
    with pytest.raises(UsageError, match=r"is a folder, not a log\."):
        read_bytes(tmp_path, "log")


def test_a_file_that_cannot_grow_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Cannot write"):
        AppendedFile(tmp_path / "file" / "log.txt").append("one\n")


@pytest.mark.parametrize("path", [5, [], b"x", None, "a\0b", "\ud800", "x" * 256, "é" * 128])
def test_what_is_no_path_is_refused_in_a_line(path: Any) -> None:
    with pytest.raises(UsageError, match=r"is no path|cannot be a path") as raised:
        user_path(path)
    assert "\n" not in str(raised.value)


def test_whatever_a_file_system_holds_is_a_path(tmp_path: Path) -> None:
    for name in ("x" * 255, "h-ä", "\udcff", "a b", "line\nline"):
        place = user_path(tmp_path / name)
        place.touch()
        assert place.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_a_full_disk_did_not_take_is_one_error_and_closing_is_none() -> None:
    file = AppendedFile(Path("/dev/full"))
    with pytest.raises(TrainingError, match="No space left"):
        file.append("a line\n")
    file.close()


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_checksum_is_that_of_all_a_file_holds(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert file_checksum(path) == xxh3_64(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("value", "short"),
    [
        (-2.325e-29, -2.325e-29), (-2.32549e-29, -2.325e-29), (1e300, 1e300), (1.23456e300, 1.235e300),
        (5e-324, 5e-324), (1.23456e-310, 1.235e-310), (-0.000123456, -0.0001235), (98765.4, 98770.0), (3, 3.0),
        (sys.float_info.min, 2.225e-308), (sys.float_info.max, None), (float("-inf"), None), (float("nan"), None),
    ],
)  # fmt: skip
def test_a_number_is_rounded_to_significant_digits_and_stays_one_that_json_has(
    value: float, short: float | None
) -> None:
    made = rounded(value, 4)
    assert made == short
    assert json.loads(json.dumps(made, allow_nan=False)) == short
    assert len(f"{made!r}") <= 10
