import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from grouprl.errors import UsageError
from grouprl.runs import MetricsLog, RunFolder
from grouprl.runs.plots import (
    _bootstrap,
    _common_grid,
    _dress,
    _group,
    _load,
    _moving_average,
    _Run,
    _without_repetitions,
    flatten,
    labels,
    plot_run,
    plot_runs,
)

EMPTY = (np.empty(0), np.empty(0))


def make_run(path: Path, seed: int = 0, rows: int = 40, env_id: str = "CartPole-v1", **settings: object) -> RunFolder:
    run = RunFolder.create(path, {"env_id": env_id, "seed": seed, "config": {**settings, "seed": seed}})
    with MetricsLog(run.metrics_path) as log:
        for i in range(rows):
            evaluation = 500.0 if i % 10 == 9 else None
            log.append({"update": i, "step": 2048 * (i + 1), "return_mean": 10.0 * i, "eval_return": evaluation})
    return run


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height from a PNG's own header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_the_curve_of_one_run_is_a_picture_in_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert plot_run(run, threshold=475) == run.curve_path
    assert picture_size(run.curve_path) == (1050, 645)


def test_dots_are_evaluations_of_what_the_curve_shows(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"task": "reverse", "seed": 0})
    with MetricsLog(run.metrics_path) as log:
        for i in range(4):
            log.append({"step": i, "reward": 3.0 + i, "loss": 0.0, "eval_reward": 3.5, "eval_accuracy": 0.25})
    assert _load(run, "step", "reward").evaluation[1].tolist() == [3.5] * 4
    assert not len(_load(run, "step", "loss").evaluation[1])


