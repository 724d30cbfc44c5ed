"""Sweeps: what they try, that a killed one goes on, and what they report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import call
from grouprl.bench import harness, sweep
from grouprl.bench.asked import asked
from grouprl.bench.cells import ENVIRONMENTS, Cell
from grouprl.bench.space import Space
from grouprl.bench.sweep import Sweep
from grouprl.errors import DamagedFileError, UsageError

WORKER = """
import json, os, sys, time
cell = json.loads(sys.stdin.readline())
with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as file:
    file.write(f"{cell['settings']['a']}/{cell['seed']} ")
slow = cell["settings"].get("slow")
if cell["settings"]["a"] == "breaks":
    sys.exit("it broke")
best = {"small": 1.0, "large": 9.0}.get(cell["settings"]["a"], cell["settings"]["a"])
for step in range(10, 101, 10):
    print(json.dumps({"point": {"step": step, "greedy": best * step}}), flush=True)
    time.sleep(slow or 0)
played = {"mean": best + cell["seed"] / 10, "returns": [best]}
print(json.dumps({"result": {"steps_done": 100, "train_seconds": 1.0, "greedy": played, "sampled": played}}))
"""


def made(tmp_path: Path, **given: object) -> Sweep:
    """A sweep of values of ``a`` whose runs take no time."""
    (tmp_path / "fake.py").write_text(WORKER)
    cell = Cell("", "Env", ENVIRONMENTS, 100, 0, worker=(sys.executable, str(tmp_path / "fake.py")), points=10)
    space = Space.read({"a": ["small", "large"], **given})
    return Sweep(cell, space, [0, 1], "grid", len(space.grid()))


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().split() if file.exists() else []


def test_a_sweep_runs_every_setting_with_every_seed_and_ranks_them(tmp_path: Path) -> None:
    one = made(tmp_path)
    found = sweep.run(one, tmp_path / "out", jobs=2, say=lambda line: None)
    assert found.ranked == ["a=large", "a=small"]
    assert sorted(calls(tmp_path)) == ["large/0", "large/1", "small/0", "small/1"]
    text = harness.report_sweep(one, found, tmp_path / "out")
    assert text.index("| Env | a=large | 100 | 2 | 9.05") < text.index("| Env | a=small | 100 | 2 | 1.05")
    assert "0.00 [0.00, 0.00]" in text  # small is never better than large
    assert "with fewer than 5 no difference is sure" in text
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    again = sweep.run(one, tmp_path / "out", jobs=2, say=lambda line: None)
    assert again.ranked == found.ranked
    assert len(calls(tmp_path)) == 4  # nothing was done again


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_a_sweep_that_is_killed_goes_on(tmp_path: Path, sampler: str) -> None:
    one = replace(made(tmp_path, slow=0.05), sampler=sampler, trials=2 if sampler == "grid" else 4)
    code = f"""
