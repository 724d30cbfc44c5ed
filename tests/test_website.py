"""The documentation site: it builds without a warning, and shows what the pages show in the repository."""

from __future__ import annotations

import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cmarkgfm
import pytest
import tomli

from programs import DOCS, docs_program

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(DOCS) for path in DOCS.rglob("*.md"))


website = docs_program("website")


class Read(HTMLParser):
    """What a page in HTML holds: its ids and links, what it loads, its formulas, and how many elements of each kind."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.kinds[tag] += 1
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given or (tag == "link" and given.get("rel") != "canonical"):
            self.loaded.append(given.get("src", given.get("href", "")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built once: a few seconds."""
    out = tmp_path_factory.mktemp("site")
    website.make(out)
    return out / "site"


def built(page: Path) -> str:
    """The file on the site that a page of docs/ becomes."""
    return (page.parent / "index.html" if page.name == "README.md" else page.with_suffix(".html")).as_posix()


def body(html: str) -> str:
    """What the page itself says, without the navigation around it."""
    return html[html.index("<article") : html.index("</article>")]


# --- the whole site --------------------------------------------------------------------------------------------------
def test_every_link_of_the_site_leads_to_a_page_and_a_heading_that_exist(site: Path) -> None:
    pages = {path: Read(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or path.name == "404.html":
                continue
            to, _, heading = unquote(link).partition("#")
            file = (path.parent / to).resolve() if to else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (heading and file in pages and heading not in pages[file].ids):
                lost.append(f"{path.relative_to(site)} links to {link}")
    assert len(pages) > len(PAGES)
    assert lost == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = Read(path.read_text(encoding="utf-8")).loaded
        assert "mathjax.js" in {Path(file).name for file in loaded}
        for file in loaded:
            assert not re.match(r"(https?:)?//", file), f"{path.relative_to(site)} loads {file}"
            assert path.name == "404.html" or file.startswith("data:") or (path.parent / file.split("?")[0]).exists()


def test_the_front_page_has_four_doors_to_the_four_parts(site: Path) -> None:
    cards = re.search(r'<div class="grid cards">(.*?)</div>', (site / "index.html").read_text("utf-8"), re.S)
    assert cards is not None
    doors = re.findall(r'<strong><a href="([^"]+)">(.*?)</a>', cards[1])
    assert [name for _, name in doors] == [
        "Learn", "Train a policy", "Train a language model", "Change an estimator",
    ]  # fmt: skip
    assert [name for name in navigation() if name not in ("Start", "Reference")] == [name for _, name in doors]


def test_the_pages_of_docstrings_show_every_name_of_the_reference(site: Path) -> None:
    for part, name in website.API.items():
        ids = Read((site / "api" / f"{name}.html").read_text(encoding="utf-8")).ids
        for module, names in website.build.python_modules(part).values():
            assert {f"{module}.{one}" for one in names} <= ids


def test_every_page_is_found_by_the_search(site: Path) -> None:
    index = (site / "search.json").read_text(encoding="utf-8")
    assert [page for page in PAGES if f'"{built(page)}' not in index] == []


def navigation() -> dict[str, Any]:
    config = tomli.loads((DOCS / "zensical.toml").read_text(encoding="utf-8"))
    return {name: to for entry in config["project"]["nav"] for name, to in entry.items()}


def test_every_page_stands_in_the_navigation() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    missing = {page.as_posix() for page in PAGES} - set(files(navigation()))
    assert missing == set(), "give these pages of docs/ a place in `nav` of docs/zensical.toml"


# --- each page, beside what GitHub makes of it -----------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_has_the_same_parts_on_the_site_as_on_github(page: Path, site: Path) -> None:
    """The two parsers of Markdown agree: as many headings, list items, rows, blocks of code, pictures and links."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if page.name == "reference.md":
        text = text[: text.index("\n## Python\n")]
    options = cmarkgfm.cmark.Options.CMARK_OPT_UNSAFE  # elements of HTML stay, such as those that hide a solution
    github = Read(cmarkgfm.github_flavored_markdown_to_html(text, options))
    here = Read(body((site / built(page)).read_text(encoding="utf-8")))
    formulas = len(re.findall(r"^ *```math$", text, re.M))
    parts = ("h1", "h2", "h3", "h4", "li", "tr", "pre", "img", "blockquote", "em", "strong", "details")
    expected = {part: github.kinds[part] - (formulas if part == "pre" else 0) for part in parts}
    if page.name == "reference.md":
        expected["h2"], expected["li"] = expected["h2"] + 1, expected["li"] + len(website.API)
    assert {part: here.kinds[part] for part in parts} == expected


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_site_typesets_every_formula_of_a_page(page: Path, site: Path) -> None:
    fences = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
    text = (DOCS / page).read_text(encoding="utf-8")
    displayed = [code.strip() for kind, code in fences.findall(text) if kind == "math"]
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"`[^`\n]*`", "", fences.sub("", text)))
    html = (site / built(page)).read_text(encoding="utf-8")
    marked = [unescape(formula) for formula in re.findall(r'class="arithmatex">(.*?)</(?:div|span)>', html, re.S)]
    assert [f.strip()[2:-2].strip() for f in marked if f.strip().startswith(r"\[")] == displayed
    assert [f[2:-2] for f in marked if f.startswith(r"\(")] == inline


# --- what stops the build --------------------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one page and the site's own files."""
    docs = tmp_path / "docs"
    (docs / "theme").mkdir(parents=True)
    for file in (DOCS / "theme").iterdir():
        (docs / "theme" / file.name).write_bytes(file.read_bytes())
    config = re.sub(
        r"^nav = \[.*?^\]", 'nav = [{ "Start" = "index.md" }]', (DOCS / "zensical.toml").read_text(), flags=re.M | re.S
    )
    (docs / "zensical.toml").write_text(config)
    monkeypatch.setattr(website, "ROOT", tmp_path)
    monkeypatch.setattr(website, "DOCS", docs)
    monkeypatch.setattr(website, "API", {})
    return docs


def test_a_file_beside_docs_becomes_a_page_and_links_follow(small: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "run.py").write_text("print(1)  # [no link](nowhere.md)\n")
    (tmp_path / "README.md").write_text("# Readme\n\n[back](docs/index.md#start), [script](examples/run.py)\n")
    (small / "index.md").write_text("# Start\n\nSee [the readme](../README.md#readme) and `[code](nowhere.md)`.\n")
    website.make(tmp_path / "out")
    built = tmp_path / "out" / "site"
    assert 'href="repository/index.html#readme"' in (built / "index.html").read_text()
    readme = body((built / "repository" / "index.html").read_text())
    assert 'href="../index.html#start"' in readme
    assert 'href="examples/run.py.html"' in readme
    assert "nowhere.md" in body((built / "repository" / "examples" / "run.py.html").read_text())


def test_a_link_to_a_file_that_is_not_there_stops_the_build(small: Path, tmp_path: Path) -> None:
    (small / "index.md").write_text("# Start\n\n[gone](gone.md)\n")
    with pytest.raises(SystemExit, match=r"docs/index\.md links to gone\.md, which does not exist"):
        website.make(tmp_path / "out")


@pytest.mark.parametrize("wrong", ["[x]: gone.md\n\n[a][x]", "::: grouprl.nothing_of_the_kind"])
def test_a_warning_of_the_generator_stops_the_build(wrong: str, small: Path, tmp_path: Path) -> None:
    (small / "index.md").write_text(f"# Start\n\n{wrong}\n")
    with pytest.raises(SystemExit, match="the site was not built without a warning"):
        website.make(tmp_path / "out")
