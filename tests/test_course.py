"""The course: every unit runs, prints and draws what its page shows, and has the parts that a unit has."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from programs import docs_program

units = docs_program("units")
PAGES = units.units()


def name(page: Path) -> str:
    return page.stem


# --- the units -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_unit_prints_and_draws_what_its_page_shows(page: Path) -> None:
    """What it asserts on the way holds too: numbers that machines may compute differently are compared, not printed."""
    for block, printed, picture in units.run(page, page.read_text(encoding="utf-8")):
        code = block["code"].strip().splitlines()
        assert printed == (block["printed"] or ""), f"{page.name}: what {code[-1]} prints; run: python docs/units.py"
        assert (picture is None) == (block["file"] is None), f"{page.name}: the picture of {code[0]}"
        assert block["file"] is None or (page.parent / block["file"]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_unit_has_a_curve_a_picture_two_exercises_and_a_word_on_the_chapter(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert f"[This unit as a notebook]({page.stem}.ipynb)" in text
    assert len(re.findall(r"^!\[", text, re.M)) >= 2
    assert "\n## What the chapter gets wrong\n" in text
    exercises = text[text.index("\n## Exercises\n") :]
    assert re.findall(r"^\*\*(\d)\.\*\* ", exercises, re.M) == ["1", "2"]
    assert len(units.SOLUTION.findall(exercises)) == 2
    assert text.count("<details") == 2


def test_the_units_lead_from_one_to_the_next() -> None:
    overview = (units.COURSE / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\d\. \[.*?\]\((.*?)\)", overview, re.M) == [page.name for page in PAGES]
    for page, following in pairwise(PAGES):
        assert re.search(rf"next: \[.*?\]\({re.escape(following.name)}\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_notebook_of_a_unit_has_its_code_in_cells_without_outputs_and_hides_the_solutions(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    cells = json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    shown = [block["code"].strip() for block in units.CODE.finditer(units.SOLUTION.sub("", text))]
    assert [one.strip() for one in code] == shown
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    hidden = [cell for cell in cells if "<details" in "".join(cell["source"])]
    assert len(hidden) == 2
    assert all(cell["cell_type"] == "markdown" and "</details>" in "".join(cell["source"]) for cell in hidden)


# --- how a page is run -----------------------------------------------------------------------------------------------
PAGE = """# 0. A page

```python
print(1 + 1)
```

```text
3
```

```python
import matplotlib.pyplot as plt

plt.plot([1, 2])
```

![A line](images/line.svg)

<details markdown="1">
<summary>Solution</summary>

```python
print("hidden")
```

</details>
"""


def test_renewing_a_page_writes_what_it_prints_and_draws(tmp_path: Path) -> None:
    page = tmp_path / "0-page.md"
    page.write_text(PAGE)
    units.renew(page)
    text = page.read_text()
    assert text == PAGE.replace("\n3\n", "\n2\n").replace(
        'print("hidden")\n```\n', 'print("hidden")\n```\n\n```text\nhidden\n```\n'
    )
    first = (tmp_path / "images" / "line.svg").read_bytes()
    assert b"<svg" in first
    units.renew(page)
    assert page.read_text() == text
    assert (tmp_path / "images" / "line.svg").read_bytes() == first


@pytest.mark.parametrize("without", ["plt.plot([1, 2])", "![A line](images/line.svg)\n"])
def test_a_picture_without_a_figure_and_a_figure_without_a_picture_are_errors(without: str, tmp_path: Path) -> None:
    wrong = PAGE.replace(without, "")
    page = tmp_path / "0-page.md"
    page.write_text(wrong)
    with pytest.raises(SystemExit, match="a block that draws is followed by its picture"):
        units.renew(page)
    assert page.read_text() == wrong
