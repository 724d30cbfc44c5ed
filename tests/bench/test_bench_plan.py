"""Benchmarks as files: the runs they become, and what they must not hold."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from grouprl.bench import plan
from grouprl.bench.cells import ENVIRONMENTS, Cell, parse_seeds
from grouprl.envs import presets
from grouprl.errors import UsageError

GOOD = """
methods:
  default: {}
  preset: {preset: auto, settings: {learning_rate: 1e-3}}
  peer: {worker: "python peer.py ppo", subjects: [CartPole-v1]}
environments:
  CartPole-v1: {steps: 1e3, scale: [20, 500]}
  LunarLander-v3-continuous: {seeds: 7-7}
seeds: 0-1
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return file


def test_methods_times_subjects_times_seeds(tmp_path: Path) -> None:
    planned = plan.read(write(tmp_path, GOOD))
    assert [cell.name for cell in planned.cells] == [
        "default/CartPole-v1/0", "preset/CartPole-v1/0", "peer/CartPole-v1/0",
        "default/CartPole-v1/1", "preset/CartPole-v1/1", "peer/CartPole-v1/1",
        "default/LunarLander-v3-continuous/7", "preset/LunarLander-v3-continuous/7",
    ]  # fmt: skip
    cells = {cell.name: cell for cell in planned.cells}
    lander = cells["preset/LunarLander-v3-continuous/7"]
    assert lander.env_id == "LunarLander-v3"  # a preset's name says which environment it is, and how it is made
    assert lander.env_kwargs == {"continuous": True}
    assert lander.preset == "LunarLander-v3-continuous"
    assert lander.settings == {"learning_rate": 0.001}
    assert cells["default/CartPole-v1/0"].preset is None
    assert cells["default/CartPole-v1/0"].steps == 1000
    assert cells["peer/CartPole-v1/1"].worker == ("python", "peer.py", "ppo")
    assert planned.scales == {"CartPole-v1": (20.0, 500.0)}
    assert len({cell.id for cell in planned.cells}) == 8


def test_only_some_of_them(tmp_path: Path) -> None:
    planned = plan.read(write(tmp_path, GOOD))
    assert [cell.name for cell in planned.only(["peer/*/1", "preset/Lunar*"]).cells] == [
        "peer/CartPole-v1/1", "preset/LunarLander-v3-continuous/7",
    ]  # fmt: skip
    assert len(planned.only(["default/CartPole-v1"]).cells) == 2
    with pytest.raises(UsageError, match=r"no run is called 'peer/Acrobot'; runs are called METHOD/SUBJECT/SEED"):
        planned.only(["peer/Acrobot"])


def test_a_part_of_a_name_is_a_whole_one_unless_a_star_follows(tmp_path: Path) -> None:
    text = "methods: [ppo, ppo-2]\nenvironments: [LunarLander-v3, LunarLander-v3-continuous]\nseeds: 0,10"
    planned = plan.read(write(tmp_path, text))

    def chosen(pattern: str) -> list[str]:
        return [cell.name for cell in planned.only([pattern]).cells]

    assert chosen("ppo/LunarLander-v3") == ["ppo/LunarLander-v3/0", "ppo/LunarLander-v3/10"]
    assert len(chosen("ppo/LunarLander-v3*")) == 4
    assert chosen("ppo-2/LunarLander-v3/0") == ["ppo-2/LunarLander-v3/0"]
    with pytest.raises(UsageError, match="no run is called 'pp'"):
        planned.only(["pp"])


def test_a_name_with_signs_of_patterns_chooses_its_own_runs(tmp_path: Path) -> None:
    planned = plan.read(write(tmp_path, "methods: ['50% [x]|<b>', other]\nenvironments: [CartPole-v1]\nseeds: 0-1"))
    assert [cell.seed for cell in planned.only(["50% [x]|<b>"]).cells] == [0, 1]
    assert [cell.name for cell in planned.only(["50% [x]|<b>/CartPole-v1/1"]).cells] == ["50% [x]|<b>/CartPole-v1/1"]


