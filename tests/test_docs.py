"""The documentation: generated pages are current, code in it runs, commands in it parse, links in it lead somewhere."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import shlex
import sys
import textwrap
from contextlib import redirect_stdout
from html import unescape
from pathlib import Path
from typing import Any, get_args

import cmarkgfm
import pytest
import typer

from grouprl import GRPO, cli, objective
from grouprl.bench import plan
from grouprl.bench.worker import run_environment
from grouprl.envs import training
from grouprl.envs.config import GRPOConfig
from grouprl.envs.run_settings import RunSettings
from grouprl.lm import GRPOConfig as LanguageConfig
from grouprl.lm import GRPOTrainer
from grouprl.lm.models.tiny import build_tiny
from grouprl.lm.run import recipe
from grouprl.lm.run import training as lm_training
from grouprl.lm.settings.batch_plan import batch_plan
from grouprl.lm.settings.trl import FOREIGN, RENAMED
from grouprl.runs import read_metrics
from grouprl.settings.names import OneOf
from programs import docs_program

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST = 2_000
"""Steps that `learn` is cut to here: that code runs is tested, not what it learns."""

FENCE = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?^ *```(?P<kind>\w+)\n(?P<code>.*?)^ *```$", re.M | re.S)


build = docs_program("build")


def short(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learn = GRPO.learn

    def cut(self: GRPO, total_timesteps: int, *args: Any, **kwargs: Any) -> GRPO:
        return learn(self, min(total_timesteps, LONGEST), *args, **kwargs)

    make = GRPOTrainer.__init__

    def small(
        self: GRPOTrainer, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        # Whatever model a page names, its code is run on the tiny one, which has room for 64 characters.
        assert isinstance(model, str)
        model, kwargs["processing_class"] = build_tiny(0)
        config = LanguageConfig() if args is None else args
        config = config.replace(max_steps=1, max_completion_length=min(config.max_completion_length, 4), report_to=())
        if "environment_factory" in kwargs:
            config = config.replace(history="turn", max_turns=1)  # two turns have more characters
        make(self, model, reward_funcs, config, *rest, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "__init__", small)
    monkeypatch.setattr(GRPO, "learn", cut)
    monkeypatch.chdir(tmp_path)


# --- what is generated -----------------------------------------------------------------------------------------------
def test_the_generated_pages_are_what_build_writes_now() -> None:
    stale = [
        short(page)
        for page, text in build.pages().items()
        if not page.exists() or page.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"out of date: {', '.join(stale)}; run: make docs"


RESULTS = """# Title

