"""A benchmark from its file to rows, tables and figures, with workers that take no time."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from matplotlib.figure import Figure

from command_line import call
from grouprl import GRPO
from grouprl.bench import clock, figures, harness, heard, results, rows, tables, worker
from grouprl.bench.cells import ENVIRONMENTS, Cell
from grouprl.bench.episodes import play
from grouprl.bench.noise import noisy
from grouprl.bench.plan import check
from grouprl.bench.plan import read as read_plan
from grouprl.bench.rows import Rows, read_rows
from grouprl.envs import evaluation
from grouprl.envs.evaluation import Evaluator
from grouprl.errors import DamagedFileError, TrainingError, UsageError

WORKER = """
import json, sys
cell = json.loads(sys.stdin.readline())
open("calls", "a").write(cell["method"] + str(cell["seed"]) + " ")
if cell["method"] == "broken" and not __import__("os").path.exists("mended"):
    sys.exit("it broke")
best = {"good": 100.0, "bad": 10.0}.get(cell["method"], 50.0) + cell["seed"]
for step in (0, 50, 100):
    print(json.dumps({"point": {"step": step, "seconds": step / 10, "greedy": best * step / 100}}))
played = {"mean": best, "returns": [best], "episodes": 1}
print(json.dumps({"result": {"steps_done": 100, "train_seconds": 10.0, "greedy": played, "sampled": played}}))
"""
FILE = f"""
about: Three methods.
methods:
  good: {{worker: "{sys.executable} fake.py"}}
  bad: {{worker: "{sys.executable} fake.py"}}
  broken: {{worker: "{sys.executable} fake.py"}}
environments:
  CartPole-v1: {{scale: [0, 100]}}
  Acrobot-v1: {{scale: [-500, -100]}}
steps: 100
seeds: 0-2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a file of a benchmark and its worker."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(WORKER)
    (tmp_path / "some.yaml").write_text(FILE)
    return tmp_path


def test_a_benchmark_leaves_rows_a_table_and_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", "some.yaml", "--jobs", "4") == 1  # some failed
    rows = read_rows(folder / "runs" / "bench-some" / "rows.jsonl")
    assert len(rows) == 18
    done = {(row["method"], row["subject"], row["seed"]): row for row in rows if row["status"] == "done"}
    assert len(done) == 12
    one = done["good", "CartPole-v1", 2]
    assert one["greedy"]["mean"] == 102.0
    assert [point["step"] for point in one["curve"]] == [0, 50, 100]
    assert {"machine", "commit", "finished", "seconds", "peak_memory_mb", "settings", "jobs"} <= set(one)
    assert {row["error"] for row in rows if row["status"] == "failed"} == {"it broke"}
    text = (folder / "runs" / "bench-some" / "table.md").read_text()
    assert "| CartPole-v1 | good | 100 | 3 | 101 [100.0, 102.0] | 100.0 to 102.0 |  | 101 | 10.0 |" in text.replace(
        "101.0", "101"
    )
    assert "| 0.00 [0.00, 0.00] |" in text  # bad is never better than good
    assert text.count(" failed: ") == 1
    assert "Note: broken/CartPole-v1/0,1,2; broken/Acrobot-v1/0,1,2 failed: it broke.\n" in text
    assert "Normalised scores: 0 to 1 is CartPole-v1 0 to 100.0; Acrobot-v1 -500.0 to -100.0." in text
    assert "with fewer than 5" in text
    for picture in ("curves.png", "scores.png"):
        assert (folder / "runs" / "bench-some" / picture).stat().st_size > 10_000
    assert "error: 6 runs failed" in capsys.readouterr().err


