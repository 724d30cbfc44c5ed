"""Videos: frames streamed to ffmpeg as they come, so that an episode of any length fits in memory."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from grouprl.errors import TrainingError, UsageError
from grouprl.runs.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]


def write_video(frames: Iterable[Frame], path: str | os.PathLike[str], fps: float) -> None:
    """Write `frames` (each [H, W, 3] uint8, all of one size) to `path` atomically, as H.264 at `fps` frames a second.

    Raises:
        UsageError: there are no frames, a frame has another shape or dtype, `fps` <= 0, there is no ffmpeg, or the path
            cannot be written.
        TrainingError: ffmpeg failed.
    """
    if not fps > 0:
        raise UsageError(f"Cannot write {path} at {fps} frames a second: fps must be positive.")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise UsageError(f"Cannot write {path}: there are no frames.")
    _check(first, first.shape, 0)
    with atomic_path(path) as temporary, tempfile.TemporaryFile() as complaints:
        command = _ffmpeg_command(first.shape, fps, temporary)
        encoder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=complaints)
        try:
            assert encoder.stdin is not None
            for number, frame in enumerate(chain([first], iterator)):
                _check(frame, first.shape, number)
                encoder.stdin.write(frame.tobytes())
            encoder.stdin.close()
            failed = encoder.wait() != 0
        except BrokenPipeError:  # ffmpeg ended early; what it said tells why
            failed = True
        finally:
            encoder.kill()
            encoder.wait()
        if failed:
            complaints.seek(0)
            reason = complaints.read().decode(errors="replace").strip() or f"exit status {encoder.returncode}"
            raise TrainingError(f"Cannot write {path}: ffmpeg failed: {reason}")


def _ffmpeg_command(shape: tuple[int, ...], fps: float, path: Path) -> list[str]:
    import imageio_ffmpeg

    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UsageError(
            f"There is no ffmpeg to write videos with: {error} Install it, or do without video."
        ) from error
    height, width = shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    # yuv420p, which every player understands, halves the colour planes: a row or column is added to odd sizes.
    codec = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "ultrafast"]
    return [ffmpeg, "-y", "-loglevel", "error", *source, *codec, "-crf", "23", "-movflags", "+faststart", str(path)]


def _check(frame: Frame, shape: tuple[int, ...], number: int) -> None:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype.name != "uint8" or 0 in frame.shape:
        raise UsageError(f"Frame {number} has shape {frame.shape} and dtype {frame.dtype}; expected [H, W, 3] uint8.")
    if frame.shape != shape:
        raise UsageError(f"Frame {number} has shape {frame.shape}, but frame 0 has {shape}. All must be of one size.")
