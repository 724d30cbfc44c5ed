import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grouprl.errors import UsageError
from grouprl.runs.transcripts import Transcript, TranscriptWriter, read_transcripts, write_html

NASTY = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 \x00\x1b {{DATA}} {{TITLE}} 😀"


def sample(step: int = 0, group: int = 0, reward: float | None = 1.0, text: str = "yes", **changes: Any) -> Transcript:
    values: dict[str, Any] = {
        "prompt_index": 7, "prompt": "really?", "tokens": 2, "finished": True, "rewards": {"right": reward},
        "advantage": 0.5,
    }  # fmt: skip
    return Transcript(step=step, group=group, reward=reward, completion=text, **(values | changes))


class Page(HTMLParser):
    """The elements of a page, the JSON it carries, and all other text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.inside = ""
        self.carried = self.script = self.title = self.rest = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.carried)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = dict(attrs).get("id") or tag

    def handle_data(self, text: str) -> None:
        if self.inside == "data":
            self.carried += text
        elif self.inside == "script":
            self.script += text
        elif self.inside in ("title", "h1"):
            self.title += text
        else:
            self.rest += text

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def page(tmp_path: Path, samples: list[Transcript], title: str = "t", **options: Any) -> Page:
    path = tmp_path / "t.jsonl"
    path.unlink(missing_ok=True)
    with TranscriptWriter(path) as writer:
        writer.append(samples)
    write_html(path, tmp_path / "t.html", title, **options)
    return Page(tmp_path / "t.html")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_line_of_json(tmp_path: Path) -> None:
    with TranscriptWriter(tmp_path / "t.jsonl") as writer:
        writer.append([sample(step=3, group=1, rewards={"a": 1.0, "b": None}, extra={"answer": "é"})])
    assert (tmp_path / "t.jsonl").read_text(encoding="utf-8") == (
        '{"step": 3, "prompt_index": 7, "group": 1, "prompt": "really?", "completion": "yes", "tokens": 2, '
        '"finished": true, "rewards": {"a": 1.0, "b": null}, "reward": 1.0, "advantage": 0.5, '
        '"extra": {"answer": "é"}}\n'
    )


def test_samples_come_back_as_they_were_written_as_soon_as_they_are(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": None}]
    samples = [sample(prompt=chat, text=NASTY), sample(step=1, reward=None, advantage=None, finished=False)]
    writer = TranscriptWriter(tmp_path / "deep" / "t.jsonl")
    for number, item in enumerate(samples, start=1):
        writer.append([item])
        assert list(read_transcripts(tmp_path / "deep" / "t.jsonl")) == samples[:number]
    writer.close()


def test_what_json_cannot_hold_is_null_a_number_or_text(tmp_path: Path) -> None:
    extra = {"n": np.float32(0.5), "t": torch.tensor(3), "where": Path("x"), "deep": [{"bad": math.inf}], 5: (1, 2)}
    item = sample(reward=math.nan, rewards={"f": math.nan}, advantage=-math.inf, extra=extra, text="lone \ud800")
    with TranscriptWriter(tmp_path / "t.jsonl") as writer:
        writer.append([item])
    (back,) = read_transcripts(tmp_path / "t.jsonl")
    assert (back.reward, back.rewards, back.advantage) == (None, {"f": None}, None)
    assert back.extra == {"n": 0.5, "t": 3, "where": "x", "deep": [{"bad": None}], "5": [1, 2]}
    assert back.completion == "lone \ud800"


@pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 2}', "\xe9"])
def test_a_torn_last_line_is_left_out_on_reading_and_dropped_on_opening(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "t.jsonl"
    with TranscriptWriter(path) as writer:
        writer.append([sample(step=1)])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode("latin-1"))
    assert [item.step for item in read_transcripts(path)] == [1]
    with TranscriptWriter(path) as writer:
        writer.append([sample(step=2)])
    assert [item.step for item in read_transcripts(path)] == [1, 2]


def test_truncating_and_going_on_gives_the_file_of_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    steps = [[sample(step=step, group=group, text=f"{step}\n{group}") for group in range(3)] for step in range(6)]
    with TranscriptWriter(tmp_path / "whole.jsonl") as writer:
        for step in steps:
            writer.append(step)
    with TranscriptWriter(tmp_path / "cut.jsonl") as writer:
        for step in steps[:5]:
            writer.append(step)
        writer.truncate_after(2)
        assert {item.step for item in read_transcripts(tmp_path / "cut.jsonl")} == {0, 1, 2}
        for step in steps[3:]:
            writer.append(step)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    TranscriptWriter(tmp_path / "none.jsonl").truncate_after(3)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("line", ["not json", "[1]", '{"a": 1}', '{"step": 1}'])
def test_a_file_of_something_else_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    with TranscriptWriter(path) as writer:
        writer.append([sample()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UsageError, match=r"t\.jsonl, line 2, is no transcript"):
        list(read_transcripts(path))


WHOLE = {
    "step": 1, "prompt_index": 7, "group": 0, "prompt": "really?", "completion": "yes", "tokens": 2, "finished": True,
    "rewards": {"right": 1}, "reward": 1, "advantage": None, "extra": {"a": [1]},
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "value",
    ['"1"', "{}", "[]", "[1]", "true", "null", "-1e999", "1.5", str(10**400), "9" * 5000, '{"a": "b"}', '["a"]'],
)
def test_a_column_of_another_kind_is_refused_in_a_line_or_makes_a_page(tmp_path: Path, name: str, value: str) -> None:
    line = json.dumps({**WHOLE, name: "VALUE"}).replace('"VALUE"', value)
    path = tmp_path / "t.jsonl"
    for lines in ([line], [json.dumps(WHOLE), line]):
        path.write_text("\n".join([*lines, ""]))
        try:
            write_html(path, tmp_path / "t.html", "t")
            read = list(read_transcripts(path))
        except UsageError as error:
            refused = str(error)
            with pytest.raises(UsageError, match="is no transcript"):
                TranscriptWriter(path).truncate_after(0)
            assert refused.count("\n") == 0
            assert len(refused) < 400
        else:
            assert Page(tmp_path / "t.html").data["n_samples"] == len(read) == len(lines)
            TranscriptWriter(path).truncate_after(0)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000, b'{"step":' * 100_000, b"\xff\xfe", b"\x00", json.dumps({**WHOLE, "other": 1}).encode(),
        json.dumps({k: v for k, v in WHOLE.items() if k != "group"}).encode(), b'{"step": 1',
        json.dumps({**WHOLE, "turns": 3}).encode(), json.dumps({**WHOLE, "turns": [{"role": 1, "text": "a"}]}).encode(),
        json.dumps({**WHOLE, "turns": [{"role": "a", "text": "a", "reward": "b"}]}).encode(),
        json.dumps({**WHOLE, "extra": "VALUE"}).replace('"VALUE"', '{"a":' * 400 + "1" + "}" * 400).encode(),
    ],
)  # fmt: skip
def test_a_line_that_is_no_transcript_is_refused_whatever_it_is(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(UsageError, match=r"t\.jsonl, line 1, is no transcript"):
        list(read_transcripts(path))


def test_values_that_no_file_could_hold_do_not_end_a_run(tmp_path: Path) -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise ZeroDivisionError

    himself: list[Any] = []
    himself.append(himself)
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    extra = {"himself": himself, "deep": deep, "huge": 10**5000, "bad": Unspeakable(), "surrogate": "\ud800", "b": b"x"}
    made = page(tmp_path, [sample(extra=extra)])
    assert set(made.data["groups"][0]["extra"]) == set(extra)
    (read,) = read_transcripts(tmp_path / "t.jsonl")
    assert read.extra["huge"] is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file of transcripts"):
        list(read_transcripts(tmp_path / "t.jsonl"))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_what_a_model_writes_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    plain = page(tmp_path, [sample()])
    nasty = sample(
        text=NASTY,
        prompt=[{"role": NASTY, "content": NASTY}],
        rewards={NASTY: 1.0},
        extra={NASTY: NASTY, "list": [NASTY]},
    )
    attacked = page(tmp_path, [nasty], title=NASTY)
    assert attacked.tags == plain.tags
    assert attacked.tags.count("script") == 2
    assert attacked.script == plain.script
    assert attacked.rest == plain.rest
    assert not set("<>&\u2028") & set(attacked.carried)
    assert attacked.title == NASTY * 2
    group = attacked.data["groups"][0]
    assert group["prompt"] == [[NASTY, NASTY]]
    assert group["samples"][0]["text"] == NASTY
    assert group["samples"][0]["rewards"] == {NASTY: 1.0}
    assert group["extra"][NASTY] == NASTY


PAYLOADS = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</SCRIPT ><svg/onload=alert(1)>",
    "<img src=x onerror=alert(1)>", '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>", "<!--",
    "<!--<script>", "-->", "]]>", "<![CDATA[", "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>", "</style><script>alert(1)</script>",
    "</pre><iframe src=javascript:alert(1)>", "javascript:alert(1)", "<a href=javascript:alert(1)>x</a>",
    "<base href=//evil>", "<meta http-equiv=refresh content=0;url=//evil>", "<link rel=stylesheet href=//evil>",
    "<form action=//evil><button>", "<object data=//evil>", "<details open ontoggle=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;", "&#60;script&#62;", r"\u003cscript\u003e", r"\x3cscript>",
    '";alert(1);//', "';alert(1);//", "`${alert(1)}`", r'\";alert(1);//', "{{DATA}}", "{{TITLE}}",
    "\u2028alert(1)//", "\u2029", "\x00<script>", "\ud800<script>", "__proto__", "constructor",
    "\uff1cscript\uff1e", "<\x00script>", "\r\n\r\n<script>",
)  # fmt: skip
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt": lambda x: {"prompt": x},
    "role": lambda x: {"prompt": [{"role": x, "content": "a"}]},
    "content": lambda x: {"prompt": [{"role": "user", "content": x}]},
    "call of a tool": lambda x: {"prompt": [{"role": "user", "content": "a", "tool_calls": [{x: x}]}]},
    "completion": lambda x: {"text": x},
    "role of a turn": lambda x: {"turns": [{"role": x, "text": "a", "reward": 1.0, "advantage": -1.0}]},
    "turn": lambda x: {"turns": [{"role": "assistant", "text": x, "reward": None, "advantage": None}]},
    "reward function": lambda x: {"rewards": {x: 1.0}},
    "name of an extra": lambda x: {"extra": {x: "a"}},
    "extra": lambda x: {"extra": {"a": x}},
    "nested extra": lambda x: {"extra": {"a": [{x: [x]}]}},
    "title": lambda x: {},
}


class Loaded(Page):
    """Refuses what a page of ours does not hold, however it got there."""

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")

    def unknown_decl(self, data: str) -> None:
        self.tags.append("declaration")


@pytest.mark.parametrize("place", PLACES)
def test_nothing_that_a_page_shows_can_run(tmp_path: Path, place: str) -> None:
    """Whatever is in a sample, the page has the elements, attributes and scripts that it has without it."""
    page(tmp_path, [sample()])
    plain = Loaded(tmp_path / "t.html")
    for payload in PAYLOADS:
        for title in (payload,) if place == "title" else ("t",):
            page(tmp_path, [sample(**PLACES[place](payload))], title=title)
            loaded = Loaded(tmp_path / "t.html")
            assert loaded.tags == plain.tags, payload
            assert loaded.attributes == plain.attributes, payload
            assert (loaded.script, loaded.rest) == (plain.script, plain.rest), payload
            assert not set("<>&\u2028\u2029") & set(loaded.carried), payload
            if place == "title":
                shown = payload.replace("\r\n", "\n").encode("utf-8", "backslashreplace").decode()
                assert loaded.title == shown * 2, payload
            else:
                shown = "".join(_texts(loaded.data))  # nested values as JSON
                assert payload in shown or json.dumps(payload, ensure_ascii=False)[1:-1] in shown, payload


def _texts(value: Any) -> Iterator[str]:
    """All text in what a page carries."""
    if isinstance(value, str):
        yield value
        try:  # nested values are shown as JSON
            nested = json.loads(value)
        except ValueError:
            return
        if not isinstance(nested, str):
            yield from _texts(nested)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_any_text_reaches_the_page_unchanged(tmp_path: Path, text: str) -> None:
    shown = page(tmp_path, [sample(text=text, prompt=text)])
    assert shown.data["groups"][0]["samples"][0]["text"] == text
    assert shown.data["groups"][0]["prompt"] == text
    assert "<" not in shown.carried


def test_the_page_asks_for_nothing_and_builds_no_markup_from_text() -> None:
    template = files("grouprl.runs").joinpath("transcripts.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in template
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "fetch(",
        "src=",
        "href=",
        "url(",
    ):
        assert word not in template, word
    assert template.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    assert (template.count("{{DATA}}"), template.count("{{TITLE}}")) == (1, 2)


def test_groups_hold_their_samples_best_first_and_say_once_what_all_share(tmp_path: Path) -> None:
    samples = [
        sample(reward=reward, group=group, text=f"{group} {reward}", extra={"answer": 4, "note": index})
        for group in (3, 1)
        for index, reward in enumerate((0.0, None, 2.0, -1.0))
    ]
    first, second = page(tmp_path, samples).data["groups"]
    assert [s["text"] for s in first["samples"]] == ["3 2.0", "3 0.0", "3 -1.0", "3 None"]
    assert [s["text"] for s in second["samples"]] == ["1 2.0", "1 0.0", "1 -1.0", "1 None"]
    assert first["extra"] == {"answer": "4"}
    assert [s["extra"] for s in first["samples"]] == [{"note": n} for n in ("2", "0", "3", "1")]


def test_the_curve_is_the_mean_of_each_step_unless_another_is_given(tmp_path: Path) -> None:
    samples = [
        sample(step=step, reward=reward) for step, reward in ((4, 1.0), (2, None), (4, 0.0), (3, None), (2, 3.0))
    ]
    shown = page(tmp_path, samples)
    assert (shown.data["curve"], shown.data["whole"]) == ([[2, 3.0], [4, 0.5]], False)
    shown = page(tmp_path, samples, curve={1: 0.25, 2: math.nan, 0: 1 / 3})
    assert (shown.data["curve"], shown.data["whole"]) == ([[0, 0.333333], [1, 0.25]], True)


def test_messages_show_all_that_they_hold(tmp_path: Path) -> None:
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "é"}]},
        {"role": "assistant", "tool_calls": [1]},
        {},
    ]
    assert page(tmp_path, [sample(prompt=prompt)]).data["groups"][0]["prompt"] == [
        ["user", '[{"type": "text", "text": "é"}]'], ["assistant", '{"tool_calls": [1]}'], ["", ""]
    ]  # fmt: skip


def test_an_episode_shows_its_turns_with_reward_and_advantage(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "text": "<tool_call>add(3, 4)</tool_call>", "reward": 0.5, "advantage": -1.25},
        {"role": "tool", "text": "7"},
        {"role": "assistant", "text": "7", "reward": 1.0, "advantage": math.nan},
    ]
    made = page(tmp_path, [sample(turns=turns), sample(text="alone")])
    shown = made.data["groups"][0]["samples"]
    assert shown[0]["turns"] == [
        ["assistant", "<tool_call>add(3, 4)</tool_call>", 0.5, -1.25], ["tool", "7", None, None],
        ["assistant", "7", 1.0, None],
    ]  # fmt: skip
    assert "turns" not in shown[1]
    read = list(read_transcripts(tmp_path / "t.jsonl"))
    assert read[0].turns[1] == turns[1]
    assert read[1].turns == ()


def test_a_page_that_would_be_too_large_leaves_out_steps_evenly_and_says_how_many(tmp_path: Path) -> None:
    samples = [sample(step=10 * step, text="word " * 200) for step in range(101)]
    shown = page(tmp_path, samples, max_bytes=60_000)
    steps = [group["step"] for group in shown.data["groups"]]
    assert (tmp_path / "t.html").stat().st_size <= 60_000
    assert len(steps) > 15
    assert (steps[0], steps[-1]) == (0, 1000)
    gaps = np.diff(steps)
    assert gaps.max() - gaps.min() <= 10
    assert (shown.data["n_steps"], shown.data["n_samples"], len(shown.data["curve"])) == (101, 101, 101)
    assert len(page(tmp_path, samples).data["groups"]) == 101


def test_a_step_that_is_too_large_alone_shows_the_groups_that_fit_and_one_at_least(tmp_path: Path) -> None:
    samples = [sample(step=step, group=group, text="é" * 2000) for step in (0, 1) for group in range(50)]
    shown = page(tmp_path, samples, max_bytes=60_000)
    assert {group["step"] for group in shown.data["groups"]} == {1}
    assert 3 <= len(shown.data["groups"]) < 50
    assert (tmp_path / "t.html").stat().st_size <= 60_000
    assert len(page(tmp_path, samples, max_bytes=1).data["groups"]) == 1


def test_five_thousand_samples_fit_on_a_page(tmp_path: Path) -> None:
    item = sample(text="A sentence of usual length, and another one. " * 20)
    samples = [replace(item, step=i // 32, group=i // 8 % 4) for i in range(5000)]
    shown = page(tmp_path, samples)
    assert sum(len(group["samples"]) for group in shown.data["groups"]) == 5000


def test_a_file_without_samples_makes_no_page(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no transcripts yet"):
        page(tmp_path, [])