def test_seconds_are_neither_better_nor_on_the_scale_of_returns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--only", "good/*/0", "--only", "bad/*/0")
    assert call("bench", "some.yaml", *only) == 0
    assert "Normalised scores" in capsys.readouterr().out
    assert call("bench", "some.yaml", *only, "--table", "--metric", "curve_mean") == 0
    assert "Normalised scores" in capsys.readouterr().out
    assert call("bench", "some.yaml", *only, "--table", "--metric", "train_seconds") == 0
    text = capsys.readouterr().out
    assert "Normalised scores" not in text
    assert "| range | larger |" in text
    assert "`larger`: the probability that a run of this setting has a larger `train_seconds` than one of good" in text


def test_what_has_a_row_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ("--only", "good/CartPole-v1", "--only", "broken/CartPole-v1/0", "--out", "out", "--jobs", "1")
    assert call("bench", "some.yaml", *some) == 1
    assert (folder / "calls").read_text() == "good0 broken0 good1 good2 "
    lines = (folder / "out" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "out" / "rows.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:30])  # killed while it wrote a row
    assert call("bench", "some.yaml", *some) == 0
    assert (folder / "calls").read_text() == "good0 broken0 good1 good2 good2 "
    assert "1 runs failed before and stay so; --again tries them again" in capsys.readouterr().out
    (folder / "mended").touch()
    assert call("bench", "some.yaml", *some, "--again") == 0
    assert (folder / "calls").read_text().endswith("good2 broken0 ")
    assert call("bench", "some.yaml", "--out", "out", "--only", "broken/CartPole-v1/0", "--list") == 0
    assert capsys.readouterr().out.endswith("done    broken/CartPole-v1/0 (100 steps)\n")


def test_rows_of_changed_code_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ("bench", "some.yaml", "--only", "good/CartPole-v1/0", "--out", "out")
    code = {"commit": "abc-dirty", "source": "111"}
    for name in code:
        monkeypatch.setattr(rows, name, lambda name=name: code[name])
    monkeypatch.setattr(rows, "_context", lambda: dict(code))
    for _ in range(2):
        assert call(*some) == 0
        assert "note: rows of" not in capsys.readouterr().out
    code["source"] = "222"
    assert call(*some) == 0
    said = "note: rows of commit abc-dirty, source 111 count, here is commit abc-dirty, source 222; use another --out"
    assert said in capsys.readouterr().out
    assert rows.other_code([{"commit": "abc-dirty"}]) is None  # an older row knows no more
    assert "rows of commit old count" in str(rows.other_code([{"commit": "old"}]))


def test_the_checksum_of_the_source_is_of_its_files() -> None:
    assert re.fullmatch("[0-9a-f]{12}", rows.source())


def test_what_a_worker_says_of_itself_does_not_change_what_was_run(folder: Path) -> None:
    (folder / "fake.py").write_text(WORKER.replace('"steps_done": 100', '"steps_done": 100, "seed": 7, "method": "x"'))
    assert call("bench", "some.yaml", "--only", "good", "--out", "out") == 0
    rows = read_rows(folder / "out" / "rows.jsonl")
    assert sorted((row["method"], row["seed"]) for row in rows if row["subject"] == "CartPole-v1") == [
        ("good", 0), ("good", 1), ("good", 2),
    ]  # fmt: skip


def test_a_method_without_runs_on_a_subject_is_named_beside_its_score_over_all(folder: Path) -> None:
    text = (folder / "some.yaml").read_text().replace("  bad:", "  'b$x^{$':")
    (folder / "some.yaml").write_text(text)
    only = ("--only", "good", "--only", "b$x^{$/CartPole-v1")
    assert call("bench", "some.yaml", *only, "--out", "out") == 0
    written = (folder / "out" / "part-table.md").read_text()
    assert "Note: b$x^{$ has no run on Acrobot-v1; its score over all does not compare." in written
    assert (folder / "out" / "part-scores.png").stat().st_size > 10_000


@pytest.mark.parametrize("named", [(), ("--reference", "broken")])
def test_nothing_takes_the_place_of_a_reference_whose_runs_failed(folder: Path, named: tuple[str, ...]) -> None:
    first, rest = FILE.split("  good:"), FILE.split("  broken:")[1].partition("environments:")
    (folder / "some.yaml").write_text(
        first[0] + "  broken:" + rest[0] + "  good:" + first[1].replace("  broken:" + rest[0], "")
    )
    assert call("bench", "some.yaml", "--out", "out", *named) == 1
    text = (folder / "out" / "table.md").read_text()
    assert "than one of broken, with its interval" in text
    assert "no run of broken on CartPole-v1, Acrobot-v1 is done, so nothing is compared there" in text
    assert all(line.split("|")[7].strip() == "" for line in text.splitlines() if line.startswith("| CartPole"))


def test_a_part_of_the_runs_leaves_the_report_of_all_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("bench", "some.yaml", "--out", "out")
    names = ("table.md", "curves.png", "scores.png")
    whole = [(folder / "out" / name).read_bytes() for name in names]
    for options in (("--only", "good"), ("--seeds", "0-1", "--only", "bad"), ("--steps", "50", "--only", "good/*/0")):
        assert call("bench", "some.yaml", "--out", "out", *options) == 0
        assert [(folder / "out" / name).read_bytes() for name in names] == whole
        assert all((folder / "out" / f"part-{name}").exists() for name in names)
        assert "wrote out/part-table.md, part-curves.png and part-scores.png" in capsys.readouterr().out


def test_one_run_under_several_names_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.yaml").write_text(
        "methods:\n"
        "  default: {}\n"
        "  preset: {preset: auto}\n"  # MountainCar-v0's sets nothing, CartPole-v1's does
        "  as_default: {settings: {gamma: 0.99}}\n"
        "  other: {settings: {gamma: 0.9}}\n"
        "  noisy: {reward_noise: 1}\n"
        "environments: [MountainCar-v0, CartPole-v1]\n"
        "steps: 64\nseeds: [0]\nepisodes: 1\npoints: 1\npoint_episodes: 1\n"
    )
    done: list[str] = []

    def fake(following: Any, ended: Any, *, jobs: int) -> None:
        while (cell := following()) is not None:
            done.append(cell.name)
            played = {"mean": float(len(done)), "episodes": 1, "returns": [float(len(done))]}
            ended(cell, {"status": "done", "seconds": 1.0, "greedy": played, "curve": []})

    monkeypatch.setattr(harness.pool, "run", fake)
    assert call("bench", "names.yaml", "--only", "preset", "--out", "out", "--jobs", "1") == 0
    assert done == ["preset/MountainCar-v0/0", "preset/CartPole-v1/0"]
    assert call("bench", "names.yaml", "--out", "out", "--jobs", "1") == 0
    assert done[2:] == [
        "other/MountainCar-v0/0", "noisy/MountainCar-v0/0",
        "default/CartPole-v1/0", "other/CartPole-v1/0", "noisy/CartPole-v1/0",
    ]  # fmt: skip
    rows = {(row["method"], row["subject"]): row for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    assert len(rows) == 10
    same = {name: row["greedy"]["mean"] for name, row in rows.items() if "same_as" in row}
    assert same == {
        ("default", "MountainCar-v0"): 1.0, ("as_default", "MountainCar-v0"): 1.0, ("as_default", "CartPole-v1"): 5.0,
    }  # fmt: skip
    assert rows["as_default", "CartPole-v1"]["same_as"] == rows["default", "CartPole-v1"]["id"]
    assert rows["as_default", "CartPole-v1"]["settings"] == {"gamma": 0.99}
    assert f"the same run as {rows['default', 'CartPole-v1']['id']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--metric", "greedi"),
            "no run has the metric 'greedi'; did you mean 'greedy'? there are:",
        ),
        (("--reference", "best"), "reference='best' has no run; there are good"),
        (("--only", "best"), "no run is called 'best'"),
        (("--seeds", "x"), "seeds='x'"),
        (("--out", "elsewhere", "--table"), "no run is done yet"),
        (("--steps", "200"), "none of the 1 rows in runs/bench-some is of these runs: steps, seeds, settings or code"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert call("bench", "some.yaml", "--only", "good/CartPole-v1/0") == 0
    capsys.readouterr()
    only = () if "--only" in arguments else ("--only", "good/CartPole-v1/0")
    assert call("bench", "some.yaml", "--table", *only, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("wrong", [("--metric", "greedi"), ("--reference", "best")])
def test_a_table_that_cannot_be_made_is_refused_before_a_run_begins(
    folder: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str]
) -> None:
    assert call("bench", "some.yaml", "--only", "good/CartPole-v1/0", *wrong) == 2
    assert wrong[1] in capsys.readouterr().err
    assert not (folder / "calls").exists()


def test_two_processes_do_not_write_into_one_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    found: list[int] = []
    with Rows.held(folder / "out"):
        other = threading.Thread(target=lambda: found.append(call("bench", "some.yaml", "--out", "out")))
        other.start()
        other.join()
    assert found == [2]
    assert "is in use by" in capsys.readouterr().err


def test_a_file_of_something_else_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(DamagedFileError, match="line 1 is no run"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "changed",
    [
        {"curve": None}, {"curve": [1]}, {"curve": [{"step": "x"}]}, {"steps_done": "x"}, {"sampled": {}},
        {"greedy": {"mean": "1"}}, {"seconds": 10**400}, {"versions": []}, {"machine": {}},
    ],
)  # fmt: skip
def test_a_row_that_cannot_stand_in_a_table_is_one_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    lines = [json.dumps(row("a", seed, 1.0) | extra) for seed, extra in enumerate(({}, changed))]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DamagedFileError, match=rf"rows.jsonl is no file of rows: line 2 is no run: {next(iter(changed))}[^\n]*$"
    ):
        read_rows(tmp_path / "rows.jsonl")


