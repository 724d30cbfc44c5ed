"""The units of the course: pages in docs/course whose code is run, and which are notebooks too.

    python docs/units.py              # run every unit; write what it prints and draws into its page
    python docs/units.py 3-the-group  # only this one

A unit is a Markdown page. Its blocks of Python run from top to bottom and share their names. A block of text right
after one is what it prints; a picture right after that is the figure that the block leaves open. The notebook beside a
page is made from it (docs/build.py writes it): the same text and code, without what running it brings back.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

COURSE = Path(__file__).resolve().parent / "course"

CODE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?P<between>\n```text\n(?P<printed>.*?)^```\n)?"
    r"(?P<picture>\n!\[[^\]]*\]\((?P<file>[^)]+)\)\n)?",
    re.M | re.S,
)
SOLUTION = re.compile(r"^<details.*?^</details>\n", re.M | re.S)


class Result(NamedTuple):
    """What one block of code did."""

    block: re.Match[str]
    printed: str
    picture: bytes | None  # of the figure that it left open


def units() -> list[Path]:
    """The pages of the course in their order."""
    return sorted(COURSE.glob("[0-9]*.md"))


def run(page: Path, text: str) -> list[Result]:
    """Runs every block of Python of a page, solutions included, and says what each did."""
    names: dict[str, Any] = {"__name__": page.stem}
    results = []
    with _reader():
        for block in CODE.finditer(text):
            above = text[: block.start("code")].count("\n")
            printed = io.StringIO()
            with redirect_stdout(printed):
                # The lines of a traceback are the page's.
                exec(compile("\n" * above + textwrap.dedent(block["code"]), page.name, "exec"), names)
            results.append(Result(block, printed.getvalue(), _figure()))
    return results


@contextmanager
def _reader() -> Iterator[None]:
    """As a reader runs a notebook: in the folder of the course, and on one thread, so that a run can be repeated."""
    import matplotlib.pyplot as plt
    import torch

    folder, threads, path = Path.cwd(), torch.get_num_threads(), list(sys.path)
    with plt.rc_context({"svg.hashsalt": "unit"}):
        plt.switch_backend("agg")
        try:
            os.chdir(COURSE)
            sys.path.insert(0, str(COURSE))
            torch.set_num_threads(1)
            yield
        finally:
            os.chdir(folder)
            sys.path[:] = path
            torch.set_num_threads(threads)
            plt.close("all")


def _figure() -> bytes | None:
    """The open figure as a file; then none is open."""
    import matplotlib.pyplot as plt

    if not plt.get_fignums():
        return None
    if len(plt.get_fignums()) > 1:
        raise SystemExit("a block of code left several figures open: a page shows one for each block")
    file = io.BytesIO()
    plt.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close("all")
    return file.getvalue()


def notebook(text: str) -> str:
    """The notebook of a page, as text: its outputs are left out, and a solution stays hidden in one cell."""
    import jupytext
    import nbformat

    bare = CODE.sub(lambda block: f"```python\n{block['code']}```\n", text)
    whole = SOLUTION.sub(lambda part: f"<!-- #region -->\n{part[0]}<!-- #endregion -->\n", bare)
    made = jupytext.reads(whole, fmt="md")
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    made.nbformat, made.nbformat_minor = 4, 5
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def renew(page: Path) -> None:
    """Runs a unit, and writes what it prints and draws into its page."""
    text = page.read_text(encoding="utf-8")
    for block, printed, picture in reversed(run(page, text)):
        if (picture is None) != (block["file"] is None):
            line = text[: block.start()].count("\n") + 1
            raise SystemExit(
                f"{page.name}, line {line}: a block that draws is followed by its picture, and no other is"
            )
        if picture is not None:
            (page.parent / block["file"]).parent.mkdir(exist_ok=True)
            (page.parent / block["file"]).write_bytes(picture)
        between = f"\n```text\n{printed}```\n" if printed else ""
        text = (
            text[: block.start()]
            + f"```python\n{block['code']}```\n{between}{block['picture'] or ''}"
            + text[block.end() :]
        )
    page.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="units to run; all of them without a name")
    names = parser.parse_args(argv).names
    for page in units():
        if not names or page.stem in names:
            renew(page)
            print(f"ran {page.name}")


if __name__ == "__main__":
    main()
