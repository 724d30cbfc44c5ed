"""What grouprl reaches on each environment, over seeds. See README.md, "Learning".

    python benchmarks/envs_learning.py --seeds 0,1,2,3,4                 # every preset
    python benchmarks/envs_learning.py --env LunarLander-v3 --seeds 0,1  # one of them
    python benchmarks/envs_learning.py --default --seeds 0,1,2           # the same environments, untuned
    python benchmarks/envs_learning.py --ppo                             # Stable-Baselines3's PPO, the same budgets
    python benchmarks/envs_learning.py --env Hopper-v5 --set gamma=0.995 --out tried.jsonl   # an experiment
    python benchmarks/envs_learning.py --table                           # only render the table again

One line of results/envs_learning.jsonl per run; runs already there with the same configuration are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import measuring
import zoo_ppo

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "envs_learning.jsonl"
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
CURVE_POINTS, CURVE_EPISODES, FINAL_EPISODES = 20, 20, 100
RESAMPLES = 10_000

Run = dict[str, Any]

PUBLISHED = {  # environment without its version: what PPO reached elsewhere
    "CartPole": "500 @100k (Zoo), 490 @500k (CleanRL)",
    "Acrobot": "-73.5 @1M (Zoo), -86 @500k (CleanRL)",
    "MountainCar": "-110.4 @1M (Zoo)",
    "MountainCarContinuous": "88.3 @20k (Zoo)",
    "Pendulum": "-172 @100k (Zoo)",
    "LunarLander": "242 @1M (Zoo, v2)",
    "HalfCheetah": "5819 @1M (Zoo, v3), 1443 @1M (CleanRL, v4)",
    "Hopper": "2410 @1M (Zoo, v3), 2383 @1M (CleanRL, v4)",
    "Walker2d": "3479 @1M (Zoo, v3), 2288 @1M (CleanRL, v4)",
}
SOURCES = (
    "Published PPO: Zoo = RL Baselines3 Zoo's benchmark.md (github.com/DLR-RM/rl-baselines3-zoo; one run each, tuned "
    "settings for each environment); CleanRL = its PPO documentation (docs.cleanrl.dev; 3 seeds, one configuration per "
    "family, returns of the last training episodes)."
)


BESIDE = (
    "Both sides have the same environments and budgets, and settings tuned for them. grouprl has its presets as they "
    "ship. PPO (Stable-Baselines3) has RL-Zoo's settings, most of which were tuned for a longer budget. `better` is "
    "the share of all pairs of one seed of grouprl and one seed of PPO in which grouprl returns more; ties count half. "
    "With two or three seeds the interval is simply their range."
)
BESIDE_HEADER = ["environment", "steps", "grouprl: IQM [95 %]", "PPO: IQM [95 %]", "seeds", "better"]


def median_or_nan(values: list[float | None]) -> float:
    """Median of those known; seconds of a run that was paused are not."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else float("nan")