def test_rows_hold_no_secrets(tmp_path: Path) -> None:
    cell = Cell("m", "s", ENVIRONMENTS, 10, 0, env_kwargs={"api_key": "mine12345", "n": 3})
    with Rows.held(tmp_path) as rows:
        rows.append(cell, {"status": "failed", "error": "no"}, 1)
    (found,) = read_rows(tmp_path / "rows.jsonl")
    assert found["env_kwargs"] == {"api_key": "(secret)", "n": 3}
    assert found["id"] == cell.id


def test_a_name_ends_neither_its_cell_nor_its_line() -> None:
    assert tables.markdown([["a"], ["x|y\n<img src=x>"]]) == "| a |\n| --- |\n| x\\|y &lt;img src=x> |\n"


def row(method: str, seed: int, greedy: float, steps: int = 100) -> dict[str, Any]:
    return {
        "id": f"{method}{seed}{steps}", "method": method, "subject": "A", "arena": "environments", "seed": seed,
        "steps": steps, "status": "done", "greedy": {"mean": greedy}, "curve": [],
    }  # fmt: skip


def test_the_mean_of_a_curve_does_not_hang_on_the_number_of_its_points() -> None:
    often = [{"step": step, "greedy": float(step)} for step in range(0, 100, 10)]
    for curve in (often, often[:1], [often[0], often[5], often[6]]):
        found = results.of_rows([{**row("a", 0, 100.0), "steps_done": 100, "curve": curve}])
        assert found.scores("A", "a", "curve_mean").tolist() == [50.0]
    assert results.of_rows([row("a", 0, 7.0)]).scores("A", "a", "curve_mean").tolist() == [7.0]


