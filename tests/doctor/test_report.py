"""report.html: what it says of a run, and that nothing in a run becomes part of the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grouprl.doctor import examine
from grouprl.doctor.charts import chart
from grouprl.doctor.examine import goal_of
from grouprl.doctor.report import write_report
from grouprl.errors import UsageError
from grouprl.runs import MetricsLog, RunFolder

NASTY = "</td><script>alert(1)</script><img src=x onerror=alert(2)> {{DOCTOR}}"


def run(
    path: Path, rows: int = 40, rises: bool = False, summary: dict[str, Any] | None = None, **config: Any
) -> RunFolder:
    about = {"grouprl": "0", "env_id": "Some-v0", "preset": None, "seed": 3, "config": {"gamma": 0.5, "epochs": 4}}
    folder = RunFolder.create(path, about | config)
    rng = np.random.default_rng(0)
    with MetricsLog(folder.metrics_path) as log:
        for i in range(rows):
            evaluated = float(i) if i % 8 == 0 else None
            log.append(
                {
                    "step": 100 * i,
                    "return_batch": rng.normal() + i * rises,
                    "return_mean": float(i),
                    "eval_return": evaluated,
                }
            )
    if summary is not None:
        folder.model_path.touch()  # a run that leaves a summary has left a model
        folder.write_summary(summary)
    return folder


def text_of(page: Path) -> str:
    """What a reader sees."""

    class Words(HTMLParser):
        found = ""

        def handle_data(self, data: str) -> None:
            self.found += data + " "

    parser = Words()
    parser.feed(page.read_text().partition("<body>")[2])
    return re.sub(r"\s+", " ", parser.found)


@pytest.mark.parametrize(
    "summary",
    [
        {"eval": NASTY}, {"eval": {"mean_return": NASTY, "episodes": float("inf")}}, {"train_seconds": 10**400},
        {"reward_threshold": 1, "solved_at_steps": NASTY}, {"reward_threshold": 1, "solved_at_steps": [1]},
    ],
)  # fmt: skip
def test_a_summary_of_something_else_is_shown_without_its_numbers(tmp_path: Path, summary: dict[str, Any]) -> None:
    page = write_report(run(tmp_path / "run", summary=summary).path)
    assert "\u2013" in text_of(page)
    assert "<script>alert" not in page.read_text()


def test_it_says_what_the_run_was_how_it_went_and_what_is_wrong(tmp_path: Path) -> None:
    final = {"mean_return": 38.5, "std_return": 1.5, "episodes": 100, "min": 30, "max": 39}
    folder = run(tmp_path / "r", rises=True, summary={"eval": final, "reward_threshold": 35.0, "solved_at_steps": 3600})
    page = write_report(folder.path, {"gamma": 0.99, "epochs": 4})
    said = text_of(page)
    assert page == folder.report_page
    for part in ("Some-v0: r", "seed 3", "38.5 ± 1.5", "3,600 steps", "gamma 0.5 0.99", "No rule found anything wrong"):
        assert part in said, part
    assert said.index("gamma") < said.index("The other 1 settings") < said.index("epochs")


def test_an_ill_run_that_goes_on_says_both(tmp_path: Path) -> None:
    said = text_of(write_report(run(tmp_path / "r").path))
    assert "reward-flat" in said
    assert "Try:" in said
    assert "not finished" in said


def test_links_lead_to_files_that_are_there(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    folder.curve_path.write_bytes(b"")
    links = re.findall(r'href="([^"]*)"', write_report(folder.path).read_text())
    assert set(links) == {"curve.png", "metrics.csv", "config.yaml"}


def test_nothing_in_a_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", env_id=NASTY, preset=NASTY, config={NASTY: NASTY})
    page = write_report(folder.path, {NASTY: 1})
    text = page.read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert text_of(page).count("alert(1)") == 4  # the title, the preset, the setting and its value
    assert "default-src 'none'" in text


def test_a_folder_without_metrics_makes_no_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", rows=0)
    with pytest.raises(UsageError, match=r"metrics"):
        write_report(folder.path)


def test_a_chart_draws_what_is_finite_within_its_frame() -> None:
    steps = np.arange(1000.0)
    values = np.where(steps % 7, np.sin(steps / 100) * 1e5, np.nan)
    figure = chart("a & b", "", steps, values, np.where(steps == 500, 2e5, np.nan), goal=-3e5)
    path = re.search(r'class="a" d="M([^"]*)"', figure)
    assert path is not None
    points = np.array([list(map(float, point.split())) for point in path[1].split("L")])
    assert len(points) == 240
    assert points.min() >= 0
    assert points[:, 0].max() <= 360
    assert points[:, 1].max() <= 190
    assert figure.count("<circle") == 1
    assert "a &amp; b" in figure
    assert "nan" not in figure


def test_a_chart_of_nothing_is_nothing_and_one_of_a_constant_is_drawn() -> None:
    assert chart("a", "", np.arange(3.0), np.full(3, np.nan)) == ""
    assert "nan" not in chart("a", "", np.arange(3.0), np.ones(3))
    assert "nan" not in chart("a", "", np.ones(1), np.zeros(1))


def test_half_a_run_is_too_early_to_call_its_reward_flat(tmp_path: Path) -> None:
    for total, found in ((20_000, []), (4_000, ["reward-flat"])):
        folder = run(tmp_path / str(total), run={"total_timesteps": total})
        assert [one.name for one in examine(folder.path)] == found


def test_the_goal_of_a_run_is_known_before_its_end(tmp_path: Path) -> None:
    assert goal_of(run(tmp_path / "on", reward_threshold=30.0)) == 30.0
    assert goal_of(run(tmp_path / "none")) is None
    assert examine(tmp_path / "on") == []  # its reward is flat, and it is solved
    assert [one.name for one in examine(tmp_path / "none")] == ["reward-flat"]
