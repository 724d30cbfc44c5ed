"""Any words after `grouprl`: the command does it, or one line says what is wrong, and never a traceback."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd import result_or_clear_error

from grouprl import cli
from grouprl.envs import training
from grouprl.envs.config import GRPOConfig
from grouprl.envs.recorder import RunResult
from grouprl.envs.run_settings import RunSettings
from grouprl.lm.run import recipe
from grouprl.lm.run import training as language
from grouprl.lm.settings.fields import Fields

TINY = [
    "tiny", "--set", "n_train=4", "--set", "n_eval=2", "--set", "warm_start=null", "--set", "num_generations=2",
    "--set", "prompts_per_step=2", "--set", "max_completion_length=4",
]  # fmt: skip
FAST = ["CartPole-v1", "--preset", "default", "--no-video", "--set", "n_envs=2", "--set", "warmup_steps=0"]


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `grouprl` with these words; an empty line is what a person types."""
    with monkeypatch.context() as here:
        here.setattr(sys, "argv", ["grouprl", *words])
        here.setattr(sys, "stdin", io.StringIO("what\n\n"))
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        else:
            code = 0
    assert code in (0, 1, 2, 130), code
    return int(code)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of each arena."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        small = ["--steps", "100", "--set", "collect=segments", "--set", "n_steps=16", "--set", "eval_episodes=1"]
        more = ["--set", "final_episodes=1", "--set", "epochs=1"]
        assert call(["train", *FAST, *small, *more, "--out", str(folder / "e")], monkeypatch) == 0
        assert call(["train-lm", *TINY, "--steps", "1", "--out", str(folder / "l")], monkeypatch) == 0
    return folder / "e", folder / "l"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is made and checked, and then nothing is learned."""
    monkeypatch.setattr(training, "_run", lambda folder, run, agent, *_: RunResult(folder, agent, None, []))
    monkeypatch.setattr(
        language, "_run", lambda folder, *_, **__: language.RunResult(folder, 0, None, [])
    )  # fmt: skip


TEXTS = [
    "", " ", "-", "--", "-h", "--help", "--version", "=", "a=b", "a=", "=b", "a=b=c", "~", ".", "..", "/", "/dev/null",
    "/proc/self/mem", "nowhere", "CartPole-v1", "Pendulum-v1", "x:y", "x:CartPole-v1", "os:path", ":", "tiny", "1",
    "-1", "1e3", "1e400", "nan", "inf", "0x10", "1_000", "١", "true", "null", "[]", "{}", "*", "&a", "\udcff",
    "!!python/name:os.system", "ä", "\n", "a\nb", "'", '"', "%s", "{0}", "$HOME", "x" * 300, "auto",
    "default", "none", "wandb", "step", "reward", "return_mean", "tensorboard",
]  # fmt: skip
VALUES = [
    "[1, 2]", "[8, 8]", "{a: 1}", "[[1]]", "2020-01-01", "1:30", "0.5", "1e-3", "3", "yes", "? a", "- 1", "'1'",
    "!!set {a}", "group", "cpu", "cuda", "meta", "mps", "adaptive", "linear", "outcome", "dapo", "grpo",
]  # fmt: skip
words = st.sampled_from(TEXTS) | st.text(max_size=6)
values = words | st.sampled_from(VALUES)
OPTIONS = {
    "train": ["--preset", "--set", "--env", "--seed", "--steps", "--out", "--track", "--config", "--overwrite",
              "--video", "--no-video", "--quiet", "-s", "-e", "-q"],
    "train-lm": ["--set", "--model", "--seed", "--steps", "--out", "--track", "--timeout", "--overwrite", "--quiet"],
    "resume": ["--steps", "--quiet", "-q"],
    "evaluate": ["--episodes", "--seed", "--sampled", "--on", "--answers"],
    "chat": ["--sampled", "--tokens", "--bare"],
    "play": ["--episodes", "--seed", "--sampled", "--video"],
    "plot": ["--out", "--x", "--y"],
    "settings": ["--lm"],
    "presets": [],
}  # fmt: skip


def named(names: list[str]) -> st.SearchStrategy[str]:
    return st.builds("{}={}".format, st.sampled_from(sorted(names)), values)


@given(st.lists(st.sampled_from([*OPTIONS, *OPTIONS["train"], *OPTIONS["evaluate"]]) | words, max_size=5))
@pytest.mark.usefixtures("no_training")
def test_any_words(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if arguments[:1] != ["chat"]:  # any name may be a model's
            call(arguments, monkeypatch)


ENVIRONMENT_NAMES = [*GRPOConfig.model_fields, *RunSettings.__dataclass_fields__, "nothing", ""]
SIZES = ("n_envs", "n_steps", "threads", "warmup_steps", "hidden_sizes")


@given(st.lists(named([n for n in ENVIRONMENT_NAMES if n not in SIZES]), max_size=3), st.lists(words, max_size=2))
@pytest.mark.usefixtures("no_training")
def test_settings_of_train(assignments: list[str], more: list[str]) -> None:
    arguments = [word for pair in assignments for word in ("--set", pair)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(["train", *FAST, *arguments, *more, "--out", "run", "--overwrite"], monkeypatch)


@given(st.sampled_from(OPTIONS["train"]), values)
@pytest.mark.usefixtures("no_training")
def test_options_of_train(option: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(["train", *FAST, option, value, "--out", "run", "--overwrite"], monkeypatch)
        call(["train", *FAST, "--out", "run", "--overwrite", option, value], monkeypatch)


LANGUAGE_NAMES = [*Fields.model_fields, *recipe.settable(), "nothing"]


@given(st.lists(named([n for n in LANGUAGE_NAMES if n != "model"]), max_size=2))
@pytest.mark.usefixtures("no_training")
def test_settings_of_train_lm(assignments: list[str]) -> None:
    arguments = [word for pair in assignments for word in ("--set", pair)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(["train-lm", *TINY, *arguments, "--out", "run", "--overwrite"], monkeypatch)


@given(st.sampled_from([o for o in OPTIONS["train-lm"] if o != "--model"]), values)
@pytest.mark.usefixtures("no_training")
def test_options_of_train_lm(option: str, value: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(["train-lm", *TINY, "--out", "run", "--overwrite", option, value], monkeypatch)


@given(
    st.sampled_from(["resume", "evaluate", "plot", "settings", "presets"]),
    st.sampled_from(["e", "l"]),
    st.data(),
)
@pytest.mark.usefixtures("no_training")
def test_commands_on_runs(runs: tuple[Path, Path], command: str, arena: str, data: st.DataObject) -> None:
    run = runs["el".index(arena)]
    options = (
        data.draw(st.lists(st.sampled_from(OPTIONS[command]) | values | st.just("2"), max_size=3))
        if OPTIONS[command]
        else data.draw(st.lists(values, max_size=2))
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        call([command, *([str(run)] if command in ("resume", "evaluate", "plot") else []), *options], monkeypatch)


plain: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 99)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a: b", "tiny"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=60) | st.text(max_size=60) | plain)
def test_any_file_as_a_recipe_or_as_the_configuration_of_a_run(content: Any) -> None:
    import yaml

    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else yaml.dump(content)).encode(errors="surrogatepass")
    Path("file.yaml").write_bytes(content)
    Path("run").mkdir(exist_ok=True)
    Path("run/config.yaml").write_bytes(content)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for arguments in (
            ["train-lm", "file.yaml"],
            ["train", "--config", "file.yaml"],
            ["resume", "run"],
            ["evaluate", "run"],
            ["plot", "run"],
            ["chat", "run"],
            ["play", "run"],
        ):
            assert call(arguments, monkeypatch) != 0, arguments


@given(st.dictionaries(st.sampled_from([*recipe.Recipe.__dataclass_fields__, "other"]), plain, max_size=4))
def test_any_field_of_a_recipe(fields: dict[str, Any]) -> None:
    import yaml

    saved = {"model": "tiny", "task": "nth-word", **fields}
    Path("file.yaml").write_text(yaml.safe_dump(saved, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    result_or_clear_error(lambda: recipe.load("file.yaml"))