def test_the_steps_of_a_table_are_those_that_were_trained() -> None:
    rows = [row("a", seed, 1.0) | {"steps_done": 101} for seed in range(5)]
    assert tables.warnings(results.of_rows(rows)) == []
    assert "| A | a | 101 |" in tables.table(results.of_rows(rows), "greedy")
    rows += [row("b", seed, 1.0) | {"steps_done": 300 + 100 * seed} for seed in range(5)]
    assert "| A | b | 300 to 700 |" in tables.table(results.of_rows(rows), "greedy")
    assert [note.partition(":")[0] for note in tables.warnings(results.of_rows(rows))] == [
        "b on A was trained for 700 steps where 100 were asked for",
        "settings on A were trained for different numbers of steps",
    ]


def test_a_curve_of_fewer_points_than_were_asked_for_is_a_note() -> None:
    points = [{"step": step, "greedy": 1.0} for step in (0, 60, 130)]
    rows = [{**row("a", seed, 1.0), "points": 6, "curve": points} for seed in range(2)]
    said = "a on A: 2 of 6 points of the curve: a batch holds more steps than lie between them"
    assert results.of_rows(rows).notes == [said]
    assert results.of_rows([{**one, "points": 2} for one in rows]).notes == []


def test_the_panel_of_all_subjects_goes_to_the_end_of_training_and_few_evaluations_have_marks() -> None:
    def drawn(points: int) -> list[Any]:
        curve = [{"step": 1000 * i / points, "greedy": 100 * i / points} for i in range(points + 1)]
        rows = [
            {**row("a", seed, 100.0), "subject": subject, "steps_done": 1000, "curve": curve}
            for subject in "AB" for seed in range(2)
        ]  # fmt: skip
        axes = Figure().add_subplot()
        scales = dict.fromkeys("AB", (0.0, 100.0))
        figures._overall(axes, results.of_rows(rows), ["A", "B"], scales, ["a"])
        return list(axes.lines)

    line, marks = drawn(5)
    assert line.get_xydata()[[0, -1]].tolist() == [[0.05, pytest.approx(0.05)], [1.0, 1.0]]
    assert marks.get_xdata().tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert len(drawn(20)[1].get_xdata()) == 0


