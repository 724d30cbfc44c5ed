"""Recipes: what a file may say, and what is said of mistakes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grouprl.errors import UsageError
from grouprl.lm.run import recipe
from grouprl.lm.run.data import load_task_data
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.settings.config import GRPOConfig


def written(folder: Path, values: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", recipe.names())
def test_every_preset_is_a_recipe_whose_settings_are_allowed(name: str) -> None:
    given = recipe.load(name)
    assert given.name == name
    assert given.about
    assert GRPOConfig(**given.config).max_steps > 0


def test_the_smallest_preset_has_room_to_learn_and_learns() -> None:
    measured = recipe.load("tiny").expect
    assert 0.3 <= measured["accuracy_before"] <= 0.6
    assert measured["accuracy_after"] > 0.95
    assert len(measured["seeds"]) >= 5


def test_a_file_gives_the_recipe_it_holds(tmp_path: Path) -> None:
    given = recipe.load(written(tmp_path, {"model": "tiny", "task": "sort", "config": {"seed": 1}}))
    assert (given.name, given.model, given.task, given.config) == ("mine", "tiny", "sort", {"seed": 1})


def test_a_recipe_reads_back_from_what_a_run_writes_of_it(tmp_path: Path) -> None:
    given = Recipe("some", "tiny", "sort", lora={}, task_options={"length": 3}, eval_every=0, config={"seed": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"arena": "lm", "recipe": given.to_dict()}))
    assert recipe.load(tmp_path) == given
    assert recipe.load(tmp_path / "config.yaml") == given


def test_changes_go_to_the_recipe_or_to_its_configuration() -> None:
    given = recipe.load("tiny").changed({"task": "sort", "n_train": 1e2, "learning_rate": 0.5})
    assert (given.task, given.n_train, given.config["learning_rate"]) == ("sort", 100, 0.5)
    assert type(given.n_train) is int
    assert recipe.load("tiny").config["learning_rate"] != 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "tiny", "task": "sort", "modle": 1}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": "tiny", "task": "sort", "learning_rate": 1}, "belong under config"),
        ({"task": "sort"}, "lacks model"),
        ({}, "lacks model and task"),
        (["model"], "must hold a mapping"),
        ("model: [tiny", "is not YAML"),
        ({"recipe": "tiny"}, "must hold a mapping"),
        ({"model": "tiny", "task": 3}, "task=3 of recipe mine must be text"),
        ({"model": "tiny", "task": "sort", "n_train": "many"}, "n_train='many' .* must be a number"),
        ({"model": "tiny", "task": "sort", "n_train": 0}, "n_train=0 .* at least 1"),
        ({"model": "tiny", "task": "sort", "n_train": 1.5}, "n_train=1.5 .* whole number"),
        ({"model": "tiny", "task": "sort", "eval_every": -1}, "eval_every=-1 .* at least 0"),
        ({"model": "tiny", "task": "sort", "config": 5}, "config=5 .* must be a mapping"),
        ({"model": "tiny", "task": "sort", "config": None}, "config=None .* must be a mapping"),
        ({"model": "tiny", "task": "sort", "lora": 8}, "lora=8 .* must be a mapping or left out"),
        ({"model": "tiny", "task": "sort", "task_options": [1]}, "task_options=.* must be a mapping"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_clear_sentence(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe.load(written(tmp_path, values))


def test_an_unknown_preset_is_told_the_closest_one() -> None:
    with pytest.raises(UsageError, match=r"no preset and no file 'arithmetics'; did you mean 'arithmetic'\?"):
        recipe.load("arithmetics")


@pytest.mark.parametrize(
    ("setting", "close"), [("learning_rat", "learning_rate"), ("n_trains", "n_train"), ("eval_evry", "eval_every")]
)
def test_an_unknown_setting_is_told_the_closest_one(setting: str, close: str) -> None:
    with pytest.raises(UsageError, match=f"unknown setting '{setting}'; did you mean '{close}'"):
        recipe.load("tiny").changed({setting: 1})


def test_a_recipe_names_a_task_or_an_environment(tmp_path: Path) -> None:
    given = recipe.load(written(tmp_path, {"model": "tiny", "environment": "guess-number", "tools": ["a:b"]}))
    assert (given.subject, given.tools) == ("guess-number", ["a:b"])
    assert Recipe(**{"name": "mine", **given.to_dict()}) == given
    for both in ({}, {"task": "sort", "environment": "guess-number"}):
        with pytest.raises(UsageError, match=r"lacks task|a task or an environment, one of the two"):
            recipe.load(written(tmp_path, {"model": "tiny", **both}))


def test_the_starts_of_an_environment_are_even_seeds_to_train_on_and_odd_ones_held_out() -> None:
    options = {"env_kwargs": "grouprl.lm.agents.environments.of_gymnasium:random_lake", "form": "text"}
    given = Recipe("mine", "tiny", environment="FrozenLake-v1", environment_options=options, n_train=3, n_eval=2)
    data = load_task_data(given)
    assert [row["seed"] for row in data.train] == [0, 2, 4]
    assert [row["seed"] for row in data.held_out] == [1, 3]
    assert (data.reward, data.task) == (None, None)
    assert "Goal: down 3, right 3." in data.environment().begin({}, 0)


def test_an_environment_whose_class_is_no_text_environment_is_played_as_it_is() -> None:
    name = "grouprl.lm.agents.environments.text_episodes:Episodes"
    assert load_task_data(Recipe("mine", "tiny", environment=name)).environment.__name__ == "Episodes"
    with pytest.raises(UsageError, match="is no text environment and takes none"):
        load_task_data(Recipe("mine", "tiny", environment=name, environment_options={"cue": "x"}))


def test_an_option_that_text_environments_do_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'colour'; known: env, env_kwargs"):
        load_task_data(Recipe("mine", "tiny", environment="guess-number", environment_options={"colour": 1}))


def test_tools_of_a_recipe_are_functions_by_name() -> None:
    given = Recipe("mine", "tiny", "sort", tools=["grouprl.lm.agents.calculator:calculate"], n_train=2, n_eval=2)
    assert [tool.__name__ for tool in load_task_data(given).tools] == ["calculate"]


def test_numbers_with_an_exponent_are_numbers_at_any_depth_and_text_in_quotes_stays(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
model: tiny
task: sort
task_options: {length: 3, name: "12"}
lora: {lora_dropout: 1e-1}
warm_start: {learning_rate: 1e-3}
config: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1E-6}, stop_strings: [one, 2e+1]}
""",
    )
    given = recipe.load(path)
    assert (given.lora, given.warm_start) == ({"lora_dropout": 0.1}, {"learning_rate": 0.001})
    assert given.task_options == {"length": 3, "name": "12"}
    assert given.config["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
