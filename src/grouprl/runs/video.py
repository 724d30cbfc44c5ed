"""Videos: frames streamed to ffmpeg as they come, so that an episode of any length fits in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from grouprl.errors import TrainingError, UsageError
from grouprl.runs.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# yuv420p, which every player understands, halves the colour planes: a row or column is added to odd sizes.
_EVEN = "pad=ceil(iw/2)*2:ceil(ih/2)*2"


def write_video(frames: Iterable[NDArray[np.uint8]], path: str | os.PathLike[str], fps: float) -> None:
    """Write `frames` (each [H, W, 3] uint8, all of one size) to `path` atomically, as H.264 at `fps` frames a second.

    Raises:
        UsageError: there are no frames, a frame has another shape or dtype, `fps` <= 0, or the path is not writable.
        TrainingError: ffmpeg failed.
    """
    import imageio_ffmpeg

    if not fps > 0:
        raise UsageError(f"Cannot write {path} at {fps} frames a second: fps must be positive.")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise UsageError(
            f"Cannot write {path}: there are no frames. Was the environment made with rgb_array rendering?"
        )
    shape = first.shape
    with atomic_path(path) as temporary:
        encoder = imageio_ffmpeg.write_frames(
            str(temporary), (shape[1], shape[0]) if len(shape) == 3 else (0, 0), fps=fps, codec="libx264",
            pix_fmt_in="rgb24", pix_fmt_out="yuv420p", macro_block_size=1, quality=None, ffmpeg_log_level="error",
            output_params=["-vf", _EVEN, "-preset", "ultrafast", "-crf", "23", "-movflags", "+faststart"],
        )  # fmt: skip
        try:
            for number, frame in enumerate(chain([first], iterator)):
                _check(frame, shape, number)
                if number == 0:
                    encoder.send(None)
                encoder.send(frame.tobytes())
        except OSError as error:
            raise TrainingError(f"Cannot write {path}: ffmpeg failed: {error}") from error
        finally:
            encoder.close()
        if temporary.stat().st_size == 0:
            raise TrainingError(f"Cannot write {path}: ffmpeg wrote nothing for frames of shape {shape}.")


def _check(frame: NDArray[np.uint8], shape: tuple[int, ...], number: int) -> None:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype.name != "uint8" or 0 in frame.shape:
        raise UsageError(f"Frame {number} has shape {frame.shape} and dtype {frame.dtype}; expected [H, W, 3] uint8.")
    if frame.shape != shape:
        raise UsageError(f"Frame {number} has shape {frame.shape}, but frame 0 has {shape}. All must be of one size.")