def test_seeds_that_failed_are_counted_beside_a_score() -> None:
    failed = [{**row("a", seed, 0.0), "status": "failed", "error": f"nan at step {seed}"} for seed in (3, 4)]
    found = results.of_rows(
        [*(row("a", seed, 1.0) for seed in range(3)), *failed, *(row("b", s, 1.0) for s in range(5))]
    )
    assert "| A | a | 100 | 3 of 5 |" in tables.table(found, "greedy")
    assert "| A | b | 100 | 5 |" in tables.table(found, "greedy")
    notes = tables.warnings(found)
    assert notes[0] == "a/A/3,4 failed: nan at step 3"
    assert "2 of 5 runs of a on A failed, and its score is that of the others" in notes


def test_a_seed_is_counted_once() -> None:
    found = results.of_rows([row("a", 0, 1.0), row("a", 0, 3.0), row("a", 1, 5.0), row("a", 1, 7.0, steps=50)])
    assert found.scores("A", "a", "greedy").tolist() == [3.0, 5.0]
    assert len(found.notes) == 2


def test_what_rows_did_not_name_yet_has_its_default_in_them() -> None:
    later = {**row("a", 1, 3.0), "ready_made": "", "functions": {}, "reward_noise": 0.0}
    found = results.of_rows([row("a", 0, 1.0), later])
    assert found.scores("A", "a", "greedy").tolist() == [1.0, 3.0]
    assert found.notes == []
    noisy = results.of_rows([row("a", 0, 1.0), {**later, "reward_noise": 0.5}])
    assert noisy.scores("A", "a", "greedy").tolist() == [3.0]


def test_five_seeds_are_no_reason_to_warn_and_unequal_numbers_are() -> None:
    five = [row("a", seed, 1.0) for seed in range(5)]
    assert tables.warnings(results.of_rows(five)) == []
    notes = tables.warnings(results.of_rows([*five, *(row("b", seed, 1.0) for seed in range(6))]))
    assert notes == ["settings on A have different numbers of seeds: 5 to 6"]