def test_whatever_decides_a_result_makes_another_run_of_it(tmp_path: Path) -> None:
    before = plan.read(write(tmp_path, GOOD)).cells[1].id
    for old, new in (("1e-3", "2e-3"), ("1e3", "2e3"), ("seeds: 0-1", "seeds: 0-1\nepisodes: 7")):
        assert plan.read(write(tmp_path, GOOD.replace(old, new))).cells[1].id != before
    assert plan.read(write(tmp_path, GOOD.replace("seeds: 0-1", "seeds: 0-9\nabout: text"))).cells[1].id == before


def test_a_preset_with_other_settings_makes_another_run_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids() -> dict[str, str]:
        return {cell.name: cell.id for cell in plan.read(write(tmp_path, GOOD)).cells}

    before, load = ids(), presets.load
    monkeypatch.setattr(presets, "load", lambda name: replace(load(name), about="other words"))
    assert ids() == before
    monkeypatch.setattr(presets, "load", lambda name: replace(load(name), config={"epochs": 3}))
    changed = {name for name, id in ids().items() if id != before[name]}
    assert changed == {name for name in before if name.startswith("preset/")}


def test_a_recipe_with_other_settings_makes_another_run_of_it(tmp_path: Path) -> None:
    def ids(about: str, learning_rate: float) -> set[str]:
        own = {"model": "tiny", "task": "sort", "about": about, "config": {"learning_rate": learning_rate}}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
        text = f"methods: [plain]\nrecipes: {{own: {{recipe: {tmp_path / 'own.yaml'}, steps: 3}}}}\nseeds: 0"
        return {cell.id for cell in plan.read(write(tmp_path, text)).cells}

    assert ids("some words", 1e-3) == ids("other words", 1e-3)
    assert ids("some words", 1e-3) != ids("some words", 2e-3)


def test_noise_is_in_the_size_of_a_reward(tmp_path: Path) -> None:
    text = """
methods: {plain: {}, noisy: {reward_noise: 5e-1}}
environments: {CartPole-v1: {steps: 10}, Pendulum-v1: {steps: 10, reward_size: 6}}
seeds: 0
"""
    cells = plan.read(write(tmp_path, text)).cells
    assert {cell.name: cell.reward_noise for cell in cells} == {
        "plain/CartPole-v1/0": 0.0, "noisy/CartPole-v1/0": 0.5, "plain/Pendulum-v1/0": 0.0, "noisy/Pendulum-v1/0": 3.0,
    }  # fmt: skip
    assert replace(cells[1], reward_noise=1.0).id != cells[1].id


def test_runs_with_different_seeds_share_no_start_and_methods_with_one_seed_share_all() -> None:
    def starts(method: str, seed: int) -> tuple[int, int]:
        given = Cell(method, "CartPole-v1", ENVIRONMENTS, 100, seed).given()
        return given["curve_starts"], given["final_starts"]

    assert starts("a", 0) == (10_000, 20_000)
    assert starts("a", 3) == starts("b", 3)
    seeds = [*range(30), 9_999, 10_000, 99_999]
    blocks = sorted(start for seed in seeds for start in starts("a", seed))
    assert all(after - before >= 10_000 for before, after in pairwise(blocks))
    assert max(starts("a", 999_999_999)) < 2**31


def test_runs_without_noise_are_those_of_rows_that_know_of_none() -> None:
    assert Cell("a", "CartPole-v1", ENVIRONMENTS, 100, 3, env_id="CartPole-v1").id == "e065db9e297ef518"


def test_an_estimator_that_was_changed_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, "methods: {mine: {advantage_function: own_plan_module:f}}\nenvironments: [CartPole-v1]")
    ids = []
    for body in ("rewards", "2 * rewards"):
        (tmp_path / "own_plan_module.py").write_text(f"def f(rewards, lengths, group):\n    return {body}\n")
        ids.append(plan.read(file).cells[0].id)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("worker", ["", "worker: python peer.py"])