Intro with a [link](../README.md#speed).

## One

a table

## Two

### Inner

another [link](https://example.org/x.md)
"""


def fill(tmp_path: Path, block: str, page: Path = build.ROOT / "docs" / "page.md") -> str:
    tmp_path.joinpath("speed.md").write_text(RESULTS)
    text = f"# Page\n\n## Part\n\n<!-- generated: {block} -->\nold\n<!-- /generated -->\n\nafter\n"
    filled: str = build.refreshed(page, text, tmp_path)
    assert build.refreshed(page, filled, tmp_path) == filled  # a second time changes nothing
    assert filled.endswith("<!-- /generated -->\n\nafter\n")
    return filled


def test_a_results_file_goes_under_the_heading_of_its_block_and_its_links_still_lead_there(tmp_path: Path) -> None:
    filled = fill(tmp_path, "results speed")
    assert "old" not in filled
    assert "# Title" not in filled
    assert "\n### One\n\na table\n" in filled
    assert "\n#### Inner\n" in filled
    assert "https://example.org/x.md" in filled
    link = re.search(r"Intro with a \[link\]\((.*?)#speed\)", filled)
    assert link is not None
    assert (build.ROOT / "docs" / link[1]).resolve() == tmp_path.parent / "README.md"


def test_a_block_can_ask_for_some_sections_and_says_which_were_not_measured(tmp_path: Path) -> None:
    filled = fill(tmp_path, "results speed / Two / Three / intro")
    assert "a table" not in filled
    assert filled.index("### Two") < filled.index("*Three: not measured yet.*") < filled.index("Intro with")


def test_a_block_without_a_results_file_quotes_nothing(tmp_path: Path) -> None:
    assert "*Not measured yet. [benchmarks/README.md](../benchmarks/README.md)" in fill(tmp_path, "results learning")


def test_a_block_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="do not know how to generate 'result speed'"):
        fill(tmp_path, "result speed")


def test_the_reference_names_every_setting_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", build.settings_part(), re.M)
    assert rows == list(GRPOConfig.model_fields)


def test_the_reference_names_every_setting_of_language_models_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", build.lm_settings_part(), re.M)
    assert rows == list(LanguageConfig.model_fields)


def test_the_reference_says_what_becomes_of_every_setting_of_trl() -> None:
    names = (ROOT / "docs" / "trl-1.16-settings.txt").read_text(encoding="utf-8").split()
    part = build.trl_settings_part()
    assert [name for name in names if f"`{name}`" not in part] == []
    known = {*LanguageConfig.model_fields, *FOREIGN, *RENAMED}
    assert [name for name in names if name not in known] == []
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    if trl.__version__.startswith("1.16."):
        assert sorted(trl.GRPOConfig.__dataclass_fields__) == names


def test_the_reference_has_every_function_of_the_objective() -> None:
    part = build.python_part()
    part = part[part.index("### The objective") :]
    tables = [name for name in objective.__all__ if isinstance(getattr(objective, name), dict)]
    assert tables == ["DIVERGENCES", "ESTIMATORS", "LOSSES"]
    assert [name for name in tables if f"`{name}`" not in part] == []
    functions = [name for name in objective.__all__ if name not in tables]
    assert [name for name in functions if not re.search(rf"^(def|class) {name}\b", part, re.M)] == []


@pytest.mark.parametrize("name", ["ESTIMATORS", "LOSSES", "DIVERGENCES"])
def test_the_page_of_estimators_has_a_row_for_every_entry_of_the_objective(name: str) -> None:
    text = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
    block = text[text.index(f"<!-- generated: table {name} -->") :]
    block = block[: block.index("<!-- /generated -->")]
    _, *names = re.findall(r"^\| `(\w+)` \|", block, re.M)  # the first row is the header
    assert names == list(getattr(objective, name))


def test_a_table_the_objective_does_not_have_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no table 'LOSS'; ESTIMATORS, LOSSES and DIVERGENCES"):
        build.objective_table("LOSS")


# --- code ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/index.md", "docs/tutorial.md", "docs/environments.md", "docs/architecture.md",
     "docs/language-models.md", "docs/agents.md", "docs/agents-environments.md"],
)  # fmt: skip
@pytest.mark.usefixtures("short_training")
def test_the_code_of_a_page_runs_from_top_to_bottom(name: str) -> None:
    """Blocks share their names; a block of text right after one is what it prints."""
    text = (ROOT / name).read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "docs"}
    fences = list(FENCE.finditer(text))
    ran = 0
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence["kind"] != "python" or (fence["needs"] and importlib.util.find_spec(fence["needs"]) is None):
            continue
        ran += 1
        above = text[: fence.start("code")].count("\n")
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(
                compile("\n" * above + textwrap.dedent(fence["code"]), name, "exec", dont_inherit=True), names
            )  # the lines of a traceback are the page's
        if following and following["kind"] == "text" and not text[fence.end() : following.start()].strip():
            assert printed.getvalue() == following["code"], f"{name}, line {above + 1}"
    assert ran


def configurations() -> list[str]:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    return [fence["code"].strip() for fence in FENCE.finditer(text) if fence["kind"] == "python"]


@pytest.mark.parametrize("code", configurations(), ids=lambda code: re.sub(r"\W+", "_", code)[11:60])
def test_every_configuration_of_a_paper_can_be_made_and_describes_a_batch(code: str) -> None:
    config = eval(code, {"GRPOConfig": LanguageConfig})
    assert isinstance(config, LanguageConfig)
    assert batch_plan(config).prompts_per_generation >= 1


@pytest.mark.parametrize(
    "name",
    ["loss_type", "advantage", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation", "kl_in",
     "kl_estimator"],
)  # fmt: skip
def test_the_page_of_papers_shows_every_choice_of_the_objective(name: str) -> None:
    made = [eval(code, {"GRPOConfig": LanguageConfig}) for code in configurations()]
    field = LanguageConfig.model_fields[name]
    offered = next((limit.names for limit in field.metadata if isinstance(limit, OneOf)), get_args(field.annotation))
    assert {getattr(config, name) for config in made} == set(offered)


def test_the_recipes_in_the_pages_are_recipes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "language-models.md").read_text(encoding="utf-8")
    recipes = [fence["code"] for fence in FENCE.finditer(text) if fence["kind"] == "yaml"]
    assert recipes
    for number, code in enumerate(recipes):
        (tmp_path / f"{number}.yaml").write_text(code, encoding="utf-8")
        LanguageConfig(**recipe.load(tmp_path / f"{number}.yaml").config)


@pytest.mark.usefixtures("short_training")
def test_the_own_environment_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(ROOT / "examples" / "own_environment.py")
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path / "run")])
    runpy.run_path(script, run_name="__main__")
    assert "mean return" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()


def test_the_comparison_example_is_a_benchmark_whose_methods_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = plan.read(ROOT / "examples" / "compare_estimators.yaml", steps=300)
    plan.check(planned)
    own = planned.only(["median/*/0"]).cells[0]
    points: list[dict[str, Any]] = []
    small = {"episodes": 2, "point_episodes": 1, "settings": {"n_envs": 4, "collect": "segments", "n_steps": 25}}
    assert run_environment({**own.given(), **small}, points.append)["steps_done"] >= 300
    assert len(points) > 1


# --- commands --------------------------------------------------------------------------------------------------------
def command_lines() -> list[str]:
    blocks = [fence["code"] for page in PAGES for fence in FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [line for code in blocks for line in code.splitlines() if line.startswith("grouprl ")]


def parse(line: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    _, name, *arguments = shlex.split(line, comments=True)
    context = group.commands[name].make_context(name, arguments)
    assigned = cli.common.assigned(list(context.params.get("assignments") or []))
    if name == "train-lm":
        source = context.params["recipe"]
        own = recipe.Recipe(source, "tiny", "reverse") if source.endswith(".yaml") else recipe.load(source)
        LanguageConfig(**own.changed(assigned).config)
        return
    settings, run = cli.train._split(assigned)
    GRPOConfig(**settings)
    assert set(run) <= set(RunSettings.__dataclass_fields__)


def test_every_command_line_in_the_pages_is_one_the_command_line_takes() -> None:
    lines = command_lines()
    assert len(lines) > 10
    for line in lines:
        parse(line)


@pytest.mark.parametrize(
    "wrong",
    ["grouprl trian CartPole-v1", "grouprl train --stpes 3", "grouprl train X --set n_env=3", "grouprl train-lm tny",
     "grouprl train-lm tiny --set num_generation=4"],
)  # fmt: skip
def test_a_wrong_command_line_would_be_noticed(wrong: str) -> None:
    with pytest.raises(Exception, match=r"trian|stpes|n_env|tny|num_generation"):
        parse(wrong)


# --- links and lists -------------------------------------------------------------------------------------------------
def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: list[str] = []
    for _, heading in build.HEADING.findall(text):
        name = build.anchor(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading))
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_relative_links_lead_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, name = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{short(page)} links to {target}"
        if name:
            assert name in anchors(file), f"{short(page)} links to {target}: no such heading"


# --- prose -----------------------------------------------------------------------------------------------------------
WRITTEN = [page for page in PAGES if page.name not in ("reference.md", "lab-log.md")] + [ROOT / "benchmarks/README.md"]
"""The pages that people write; the reference is made from the code, the lab log is a record."""


def written(page: Path) -> str:
    """The page without its code and without what `docs/build.py` puts into it."""
    return FENCE.sub("", build.BLOCK.sub("", page.read_text(encoding="utf-8")))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 210


def test_no_table_row_stands_in_two_pages() -> None:
    pages: dict[str, set[str]] = {}
    for page in WRITTEN:
        for row in re.findall(r"^\| .{60,} \|$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
            pages.setdefault(row, set()).add(short(page))
    assert {row: where for row, where in pages.items() if len(where) > 1} == {}


@pytest.mark.parametrize("page", WRITTEN, ids=short)
def test_the_cells_of_tables_are_short(page: Path) -> None:
    """Longer explanations are lists. What a link leads to is not counted."""
    text = re.sub(r"\]\([^)\s]+\)", "]", written(page))
    cells = [cell.strip() for row in re.findall(r"^\|.*\|$", text, re.M) for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(cell) > 165] == []


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_formulas_render_on_github(page: Path) -> None:
    """GitHub's own parser of Markdown leaves every formula as it is written, and its MathJax knows every command."""
    text = page.read_text(encoding="utf-8")
    displayed, inline = formulas(text)
    html = cmarkgfm.github_flavored_markdown_to_html(text)
    rendered = [unescape(code) for code in re.findall(r'<pre lang="math"><code>(.*?)</code>', html, re.S)]
    assert rendered == displayed
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", html, flags=re.S)
    assert "$$" not in prose, "write a formula that stands alone as a block of ```math"
    assert [unescape(formula) for formula in re.findall(r"\$([^$\n]*)\$", prose)] == inline
    for formula in [*displayed, *inline]:
        assert formula.count("{") == formula.count("}"), formula
        assert not re.search(r"\\(operatorname|DeclareMathOperator|def|newcommand|label|ref)\b", formula), formula


def formulas(text: str) -> tuple[list[str], list[str]]:
    """The formulas of a page as they are written: those that stand alone, and those within the text."""
    displayed = [fence["code"] for fence in FENCE.finditer(text) if fence["kind"] == "math"]
    return displayed, re.findall(r"\$([^$\n]+)\$", re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


@pytest.mark.parametrize(
    "wrong", ["$$\na\n- b\n$$", "clip$(a,\\, b)$", "$A_{i}$ and $a *b* c$", "$x_a$ x $$ y $$", r"$\operatorname{E} x$"]
)
def test_a_formula_that_github_would_break_is_noticed(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(wrong)
    with pytest.raises(AssertionError):
        test_formulas_render_on_github(page)


# --- lists of the package --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", ["envs", "bench"])
def test_every_module_of_a_room_is_in_the_picture_of_the_package(room: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = text[text.index(f"| module of `{room}/`") :]
    modules = {path.name for path in (ROOT / "src" / "grouprl" / room).glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if not re.search(rf"[`/]{name}`", text)} == set()


def test_every_room_for_language_models_is_in_the_picture_of_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text = text[text.index("## Language models") :]
    rooms = {path.parent.name for path in (ROOT / "src" / "grouprl" / "lm").glob("*/__init__.py")}
    assert {name for name in rooms if f"`{name}/`" not in text} == set()


def test_every_column_of_the_metrics_of_language_models_is_explained(tmp_path: Path) -> None:
    lm_training.train(
        "tiny", tmp_path / "run", steps=2, track=("none",), progress_bar=False,
        settings={"warm_start": {"steps": 1}, "n_train": 8, "n_eval": 2, "prompts_per_step": 2, "beta": 0.01,
                  "max_completion_length": 4, "dynamic_sampling": True, "dynamic_sampling_max_batches": 2},
    )  # fmt: skip
    text = (ROOT / "docs" / "language-models.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([\w/]+)`", text[text.index("## Metrics") :]))
    columns = {name.replace("/reverse/", "/NAME/") for name in read_metrics(tmp_path / "run" / "metrics.csv")}
    assert "kl" in columns
    assert columns <= explained


def test_every_column_of_the_metrics_is_explained(tmp_path: Path) -> None:
    training.train(
        "CartPole-v1", tmp_path / "run", preset=None, steps=600, settings={"collect": "segments", "warmup_steps": 0},
        run={"video": False, "final_episodes": 1, "eval_episodes": 1, "track": ("none",)},
    )  # fmt: skip
    text = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", text[text.index("## Metrics") :]))
    assert set(read_metrics(tmp_path / "run" / "metrics.csv")) <= explained