from pathlib import Path
from grouprl.bench import sweep
from grouprl.bench.cells import Cell
from grouprl.bench.space import Space
from grouprl.bench.sweep import Sweep
sweep.run({one!r}, Path({str(tmp_path / "out")!r}), jobs=1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        for _ in range(6000):  # at most two minutes; it imports much before the first trial
            if len(calls(tmp_path)) >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    with (tmp_path / "out" / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 4, "torn')  # as a kill leaves it
    Path(tmp_path / "out" / "study.journal.lock").symlink_to(tmp_path / "nowhere")
    done = len((tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    assert done >= 1
    before = len(calls(tmp_path))
    found = sweep.run(one, tmp_path / "out", jobs=1, say=lambda line: None)
    assert set(found.ranked) <= {"a=large", "a=small"}
    rows = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(calls(tmp_path)) - before == len(rows) - done  # what had a row was not done again
    if sampler == "grid":
        assert found.ranked == ["a=large", "a=small"]
        assert len(rows) == 4
    assert os.listdir(tmp_path / "out")


def test_settings_below_the_median_of_the_others_are_pruned(tmp_path: Path) -> None:
    one = made(tmp_path, slow=0.05)
    values = [5.0, 6.0, 7.0, 8.0, 1.0]
    one = replace(one, space=Space.read({"a": values, "slow": 0.05}), seeds=[0], trials=5, prune=True)
    found = sweep.run(one, tmp_path / "out", jobs=1, say=lambda line: None)
    assert found.ranked == ["a=8.0", "a=7.0", "a=6.0", "a=5.0"]
    assert found.pruned == ["a=1.0"]
    assert "Pruned: a=1.0." in harness.report_sweep(one, found, tmp_path / "out")


def test_sampled_returns_are_not_known_along_the_way(tmp_path: Path) -> None:
    one = made(tmp_path)
    assert replace(one, metric="sampled").metric == "sampled"
    with pytest.raises(UsageError, match="leave --prune out"):
        replace(one, metric="sampled", prune=True)


def test_a_setting_of_which_one_seed_failed_has_no_rank(tmp_path: Path) -> None:
    one = made(tmp_path)
    script = tmp_path / "fake.py"
    fails = 'if cell["settings"]["a"] == "large" and cell["seed"] == 0: sys.exit("it broke")\nslow ='
    script.write_text(script.read_text().replace("slow =", fails, 1))
    found = sweep.run(one, tmp_path / "out", jobs=1, say=lambda line: None)
    assert (found.ranked, found.broken) == (["a=small"], ["a=large"])


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_settings_that_failed_are_tried_again_if_that_is_asked_for(tmp_path: Path, sampler: str) -> None:
    one = replace(made(tmp_path), space=Space.read({"a": ["breaks", "large"]}), sampler=sampler, trials=2)
    out, said = tmp_path / "out", list[str]()
    assert sweep.run(one, out, jobs=1, say=said.append).broken == ["a=breaks"]
    script = tmp_path / "fake.py"
    script.write_text(script.read_text().replace('== "breaks"', '== "mended"').replace('"small"', '"breaks"'))
    assert sweep.run(one, out, jobs=1, say=said.append).broken == ["a=breaks"]
    assert said[-1] == "note: of 1 settings a run failed before, and they stay so; --again tries them again"
    assert len(calls(tmp_path)) == 4
    for again in (True, True, False):
        found = sweep.run(one, out, jobs=1, again=again, say=said.append)
        assert (found.ranked, found.broken) == (["a=large", "a=breaks"], [])
        assert [row["status"] for row in found.rows] == ["done"] * 4
        assert sorted(calls(tmp_path)) == ["breaks/0", "breaks/0", "breaks/1", "breaks/1", "large/0", "large/1"]


def test_a_grid_takes_no_number_of_trials(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a grid tries all 2 settings; set sampler=random"):
        asked("CartPole-v1", {"of_command": Space.parse(["lr=1e-3,3e-4"]), "trials": 1})


def test_a_setting_that_breaks_does_not_stop_the_others(tmp_path: Path) -> None:
    one = made(tmp_path)
    one = replace(one, space=Space.read({"a": ["breaks", "large"]}))
    found = sweep.run(one, tmp_path / "out", jobs=1, say=lambda line: None)
    assert (found.ranked, found.broken) == (["a=large"], ["a=breaks"])
    assert "a=breaks/Env/0,1 failed: it broke" in harness.report_sweep(one, found, tmp_path / "out")
    assert sweep.run(one, tmp_path / "out", jobs=1, say=lambda line: None).broken == ["a=breaks"]
    assert len(calls(tmp_path)) == 4


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_settings_are_tried_twice(tmp_path: Path, sampler: str) -> None:
    one = replace(made(tmp_path), sampler=sampler, trials=6)
    said: list[str] = []
    found = sweep.run(one, tmp_path / "out", jobs=3, say=said.append)
    assert sorted(found.ranked) == ["a=large", "a=small"]
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 4
    assert said.count("note: 2 settings are tried instead of 6: of 1,000 more that were drawn all had been tried") == 1


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_that_goes_on_tries_what_it_has_not_tried(tmp_path: Path, sampler: str) -> None:
    one = replace(made(tmp_path), space=Space.read({"a": "1..1000"}), sampler=sampler, seeds=[0])
    for trials in (2, 4, 9):
        found = sweep.run(replace(one, trials=trials), tmp_path / "out", jobs=2, say=lambda line: None)
        assert len(set(found.ranked)) == len(found.ranked) == trials
        assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == trials


def test_values_are_lists_ranges_or_stay() -> None:
    given = Space.parse(["lr=1e-3,3e-4", "gamma=0.9..0.999", "hidden_sizes=[64,64],[32]", "epochs=4", "n_envs=2..64"])
    space = Space.read(given)
    assert space.choices == {"learning_rate": [0.001, 0.0003], "hidden_sizes": [[64, 64], [32]]}
    assert space.ranges == {"gamma": (0.9, 0.999), "n_envs": (2, 64)}
    assert space.fixed == {"epochs": 4}
    distributions = space.distributions()
    assert not distributions["gamma"].log  # type: ignore[attr-defined]
    assert distributions["n_envs"].log  # type: ignore[attr-defined]  # its ends differ by a factor of more than ten
    settings = {"learning_rate": 0.0003, "hidden_sizes": [32], "gamma": 0.95}
    assert space.of_text(space.as_text(settings)) == settings


AWKWARD = [
    0.00001234, 1e-5, 1.23412e-5, 1.23413e-5, 1, 1.0, "1", "1.0", "1e-5", None, "None", "null", True, "true", "a",
    "a, b=1", '"a"', "a ", "", [1, 2], "[1, 2]", [1.0, 2], {"a": 1}, "{a: 1}", 10**20, 1e20, 123456.7, 123456.8,
]  # fmt: skip


def test_settings_that_differ_never_have_one_label() -> None:
    space = Space(choices={"x": AWKWARD, "y": [1, 2]})
    found = {space.label({"x": x, "y": y}) for x in AWKWARD for y in (1, 2)}
    assert len(found) == 2 * len(AWKWARD)
    assert space.label({"x": 0.00001234, "y": 1}) == "x=1.234e-05, y=1"
    assert space.label({"x": 1e-5, "y": 1}) == "x=1e-05, y=1"


def test_a_sweep_of_values_has_the_name_and_the_runs_that_it_had_before_there_was_noise() -> None:
    space = Space.read({"learning_rate": [1e-3, 1e-5]})
    one = Sweep(Cell("", "CartPole-v1", ENVIRONMENTS, 100, 0, env_id="CartPole-v1"), space, [0, 1], "grid", 2)
    assert one.name == "10b983cc03a91223"
    assert one.cells({"learning_rate": 1e-5})[0].id == "eed57dcfec029fbf"
    noisy = replace(one, cell=replace(one.cell, reward_noise=1.0))
    assert noisy.name != one.name


def test_a_label_says_all_digits_of_what_was_tried() -> None:
    space = Space.read(Space.parse(["lr=1e-5..1e-2", "gamma=0.99..0.99999", "epochs=1..9"]))
    tried = {"learning_rate": 0.000348721948, "gamma": 0.9912345678, "epochs": 3}
    settings = space.of_text(tried)
    assert settings == {"learning_rate": 0.0003487, "gamma": 0.9912346, "epochs": 3}
    label = space.label(settings)
    assert label == "learning_rate=0.0003487, gamma=0.9912346, epochs=3"
    assert Space.read(Space.parse(label.split(", "))).fixed == settings  # as people type it
    narrow = Space.read({"x": "0.123456..0.123457"})
    assert narrow.of_text({"x": 0.123456}) == {"x": 0.123456}
    assert narrow.of_text({"x": 0.12345699999}) == {"x": 0.123457}


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["lr"], "write KEY=VALUE,VALUE or KEY=LOW..HIGH"),
        (["lr="], "write KEY=VALUE,VALUE or KEY=LOW..HIGH"),
        (["lr=1", "lr=2"], "is given twice"),
        (["lr=1,2", "learning_rate=3"], "'learning_rate' is given twice"),
        (["lr=1..0.1"], "is no range; write two numbers, the lower one first"),
        (["lr=1,1.0,1"], "has a value twice"),
        (["lr=[1"], "is not YAML"),
    ],
)
def test_other_values_are_refused(pairs: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Space.read(Space.parse(pairs))
    assert said in str(caught.value)


def test_a_sweep_is_of_an_environment_a_recipe_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"of_command": Space.parse(["lr=1e-3,3e-4"]), "seeds": "0-2,7"}
    one = asked("CartPole-v1", given)
    assert (one.cell.env_id, one.cell.preset, one.cell.steps) == ("CartPole-v1", "CartPole-v1", 100_000)
    assert (one.seeds, one.sampler, one.trials) == ([0, 1, 2, 7], "grid", 2)
    one.check()
    of_language = asked("tiny", given)
    assert (of_language.cell.recipe, of_language.cell.env_id) == ("tiny", None)
    of_language.check()
    Path("some.yaml").write_text(
        "environment: Acrobot-v1\nset: {learning_rate: 1e-4..1e-2, epochs: 2}\nsteps: 1e4\ntrials: 9\nseeds: 3-3\n"
    )
    of_file = asked("some.yaml", {"steps": 50})
    assert (of_file.cell.subject, of_file.cell.steps, of_file.sampler, of_file.trials) == ("Acrobot-v1", 50, "tpe", 9)
    assert of_file.cells({"learning_rate": 0.001})[0].settings == {"epochs": 2, "learning_rate": 0.001}


def test_a_function_beside_the_file_of_a_sweep_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "own_sweep_module.py").write_text("def f(rewards, lengths, group):\n    return rewards\n")
    (tmp_path / "there" / "some.yaml").write_text(
        "environment: CartPole-v1\nset: {advantage_function: 'own_sweep_module:f', learning_rate: [1e-3, 1e-2]}\n"
    )
    one = asked("there/some.yaml", {})
    assert one.cell.folder == str(tmp_path / "there")
    assert one.name == replace(one, cell=replace(one.cell, folder="/elsewhere")).name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("set: {learning_rate: '1e-3,3e-4'}", "write several values as a list: learning_rate: [1e-3,3e-4]"),
        ("set: {lr: [1e-3, 1e-2]}\nprune: 'false'", "prune is 'false', and must be true or false, without quotes"),
        ("set: {lr: [1e-3, 1e-2]}\nprune: 1", "prune is 1, and must be true or false"),
    ],
)
def test_what_a_file_of_a_sweep_says_in_another_way_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "some.yaml").write_text(f"environment: CartPole-v1\n{line}\n")
    with pytest.raises(UsageError) as caught:
        asked(str(tmp_path / "some.yaml"), {})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("what", "given", "said"),
    [
        ("CartPole-v1", [], "nothing is swept"),
        ("CartPole-v1", ["learnin_rate=1,2"], "'learning_rate'"),
        ("CartPole-v1", ["gamma=0.9,7"], "gamma"),
        ("NoSuchEnv-v0", ["lr=1,2"], "no preset that does; --steps"),
        ("none.yaml", ["lr=1,2"], "there is no file 'none.yaml'"),
        ("CartPole-v1", ["advantage_function=a:b,c:d"], "compare functions with grouprl bench"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line(what: str, given: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked(what, {"of_command": Space.parse(given)}).check()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_has_no_ranges_and_a_sampler_is_one_of_three() -> None:
    options = {"of_command": Space.parse(["lr=1e-4..1e-2"])}
    with pytest.raises(UsageError, match="a grid needs values, and learning_rate has a range"):
        asked("CartPole-v1", {**options, "sampler": "grid"})
    with pytest.raises(UsageError, match="must be one of grid, random, tpe"):
        asked("CartPole-v1", {**options, "sampler": "bayes"})


@pytest.mark.parametrize(
    "found", [b"hello\n", b"[1]\n", b"null\n", b'{"op_code": 99, "worker_id": "x"}\n', b"\0\0\n", b"\xff\xfe\n"]
)
def test_a_journal_of_something_else_is_one_line_that_says_what_to_do(tmp_path: Path, found: bytes) -> None:
    journal = tmp_path / "out" / "study.journal"
    journal.parent.mkdir()
    journal.write_bytes(found)
    with pytest.raises(DamagedFileError, match=r"study\.journal is no journal of a sweep[^\n]*; move it away: [^\n]*$"):
        sweep.run(made(tmp_path), journal.parent, jobs=1, say=lambda line: None)
    assert not calls(tmp_path)


def test_the_folder_of_a_sweep_has_a_name_that_every_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_sweep_env.py").write_text("from gymnasium.envs.classic_control import CartPoleEnv as Own\n")
    monkeypatch.setattr(sweep, "run", lambda *_, **__: sweep.Swept())
    said: list[Path] = []
    monkeypatch.setattr(harness, "report_sweep", lambda _, __, folder: said.append(folder))
    assert call("sweep", "own_sweep_env:Own", "--set", "lr=1e-3,1e-2", "--steps", "10") == 0
    assert said == [Path("runs/sweep-own_sweep_env-Own")]
