"""What a run leaves behind. Knows nothing of environments or language models.

A run folder::

    config.yaml          everything that reproduces the run
    metrics.csv          one row per update
    tensorboard/         the same metrics as TensorBoard events
    checkpoints/         step_000000012345.safetensors, ...: what a resumed run continues from
    model.safetensors    the trained model
    curve.png            the learning curve
    episode.mp4          the trained model at work
    summary.json         the result

Each file is written whole or not at all (`files`). No file holds pickled objects (`state`). The learning curve and the
video are made by `plots.plot_run` and `video.write_video`; import those modules where they are used.
"""

from grouprl.runs.folder import RunFolder, default_run_path
from grouprl.runs.metrics import MetricsLog, read_metrics
from grouprl.runs.progress import Progress
from grouprl.runs.state import load_state, save_state
from grouprl.runs.trackers import Tracker, make_trackers

__all__ = [
    "MetricsLog",
    "Progress",
    "RunFolder",
    "Tracker",
    "default_run_path",
    "load_state",
    "make_trackers",
    "read_metrics",
    "save_state",
]
