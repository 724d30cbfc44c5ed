"""Where the files of a run are in its folder, and which of them there are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from grouprl.errors import UsageError
from grouprl.runs.files import list_folder
from grouprl.runs.lock import LOCK
from grouprl.runs.metrics import read_metrics
from grouprl.runs.temporaries import is_left_over

_CHECKPOINT = re.compile(r"step_(\d+)\.safetensors")


@dataclass(frozen=True)
class RunLayout:
    """The names of the files in the folder of one run."""

    path: Path

    @property
    def config_path(self) -> Path:
        """What reproduces the run (YAML)."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One row per update (CSV)."""
        return self.path / "metrics.csv"

    @property
    def model_path(self) -> Path:
        """The model the run leaves (safetensors)."""
        return self.path / "model.safetensors"

    @property
    def model_folder(self) -> Path:
        """The language model the run leaves: a Hugging Face folder."""
        return self.path / "model"

    @property
    def transcripts_path(self) -> Path:
        """What a language model wrote while it learned (JSON lines)."""
        return self.path / "transcripts.jsonl"

    @property
    def transcripts_page(self) -> Path:
        """The same, to browse (HTML)."""
        return self.path / "transcripts.html"

    @property
    def episodes_path(self) -> Path:
        """Some batches of an environment as they were learned from (JSON lines)."""
        return self.path / "episodes.jsonl"

    @property
    def episodes_page(self) -> Path:
        """The same, to browse (HTML)."""
        return self.path / "episodes.html"

    @property
    def report_page(self) -> Path:
        """What the run was and how it went, on one page (HTML)."""
        return self.path / "report.html"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of the states a run can be resumed from."""
        return self.path / "checkpoints"

    @property
    def curve_path(self) -> Path:
        """The learning curve (PNG)."""
        return self.path / "curve.png"

    @property
    def video_path(self) -> Path:
        """An episode of the trained model (MP4)."""
        return self.path / "episode.mp4"

    @property
    def summary_path(self) -> Path:
        """The result of the run (JSON)."""
        return self.path / "summary.json"

    @property
    def tensorboard_path(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    def export_path(self, kind: str) -> Path:
        """The folder of the model as other programs read it, of `kind` onnx, torch or merged."""
        return self.path / f"export-{kind}"

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint taken after `step` steps belongs."""
        return self.checkpoints_path / f"step_{step:012d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in list_folder(self.checkpoints_path)]
        return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]

    def made(self) -> list[Path]:
        """What a run has made, config.yaml last."""
        paths = (
            self.checkpoints_path, self.tensorboard_path, self.path / "wandb", self.model_folder,
            *self.path.glob("checkpoint-*"), *self.path.glob("export-*"), self.metrics_path, self.model_path,
            self.curve_path, self.video_path, self.summary_path, self.transcripts_path, self.transcripts_page,
            self.episodes_path, self.episodes_page, self.report_page, self.config_path,
        )  # fmt: skip
        return [path for path in paths if path.exists() or path.is_symlink()]

    def is_usable(self) -> bool:
        """Whether there is a model, or a state that the run can be resumed from."""
        places = (self.checkpoints_path, self.model_folder, self.model_path, *self.path.glob("checkpoint-*"))
        return self.config_path.is_file() and any(place.exists() for place in places)

    def has_steps(self) -> bool:
        """Whether the run has recorded a step above 0."""
        try:
            steps = read_metrics(self.metrics_path).get("step", ())
        except UsageError:
            return False
        return any(step > 0 for step in steps)

    def holds_something(self) -> bool:
        """Whether anything is in the folder, of a run or not."""
        return self.path.is_dir() and any(path.name != LOCK and not is_left_over(path) for path in self.path.iterdir())
