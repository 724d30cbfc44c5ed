"""What is printed: any text on any stream, and no stream that is full, closed or without a reader ends a run."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grouprl import cli
from grouprl.printing import LastingStream, in_markdown, show

TEXT = "h\xe4, \u20ac, \U0001f600, \ud800, \x00"


def encoded(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")


def written(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"h\\xe4, \\u20ac, \\U0001f600, \\ud800, \\x00\n"),
        ("cp1252", b"h\xe4, \x80, \\U0001f600, \\ud800, \\x00\n"),
        ("utf-8", b"h\xc3\xa4, \xe2\x82\xac, \xf0\x9f\x98\x80, \\ud800, \\x00\n"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, expected: bytes) -> None:
    stream = encoded(encoding)
    show(TEXT, stream)
    assert written(stream) == expected
    out = encoded(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    show(TEXT)
    assert written(out) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"), ("a\rb\r\nc\n\td", "a\\rb\r\nc\n\td"),
        ("\x9b31m \x7f \u202e \u2028", r"\x9b31m \x7f \u202e \u2028"), ("h\xe4 \u20ac \u05d0", "h\xe4 \u20ac \u05d0"),
    ],
)  # fmt: skip
def test_text_of_others_does_nothing_to_a_terminal(text: str, expected: str) -> None:
    stream = encoded("utf-8")
    show(text, stream)
    assert written(stream).decode() == expected + "\n"


def test_text_of_others_stays_in_its_line_of_markdown() -> None:
    assert in_markdown("a\n---\n# <script>x</script>\x1b[2J") == r"a --- # &lt;script>x&lt;/script>\x1b[2J"


def full() -> io.TextIOWrapper:
    return io.TextIOWrapper(open("/dev/full", "wb", buffering=0), encoding="utf-8")


def closed() -> io.TextIOWrapper:
    stream = encoded("utf-8")
    stream.close()
    return stream


def without_a_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return io.TextIOWrapper(open(writer, "wb", buffering=0), encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("make", [full, closed, without_a_reader])
def test_a_stream_that_cannot_be_written_is_swallowed_and_known(make: type) -> None:
    show("once", make())
    stream = LastingStream(make())
    for _ in range(2):
        assert stream.write("text") == 4
        stream.flush()
    assert isinstance(stream.error, OSError | ValueError)
    stream.discard()


def test_without_standard_output_nothing_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    show("text")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["grouprl", "presets"])
    return


def status() -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_standard_output_is_one_line(
    called: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = full()
    monkeypatch.setattr(sys, "stdout", stream)
    assert status() == 1
    assert capsys.readouterr().err == "error: standard output could not be written: No space left on device\n"
    assert sys.stdout is stream


def test_a_reader_that_leaves_is_no_error(
    called: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", without_a_reader())
    assert status() == 0
    assert capsys.readouterr().err == ""


def test_an_error_about_text_that_standard_error_lacks_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    err = encoded("ascii")
    monkeypatch.setattr(sys, "argv", ["grouprl", "presets", "h\xe4\udce4"])
    monkeypatch.setattr(sys, "stderr", err)
    assert status() == 2
    assert written(err).startswith(b"error: no preset 'h\\xe4\\udce4'")


def test_the_process_ends_without_a_word_of_its_own(tmp_path: Path) -> None:
    """What waits in a buffer is flushed once more when the interpreter ends."""
    code = "import sys; sys.argv = ['grouprl', '--version']; from grouprl import cli; cli.main()"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