def test_a_note_ends_in_one_full_stop() -> None:
    warned = [{**row("a", seed, 1.0), "warnings": ["doctor: less is more. Try: less."]} for seed in range(5)]
    assert "Note: a on A: doctor: less is more. Try: less.\n" in harness.table_text(
        results.of_rows(warned), "greedy", None
    )


def test_a_warning_about_a_setting_is_a_note() -> None:
    warned = [{**row("a", seed, 1.0), "warnings": ["gamma=0.9 has no effect: none"]} for seed in range(5)]
    assert tables.warnings(results.of_rows(warned)) == ["a on A: gamma=0.9 has no effect: none"]


def test_warnings_that_differ_in_their_numbers_are_one_note_for_each_setting() -> None:
    ill = "doctor, no-signal: in {} of the groups all rewards are equal (mean reward 1.5e-3). Try: less"
    rows = [
        {**row(f"lr=1e-{n}", seed, 1.0), "warnings": [ill.format(f"{seed}0%")]} for n in (3, 4) for seed in range(5)
    ]
    found = results.of_rows(rows).notes
    assert [note.partition(" (mean")[0] for note in found] == [
        f"lr=1e-{n} on A: doctor, no-signal: in 00% of the groups all rewards are equal" for n in (3, 4)
    ]
    assert all(note.endswith("(4 more like it)") for note in found)


def test_what_is_warned_of_is_kept_once_and_shown() -> None:
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: shown.append(str(message))  # type: ignore[assignment]
        with heard.warnings_heard() as said:
            for _ in range(3):
                warnings.warn("of a setting", stacklevel=1)
                logging.getLogger("grouprl.some").warning("of %s", "a file")
            warnings.warn("of code", DeprecationWarning, stacklevel=1)
            for i in range(100):
                warnings.warn(f"at step {i}", RuntimeWarning, stacklevel=1)
        logging.getLogger("grouprl.some").warning("later")
    assert said[:3] == ["of a setting", "of a file", "at step 0"]
    assert len(said) == 20
    assert len(shown) >= 101


def test_a_log_that_no_handler_takes_is_still_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("grouprl")
    monkeypatch.setattr(log, "propagate", False)  # pytest has handlers at the root
    monkeypatch.setattr(log, "handlers", [])
    with heard.warnings_heard() as said:
        log.warning("of the doctor")
    assert said == ["of the doctor"]
    assert capsys.readouterr().err == "of the doctor\n"
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    with heard.warnings_heard():
        log.warning("taken by another")
    assert capsys.readouterr().err == ""


def test_a_report_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run is done yet"):
        harness.report([], tmp_path, "none")


# --- the workers -----------------------------------------------------------------------------------------------------
CELL = {
    "env_id": "CartPole-v1", "env_kwargs": {}, "preset": None, "seed": 3, "steps": 400, "points": 2, "functions": {},
    "folder": "", "point_episodes": 2, "episodes": 5, "curve_starts": 70_000, "final_starts": 80_000,
    "settings": {"n_envs": 4, "collect": "segments", "n_steps": 25, "epochs": 1, "warmup_steps": 0},
}  # fmt: skip