def test_an_environment_of_ones_own_that_was_changed_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = write(
        tmp_path, f"methods: {{a: {{{worker}}}}}\nenvironments: {{'own_plan_env:Env': {{steps: 10}}}}\nseeds: 0"
    )
    ids = []
    for body in ("raise RuntimeError('it is not imported')", "x = 1"):
        (tmp_path / "own_plan_env.py").write_text(body)
        ids.append(plan.read(file).cells[0].id)
    assert ids[0] != ids[1]


def test_the_code_of_an_installed_environment_is_not_in_the_hash() -> None:
    for env_id in ("CartPole-v1", "grouprl.envs.grpo:GRPO", "benchmarks.pixels:A", "gymnasium:A", "json:A", "none:A"):
        assert plan.checksum({}, env_id, Path(__file__).parents[2]) == ""


def test_a_function_beside_the_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside").mkdir()
    file = write(tmp_path / "beside", "methods: {a: {advantage_function: own_beside:f}}\nenvironments: [CartPole-v1]")
    (tmp_path / "beside" / "own_beside.py").write_text("def f(rewards, lengths, group):\n    return rewards\n")
    monkeypatch.chdir(tmp_path)
    cell = plan.read(file).cells[0]
    assert cell.folder == str(tmp_path / "beside")
    assert cell.id == replace(cell, folder="/elsewhere").id  # the same run, wherever its file lies


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "benchmarks").rglob("*.yaml")), ids=lambda f: f.name
)
def test_the_files_that_ship_are_plans_whose_settings_are_allowed(file: Path) -> None:
    planned = plan.read(file)
    assert len(planned.cells) > 10
    if find_spec("minatar") is None:
        others = [cell for cell in planned.cells if not str(cell.env_id).startswith("benchmarks.pixels:")]
        planned = replace(planned, cells=others)
    plan.check(planned)


