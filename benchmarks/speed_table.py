"""Renders what envs_speed.py measured as Markdown; reads nothing but its JSON."""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from measuring import GREEDY_EPISODES, SOLVED, TRAINING_EPISODES

Run = dict[str, Any]
PARTS = ("time_collect", "time_advantages", "time_update")
OWN_ENVS = {"sb3": 8, "rejax": 5}  # environments of a peer's own settings
COMPARED = (
    ("SB3 PPO, equal work at 256 environments", "grouprl-256", "sb3-256-*"),
    ("SB3 PPO with RL-Zoo settings (not equal work: grouprl at 256 environments)", "grouprl-256", "sb3-zoo-*"),
    ("SBX PPO, equal work at 256 environments", "grouprl-256", "sbx-256"),
    ("rejax PPO, equal work at 256 environments", "grouprl-256", "rejax-256"),
    ("rejax PPO, equal work at 4096 environments", "grouprl-4096", "rejax-4096"),
    ("itself with a user's own network at 256 environments", "grouprl-256", "grouprl-own-network-256"),
    ("itself with a user's own network at 4096 environments", "grouprl-4096", "grouprl-own-network-4096"),
)


def spread(values: Sequence[float], digits: str) -> str:
    """Median and range; what was never reached counts as infinitely late."""

    def show(value: float) -> str:
        return "not reached" if math.isinf(value) else format(value, digits)

    if len(set(values)) == 1:
        return show(values[0])
    return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"


def median_of(runs: Sequence[Run], name: str, digits: str) -> str:
    """The median of a measured quantity, or nothing where it was not measured."""
    values = [run[name] for run in runs if name in run]
    return format(statistics.median(values), digits) if values else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)) + "\n"


def throughput_table(data: dict[str, Any], names: Sequence[str]) -> str:
    """env-steps/s, where the time goes, and memory."""
    rows = []
    for name in names:
        case, runs = data["cases"][name], data["runs"][name]
        share = ""
        if PARTS[0] in runs[0]:
            parts = [statistics.median(run[part] / run["timed_seconds"] for run in runs) for part in PARTS]
            share = " / ".join(f"{part:.0%}" for part in parts)
        rows.append(
            [
                case["label"],
                str(case["arguments"].get("n_envs", OWN_ENVS.get(case["worker"]))),
                spread([run["steps_per_second"] for run in runs], ",.0f"),
                share,
                median_of(runs, "peak_rss_mb", ",.0f"),
                median_of(runs, "compile_seconds", ".1f"),
                str(len(runs)),
            ]
        )
    rate, split = "env-steps/s: median (range)", "collection / advantages / update"
    return table(["trainer", "envs", rate, split, "peak RSS MB", "compile s", "runs"], rows)


def solve_table(data: dict[str, Any], names: Sequence[str], criterion: str) -> str:
    """Steps and seconds to the first update at which ``criterion`` was met."""
    rows = []
    for name in names:
        runs = data["runs"][name]
        values: dict[str, list[float]] = defaultdict(list)
        for run in runs:
            hit = run["hits"].get(criterion, {})
            compiling = run["compile_seconds"] if run.get("compile_in_clock") else 0.0
            values["seconds"].append(hit.get("seconds", math.inf) - compiling)
            for quantity in ("steps", "process_seconds"):
                values[quantity].append(hit.get(quantity, math.inf))
        rows.append(
            [
                data["cases"][name]["label"],
                f"{sum(criterion in run['hits'] for run in runs)} of {len(runs)}",
                spread(values["steps"], ",.0f"),
                spread(values["seconds"], ".2f"),
                median_of(runs, "compile_seconds", ".1f"),
                spread(values["process_seconds"], ".1f"),
            ]
        )
    steps, seconds = "env-steps: median (range)", "training s: median (range)"
    return table(["trainer", "seeds solved", steps, seconds, "compile s", "s since launch: median (range)"], rows)


def ratios(data: dict[str, Any]) -> str:
    """grouprl's env-steps/s over those of each peer at its best number of threads."""

    def rate(pattern: str) -> float:
        found = [runs for name, runs in data["runs"].items() if runs and fnmatch.fnmatch(name, f"throughput/{pattern}")]
        return max((statistics.median(run["steps_per_second"] for run in runs) for runs in found), default=math.nan)

    lines = [(label, rate(ours) / rate(theirs)) for label, ours, theirs in COMPARED]
    return "".join(f"- grouprl over {label}: {ratio:.2f}\n" for label, ratio in lines if not math.isnan(ratio))


def render(data: dict[str, Any]) -> str:
    """The Markdown report of what was measured."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, case in data["cases"].items():
        if data["runs"][name]:
            names[case["kind"]].append(name)
    where = data["machine"]
    loads = [run["load_before"] for runs in data["runs"].values() for run in runs]
    packages = [f"{worker} ran on {', '.join(map(' '.join, v.items()))}" for worker, v in data["versions"].items()]
    text = (
        f"# Speed on CartPole-v1\n\n{where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB, "
        f"{where['system']}; started {data['started']}, took {data['total_seconds'] / 60:.0f} minutes: "
        f"`{data['command']}`.  \n"
        f"1-minute load average just before a run: median {statistics.median(loads):.1f}, highest {max(loads):.1f} "
        f"(about 1 is this benchmark's own).  \n{'; '.join(packages)}.  \n"
        "How this is measured, and what to keep in mind: [../README.md](../README.md#speed).\n"
    )
    if names["throughput"]:
        text += (
            "\n## Throughput of the whole trainer\n\n64x64 tanh; unless a peer's own settings are named: 128 steps per "
            "environment, 4 epochs of 4 minibatches. Collection, advantages and update together; two updates are "
            f"left out as burn-in.\n\n{throughput_table(data, names['throughput'])}\n"
            f"Ratios of the medians, each peer at its best number of threads:\n\n{ratios(data)}"
        )
    if names["solve"]:
        text += (
            f"\n## Time to solve\n\nFirst update after which {GREEDY_EPISODES} greedy episodes return {SOLVED:.0f} or "
            "more on average. Evaluating is left out of all seconds, compiling out of training s:\n\n"
            f"{solve_table(data, names['solve'], 'greedy')}\nFirst update after which the last {TRAINING_EPISODES} "
            f"*training* episodes return {SOLVED:.0f} or more on average:\n\n"
            + solve_table(data, names["solve"], "training")
        )
    if names["command"]:
        runs = data["runs"][names["command"][0]]
        seconds, memory = ([run[name] for run in runs] for name in ("wall_seconds", "peak_rss_mb"))
        text += (
            f"\n## The whole command\n\n`{data['cases'][names['command'][0]]['label']}`, launch to exit, with its "
            f"evaluations, logs, plots and video: {spread(seconds, '.1f')} s; peak RSS {spread(memory, ',.0f')} MB; "
            f"{len(runs)} seeds.\n"
        )
    return text
