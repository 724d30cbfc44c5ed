"""Writes what is generated in the documentation.

    python docs/build.py           # write
    python docs/build.py --check   # name the pages that are out of date, write nothing

docs/reference.md is made from the code: settings, presets, recipes, commands, signatures and docstrings. The notebooks
of docs/course are made from its pages (docs/units.py). In the other pages the text between `<!-- generated: NAME -->`
and `<!-- /generated -->` is replaced. NAME is one of

    results FILE                     benchmarks/results/FILE.md
    results FILE / SECTION / ...     only these sections of it; "intro" is what stands before the first one
    presets NAME NAME ...            a table of the settings in which presets differ from each other
    table NAME                       a table of grouprl.objective: ESTIMATORS, LOSSES or DIVERGENCES
    stable_baselines3 PART           what its names are called here: arguments or attributes
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import units  # noqa: E402 - docs/units.py, beside this file

RESULTS = ROOT / "benchmarks" / "results"
REFERENCE = ROOT / "docs" / "reference.md"
BLOCK = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- /generated -->)", re.S)
HEADING = re.compile(r"^(#+) (.*)$", re.M)
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


# --- marked blocks ---------------------------------------------------------------------------------------------------
def refreshed(page: Path, text: str, results: Path = RESULTS) -> str:
    """``text`` of ``page`` with every marked block made anew."""

    def fill(block: re.Match[str]) -> str:
        headings = HEADING.findall(text[: block.start()])
        level = len(headings[-1][0]) if headings else 0
        kind, _, arguments = block[2].partition(" ")
        if kind == "results":
            name, *sections = (part.strip() for part in arguments.split(" / "))
            body = measured(results / f"{name}.md", sections, page, level)
        elif kind == "presets":
            body = preset_differences(arguments.split())
        elif kind == "table":
            body = objective_table(arguments)
        elif kind == "stable_baselines3":
            body = names_of_stable_baselines(arguments)
        else:
            raise SystemExit(f"{page}: do not know how to generate {block[2]!r}; docs/build.py lists the kinds")
        return f"{block[1]}\n{body.strip()}\n\n{block[3]}"

    return BLOCK.sub(fill, text)


def measured(file: Path, sections: list[str], page: Path, level: int) -> str:
    """A results file as part of ``page``: under a heading of ``level``, its links leading where they led."""
    guide = os.path.relpath(ROOT / "benchmarks" / "README.md", page.parent)
    if not file.exists():
        return f"*Not measured yet. [benchmarks/README.md]({guide}) names the command that fills this in.*"
    text = re.sub(r"\A# .*\n+", "", file.read_text(encoding="utf-8"))
    intro, *rest = re.split(r"^(?=## )", text, flags=re.M)
    parts = {"intro": intro} | {part.partition("\n")[0].removeprefix("## ").strip(): part for part in rest}
    if sections:
        missing = "*{}: not measured yet.*\n\n"
        text = "".join(parts.get(section, missing.format(section)) for section in sections)
    text = HEADING.sub(lambda h: f"{'#' * (len(h[1]) - 1 + level)} {h[2]}", text)
    text = LINK.sub(lambda link: moved(link, file.parent, page.parent), text)
    whole = os.path.relpath(file, page.parent)
    return text + (f"\nThe whole report: [{whole}]({whole}).\n" if sections else "")


def moved(link: re.Match[str], old: Path, new: Path) -> str:
    """A relative link of a page in ``old`` as a page in ``new`` writes it; a label that is the path changes with it."""
    label, path, heading = link[1], link[2], link[3] or ""
    there = os.path.relpath((old / path).resolve(), new)
    return f"[{there if label == path else label}]({there}{heading})"


def preset_differences(names: list[str]) -> str:
    """A table of the settings in which the presets differ."""
    from grouprl.envs import presets
    from grouprl.envs.config import make_config

    chosen = [presets.load(name) for name in names]
    configs = [make_config(preset.config).model_dump(mode="json") for preset in chosen]
    rows = [["steps", *(f"{preset.total_timesteps:,}" for preset in chosen)]]
    for key in configs[0]:
        values = [config[key] for config in configs]
        if any(value != values[0] for value in values):
            rows.append([f"`{key}`", *map(shown, values)])
    return table(["", *(f"`{name}`" for name in names)], rows)


def objective_table(name: str) -> str:
    """One of the tables of :mod:`grouprl.objective`: what each name computes, which arena offers it, its source."""
    from grouprl import objective
    from grouprl.objective import divergences, estimators, losses

    def ticks(*columns: Collection[str]) -> Callable[[str], list[str]]:
        return lambda entry: ["yes" if entry in column else "" for column in columns]

    if name == "ESTIMATORS":
        entries = objective.ESTIMATORS
        arenas = [estimators.names(environments=True), estimators.names(environments=False)]
        whole, after = (
            [n for n, e in entries.items() if getattr(e, field)] for field in ("whole_samples", "standardised")
        )
        columns = ticks(*arenas, whole, after)
        rows = [[f"`{n}`", sentence(e.about), *columns(n), linked(e.source)] for n, e in entries.items()]
        extra = ["whole episodes", "scaled after"]
        return table(["`advantage`", "the advantage of a step", *ARENAS, *extra, "source"], rows)
    if name == "LOSSES":
        columns = ticks(losses.names(environments=True), losses.names(environments=False))
        rows = [[f"`{n}`", sentence(e.about), *columns(n), linked(e.source)] for n, e in objective.LOSSES.items()]
        return table(["`loss_type`", "the loss", *ARENAS, "source"], rows)
    if name == "DIVERGENCES":
        columns = ticks(objective.DIVERGENCES, divergences.SAMPLED_DIVERGENCES)
        rows = [[f"`{n}`", sentence(e.about), *columns(n)] for n, e in objective.DIVERGENCES.items()]
        return table(["`kl_estimator`", "what is penalised", *ARENAS], rows)
    raise SystemExit(f"grouprl.objective has no table {name!r}; ESTIMATORS, LOSSES and DIVERGENCES are there")


def names_of_stable_baselines(part: str) -> str:
    """A table of the names of Stable-Baselines3 that are others here, of arguments or of attributes."""
    from grouprl.envs.config import GRPOConfig
    from grouprl.envs.stable_baselines import ATTRIBUTES, ELSEWHERE, SAME_THING
    from grouprl.settings.names import ALIASES

    if part == "attributes":
        return table(["of a model", "here"], [[f"`{name}`", text] for name, text in ATTRIBUTES.items()])
    same = [[f"`{name}`", f"`{ALIASES[name]}`"] for name in SAME_THING if ALIASES[name] in GRPOConfig.model_fields]
    return table(["argument", "here"], [*same, *([f"`{name}`", text] for name, text in ELSEWHERE.items())])


ARENAS = ["environments", "language models"]


def sentence(text: str) -> str:
    """A description in a table's words: the divergence bars as the pages print them."""
    return text.replace("||", "‖")


