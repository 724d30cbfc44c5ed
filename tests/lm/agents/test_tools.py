"""Whatever a tool does, the model gets a text of bounded length and the training goes on."""

import asyncio
import threading
import time
from fractions import Fraction

import pytest

from grouprl.errors import UsageError
from grouprl.lm.agents.tools import Tools, bounded, schema_of
from grouprl.lm.rewards import event_loop
from grouprl.lm.rewards.event_loop import EventLoop


def tools(*functions, timeout=5.0, most=200) -> Tools:
    return Tools(functions, timeout, most, EventLoop())


def say(text: str) -> str:
    """Say it.

    Args:
        text: What to say.
    """
    return text


async def say_later(text: str) -> str:
    """Say it a little later.

    Args:
        text: What to say.
    """
    await asyncio.sleep(0)
    return text


def give(kind: str) -> object:
    """Give something.

    Args:
        kind: What to give.
    """
    return {
        "int": 7, "none": None, "list": [1, "a"], "bytes": b"abc", "object": object(), "megabytes": "x" * 5_000_000,
        "surrogate": "a\ud800b", "generator": (i for i in "ab"), "function": give, "map": map(str, [1]),
        "image": [{"type": "text", "text": "See:"}, {"type": "image", "image": object()}],
        "url": {"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}, "nested": {"found": [object()]},
        "table": [{"type": "image", "name": "b.png"}], "trace": ["<generator object f at 0x7f00>"],
        "fraction": Fraction(1, 3),
    }[kind]  # fmt: skip


def fail(how: str) -> str:
    """Fail.

    Args:
        how: In which way.
    """
    if how == "exit":
        raise SystemExit(3)
    if how == "long":
        raise ValueError("y" * 100_000)
    raise KeyError("z")


@pytest.mark.parametrize("function", [say, say_later])
def test_a_call_gives_what_the_function_returns(function) -> None:
    found = tools(function).call(function.__name__, {"text": "hello"})
    assert (found.text, found.failed, found.late) == ("hello", False, False)


@pytest.mark.parametrize(("kind", "text"), [
    ("int", "7"), ("none", "None"), ("list", "[1, 'a']"), ("surrogate", "a?b"), ("fraction", "1/3"),
    ("table", "[{'type': 'image', 'name': 'b.png'}]"), ("trace", "['<generator object f at 0x7f00>']"),
])  # fmt: skip
def test_what_is_plain_becomes_text(kind: str, text: str) -> None:
    assert tools(give).call("give", {"kind": kind}).text == text


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("give", {"kind": "bytes"}, "the tool give returned bytes, which is not text"),
        ("give", {"kind": "object"}, "the tool give returned object, which is not text"),
        ("give", {"kind": "generator"}, "the tool give returned generator, which is not text"),
        ("give", {"kind": "function"}, "the tool give returned function, which is not text"),
        ("give", {"kind": "map"}, "the tool give returned map, which is not text"),
        ("give", {"kind": "image"}, "the tool give returned list with a part of the type 'image', which is not text"),
        ("give", {"kind": "url"}, "the tool give returned a part of the type 'image_url', which is not text"),
        ("give", {"kind": "nested"}, "the tool give returned dict with object, which is not text"),
        ("give", {"kind": "?"}, "KeyError"),
        ("fail", {"how": "exit"}, "SystemExit"),
        ("fail", {"how": "long"}, "ValueError: yyy"),
        ("fail", {}, "missing a required argument: 'how'"),
        ("fail", {"how": "long", "when": 1}, "unexpected keyword argument 'when'"),
        ("fail", [1], "Arguments of fail must have names"),
        ("fly", {}, "Tool fly not found. There are: give, fail."),
    ],
)
def test_a_call_that_fails_says_why(function: str, arguments: object, said: str) -> None:
    found = tools(give, fail).call(function, arguments)
    assert found.failed
    assert said in found.text
    assert len(found.text) <= 200


