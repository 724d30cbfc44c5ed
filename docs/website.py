"""Builds the documentation site from the pages that people also read in the repository.

    python docs/website.py            # build/docs/site/index.html and the rest; a warning is an error
    python docs/website.py --serve    # build it, show it at http://localhost:8000

A page has one source, which a reader of the repository and a reader of the site both see. Before the generator
(zensical) reads the pages, they are laid out in a folder of their own:

- Pages of docs/ keep their place. Other files that a page links to, such as benchmarks/README.md or an example, become
  pages under repository/, and links follow.
- The Python part of reference.md becomes the pages under api/, which are made from docstrings.
- MathJax comes from a Python package, so that the site needs no network when it is read.

What the site looks like, and which page stands where in its navigation, is in docs/zensical.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import build  # docs/build.py, beside this file

ROOT = build.ROOT
DOCS = ROOT / "docs"
OUT = ROOT / "build" / "docs"
API = {"Environments": "environments", "Language models": "language-models", "The objective": "objective"}
"""The pages of docstrings: a part of `build.PYTHON`, or the objective, and the name of its page."""

LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```$|`[^`\n]*`)|\]\((?P<to>(?![a-z]+:|#)[^)\s#]+)(?P<heading>#[^)\s]*)?\)", re.M | re.S
)


# --- laying the pages out --------------------------------------------------------------------------------------------
def place(file: Path) -> Path:
    """Where a file of the repository stands among the sources of the site."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS)
    inside = Path("repository") / file.relative_to(ROOT)
    if file.is_dir():
        return inside / "index.md"
    return inside if file.suffix in (".md", ".png", ".svg") else inside.with_name(inside.name + ".md")


def lay_out(source: Path) -> None:
    """Writes every page, and every file that a page links to, into ``source``."""
    waiting = sorted(DOCS.rglob("*.md"))
    done = set(waiting)
    while waiting:
        file = waiting.pop()
        target = source / place(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix != ".md":
            shutil.copyfile(file, target)
            continue
        text, linked = moved(page(file), file)
        if file == build.REFERENCE:
            text = without_python(text)
        target.write_text(text, encoding="utf-8")
        waiting += [other for other in linked if other not in done]
        done |= linked
    for part, name in API.items():
        (source / "api").mkdir(exist_ok=True)
        (source / "api" / f"{name}.md").write_text(api_page(part), encoding="utf-8")


def page(file: Path) -> str:
    """A file of the repository as a page in Markdown."""
    if file.is_dir():
        inside = "\n".join(f"- [{other.name}]({file.name}/{other.name})" for other in sorted(file.glob("*.md")))
        return f"# {file.relative_to(ROOT)}\n\n{inside}\n"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    return f"# {file.relative_to(ROOT)}\n\n```{'python' if file.suffix == '.py' else 'text'}\n{text}```\n"


def moved(text: str, file: Path) -> tuple[str, set[Path]]:
    """``text`` of ``file`` with its links as they read from its new place, and the files that they lead to."""
    linked: set[Path] = set()
    here = file.parent
    start = place(file).parent

    def follow(link: re.Match[str]) -> str:
        if link["code"]:
            return link[0]
        other = (here / link["to"]).resolve()
        if not other.exists() or not other.is_relative_to(ROOT):
            raise SystemExit(f"{file.relative_to(ROOT)} links to {link['to']}, which does not exist")
        linked.add(other)
        return f"]({os.path.relpath(place(other), start)}{link['heading'] or ''})"

    return LINK.sub(follow, text), linked


def without_python(reference: str) -> str:
    """The reference, with links to the pages of docstrings in place of its Python part."""
    before, _, _ = reference.partition("\n## Python\n")
    pages = "\n".join(f"- [{part}](api/{name}.md)" for part, name in API.items())
    before += f"\n## Python\n\nClasses and functions, from their docstrings:\n\n{pages}\n"
    return before


def api_page(part: str) -> str:
    """The docstrings of one part of the package, for mkdocstrings."""
    text = f"# {part}\n"
    for title, (module, names) in build.python_modules(part).items():
        text += f"\n## {title[0].upper()}{title[1:]}\n\n`{module}`\n"
        text += "".join(f"\n::: {module}.{name}\n" for name in names)
    return text


# --- building --------------------------------------------------------------------------------------------------------
def make(out: Path = OUT) -> str:
    """Builds the site in ``out``/site and returns what the generator said; SystemExit where it warned of anything."""
    shutil.rmtree(out, ignore_errors=True)
    source = out / "source"
    lay_out(source)
    for name in ("site.css", "mathjax.js"):
        shutil.copyfile(DOCS / "theme" / name, source / name)
    shutil.copyfile(mathjax(), source / "tex-svg.js")
    config = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    (out / "zensical.toml").write_text(config.replace("@src@", str(ROOT / "src")), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(
        command,
        cwd=out,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "NO_COLOR": "1"},
    )
    said = re.sub(r"\x1b\[[0-9;]*m", "", built.stdout)
    if built.returncode or re.search(r"^(griffe|warning|error)\b", said, re.M | re.I):
        raise SystemExit(f"the site was not built without a warning:\n{said}")
    return said


def mathjax() -> Path:
    """MathJax in one file, as the package django-static-mathjax carries it; it is GitHub's renderer of formulas too."""
    found = importlib.util.find_spec("mathjax")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the site needs MathJax; run: pip install django-static-mathjax")
    return Path(found.submodule_search_locations[0]) / "static" / "mathjax" / "es5" / "tex-svg.js"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="show the site at http://localhost:PORT")
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args(argv)
    make()
    print(f"wrote {(OUT / 'site').relative_to(ROOT)}/index.html; its search needs a server: --serve")
    if asked.serve:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(OUT / "site"))
        with http.server.ThreadingHTTPServer(("localhost", asked.port), handler) as server:
            print(f"http://localhost:{asked.port} (Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


if __name__ == "__main__":
    main()
