"""report.html: one page that says what a run was, how it went, what is wrong with it, and where the rest is."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grouprl.doctor.charts import chart
from grouprl.doctor.examine import examine, goal_of, is_language
from grouprl.doctor.table import Diagnosis
from grouprl.runs.files import write_text
from grouprl.runs.folder import RunFolder
from grouprl.runs.metrics import read_metrics
from grouprl.runs.pages import fill
from grouprl.runs.wording import Wording, wording

if TYPE_CHECKING:
    from grouprl.doctor.table import Array

_CURVES = {
    False: (
        ("Return", "line: training, sampled actions; dots: evaluation, greedy", "return_mean", "eval_return"),
        ("Episode length", "steps, mean of the last episodes", "length_mean", None),
        ("Entropy of the policy", "nats; how much choice is left", "policy_entropy", None),
        ("Standard deviation of actions", "mean over dimensions", "policy_std", None),
        ("KL of old and new policy", "nats, per update", "approx_kl", None),
        ("Clipped", "share of steps outside the clip", "clip_fraction", None),
        ("Explained variance", "of the returns, by the baseline", "explained_variance", None),
        ("Groups without signal", "share of groups with equal returns", "degenerate_groups", None),
        ("Learning rate", "", "learning_rate", None),
        ("Gradient norm", "before it is clipped", "grad_norm", None),
        ("Speed", "steps per second", "steps_per_second", None),
        ("Memory", "GB held by the process", "memory_gb", None),
    ),
    True: (
        ("Reward", "line: training, sampled; dots: {held_out}, greedy", "reward", "eval_reward"),
        ("{Success} on {held_out}", "greedy", "eval_accuracy", None),
        ("Groups without signal", "share of groups with equal rewards", "frac_reward_zero_std", None),
        ("Copies", "share of completions equal to another of their group", "frac_duplicates", None),
        ("Completion length", "tokens, mean", "completions/mean_length", None),
        ("Cut off", "share of completions cut at the longest length", "completions/clipped_ratio", None),
        ("Reward and length", "their correlation within groups", "length_reward_correlation", None),
        ("Entropy", "nats a token", "entropy", None),
        ("KL from the reference", "nats a token", "kl", None),
        ("Clipped", "share of tokens outside the clip", "clip_ratio/region_mean", None),
        ("Gradient norm", "before it is clipped", "grad_norm", None),
        ("Learning rate", "", "learning_rate", None),
        ("Seconds a step", "", "step_time", None),
        ("Memory", "GB held by the process", "memory_gb", None),
    ),
}
"""For each arena: name, explanation, column of the line, column of the dots."""

_FILES = (
    ("episodes.html", "episodes of training, side by side"),
    ("transcripts.html", "what the model wrote, and what it got for it"),
    ("episode.mp4", "a greedy episode as a video"),
    ("curve.png", "the learning curve"),
    ("metrics.csv", "all numbers"),
    ("config.yaml", "all settings"),
    ("summary.json", "the result, for programs"),
)


def write_report(path: str | os.PathLike[str], defaults: Mapping[str, Any] | None = None) -> Path:
    """Write report.html into the run folder ``path``, of a finished run or another, and return where it is.

    Args:
        defaults: of the settings; those that differ are shown first.

    Raises UsageError if there is no run or it has no metrics yet, TrainingError if the disk is full.
    """
    folder = RunFolder.open(path)
    config, metrics, diagnoses = folder.read_config(), read_metrics(folder.metrics_path), examine(path)
    language, words = is_language(config), wording(config)
    summary = folder.read_summary()
    subject = str(config.get("task" if language else "env_id"))
    page = fill(
        "report.html",
        f"{subject}: {folder.path.name}",
        {
            "ABOUT": _text(_about(config, metrics, finished=bool(summary))),
            "LINKS": _links(folder.path),
            "DOCTOR": _doctor(diagnoses),
            "RESULT": _result(summary, metrics, language, words),
            "CHARTS": "".join(_charts(metrics, language, goal_of(folder), words)),
            "SETTINGS": _settings(config, defaults or {}),
        },
    )
    write_text(folder.report_page, page)
    return folder.report_page


def _about(config: Mapping[str, Any], metrics: Mapping[str, Array], *, finished: bool) -> str:
    recipe = config.get("recipe") or {}
    made_by = config.get("preset") or (recipe.get("name") if isinstance(recipe, Mapping) else None)
    steps = metrics["step"][-1] if "step" in metrics else float("nan")
    parts = [
        f"preset {made_by}" if made_by else "the robust default",
        f"seed {config.get('seed')}",
        f"{steps:,.0f} steps",
    ]
    return "  ·  ".join([*parts, *([] if finished else ["not finished"]), f"grouprl {config.get('grouprl')}"])


def _links(folder: Path) -> str:
    items = [f'<li><a href="{name}">{name}</a> {_text(what)}</li>' for name, what in _FILES if (folder / name).exists()]
    return f'<ul class="links soft">{"".join(items)}</ul>'


def _doctor(diagnoses: Sequence[Diagnosis]) -> str:
    if not diagnoses:
        return '<p class="well">No rule found anything wrong. The run may still be worse than it could be.</p>'
    return "".join(
        f'<div class="one{"" if one.ill else " note-only"}"><p><b>{_text(one.name)}</b></p>'
        f"<p>{_text(one.finding)}.</p><p><b>Try:</b> {_text(one.advice)}</p></div>"
        for one in diagnoses
    )


def _result(summary: Mapping[str, Any], metrics: Mapping[str, Array], language: bool, words: Wording) -> str:
    facts: list[tuple[str, str]] = []
    if not summary:
        return '<p class="soft">The run has left no summary: it goes on, or was interrupted.</p>'
    if language:
        facts += [
            (words("{success}, greedy, before"), _number(summary.get("accuracy_before"))),
            ("after", _number(summary.get("accuracy_after"))),
            ("greedy reward before", _number(summary.get("reward_before"))),
            ("after", _number(summary.get("reward_after"))),
            ("tokens per second", _number(summary.get("tokens_per_second"))),
        ]
    else:
        final = summary.get("eval")
        final = final if isinstance(final, Mapping) else {}
        spread = f"{_number(final.get('mean_return'))} ± {_number(final.get('std_return'))}"
        episodes = _number(final.get("episodes"))
        facts += [
            (f"greedy return, {episodes} episodes, ± their deviation", spread),
            ("lowest, highest", f"{_number(final.get('min'))}, {_number(final.get('max'))}"),
        ]
        sampled = metrics.get("return_mean")
        if sampled is not None:
            facts.append(("sampled return at the end", _number(sampled[-1])))
        solved = summary.get("solved_at_steps")
        if summary.get("reward_threshold") is not None:
            goal = _number(summary["reward_threshold"])
            facts.append((f"solved (at {goal}) after", "not solved" if solved is None else f"{_number(solved)} steps"))
        facts.append(("steps per second", _number(summary.get("steps_per_second"))))
    facts.append(("seconds of training", _number(summary.get("train_seconds"))))
    return (
        '<dl class="facts">' + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) + "</dl>"
    )


def _charts(metrics: Mapping[str, Array], language: bool, goal: float | None, words: Wording) -> list[str]:
    import numpy as np

    steps = metrics.get("step")
    if steps is None:
        return []
    drawn = []
    for name, about, line, dots in _CURVES[language]:
        values = metrics.get(line)
        if values is None or np.unique(values[np.isfinite(values)]).size < 2:
            continue
        threshold = goal if dots == "eval_return" else None
        about = words(about)
        note = f"{about}; dashed: solved at {threshold:g}" if threshold is not None else about
        drawn.append(chart(words(name), note, steps, values, metrics.get(dots) if dots else None, threshold))
    return drawn


def _settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    settings = config.get("config")
    if not isinstance(settings, Mapping):
        return ""
    differ = {k: v for k, v in settings.items() if k in defaults and _plain(defaults[k]) != _plain(v)}
    rest = {k: v for k, v in settings.items() if k not in differ}
    head = "<p class='soft'>All settings are at their defaults.</p>" if defaults and not differ else ""
    changed = _rows(differ, defaults) if differ else ""
    return f"{head}{changed}<details><summary>The other {len(rest)} settings</summary>{_rows(rest, {})}</details>"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _rows(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    head = (
        "<tr><th>setting</th><th>value</th><th>default</th></tr>"
        if defaults
        else "<tr><th>setting</th><th>value</th></tr>"
    )
    rows = []
    for name, value in settings.items():
        default = f"<td class='soft'>{_value(defaults[name])}</td>" if name in defaults else ""
        rows.append(f"<tr><td><code>{_text(name)}</code></td><td>{_value(value)}</td>{default}</tr>")
    return f"<table>{head}{''.join(rows)}</table>"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False, default=str)
    return f"<code>{_text(text)}</code>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_LARGEST = 1e18
"""The largest number in size that says anything; a damaged summary may have infinity, or one that no float holds."""


def _number(value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value or abs(value) > _LARGEST:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"
