import sys
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray

from grouprl.errors import TrainingError, UsageError
from grouprl.runs.video import write_video


def some_frames(count: int, height: int = 40, width: int = 60) -> Iterator[NDArray[np.uint8]]:
    for i in range(count):
        frame = np.full((height, width, 3), 255, dtype=np.uint8)
        frame[:, i % width] = 0
        yield frame


def test_every_frame_can_be_read_back_at_its_rate(tmp_path: Path) -> None:
    write_video(some_frames(30), tmp_path / "v.mp4", fps=15)
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "v.mp4")) == (30, 2.0)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "v.mp4")))
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["size"] == (60, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_colours_survive(tmp_path: Path) -> None:
    frame = np.zeros((40, 60, 3), dtype=np.uint8)
    frame[:, :30, 0] = 255  # left half red, right half blue
    frame[:, 30:, 2] = 255
    write_video([frame] * 3, tmp_path / "v.mp4", fps=10)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "v.mp4"))
    next(reader)
    read = np.frombuffer(next(reader), dtype=np.uint8).reshape(40, 60, 3)
    reader.close()
    np.testing.assert_allclose(read[20, 10], [255, 0, 0], atol=12)
    np.testing.assert_allclose(read[20, 50], [0, 0, 255], atol=12)


def test_an_odd_size_gains_one_row_and_one_column(tmp_path: Path) -> None:
    write_video(some_frames(3, 41, 61), tmp_path / "v.mp4", fps=10)
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "v.mp4")))["size"] == (62, 42)


def test_no_frames_and_no_speed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no frames"):
        write_video([], tmp_path / "v.mp4", fps=10)
    with pytest.raises(UsageError, match="fps must be positive"):
        write_video(some_frames(1), tmp_path / "v.mp4", fps=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    "bad",
    [np.zeros((40, 60), np.uint8), np.zeros((40, 60, 4), np.uint8), np.zeros((40, 60, 3), np.float32)],
    ids=["grey", "alpha", "float"],
)
def test_a_frame_that_is_no_picture_is_refused_by_number(tmp_path: Path, bad: NDArray[np.uint8], number: int) -> None:
    with pytest.raises(UsageError, match=rf"Frame {number} has shape .* expected \[H, W, 3\] uint8"):
        write_video([*some_frames(number), bad], tmp_path / "v.mp4", fps=10)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_of_another_size_is_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Frame 2 has shape \(40, 62, 3\), but frame 0 has \(40, 60, 3\)"):
        write_video([*some_frames(2), *some_frames(1, 40, 62)], tmp_path / "v.mp4", fps=10)
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_fails_in_the_middle_leaves_the_old_video(tmp_path: Path) -> None:
    def broken() -> Iterator[NDArray[np.uint8]]:
        yield from some_frames(5)
        raise RuntimeError("the environment died")

    (tmp_path / "v.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the environment died"):
        write_video(broken(), tmp_path / "v.mp4", fps=10)
    assert (tmp_path / "v.mp4").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_what_ffmpeg_complains_of_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ffmpeg failed: .*Unable to choose an output format"):
        write_video(some_frames(5), tmp_path / "v.nosuchformat", fps=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for ffmpeg is a shell script")
def test_an_encoder_that_reads_all_and_fails_leaves_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text("#!/bin/sh\ncat > /dev/null\nexit 3\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(stand_in))
    with pytest.raises(TrainingError, match="exit status 3"):
        write_video(some_frames(5), tmp_path / "v.mp4", fps=10)
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


def test_a_missing_ffmpeg_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(UsageError, match="do without video"):
        write_video(some_frames(1), tmp_path / "v.mp4", fps=10)
    assert list(tmp_path.iterdir()) == []