def linked(source: str) -> str:
    """A source with its arXiv numbers as links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", source)


# --- the reference ---------------------------------------------------------------------------------------------------
def reference() -> str:
    """docs/reference.md."""
    parts = [
        "# Reference\n\nWritten by `make docs` from the code; changes belong there.\n",
        "Environments:\n\n- [Settings](#settings)\n- [Settings of a run](#settings-of-a-run)\n- [Presets](#presets)\n\n"
        "Language models:\n\n- [Settings of language models](#settings-of-language-models)\n- [Recipes](#recipes)\n\n"
        "Both:\n\n- [Commands](#commands)\n- [Python](#python)\n",
        settings_part(),
        run_settings_part(),
        presets_part(),
        lm_settings_part(),
        trl_settings_part(),
        recipes_part(),
        commands_part(),
        python_part(),
    ]
    return "\n".join(parts)


def settings_part() -> str:
    from grouprl.envs.config import GRPOConfig

    text = (
        "## Settings\n\nOf `GRPO(env, **settings)` and of `grouprl train --set KEY=VALUE`. The defaults are the "
        "*robust default*, meant for an environment nobody tuned; presets change some of them.\n"
    )
    return text + _settings_tables(GRPOConfig)


def lm_settings_part() -> str:
    from grouprl.lm.settings.fields import Fields

    return (
        "## Settings of language models\n\nOf `grouprl.lm.GRPOConfig(**settings)`, under `config:` in a recipe, and of "
        "`grouprl train-lm --set KEY=VALUE`. Names and meanings are TRL's where TRL has the setting; "
        "[language-models.md](language-models.md) says what they do together, [papers.md](papers.md) which of them "
        "make which paper.\n"
    ) + _settings_tables(Fields, "Language models: ")


def trl_settings_part() -> str:
    """What becomes of every field of TRL's GRPOConfig, those that are settings here first."""
    from grouprl.lm.settings.fields import Fields
    from grouprl.lm.settings.trl import FOREIGN, RENAMED

    names = (ROOT / "docs" / "trl-1.16-settings.txt").read_text(encoding="utf-8").split()
    own = [name for name in names if name in Fields.model_fields]
    rows = [[f"`{name}`", f"is `{RENAMED[name]}`"] for name in names if name in RENAMED and name not in own]
    for name in (name for name in names if name not in own and name not in RENAMED):
        option = FOREIGN[name]
        off = " or ".join(f"`{value}`" for value in dict.fromkeys(map(str, (option.off, *option.also_off))))
        if not option.advice:
            fate = "accepted at any value, because it changes no number here"
        elif option.warned is None:
            fate = f"accepted, and left out with a warning: {option.advice}"
        else:
            fate = f"accepted at {off}, else refused: {option.advice}"
            if option.warned:
                fate += f"; left out with a warning: {', '.join(f'`{value}`' for value in option.warned)}"
        rows.append([f"`{name}`", fate])
    return (
        "## Settings of TRL\n\nEvery field of `GRPOConfig` in TRL 1.16. These work as settings of the same name: "
        + ", ".join(f"`{name}`" for name in own)
        + ".\n\nThe others:\n\n"
        + table(["field", "what becomes of it"], rows)
    )