def test_language_models_are_recipes(tmp_path: Path) -> None:
    planned = plan.read(write(tmp_path, "methods: [a]\nrecipes: {tiny: {steps: 3}}\nseeds: [0, 4]"))
    assert [(cell.name, cell.recipe, cell.steps, cell.env_id) for cell in planned.cells] == [
        ("a/tiny/0", "tiny", 3, None), ("a/tiny/4", "tiny", 3, None),
    ]  # fmt: skip
    assert planned.scales == {"tiny": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("methods: [a]", "must name methods, and environments or recipes"),
        (
            "methods: {a: {reward_noise: -1}}\nenvironments: [CartPole-v1]",
            "reward_noise of method a=-1 must be a number of 0 or more",
        ),
        (
            "methods: {a: {reward_noise: 1, settings: {vectorization: async}}}\nenvironments: [CartPole-v1]",
            "reward_noise of method a with vectorization=async: the environments with noise are made one by one",
        ),
        (
            "methods: [a]\nenvironments: {CartPole-v1: {reward_size: 0}}",
            "reward_size of CartPole-v1=0 must be a number above 0",
        ),
        ("methods: {a: {reward_noise: 1}}\nrecipes: [tiny]", "tiny is a language model; name the method's subjects"),
        ("method: [a]", "unknown key 'method'; did you mean 'methods'?"),
        ("methods: {a: {setings: {}}}\nenvironments: [CartPole-v1]", "unknown key 'setings'; did you mean 'settings'?"),
        ("methods: {a/b: {}}\nenvironments: [CartPole-v1]", "cannot hold a slash"),
        ("methods: [a]\nenvironments: [CartPole-v1]\nseeds: 0-", "write whole numbers and ranges: 0-4,7"),
        ("methods: [a]\nenvironments: [CartPole-v1]\nsteps: 1.5", "must be a whole number, at least 1"),
        ("methods: [a]\nenvironments: {CartPole-v1: {scale: 3}}", "must be two finite numbers"),
        (
            "methods: {a: {subjects: [Acrobot-v1]}}\nenvironments: [CartPole-v1]",
            "the file does not have: CartPole-v1",
        ),
        ("methods: [a]\nenvironments: [NoSuchEnv-v0]", "steps of NoSuchEnv-v0 must be a whole number"),
        ("methods: [a]\nrecipes: [tinny]", "did you mean 'tiny'?"),
        ("methods: {a: {preset: CartPol-v1}}\nenvironments: [CartPole-v1]", "did you mean CartPole-v1"),
        ("methods: {a: {advantage_function: nowhere:f}}\nenvironments: [CartPole-v1]", "no module 'nowhere'"),
        ("methods: [a]\nenvironments: [CartPole-v1, CartPole-v1]", "is named twice"),
        ("methods: [", "is not YAML"),
        ("methods: [a]\nenvironments: [CartPole-v1]\nseeds: []", "seeds=[] names no seed"),
        ("methods: [a]\nenvironments: [CartPole-v1]\nepisodes: .inf", "episodes in"),
        ("methods: [a]\nenvironments: [CartPole-v1]\nsteps: .nan", "must be a whole number, at least 1"),
        ("methods:\n  a: {}\n  b: {}\n  a: {preset: auto}\n", "the key 'a' twice in one mapping, again in line 4"),
        *(
            (
                f"methods: [a]\nenvironments: {{CartPole-v1: {{scale: {scale}}}}}",
                "must be two finite numbers that differ",
            )
            for scale in ("[0, .inf]", "[.nan, 1]", "[false, true]", "[1, 1.0]", "[1, 2, 3]", "5", "[0, a]")
        ),
        ("methods: {a: {subjects: []}}\nenvironments: [CartPole-v1]", "method a has no subjects; name some of CartP"),
        ("methods: {}\nenvironments: [CartPole-v1]", "must name methods"),
        (
            "methods: {a: {subjects: [CartPole-v1]}}\nenvironments: [CartPole-v1, Acrobot-v1]",
            "no method is tried on Acrobot-v1",
        ),
        ("methods: {1: {}, '1': {}}\nenvironments: [CartPole-v1]", "'1' is named twice, once in quotes"),
        (
            "methods: {a: {preset: CartPole-v1}}\nrecipes: [tiny]",
            "is tried on the recipe tiny, and preset='CartPole-v1'",
        ),
        ("methods: {a: {preset: x, worker: w}}\nenvironments: [CartPole-v1]", "method a has a worker, and preset='x'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path: Path, wrong: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan.read(write(tmp_path, wrong))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("methods: {a: {settings: {learnin_rate: 1}}}\nenvironments: [CartPole-v1]", "'learning_rate'"),
        ("methods: {a: {settings: {gamma: 7}}}\nenvironments: [CartPole-v1]", "gamma"),
        ("methods: {a: {settings: {seed: 1}}}\nenvironments: [CartPole-v1]", "seed is no setting here; give seeds"),
        ("methods: {a: {settings: {seed: 1}}}\nrecipes: [tiny]", "seed is no setting here; give seeds"),
        ("methods: {a: {settings: {num_generation: 4}}}\nrecipes: [tiny]", "'num_generations'"),
        ("methods: [a]\nenvironments: {NoSuchEnv-v0: {steps: 10}}", "NoSuchEnv"),
    ],
)
def test_what_cannot_work_is_said_before_a_run_begins(tmp_path: Path, wrong: str, said: str) -> None:
    planned = plan.read(write(tmp_path, wrong))
    with pytest.raises(UsageError) as caught:
        plan.check(planned)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("0-4,7", [0, 1, 2, 3, 4, 7]), (1, [1]), ("3-3", [3]), ([3], [3]), ("2, 1 - 2", [2, 1]), ([5, "0-1"], [5, 0, 1])],
)
def test_seeds_are_numbers_and_ranges(given: object, seeds: list[int]) -> None:
    assert parse_seeds(given) == seeds


@pytest.mark.parametrize("wrong", ["", "4-1", "a", "-3", "1;2", True, 1.5, "0-99999999", None, 5, "10"])
def test_other_seeds_are_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="seeds="):
        parse_seeds(wrong)