def test_a_run_on_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_bench_estimator.py").write_text("def ones(rewards, lengths, group):\n    return 0 * rewards + 1\n")
    points: list[dict[str, Any]] = []
    own = {"functions": {"advantage_function": "own_bench_estimator:ones"}}
    clipped = {"n_steps": 10, "epochs": 20, "epsilon": 1e-6}
    own["settings"] = {**CELL["settings"], "log_std_min": -1.0, **clipped}
    found = worker.run({**CELL, **own}, points.append)
    assert [said.partition(":")[0] for said in found["warnings"]] == [
        "log_std_min=-1.0 has no effect",  # when it was made
        "doctor, all-clipped",  # while it learned
    ]
    assert [point["step"] // 200 for point in points] == [0, 1, 2]
    assert found["steps_done"] == points[-1]["step"]
    assert len(found["greedy"]["returns"]) == len(found["sampled"]["returns"]) == 5
    assert found["greedy"]["mean"] == sum(found["greedy"]["returns"]) / 5
    assert found["greedy"]["returns"] != found["sampled"]["returns"]
    assert len(found["approx_kl"]) == 10  # an update for each batch of 40 steps
    assert all(one >= 0 for one in found["approx_kl"])
    spent = [point["cpu_seconds"] for point in points]
    assert spent == sorted(spent)
    assert spent[0] == 0
    assert found["train_cpu_seconds"] >= spent[-1] > 0


OWN_ENV = """
import gymnasium as gym
class Short(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self.observation_space.sample(), {}
    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), float(action), self.left == 0, False, {}
"""


def test_an_environment_beside_the_file_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "own_env_beside.py").write_text(OWN_ENV)
    (tmp_path / "there" / "own.yaml").write_text(
        "methods: {plain: {settings: {n_envs: 2, collect: segments, n_steps: 10, warmup_steps: 0}}}\n"
        "environments: ['own_env_beside:Short']\nsteps: 20\nseeds: [0]\nepisodes: 1\npoints: 1\npoint_episodes: 1\n"
    )
    assert call("bench", "there/own.yaml", "--out", "out") == 0, capsys.readouterr()
    (row,) = read_rows(tmp_path / "out" / "rows.jsonl")
    assert (row["status"], row["folder"]) == ("done", "")  # a folder of one machine says nothing on another


def test_noise_is_on_the_rewards_of_training_and_not_on_those_of_evaluations() -> None:
    points: list[dict[str, Any]] = []
    found = worker.run({**CELL, "reward_noise": 0.5}, points.append)
    returns = found["greedy"]["returns"] + found["sampled"]["returns"]
    assert all(value == int(value) for value in returns)  # every step of CartPole is worth 1
    assert any(point["training"] != round(point["training"]) for point in points if "training" in point)


def test_every_environment_has_noise_of_its_own() -> None:
    wrap = noisy(3.0, seed=1)
    envs = [wrap(gym.make("CartPole-v1")) for _ in range(2)]
    found = []
    for env in envs:
        rewards = []
        for _ in range(100):
            env.reset(seed=7)  # equal starts, and equal steps after them
            rewards += [float(env.step(0)[1]) for _ in range(5)]
        found.append(np.array(rewards) - 1.0)
    assert len({*found[0], *found[1]}) == 1000
    assert abs(np.std(found) - 3.0) < 0.3
    assert abs(np.mean(found)) < 0.4
    again = noisy(3.0, seed=1)(gym.make("CartPole-v1"))
    again.reset()
    assert float(again.step(0)[1]) - 1.0 == pytest.approx(found[0][0])


def test_the_clock_of_training_stands_still_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0, 1.0]
    monkeypatch.setattr(clock, "_now", lambda: (now[0], now[1]))
    training = clock.TrainingClock()
    now[:] = [13.0, 3.0]
    with training.paused():
        now[:] = [20.0, 9.0]
        assert training.cpu_seconds == 8.0  # a pause is taken off when it ends
    now[:] = [21.0, 9.5]
    assert (training.seconds, training.cpu_seconds) == (4.0, 2.5)


def test_a_run_of_a_language_model() -> None:
    points: list[dict[str, Any]] = []
    settings = {
        "warm_start": {"steps": 1}, "n_train": 8, "n_eval": 2, "prompts_per_step": 12, "num_generations": 2,
        "max_completion_length": 4,
    }  # fmt: skip
    cell = {"env_id": None, "recipe": "tiny", "settings": settings, "functions": {}, "seed": 0, "steps": 2}
    found = worker.run(cell, points.append)
    assert [said.partition(":")[0] for said in found["warnings"]] == [
        "a generation takes 12 prompts and the dataset has 8",
    ]
    assert [point["step"] for point in points] == [0, 2]
    assert found["steps_done"] == 2
    assert len(found["greedy"]["returns"]) == len(found["sampled"]["returns"]) == 2
    json.dumps([points, found])


