"""No secret of a run's settings reaches what it leaves, shows or logs; and it can be gone on with."""

import logging
from pathlib import Path
from typing import Any

import pytest
from small_runs import REVERSE, ROWS, Stop, config, warm
from transformers import TrainerCallback

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig, GRPOTrainer
from grouprl.lm.run import recipe as recipes
from grouprl.lm.run import training

TOKEN = "hf_" + "aB3dE5gH7j" * 3
PASSWORD = "correct horse"
SECRETS = (TOKEN, PASSWORD, "pa55")


def left(folder: Path) -> dict[str, list[str]]:
    """The secrets in the files of a folder, by file."""
    held = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(held) > 5
    return {path: found for path, data in held.items() if (found := [s for s in SECRETS if s.encode() in data])}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model on the disk, which is loaded with arguments."""
    model, tokenizer = warm()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_run_by_a_recipe_leaves_no_secret_and_asks_for_it_to_go_on(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    recipe = recipes.load("tiny").changed({
        "model": str(saved), "warm_start": None, "n_train": 16, "n_eval": 4, "max_steps": 2, "save_steps": 1,
        "prompts_per_step": 2, "num_generations": 4, "report_to": ["tensorboard"], "eval_every": 0,
        "model_init_kwargs": {"token": TOKEN, "proxies": {"https": "https://me:pa55@proxy"}},
    })  # fmt: skip
    out = tmp_path / "run"
    training.train(recipe, out, progress_bar=False)
    assert left(out) == {}
    kept = training.RunFolder.open(out).read_config()
    assert kept["config"]["model_init_kwargs"] == kept["recipe"]["config"]["model_init_kwargs"]
    assert kept["config"]["model_init_kwargs"] == {"token": "(secret)", "proxies": {"https": "https://(secret)@proxy"}}
    monkeypatch.setenv("GROUPRL_HTTPS", "https://me:pa55@proxy")
    for again in (lambda: training.resume(out, steps=3, progress_bar=False), lambda: training.evaluate(out, 2)):
        with pytest.raises(UsageError, match=r"model_init_kwargs\.token was a secret, .*; set GROUPRL_TOKEN"):
            again()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    seen: list[Any] = []
    build = training.build
    monkeypatch.setattr(training, "build", lambda r, c, d: seen.append(c) or build(r, c, d))
    assert training.resume(out, steps=3, progress_bar=False).steps == 3
    assert seen[0].model_init_kwargs == {"token": TOKEN, "proxies": {"https": "https://me:pa55@proxy"}}
    assert left(out) == {}
    shown = capsys.readouterr()
    assert not [secret for secret in SECRETS if secret in shown.out + shown.err]


class Asks(TrainerCallback):
    """What a tracker of transformers' reads."""

    def __init__(self) -> None:
        self.read = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.read = f"{args.to_dict()} {args.to_json_string()} {args.to_sanitized_dict()} {args!r} {args}"


def test_a_script_leaves_no_secret_either(
    tmp_path: Path, saved: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = Asks()
    arguments = {"token": TOKEN, "api_password": PASSWORD}
    args = config(
        tmp_path / "out", model_init_kwargs={"token": TOKEN}, chat_template_kwargs=arguments, report_to=["tensorboard"],
        max_steps=2,
    )  # fmt: skip
    made = GRPOTrainer(str(saved), REVERSE.reward, args, ROWS, callbacks=[Stop(1), asks])
    made.train()
    made.save_model()
    made.save_state()
    made.create_model_card(model_name=TOKEN)
    assert left(tmp_path / "out") == {}
    assert not [secret for secret in SECRETS if secret in asks.read]
    changed = config(
        tmp_path / "out", model_init_kwargs={"token": TOKEN}, chat_template_kwargs={**arguments, "x": 1}, max_steps=2
    )
    with caplog.at_level(logging.WARNING, "grouprl"):
        GRPOTrainer(str(saved), REVERSE.reward, changed, ROWS).train(resume_from_checkpoint=True)
    assert any("resumed with other settings" in message for message in caplog.messages)
    shown = capsys.readouterr()
    assert not [secret for secret in SECRETS if secret in shown.out + shown.err + caplog.text]


def test_an_error_about_a_setting_does_not_tell_the_secret_beside_it() -> None:
    for settings in (
        {"model_init_kwargs": {"token": TOKEN, "quantization_config": object()}},
        {"model_init_kwargs": [TOKEN, PASSWORD]},
        {"generation_kwargs": {"token": TOKEN}},
        {"hub_token": TOKEN, "push_to_hub": True},
        {"run_name": 3, "password": PASSWORD},
    ):
        with pytest.raises(UsageError) as caught:
            GRPOConfig(**settings).to_dict()
        assert TOKEN not in str(caught.value)


def test_a_configuration_survives_its_file_where_the_environment_holds_the_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HUB", TOKEN)
    given = GRPOConfig(model_init_kwargs={"token": TOKEN, "revision": "main"})
    kept = given.to_dict()
    assert kept["model_init_kwargs"] == {"token": "(secret $HUB)", "revision": "main"}
    assert GRPOConfig(**kept).in_use().model_init_kwargs == given.model_init_kwargs
