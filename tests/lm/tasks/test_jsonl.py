import sys

import pytest

from grouprl.errors import UsageError
from grouprl.lm.tasks.jsonl import load_jsonl


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