def _settings_tables(config: type[BaseModel], before: str = "") -> str:
    """A table for each section of a configuration; ``before`` is what its heading begins with."""
    from grouprl.settings.describe import allowed, sections

    text = ""
    for title, names in sections(config).items():
        rows = []
        for name in names:
            field = config.model_fields[name]
            rows.append([f"`{name}`", shown(field.get_default()), allowed(field, "`"), field.description or ""])
        heading = before + title
        text += (
            f"\n### {heading[0].upper()}{heading[1:]}\n\n{table(['setting', 'default', 'allowed', 'meaning'], rows)}"
        )
    return text


def run_settings_part() -> str:
    return (
        "## Settings of a run\n\nAlso set with `--set` (or by options of `grouprl train`). They change nothing of the "
        "algorithm, but a scheduled checkpoint may begin fresh episodes ([why](architecture.md#exact-resume)). Without "
        "a preset that says otherwise a run has 500,000 steps, 20 evaluations and 10 checkpoints.\n\n"
        + definition("grouprl.envs.run_settings", "RunSettings")
    )


def presets_part() -> str:
    from grouprl.envs import presets

    loaded = [presets.load(name) for name in presets.names()]
    rows = [
        [
            f"[{p.name}](#preset-{anchor(p.name)})",
            p.env_id,
            f"{p.total_timesteps:,}",
            p.needs or "",
            shown(p.expect["mean_return"]) if "mean_return" in p.expect else "",
        ]
        for p in loaded
    ]
    text = (
        "## Presets\n\n`grouprl train ENV` takes the preset named like the environment; `--preset NAME` takes any; "
        "`--preset default` takes none. *Needs* is the extra to install, as in `pip install 'grouprl[box2d]'`.\n\n"
        + table(["preset", "environment", "steps", "needs", "greedy mean return to expect"], rows)
    )
    for p in loaded:
        text += f"\n### Preset {p.name}\n\n{p.about}\n"
        for title, values in (("environment", p.env_kwargs), ("settings", p.config), ("expect", p.expect)):
            if values:
                dumped = yaml.safe_dump({title: values}, sort_keys=False, allow_unicode=True, width=110)
                text += f"\n```yaml\n{dumped}```\n"
    return text