def test_megabytes_are_cut_and_the_text_says_so() -> None:
    found = tools(give).call("give", {"kind": "megabytes"})
    assert len(found.text) == 200
    assert found.text.endswith("... [cut: 5000000 characters]")
    assert not found.failed
    assert bounded("abc", 64) == "abc"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_that_does_not_return_is_given_up_and_others_go_on(is_async: bool) -> None:
    ended = threading.Event()

    def hang() -> str:
        """Hang."""
        while not ended.is_set():
            time.sleep(0.01)
        return "never"

    async def hang_async() -> str:
        """Hang."""
        while not ended.is_set():
            await asyncio.sleep(0.01)
        return "never"

    given = tools(hang_async if is_async else hang, say_later, timeout=0.1)
    found: list = []
    thread = threading.Thread(target=lambda: found.append(given.call("hang_async" if is_async else "hang", {})))
    thread.start()
    assert given.call("say_later", {"text": "hello"}).text == "hello"
    thread.join()
    ended.set()
    assert (found[0].failed, found[0].late) == (True, True)
    assert "had not returned after 0.1 seconds" in found[0].text


def test_a_loop_that_is_blocked_is_replaced() -> None:
    ended = threading.Event()

    async def block() -> str:
        """Block the loop."""
        while not ended.is_set():
            time.sleep(0.01)
        return "never"

    given = tools(block, say_later, timeout=0.1)
    assert given.call("block", {}).late
    assert given.call("say_later", {"text": "hello"}).text == "hello"
    ended.set()


def test_a_tool_may_raise_a_timeout_of_its_own() -> None:
    def connect() -> str:
        """Connect."""
        raise TimeoutError("no server")

    found = tools(connect).call("connect", {})
    assert (found.late, "TimeoutError: no server" in found.text) == (False, True)


def no_docstring(x: int) -> int:
    return x


def no_types(x):
    """Has no types.

    Args:
        x: A number.
    """
    return x


def no_line(x: int) -> int:
    """Says nothing of x."""
    return x


@pytest.mark.parametrize("function", [no_docstring, no_types, no_line])
def test_a_tool_that_cannot_be_described_is_named_with_the_fix(function) -> None:
    with pytest.raises(UsageError, match=f"tool '{function.__name__}' cannot be described .*Args:"):
        schema_of(function)


@pytest.mark.parametrize("given", [3, int, lambda: 3])
def test_what_is_no_function_with_a_name_is_refused(given) -> None:
    with pytest.raises(UsageError, match="give a function"):
        schema_of(given)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two tools are called 'say'; rename one"):
        tools(say, say)


def test_a_loop_that_many_found_blocked_is_left_once(monkeypatch) -> None:
    loop = EventLoop()
    in_new_loop, asked, results = threading.Event(), iter(range(3)), {}

    def answers(blocked):
        if next(asked) == 1:  # the second to find it blocked says so when another call is in the next loop already
            in_new_loop.wait(20)
        return False

    async def block():
        time.sleep(0.3)

    async def works():
        in_new_loop.set()
        await asyncio.sleep(0.3)
        return "done"

    def run(name, awaited, seconds):
        try:
            results[name] = loop.run(awaited, seconds)
        except TimeoutError:
            results[name] = "late"

    monkeypatch.setattr(event_loop, "_answers", answers)
    threads = [threading.Thread(target=run, args=(i, block(), 0.05)) for i in range(2)]
    for thread in threads:
        thread.start()
    while 0 not in results and 1 not in results:
        time.sleep(0.01)
    run("next", works(), 20)
    for thread in threads:
        thread.join()
    loop.close()
    assert results == {0: "late", 1: "late", "next": "done"}


def test_text_in_parts_is_text() -> None:
    def look(at: str) -> list:
        """Look.

        Args:
            at: What at.
        """
        return [{"type": "text", "text": "a "}, {"type": "text", "text": at}]

    assert tools(look).call("look", {"at": "door"}).text == "a door"


def ask_an_address(key: str) -> str:
    """Ask.

    Args:
        key: A key.
    """
    raise ConnectionError(f"no answer of https://host/v1?api_key={key}")


def test_a_model_reads_no_secret_in_the_error_of_a_tool() -> None:
    said = tools(ask_an_address).call("ask_an_address", {"key": "mine12345"})
    assert said.failed
    assert "mine12345" not in said.text
    assert "ConnectionError: no answer of https://host/v1?api_key=(secret)" in said.text
