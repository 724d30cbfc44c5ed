"""Compare three estimators on one environment over seeds, and draw their learning curves.

    python examples/compare_estimators.py
    python examples/compare_estimators.py --env Acrobot-v1 --steps 200000 --seeds 5

All three learn from whole episodes and differ in nothing else. CartPole, the default because it is quick, is solved by
all of them; it shows how fast each learns, not which is better elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grouprl.envs import training
from grouprl.runs.plots import plot_runs

ESTIMATORS = ("baseline", "timestep", "outcome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    given = parser.parse_args()
    runs = []
    for advantage in ESTIMATORS:
        for seed in range(given.seeds):
            folder = given.out / f"{given.env}-{advantage}-seed{seed}"
            result = training.train(
                given.env,
                folder,
                preset=None,  # the robust default; a preset would favour the estimator it was made with
                steps=given.steps,
                seed=seed,
                settings={"advantage": advantage, "collect": "episodes", "sticky": 0.0},
                run={"video": False, "track": ("none",)},
                overwrite=True,
            )
            assert result.summary is not None
            final = result.summary["eval"]
            print(f"{advantage:10s} seed {seed}: {final['mean_return']:.1f} over {final['episodes']} greedy episodes")
            runs.append(folder)
    picture = given.out / "estimators.png"
    plot_runs(runs, picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