def recipes_part() -> str:
    from grouprl.lm.run import recipe

    loaded = [recipe.load(name) for name in recipe.names()]
    text = (
        "## Recipes\n\nA run of `grouprl train-lm RECIPE`: one of these presets, or [a file]"
        "(language-models.md#recipes) of the same fields.\n\n"
        + definition("grouprl.lm.run.recipe", "Recipe", methods=False)
    )
    for r in loaded:
        values = {key: value for key, value in r.to_dict().items() if key not in ("name", "about", "expect")}
        dumped = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
        text += f"\n### Recipe {r.name}\n\n{r.about}\n\n```yaml\n{dumped}```\n"
        if r.expect:
            text += f"\n```yaml\n{yaml.safe_dump({'expect': r.expect}, sort_keys=False, width=110)}```\n"
    return text


def commands_part() -> str:
    import typer

    from grouprl import cli

    text = "## Commands\n\n`grouprl COMMAND --help` says the same in a terminal.\n"
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        about = inspect.getdoc(command.callback) or ""
        rows = []
        for param in command.params:
            flags = [f"`{flag}`" for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")]
            rows.append([", ".join(flags) or f"`{param.name.upper()}`", param.help or ""])
        text += f"\n### grouprl {name}\n\n{about.partition(chr(10))[0]}\n"
        text += "\n" + table(["argument", "meaning"], rows) if rows else ""
    return text


PYTHON = {
    "Environments": {
        "The agent": ("grouprl.envs.grpo", ["GRPO"]),
        "Evaluation": ("grouprl.envs.evaluation", ["evaluate", "Evaluation"]),
        "Callbacks": ("grouprl.envs.callbacks", ["Run", "Checkpoints", "Evaluations", "StopAtReturn", "Videos"]),
        "Runs": ("grouprl.envs.training", ["train", "resume"]),
        "What a run left": ("grouprl.envs.recorder", ["RunResult"]),
        "The doctor": ("grouprl.doctor.table", ["Diagnosis", "Table"]),
        "What it is asked": ("grouprl.doctor.examine", ["examine", "examine_table"]),
        "Errors": ("grouprl.errors", ["GrouprlError", "UsageError", "TrainingError"]),
        "Packed steps": ("grouprl.envs.rollout", ["Rollout"]),
    },
    "Language models": {
        "The trainer": ("grouprl.lm.train.trainer", ["GRPOTrainer"]),
        "Around training": ("grouprl.lm.train.trl_methods", ["ScriptMethods"]),
        "What training returns": ("grouprl.lm.train.loop", ["TrainOutput"]),
        "Batches": ("grouprl.lm.settings.batch_plan", ["BatchPlan", "batch_plan"]),
        "Models": ("grouprl.lm.models.load", ["load"]),
        "Tasks": ("grouprl.lm.tasks", ["names", "get"]),
        "Rows of a task": ("grouprl.lm.tasks.task", ["Task", "Example", "dataset"]),
        "Rows of a file": ("grouprl.lm.tasks.jsonl", ["load_jsonl"]),
        "Functions by name": ("grouprl.importing", ["load_function"]),
        "Rewards": ("grouprl.lm.rewards.builtin", None),
        "Rewards of mathematics": ("grouprl.lm.rewards.math", ["math_accuracy"]),
        "Runs by a recipe": ("grouprl.lm.run.training", ["train", "resume", "evaluate", "RunResult"]),
        "Transcripts": ("grouprl.runs.transcripts", ["Transcript", "read_transcripts", "write_html"]),
    },
}
"""What the Python part of the reference and the site show: a part, and under each title a module with names in it. None
stands for all of its public functions. The objective is a third part, in `OBJECTIVE_PARTS`."""

OBJECTIVE_PARTS = (
    "loss", "losses", "estimators", "shaping", "advantages", "outcomes", "baseline", "pulled_baseline", "features",
    "level", "importance", "returns", "packed", "surrogates", "sequence", "correction", "divergences", "weights",
)  # fmt: skip


def python_modules(part: str) -> dict[str, tuple[str, list[str]]]:
    """Title, module and names of one part: of `PYTHON`, or "The objective"."""
    from grouprl import objective

    if part != "The objective":
        return {title: (module, names or _public(module)) for title, (module, names) in PYTHON[part].items()}
    modules = {name: f"grouprl.objective.{name}" for name in OBJECTIVE_PARTS}
    shown = {t: (m, [name for name in _definitions(m) if name in objective.__all__]) for t, m in modules.items()}
    return {title: entry for title, entry in shown.items() if entry[1]}


def python_part() -> str:
    text = "## Python\n\n`from grouprl import GRPO, GRPOConfig, evaluate, GrouprlError, UsageError, TrainingError`\n"
    text += python_definitions("Environments", "###")
    text += "\n### Language models\n\n`from grouprl.lm import GRPOConfig, GRPOTrainer`\n"
    text += python_definitions("Language models", "####")
    text += "\n### The objective\n\n`grouprl.objective`: pure functions on packed tensors; each imports from there.\n"
    text += "What a configuration can name stands in three tables, `ESTIMATORS`, `LOSSES` and `DIVERGENCES`: "
    text += "[estimators.md](estimators.md).\n"
    return text + python_definitions("The objective", "####")


def python_definitions(part: str, level: str) -> str:
    """A heading for each title of a part, with its module where that is news, and the definitions."""
    text = ""
    for title, (module, names) in python_modules(part).items():
        where = "" if part == "The objective" else f"`{module}`\n\n"
        text += f"\n{level} {title}\n\n{where}" + "\n".join(definition(module, name) for name in names)
    return text


# --- from source to text ---------------------------------------------------------------------------------------------
def _definitions(module: str) -> dict[str, ast.stmt]:
    """Functions and classes of a module by name, in the order of its source."""
    tree = ast.parse(inspect.getsource(import_module(module)))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _public(module: str) -> list[str]:
    return [name for name in _definitions(module) if not name.startswith("_")]


def definition(module: str, name: str, *, methods: bool = True) -> str:
    """Signature and docstring of a function; those of the public methods, and the fields, of a class."""
    lines = inspect.getsource(import_module(module)).splitlines()

    def head(node: ast.FunctionDef | ast.ClassDef) -> str:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        documented = ast.get_docstring(node) is not None
        last = (node.body[0].end_lineno or 0) if documented else node.body[0].lineno - 1
        return "\n".join(lines[first - 1 : last])

    node = _definitions(module)[name]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    parts = [head(node)]
    if isinstance(node, ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        if fields:
            parts.append("\n".join("\n".join(lines[item.lineno - 1 : item.end_lineno]) for item in fields))
        own = [item for item in node.body if isinstance(item, ast.FunctionDef)] if methods else []
        parts += [head(item) for item in own if item.name == "__init__" or item.name[0] != "_"]
    return "```python\n" + textwrap.dedent("\n\n".join(parts)) + "\n```\n"


def shown(value: Any) -> str:
    """A default or a setting as a reader would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:.6g}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def anchor(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- all pages -------------------------------------------------------------------------------------------------------
def pages() -> dict[Path, str]:
    """Every page with generated parts, and what it should read."""
    made: dict[Path, str] = {REFERENCE: reference()}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page != REFERENCE:
            made[page] = refreshed(page, page.read_text(encoding="utf-8"))
    for page in units.units():
        made[page.with_suffix(".ipynb")] = units.notebook(page.read_text(encoding="utf-8"))
    return made


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args(argv).check
    stale = [page for page, text in pages().items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if not check:
            page.write_text(pages()[page], encoding="utf-8")
        say(f"{'out of date' if check else 'wrote'}: {page.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
