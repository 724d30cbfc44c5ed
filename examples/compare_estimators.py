"""Compare estimators on one environment over seeds: final returns with intervals, and learning curves.

    python examples/compare_estimators.py
    python examples/compare_estimators.py --estimators outcome,my_module:my_function
    python examples/compare_estimators.py --env Acrobot-v1 --steps 200000 --seeds 5 --estimators outcome,leave_one_out

A function of your own is named module:function, and found in the current directory. All estimators learn from whole
episodes, and nothing else differs. CartPole is the default because it is quick. All of them solve it, so it shows how
fast each learns, and not which is better elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from grouprl.envs import training
from grouprl.runs.plots import plot_runs

ESTIMATORS = "baseline,timestep,outcome"


def interval(means: list[float]) -> str:
    """Mean over seeds, with a 95 % interval by 10,000 bootstrap samples of them."""
    draws = np.random.default_rng(0).choice(means, (10_000, len(means))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"mean {np.mean(means):.1f}, 95 % interval {low:.1f} to {high:.1f}, over {len(means)} seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--estimators", default=ESTIMATORS, help=f"names, comma-separated (default {ESTIMATORS})")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    runs, reached = [], {}
    for advantage in given.estimators.split(","):
        for seed in range(given.seeds):
            folder = given.out / f"{given.env}-{advantage.replace(':', '.')}-seed{seed}"
            setting = "advantage_function" if ":" in advantage else "advantage"
            result = training.train(
                given.env,
                folder,
                preset=None,  # the robust default; a preset would favour the estimator it was made with
                steps=given.steps,
                seed=seed,
                settings={setting: advantage, "collect": "episodes", "sticky": 0.0},
                run={"video": False, "track": ("none",)},
                overwrite=True,
            )
            assert result.summary is not None
            final = result.summary["eval"]
            print(f"{advantage:10s} seed {seed}: {final['mean_return']:.1f} over {final['episodes']} greedy episodes")
            runs.append(folder)
            reached.setdefault(advantage, []).append(final["mean_return"])
    for advantage, means in reached.items():
        print(f"{advantage:10s} {interval(means)}")
    picture = given.out / "estimators.png"
    plot_runs(runs, picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