def test_episodes_of_any_policy_are_those_that_the_evaluator_plays() -> None:
    agent = GRPO("CartPole-v1", preset=None, seed=0)
    evaluator = Evaluator("CartPole-v1", n_envs=7)
    ours = evaluator.run(agent, 7, seed=5).returns
    evaluator.close()
    assert len(set(ours)) > 1
    played = play(lambda seen: agent.predict(seen, deterministic=True)[0], "CartPole-v1", episodes=7, seed=5)
    assert sorted(played) == sorted(ours)
    more = play(lambda seen: agent.predict(seen, deterministic=True)[0], "CartPole-v1", episodes=25, seed=5)
    assert len(more) == 25


class Endless(gym.Env[Any, Any]):
    """Pays 1 for each step and never ends; one more than ``quick`` of them are made and the next takes for ever."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    made = 0

    def __init__(self, quick: int = 10**6) -> None:
        Endless.made += 1
        while Endless.made > quick:
            time.sleep(0.01)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 1.0, False, False, {}


@pytest.fixture
def endless() -> Iterator[str]:
    gym.register("Endless-v0", entry_point=Endless)
    Endless.made = 0
    yield "Endless-v0"
    del gym.registry["Endless-v0"]


def test_a_run_whose_episodes_never_end_leaves_a_row_that_says_so(
    endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LEAST_PATIENCE", 300)
    points: list[dict[str, Any]] = []
    found = worker.run({**CELL, "env_id": endless}, points.append)
    assert [point["greedy"] for point in points] == [300.0] * 3
    for played in (found["greedy"], found["sampled"]):
        assert (played["returns"], played["cut"]) == ([300.0] * 5, 5)
    assert [said for said in found["warnings"] if "episodes were cut that had not ended after 300 steps" in said]
    limited = worker.run({**CELL, "env_id": endless, "env_kwargs": {"max_episode_steps": 20}}, points.append)
    assert (limited["greedy"]["returns"], limited["greedy"]["cut"]) == ([20.0] * 5, 0)
    assert not [said for said in limited["warnings"] if "cut" in said]


def test_episodes_of_any_policy_are_cut_where_they_do_not_end(endless: str) -> None:
    def nothing(seen: Any) -> Any:
        return np.zeros(len(seen), int)

    with pytest.warns(RuntimeWarning, match="had not ended after 7 steps"):
        assert play(nothing, endless, episodes=3, seed=0, max_steps=7) == [7.0] * 3
    with pytest.raises(UsageError, match="max_steps=0"):
        play(nothing, endless, episodes=3, seed=0, max_steps=0)


@pytest.mark.parametrize("quick", [4, 6], ids=["along the way", "at the end"])
def test_environments_of_evaluations_that_cannot_be_made_in_time_end_the_run(endless: str, quick: int) -> None:
    settings = {**CELL["settings"], "env_timeout": 0.5}
    cell = {**CELL, "env_id": endless, "env_kwargs": {"quick": quick, "max_episode_steps": 10}, "settings": settings}
    with pytest.raises(TrainingError, match=r"making environment 0 \(Endless-v0\) had not ended after 0.5 s"):
        worker.run(cell, lambda point: None)


def test_an_environment_that_cannot_be_made_in_time_is_told_before_any_run(endless: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(
        "methods: {a: {settings: {env_timeout: 0.5}}}\n"
        f"environments: {{{endless}: {{steps: 100, env_kwargs: {{quick: 0}}}}}}\n"
        "seeds: 0-1\n"
    )
    with pytest.raises(TrainingError, match=r"had not ended after 0\.5 s"):
        check(read_plan(tmp_path / "b.yaml"))
