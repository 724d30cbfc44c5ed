"""What people wrote is read or refused in a line, in bounded time and memory."""

from pathlib import Path

import pytest

from grouprl.errors import UsageError
from grouprl.lm.run import recipe
from grouprl.lm.tasks.jsonl import load_jsonl
from grouprl.reading import check_size, parse_yaml, read_yaml

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500))
CRAFTED = {
    "billion laughs": LAUGHS,
    "laughing merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}}}\n" for i in range(1, 40)),
    "holds itself": "&a [*a]",
    "holds itself as a mapping": "&a {config: *a}",
    "a chain of aliases": CHAIN,
    "deep lists": "[" * 50_000,
    "deep mappings": "{a: " * 50_000,
    "deep blocks": "- " * 5000 + "a",
    "deep but closed": "[" * 200 + "]" * 200,
    "large": "a: " + "x" * 600_000,
    "many": "[" + "1," * 99_000 + "[1, 2, 3]," * 400 + "]",
    "a null byte": "a: \x00",
    "an impossible date": "a: 2001-99-99",
    "a huge number": "a: " + "9" * 5000,
    "a number that is none": "a: !!int abc",
    "an object": "a: !!python/object/apply:os.system [echo]",
    "an unknown tag": "a: !mine b",
    "an unknown alias": "a: *b",
    "a list as a key": "? [a]\n: b",
    "a tab": "a:\n\t- b",
    "two documents": "a: 1\n---\nb: 2",
    "nothing closed": "a: 'b",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_yaml_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(CRAFTED[name])
    for read in (lambda: parse_yaml(CRAFTED[name], "it"), lambda: read_yaml(path), lambda: recipe.load(path)):
        with pytest.raises(UsageError) as caught:
            read()
        assert str(caught.value).count("\n") == 0
        assert len(str(caught.value)) < 400


def test_aliases_and_numbers_that_people_write_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1e3, e: 1.0e+3}}", "it") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": "1e3", "e": 1000.0},
    }  # fmt: skip
    check_size([[[1]] * 100] * 100, "it")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \xe4", None])
def test_a_file_that_holds_no_text_is_refused_in_a_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read .*recipe\.yaml"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: tiny\ntask: reverse\nn_train: .inf", "n_train=inf .* must be a whole number"),
        ("model: tiny\ntask: reverse\nn_eval: .nan", "n_eval=nan .* must be a whole number"),
        ("model: tiny\ntask: reverse\nconfig: {1: 2}", "config of recipe .* has the key 1; names are text"),
        ("model: tiny\ntask: reverse\n1: 2", "unknown key 1"),
        ("model: !!binary aGk=\ntask: reverse", "model=b'hi' .* must be text"),
        ("model: 2001-01-01\ntask: reverse", "model=datetime.* must be text"),
        ("- model", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("recipe: 3", "must hold a mapping"),
    ],
)
def test_a_recipe_of_strange_values_is_refused_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        recipe.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": ' + b"[" * 100_000, b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", b"\xff\xfe",
        b'{"prompt": "\x00"}',
        b'{"prompt": "a", "deep": ' + b"[" * 300 + b"]" * 300 + b"}", b'{"prompt": NaN}', b"nan", b'"prompt"', b"[]",
        b'{"prompt": [{"role": 1, "content": "a"}]}', b'{"prompt": 1e999}', b"{", b"\x00",
    ],
)  # fmt: skip
def test_a_line_of_data_that_is_none_is_refused_in_a_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=r"data\.jsonl") as caught:
        load_jsonl(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [("a: 1\nb: 2\na: 3", "'a'", 3), ("x:\n- {b: 1, 'b': 2}", "'b'", 2), ("1: a\n1: b", "'1'", 2)],
)
def test_a_key_that_is_given_twice_is_refused_with_its_line(text, key, line):
    with pytest.raises(UsageError, match=f"it has the key {key} twice in one mapping, again in line {line}: leave one"):
        parse_yaml(text, "it")


def test_a_key_that_takes_the_place_of_a_merged_one_is_no_second_one():
    assert parse_yaml("a: &x {k: 1, j: 2}\nb: {<<: *x, k: 3}", "it")["b"] == {"k": 3, "j": 2}
    assert parse_yaml("- a: 1\n- a: 2", "it") == [{"a": 1}, {"a": 2}]
