"""What a run leaves behind, in both arenas.

It imports neither arena and handles no environment, model or tokenizer. It does know the names of the files that
either arena leaves, and reads the name of an environment or a task in `config.yaml`, to label curves.

A run folder::

    config.yaml          everything that reproduces the run
    metrics.csv          one row per update
    tensorboard/         the same metrics as TensorBoard events
    curve.png            the learning curve
    summary.json         the result
    report.html          what the run was and how it went, on one page

    environments                                  language models
    checkpoints/step_000000012345.safetensors     checkpoint-N/         what a resumed run continues from
    model.safetensors                             model/                the trained model
    episode.mp4                                   transcripts.jsonl     the model at work
    episodes.jsonl                                                      some batches that were learned from
    episodes.html                                 transcripts.html      the same, as a page

Each file is written whole or not at all (`files`), or grows by whole lines (`appended`). No file holds pickled objects
(`state`). The learning curve, the video and the page are made by `plots.plot_run`, `video.write_video` and
`transcripts.write_html`; import those modules where they are used.
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
