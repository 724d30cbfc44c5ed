"""Secrets are told from other text, and come back from the environment."""

import logging
from typing import Any

import pytest

from grouprl.errors import TrainingError, UsageError
from grouprl.redaction import redact, with_secrets, without_secrets

HUB = "hf_" + "aB3dE5gH7j" * 3
KEY = "sk-proj-" + "x1Y2z3" * 5


@pytest.mark.parametrize(
    "secret",
    [
        HUB, KEY, "ghp_" + "a1" * 18, "github_pat_" + "a1_" * 10, "glpat-" + "a1" * 10, "AKIA" + "Q7" * 8,
        "AIza" + "a1_-" * 9, "xoxb-1234567890-abcdef", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_a_secret_is_told_by_its_shape_wherever_it_stands(secret: str) -> None:
    for text in (secret, f"cannot load {secret}: 401", f"{{'a': '{secret}'}}"):
        assert secret not in redact(text)
        assert "(secret)" in redact(text)
    assert redact(f"a {secret} b") == "a (secret) b"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:pa55@host/x?y=1", "https://(secret)@host/x?y=1"),
        ("https://:tok@host", "https://(secret)@host"),
        ("https://host/x?api_key=abc&n=1&token=def#end", "https://host/x?api_key=(secret)&n=1&token=(secret)#end"),
        ("Authorization: Bearer abcdef.123", "Authorization: Bearer (secret)"),
        ("model_init_kwargs={'token': 'mine', 'n': 3}", "model_init_kwargs={'token': '(secret)', 'n': 3}"),
        ('password="a b c"', 'password="(secret)"'),
        ("f(api_key='x')", "f(api_key='(secret)')"),
    ],
)
def test_a_secret_is_told_by_its_place(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "eos_token='</s>', pad_token: '<pad>', max_tokens=3", "hf_hub_download", "https://host:8080/a@b", "sk-learn",
        "unknown key 'config'", "column 'key'", "see git@github.com:a/b", "http://user@host/x", "0123abcd" * 5,
        "sort_key='a'", "mask_token='_'", "key=3", "pass_k=4",
    ],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


NESTED: dict[str, Any] = {
    "token": HUB,
    "use_auth_token": True,
    "headers": [{"X-Api-Key": "mine"}, {"Authorization": "Basic abc"}],
    "db": {"dbPassword": 12345, "user": "me", "url": "https://me:pw@host/db"},
    "aws_secret_access_key": "zzz",
    "credentials": {"user": "me", "pass": "you"},
    "eos_token": "</s>",
    "eos_token_id": 3,
    "sort_key": "n",
    "note": f"made with {KEY}",
}


def test_nested_values_lose_their_secrets_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    hidden = without_secrets(NESTED)
    assert hidden == {
        "token": "(secret)",
        "use_auth_token": True,
        "headers": [{"X-Api-Key": "(secret)"}, {"Authorization": "(secret)"}],
        "db": {"dbPassword": "(secret)", "user": "me", "url": "https://(secret)@host/db"},
        "aws_secret_access_key": "(secret)",
        "credentials": {"user": "(secret)", "pass": "(secret)"},
        "eos_token": "</s>",
        "eos_token_id": 3,
        "sort_key": "n",
        "note": "made with (secret)",
    }
    assert without_secrets(hidden) == hidden
    assert NESTED["token"] == HUB


def test_a_secret_of_the_environment_is_read_from_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", HUB)
    hidden = without_secrets({"kwargs": {"token": HUB, "n": 3}})
    assert hidden == {"kwargs": {"token": "(secret $MY_TOKEN)", "n": 3}}
    assert with_secrets(hidden, "settings") == {"kwargs": {"token": HUB, "n": 3}}
    monkeypatch.delenv("MY_TOKEN")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"^settings\.kwargs\.token was a secret.*set MY_TOKEN or GROUPRL_TOKEN or "):
        with_secrets(hidden, "settings")
    monkeypatch.setenv("HF_TOKEN", "other")
    assert with_secrets(hidden, "settings")["kwargs"]["token"] == "other"


def test_a_secret_that_was_typed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = without_secrets({"url": "https://me:pw@host", "list": [{"api-key": "abcdef"}]})
    with pytest.raises(ValueError, match="set GROUPRL_URL in the environment"):
        with_secrets(hidden, "task_options")
    monkeypatch.setenv("GROUPRL_URL", "https://me:pw@host")
    monkeypatch.setenv("GROUPRL_API_KEY", "abcdef")
    assert with_secrets(hidden, "task_options") == {"url": "https://me:pw@host", "list": [{"api-key": "abcdef"}]}


def test_errors_and_the_log_hold_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    for error in (UsageError(f"token={HUB}"), TrainingError(f"the server said: bad key {KEY}")):
        assert HUB not in str(error)
        assert KEY not in str(error)
        assert "(secret)" in str(error)
    logging.getLogger("grouprl").warning("settings %s at %s", {"password": "pw12"}, "https://a:b@c")
    assert caplog.messages == ["settings {'password': '(secret)'} at https://(secret)@c"]


def test_a_secret_of_the_environment_is_told_in_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, held in {"WANDB_API_KEY": "0123abcd" * 5, "MY_PASSWORD": "short", "SSL_KEY": "/etc/keys/own.pem"}.items():
        monkeypatch.setenv(name, held)
    said = "login with " + "0123abcd" * 5 + " failed; short; /etc/keys/own.pem"
    assert redact(said) == "login with (secret $WANDB_API_KEY) failed; short; /etc/keys/own.pem"
    given = {"address": f"https://host/{'0123abcd' * 5}/v1?x=y"}
    hidden = without_secrets(given)
    assert hidden == {"address": "https://host/(secret $WANDB_API_KEY)/v1?x=y"}
    assert with_secrets(hidden, "env_kwargs") == given


def test_what_is_logged_steers_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("grouprl").warning("the environment says %s", "\x1b[2J")
    assert caplog.messages == ["the environment says \\x1b[2J"]