def test_runs_of_several_configurations_lengths_and_seeds_share_a_picture(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{lr}-{seed}", seed, 40 + seed, lr=lr) for lr in (0.1, 0.2) for seed in range(3)]
    runs.append(make_run(tmp_path / "one", rows=1, env_id="Acrobot-v1"))
    plot_runs([run.path for run in runs], tmp_path / "all.png", x="update")
    assert picture_size(tmp_path / "all.png") == (1050, 645)


def test_drawing_does_not_import_pyplot(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = f"""
import sys
from pathlib import Path
from grouprl.runs import RunFolder
heavy = {{"torch", "matplotlib", "tensorboard", "imageio_ffmpeg", "wandb"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
from grouprl.runs.plots import plot_run
plot_run(RunFolder(Path({str(run.path)!r})))
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert run.curve_path.exists()


def test_a_run_without_rows_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "idle", rows=0)
    run.metrics_path.write_text("step,return_mean\n")
    with pytest.raises(UsageError, match=r"idle.*no metrics yet"):
        plot_run(run)
    run.metrics_path.write_text("step,return_mean\n1,\n")
    with pytest.raises(UsageError, match="no value of 'return_mean'"):
        plot_run(run)
    run.metrics_path.unlink()
    with pytest.raises(UsageError, match="no metrics file"):
        plot_run(run)
    assert not run.curve_path.exists()


def test_bad_requests_say_what_is_allowed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="No runs"):
        plot_runs([], tmp_path / "x.png")
    with pytest.raises(UsageError, match="update, step, return_mean, eval_return"):
        plot_runs([run.path], tmp_path / "x.png", y="reward")
    with pytest.raises(UsageError, match="picture"):
        plot_runs([run.path], tmp_path / "x.docx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_runs_that_differ_only_in_the_seed_share_a_line() -> None:
    configs = [
        {"env_id": "A", "seed": seed, "config": {"lr": lr, "seed": seed}} for lr in (0.1, 0.2) for seed in (1, 2, 3)
    ]
    groups = _group([_Run(config, EMPTY, EMPTY) for config in configs])
    assert [[run.config["seed"] for run in group] for group in groups] == [[1, 2, 3], [1, 2, 3]]
    assert flatten(configs[0]) == {"env_id": "A", "config.lr": 0.1}


def test_a_label_says_what_tells_a_configuration_from_the_others() -> None:
    a1 = {"env_id": "A", "seed": 1, "config": {"lr": 0.1, "n": 8}}
    a2 = {"env_id": "A", "seed": 1, "config": {"lr": 0.2, "n": 8}}
    b = {"env_id": "B", "seed": 1, "config": {"lr": 0.3, "n": 4}}
    assert labels([a1]) == ["A"]
    assert labels([a1, a2]) == ["lr=0.1", "lr=0.2"]
    assert labels([a1, b]) == ["A", "B"]
    assert labels([a1, a2, b]) == ["A, lr=0.1", "A, lr=0.2", "B"]
    assert labels([{"seed": 1}]) == ["run"]


def test_labels_of_settings_that_differ_in_many_ways_differ() -> None:
    found = labels([{"env_id": "A", "a": i, "b": i, "c": i, "d": j} for i in (1, 2) for j in (1, 2, 3)])
    assert found[:3] == ["a=1, b=1, c=1, ...", "a=1, b=1, c=1, ... (2)", "a=1, b=1, c=1, ... (3)"]
    assert len(set(found)) == 6


def test_a_label_leaves_out_what_changes_nothing_of_learning() -> None:
    def config(total: int, **settings: object) -> dict[str, object]:
        return {"env_id": "A", "run": {"total_timesteps": total, "eval_every": total // 20}, "config": settings}

    assert labels([config(100, lr=0.1), config(200, lr=0.2)]) == ["lr=0.1", "lr=0.2"]
    assert labels([config(1000), config(2000)]) == [
        "total_timesteps=1000, eval_every=50",
        "total_timesteps=2000, eval_every=100",
    ]


def test_a_preset_stands_for_its_settings_unless_two_runs_share_it() -> None:
    a = {"env_id": "A", "preset": "script", "config": {"lr": 0.1, "n": 8}}
    b = {"env_id": "A", "preset": "formula", "config": {"lr": 0.2, "n": 4}}
    c = {"env_id": "A", "preset": "formula", "config": {"lr": 0.3, "n": 4}}
    assert labels([a, b]) == ["preset=script", "preset=formula"]
    assert labels([a, b, c])[1:] == ["preset=formula, lr=0.2, n=4", "preset=formula, lr=0.3, n=4"]


def test_runs_without_a_preset_are_called_default_as_on_the_command_line() -> None:
    one, other = {"env_id": "A", "preset": None, "seed": 0}, {"env_id": "A", "preset": "formula", "seed": 0}
    assert labels([one, other]) == ["preset=default", "preset=formula"]


@pytest.mark.parametrize(
    ("presets", "title"),
    [(("formula", "formula"), "A, preset formula"), (("formula", None), "A"), ((None, None), "A"), (("A", "A"), "A")],
)
def test_the_title_names_a_preset_that_all_runs_share(presets: tuple[str | None, ...], title: str) -> None:
    axes = Figure().add_subplot()
    _dress(axes, [_Run({"env_id": "A", "preset": preset}, EMPTY, EMPTY) for preset in presets], "step", "return_mean")
    assert axes.get_title() == title


def test_a_setting_that_a_configuration_holds_twice_is_named_once() -> None:
    def config(rate: float) -> dict[str, object]:
        return {"task": "t", "recipe": {"config": {"lr": rate}}, "config": {"lr": rate}}

    assert labels([config(0.1), config(0.2)]) == ["lr=0.1", "lr=0.2"]


def test_one_seed_counts_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed, rows) for name, seed, rows in (("a", 0, 40), ("b", 0, 50), ("c", 1, 40))]
    loaded = [_load(run, "step", "return_mean") for run in runs]
    [kept], notes = _without_repetitions(_group(loaded))
    assert kept == [loaded[1], loaded[2]]
    assert notes == ["2 runs have the same configuration and seed 0; the longest is shown"]
    assert plot_runs([run.path for run in runs], tmp_path / "x.png") == notes


def test_the_moving_average_is_centred_and_shorter_at_the_ends() -> None:
    assert _moving_average(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist() == [1.5, 3.0, 3.0, 3.0]


def test_curves_are_compared_where_all_of_them_are_known() -> None:
    xs, ys = _common_grid(
        [(np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([4.0, 8.0]), np.array([1.0, 3.0]))]
    )
    assert (xs[0], xs[-1]) == (4.0, 8.0)
    assert ys[:, [0, -1]].tolist() == [[4.0, 8.0], [1.0, 3.0]]
    with pytest.raises(UsageError, match="in common"):
        _common_grid([(np.array([0.0, 1.0]), np.zeros(2)), (np.array([2.0, 3.0]), np.zeros(2))])


def test_the_bootstrap_interval_of_two_runs_spans_them_and_of_equal_runs_is_a_point() -> None:
    # Of two runs a quarter of the samples is the lower one twice and a quarter the higher one twice.
    low, high = _bootstrap(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert low.tolist() == [1.0, 5.0]
    assert high.tolist() == [3.0, 5.0]
