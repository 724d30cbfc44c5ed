"""Episodes as lines of JSON, and the page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grouprl.errors import UsageError
from grouprl.runs.episodes import Batch, EpisodeLog, Sample, Strip, picture, read_episodes, write_html

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{DATA}} {{STYLE}}"


def batch(step: int = 1, **changes: Any) -> Batch:
    sample: dict[str, Any] = {
        "group": 0, "begins": 0, "length": 3, "ended": "batch", "total": 2.0, "advantage": 0.5, "at": [0, 2],
        "observation": [[0.0, None]], "rewards": [1.0, 1.0], "to_go": [2.0, 1.0], "advantages": [0.5, 0.5],
    }  # fmt: skip
    given = {"step": step, "estimator": "baseline", "names": ["obs[0]"], "samples_in_batch": 9} | changes
    return Batch(samples=[Sample(**sample)], **given)


def written(path: Path, *batches: Batch) -> Path:
    with EpisodeLog(path) as log:
        for one in batches:
            log.append(one)
    return path


def data_of(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def test_batches_come_back_as_they_were_written(tmp_path: Path) -> None:
    batches = [batch(1), batch(2, names=[NASTY])]
    assert list(read_episodes(written(tmp_path / "e.jsonl", *batches))) == batches


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    log = EpisodeLog(path)
    log.append(batch(1))
    mark = log.mark()
    log.append(batch(2))
    log.resume(1, mark)
    assert [one.step for one in read_episodes(path)] == [1]
    log.append(batch(5))
    log.resume(4, None)  # of a checkpoint from when it was not written
    assert [one.step for one in read_episodes(path)] == [1]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"step": 1}', batch().model_dump_json().replace('"batch"', '"nowhere"'), "[" * 9999]
)
def test_a_file_of_something_else_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "e.jsonl", batch())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"e\.jsonl, line 2, is no batch of episodes"):
        list(read_episodes(path))


def test_a_picture_that_is_an_address_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "e.jsonl", batch())
    path.write_text(path.read_text().replace('"frames":[]', '"frames":["https://example.com/x.png"]'))
    with pytest.raises(UsageError, match="frames"):
        list(read_episodes(path))


def test_the_page_holds_the_batches_and_nothing_breaks_out_of_it(tmp_path: Path) -> None:
    source = written(tmp_path / "e.jsonl", batch(1), batch(2, names=[NASTY]))
    write_html(source, tmp_path / "e.html", NASTY, curve={1: 3.0, 2: float("nan")}, film=["https://example.com/a.png"])
    text = (tmp_path / "e.html").read_text()
    data = data_of(tmp_path / "e.html")
    assert data["batches"][1]["names"] == [NASTY]
    assert data["about"]["curve"] == [[1, 3.0]]
    assert data["about"]["film"] == []
    assert text.count("<script>") == 1  # the page's own
    assert "<img src=x" not in text
    assert "default-src 'none'" in text


def test_a_page_that_would_be_too_large_shows_fewer_batches_and_says_so(tmp_path: Path) -> None:
    source = written(tmp_path / "e.jsonl", *(batch(step) for step in range(16)))
    write_html(source, tmp_path / "e.html", "t", max_bytes=1500)
    about = data_of(tmp_path / "e.html")["about"]
    shown = [one["step"] for one in data_of(tmp_path / "e.html")["batches"]]
    assert (about["found"], shown) == (16, [0, 4, 8, 12])


def test_a_file_without_batches_makes_no_page(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(UsageError, match="no episodes yet"):
        write_html(tmp_path / "e.jsonl", tmp_path / "e.html", "t")


def test_a_strip_keeps_evenly_spaced_pictures_of_any_number_of_them() -> None:
    frames = [np.full((4, 6, 3), i, np.uint8) for i in range(100)]
    strip = Strip(5)
    for frame in frames:
        strip.offer(frame)
    kept = [[picture(frame) for frame in frames].index(one) for one in strip.pictures]
    assert len(kept) == 5
    assert kept[0] == 0
    assert kept[-1] >= 80
    assert np.ptp(np.diff(kept)) <= 16


def test_a_picture_is_small_and_keeps_its_shape() -> None:
    import base64
    import io

    from PIL import Image

    made = picture(np.zeros((400, 600, 3), np.uint8))
    image = Image.open(io.BytesIO(base64.b64decode(made.removeprefix("data:image/png;base64,"))))
    assert image.size == (160, 107)