# --- one run ---------------------------------------------------------------------------------------------------------
def train(arguments: dict[str, Any]) -> Run:
    """Train and evaluate once, in this process."""
    from grouprl import GRPO, evaluate
    from grouprl.envs.evaluation import Evaluator
    from grouprl.envs.vector import reward_threshold

    env_id, env_kwargs, seed, budget = (arguments[key] for key in ("env_id", "env_kwargs", "seed", "budget"))
    agent = GRPO(env_id, preset=arguments["preset"], env_kwargs=env_kwargs, seed=seed, **arguments["settings"])
    evaluator = Evaluator(env_id, env_kwargs, n_envs=CURVE_EPISODES)
    every = max(1, budget // CURVE_POINTS)
    curve: list[tuple[int, float]] = []

    def after_update(agent: GRPO, metrics: dict[str, float]) -> None:
        if agent.num_timesteps >= (curve[-1][0] // every + 1 if curve else 1) * every:
            curve.append(
                (agent.num_timesteps, evaluator.run(agent, CURVE_EPISODES, seed=seed + 1).summary()["mean_return"])
            )

    agent.learn(budget, callback=after_update)
    evaluator.close()
    final = evaluate(agent, episodes=FINAL_EPISODES, seed=seed + 1000).summary()
    return {
        "steps": agent.num_timesteps,
        "train_seconds": agent.train_seconds,
        "mean": final["mean_return"],
        "std": final["std_return"],
        "min": final["min"],
        "max": final["max"],
        "episodes": final["episodes"],
        "curve": curve,
        "threshold": reward_threshold(env_id),
        "versions": measuring.versions("grouprl", "torch", "numpy", "gymnasium"),
    }


# --- which runs ------------------------------------------------------------------------------------------------------
def plan(names: list[str], seeds: list[int], steps: int | None, mode: str, settings: dict[str, Any]) -> list[Run]:
    """One entry per environment and seed, with the hash of all that decides its outcome but the seed.

    ``mode`` is preset, default (the robust default) or ppo (RL-Zoo's settings); ``settings`` win over a preset's.
    """
    from grouprl.envs import presets
    from grouprl.envs.config import make_config

    found = []
    default = mode == "default"
    for name in names:
        preset = presets.load(name) if name in presets.names() else None
        if preset is None and not (default and steps):
            raise SystemExit(
                f"no preset {name!r} (there are: {', '.join(presets.names())}); without one give --default --steps N"
            )
        budget = steps or (preset.total_timesteps if preset else 0)
        values = {**(preset.config if preset and not default else {}), **settings}
        what = {
            "env_id": preset.env_id if preset else name,
            "env_kwargs": preset.env_kwargs if preset else {},
            "budget": budget,
        }
        if mode == "ppo":
            decides = {**what, "ppo": zoo_ppo.SETTINGS[name]}
        else:
            decides = {**what, "config": make_config(values).model_dump(mode="json", exclude={"seed"})}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        for seed in seeds:
            found.append(
                {
                    "name": name,
                    "mode": mode,
                    "preset": None if default else name,
                    "settings": zoo_ppo.SETTINGS[name] if mode == "ppo" else settings,
                    "episodes": FINAL_EPISODES,
                    "seed": seed,
                    "config_hash": digest,
                    **what,
                }
            )
    return found


def key(run: Run) -> tuple[Any, ...]:
    return run["name"], run["mode"], run["seed"], run["config_hash"]


def read(path: Path) -> list[Run]:
    """All runs recorded so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(wanted: list[Run], out: Path, jobs: int, peers: Path) -> int:
    """Run each that ``out`` lacks in a process of its own, append what it reached; returns how many failed."""
    known = {key(run) for run in read(out)}
    todo = [run for run in wanted if key(run) not in known]
    print(f"{len(wanted)} runs wanted, {len(wanted) - len(todo)} already in {out}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    now = measuring.commit()
    if others := sorted({run["commit"] for run in read(out)} - {now}):
        print(f"note: runs of {', '.join(others)} count, here is {now}: delete their lines if the code may matter")
    context = {"commit": now, "jobs": jobs, "machine": measuring.machine()}

    def one(run: Run) -> bool:
        label = f"{run['name']} ({run['mode']}) seed {run['seed']}"
        try:
            peer = [peers, HERE / "worker_ppo.py"]
            result = measuring.run_worker(peer if run["mode"] == "ppo" else [sys.executable, __file__, "--worker"], run)
        except RuntimeError as error:
            print(f"{label}: FAILED\n{error}", file=sys.stderr, flush=True)
            return False
        line = {**run, **result, **context, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{label}: {result['mean']:.1f} after {result['steps']:,} steps, {result['train_seconds']:.1f} s",
            flush=True,
        )
        return True

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, todo)).count(False)


# --- the table -------------------------------------------------------------------------------------------------------
def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis: a quarter of the values, rounded down, is dropped at each end."""
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the interquartile mean, over seeds."""
    resampled = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(interquartile_mean(resampled), [2.5, 97.5])
    return float(low), float(high)


def number(value: float) -> str:
    """Four significant digits at most, no exponent; nothing for what is not known."""
    if value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def means_of(runs: list[Run]) -> np.ndarray:
    return np.array([run["mean"] for run in runs])


def with_interval(means: np.ndarray) -> str:
    """The interquartile mean and, of more than one seed, its interval."""
    shown = number(float(interquartile_mean(means)))
    if len(means) > 1:
        low, high = interval(means)
        shown += f" [{number(low)}, {number(high)}]"
    return shown


def row(runs: list[Run]) -> list[str]:
    first = runs[-1]
    means = means_of(runs)
    threshold = first["threshold"]
    reached = "" if threshold is None else f"{number(threshold)} ({(means >= threshold).sum()} of {len(means)})"
    # Published numbers are of the environment as registered, not of a variant made with arguments.
    published = "" if first["env_kwargs"] else PUBLISHED.get(first["env_id"].rsplit("-v", 1)[0], "")
    return [
        first["name"],
        f"{first['budget']:,}",
        str(len(runs)),
        with_interval(means),
        f"{number(means.min())} to {number(means.max())}",
        reached,
        published,
        number(median_or_nan([run["train_seconds"] for run in runs])),
    ]


def compared(ours: list[Run], ppo: list[Run]) -> list[str]:
    """A row that sets our runs beside PPO's on one environment and budget."""
    a, b = means_of(ours), means_of(ppo)
    better = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    return [
        ours[-1]["name"], f"{ours[-1]['budget']:,}", with_interval(a), with_interval(b), f"{len(a)}, {len(b)}",
        f"{better:.2f}",
    ]  # fmt: skip


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in [header, ["---"] * len(header), *rows])


def render_experiments(runs: list[Run]) -> str:
    """The Markdown report of a file of one's own: a row for each configuration that was tried."""
    every: dict[str, list[Run]] = defaultdict(list)
    for run in {key(run): run for run in runs}.values():
        every[run["config_hash"]].append(run)
    header = ["environment", "settings", "steps", "seeds", "IQM of greedy return [95 %]", "range", "commit"]
    rows = []
    for found in every.values():
        first, means = found[-1], means_of(found)
        settings = ", ".join(f"{name}={value}" for name, value in first["settings"].items()) or "as they are"
        commits = ", ".join(sorted({run["commit"] for run in found}))
        rows.append([
            first["name"], f"{first['mode']}: {settings}", f"{first['budget']:,}", str(len(found)),
            with_interval(means), f"{number(means.min())} to {number(means.max())}", commits,
        ])  # fmt: skip
    return f"# Experiments\n\n{markdown(header, rows)}"


def render(runs: list[Run]) -> str:
    """The Markdown report: for each environment and budget, the runs of its newest configuration."""
    every: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in {key(run): run for run in runs}.values():
        every[run["mode"], run["name"], run["budget"]].append(run)
    groups = {
        group: [run for run in found if run["config_hash"] == found[-1]["config_hash"]]
        for group, found in sorted(every.items())
    }
    quality = ["IQM of greedy return [95 %]", "range over seeds", "threshold (reached by)", "published PPO"]
    header = ["environment", "steps", "seeds", *quality, "training s"]
    text = (
        f"# Learning\n\nGreedy return of the final policy over {FINAL_EPISODES} episodes; interquartile mean (IQM) "
        "over seeds with a 95 % bootstrap interval. How this is measured, and what to keep in mind: "
        "[../README.md](../README.md#learning).\n"
    )
    for mode, title in (
        ("preset", "Presets"),
        ("default", "The robust default, untuned"),
        ("ppo", "Stable-Baselines3's PPO with RL-Zoo's settings, the presets' budgets"),
    ):
        if rows := [row(found) for group, found in groups.items() if group[0] == mode]:
            text += f"\n## {title}\n\n{markdown(header, rows)}"
    both = [(found, groups.get(("ppo", *group[1:]))) for group, found in groups.items() if group[0] == "preset"]
    if rows := [compared(ours, ppo) for ours, ppo in both if ppo is not None]:
        text += f"\n## Presets beside PPO\n\n{BESIDE}\n\n{markdown(BESIDE_HEADER, rows)}"
    machines = sorted({f"{run['machine']['cpu']}, {run['machine']['cores']} cores" for run in runs})
    versions = sorted(
        {
            f"{name} {run['versions'][name]}"
            for run in runs
            for name in ("grouprl", "stable-baselines3")
            if name in run["versions"]
        }
    )
    return f"{text}\n{SOURCES}\n\n{', '.join(versions)}; {'; '.join(machines)}.\n"


def report(out: Path, render: Callable[[list[Run]], str], failed: int) -> None:
    """Render the runs in ``out`` into a page beside it and print that."""
    runs = read(out)
    if not runs:
        raise SystemExit(f"{out} holds no runs")
    out.with_suffix(".md").write_text(render(runs))
    print(out.with_suffix(".md").read_text())
    if failed:
        raise SystemExit(f"{failed} runs failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", action="append", help="a preset (with --default also a Gymnasium id); may be repeated")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated (default 0,1,2,3,4)")
    parser.add_argument("--steps", type=int, help="environment steps instead of the preset's")
    parser.add_argument(
        "--default", action="store_true", help="the robust default instead of the preset's configuration"
    )
    parser.add_argument("--ppo", action="store_true", help="Stable-Baselines3's PPO with RL-Zoo's settings instead")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting (YAML); give --out as well"
    )
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="the Python that has them")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1; seconds suffer from more)")
    parser.add_argument("--table", action="store_true", help="render the table again, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON lines; the table goes beside them as .md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        measuring.report(train(json.loads(given.worker)))
        return
    failed = 0
    if not given.table:
        from grouprl.envs import presets

        if given.set and given.out == RESULTS:
            parser.error("--set is for experiments, whose runs are no results; give --out a file of their own")
        if given.ppo and (given.default or given.set):
            parser.error("--ppo has settings of its own; leave --default and --set out")
        if given.ppo and (unknown := set(given.env or []) - set(zoo_ppo.SETTINGS)):
            parser.error(
                f"there are no PPO settings for {', '.join(sorted(unknown))}, but for {', '.join(zoo_ppo.SETTINGS)}"
            )
        mode = "ppo" if given.ppo else "default" if given.default else "preset"
        every = zoo_ppo.SETTINGS if given.ppo else [name for name in presets.names() if name != "script"]
        settings = {name: yaml.safe_load(value) for name, value in (item.split("=", 1) for item in given.set)}
        seeds = [int(seed) for seed in given.seeds.split(",")]
        wanted = plan(given.env or list(every), seeds, given.steps, mode, settings)
        failed = run_all(wanted, given.out, given.jobs, given.peers_python)
    report(given.out, render if given.out == RESULTS else render_experiments, failed)


if __name__ == "__main__":
    main()
