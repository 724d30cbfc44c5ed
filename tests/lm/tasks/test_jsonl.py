import sys

import pytest

from grouprl.errors import UsageError
from grouprl.lm.tasks.jsonl import load_function, load_jsonl


@pytest.fixture(autouse=True)
def _own_search_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_rows_are_read_with_all_their_columns(tmp_path):
    chat = '[{"role": "user", "content": "\u00fc?"}]'
    path = write(tmp_path, '{"prompt": "a", "answer": 1}', "", f'{{"prompt": {chat}, "tags": ["x"]}}', "  ")
    assert load_jsonl(path) == [
        {"prompt": "a", "answer": 1, "tags": None},
        {"prompt": [{"role": "user", "content": "\u00fc?"}], "answer": None, "tags": ["x"]},
    ]


def test_a_byte_order_mark_windows_line_ends_and_other_separators_are_no_trouble(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n'.encode())
    assert [row["prompt"] for row in load_jsonl(path)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 is a JSON list"),
        ('"a"', "line 2 is a JSON str"),
        ('{"question": "a"}', "line 2 has no prompt; it has: 'question'"),
        ("{}", "line 2 has no prompt; it has: nothing"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": 5}', "line 2: the prompt is a int"),
        ('{"prompt": null}', "line 2: the prompt is a NoneType"),
        ('{"prompt": []}', "line 2: the prompt is an empty list"),
        ('{"prompt": ["a"]}', "line 2: message 1 of the prompt has no role"),
        ('{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}', "line 2: message 2 of the prompt"),
    ],
)
def test_an_error_names_the_line(tmp_path, line, problem):
    with pytest.raises(UsageError, match=problem):
        load_jsonl(write(tmp_path, '{"prompt": "a"}', line))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"Cannot read .*none\.jsonl: No such file"):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="Cannot read"):
        load_jsonl(tmp_path)
    with pytest.raises(UsageError, match="holds no row"):
        load_jsonl(write(tmp_path, "", "  "))
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UsageError, match=r"not text in UTF-8: .* at byte 12"):
        load_jsonl(tmp_path / "data.jsonl")


def test_a_function_is_found_in_the_current_directory_and_in_the_given_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, module in ((here, "reward_here"), (there, "reward_there")):
        folder.mkdir()
        (folder / f"{module}.py").write_text("def short(completions, **kw):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(here)
    assert load_function("reward_here:short")(completions=["a"]) == [1.0]
    with pytest.raises(UsageError, match="there is no module 'reward_there'"):
        load_function("reward_there:short")
    assert load_function("reward_there:short", there)(completions=["a", "b"]) == [1.0, 1.0]
    assert load_function("grouprl.lm.rewards.builtin:completion_text")("a") == "a"


def test_a_file_named_like_an_installed_package_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("stolen = True\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("colorsys:rgb_to_hsv")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


def test_what_is_wrong_with_the_name_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_wrong.py").write_text("LIMIT = 3\ndef correct(): ...\ndef _hidden(): ...\n")
    for name in ("reward_wrong", "reward_wrong:", ":correct", "reward_wrong.py:correct()", "a b:c", "../x:y"):
        with pytest.raises(UsageError, match="module:function"):
            load_function(name)
    with pytest.raises(UsageError, match=r"'reward_wrong' \(.*reward_wrong.py\) has no 'corect'; it has: correct\."):
        load_function("reward_wrong:corect")
    with pytest.raises(UsageError, match="LIMIT is a int, not a function"):
        load_function("reward_wrong:LIMIT")
    with pytest.raises(UsageError, match="there is no module 'no_such_package'"):
        load_function("no_such_package.sub:f")


def test_what_the_module_itself_raises_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_importing.py").write_text("import no_such_library\n")
    (tmp_path / "reward_failing.py").write_text("1 / 0\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_function("reward_importing:f")
    with pytest.raises(ZeroDivisionError):
        load_function("reward_failing:f")
