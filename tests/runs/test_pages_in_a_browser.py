"""The pages of a run, opened in a browser without a window, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from grouprl.runs import episodes, transcripts

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def opened(page: Path, profile: Path) -> str:
    """The page as its script left it."""
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_transcripts_open_at_the_last_step_where_rewards_differ(tmp_path: Path) -> None:
    with transcripts.TranscriptWriter(tmp_path / "t.jsonl") as writer:
        for step, advantages in enumerate(([1.0, -1.0], [0.5, -0.5], [0.0, 0.0])):
            writer.append(
                transcripts.Transcript(
                    step=step, group=0, reward=a, completion="text", prompt_index=7, prompt="really?", tokens=2,
                    finished=True, rewards={"right": a}, advantage=a,
                )
                for a in advantages
            )  # fmt: skip
    transcripts.write_html(tmp_path / "t.jsonl", tmp_path / "t.html", "t")
    assert ">Step 1<" in opened(tmp_path / "t.html", tmp_path / "profile")


def test_the_axes_of_episodes_have_round_numbers(tmp_path: Path) -> None:
    sample = episodes.Sample(
        group=0, begins=0, length=3, ended="batch", total=2.0, advantage=0.5, at=[0, 2], observation=[[0.0, None]],
        rewards=[1.0, 1.0], to_go=[2.0, 1.0], advantages=[0.5, 0.5],
    )  # fmt: skip
    with episodes.EpisodeLog(tmp_path / "e.jsonl") as log:
        log.append(
            episodes.Batch(samples=[sample], step=997, estimator="baseline", names=["obs[0]"], samples_in_batch=9)
        )
    curve = {0: 19.2, 500: 251.0, 1003: 487.3}
    episodes.write_html(tmp_path / "e.jsonl", tmp_path / "e.html", "e", curve=curve)
    chart = opened(tmp_path / "e.html", tmp_path / "profile").partition('id="chart"')[2].partition("</svg>")[0]
    assert re.findall(r"<text[^>]*>([^<]*)<", chart) == ["200", "400", "0", "500", "1,000"]
