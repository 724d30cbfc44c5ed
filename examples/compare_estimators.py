"""Compare estimators over seeds, one of them your own: a table with intervals, and learning curves.

    grouprl bench examples/compare_estimators.yaml
    python examples/compare_estimators.py             # the same from Python

The file lists the methods. `median` is the function below, which the file names `compare_estimators:median_centred`.
CartPole is quick. All of them solve it, so it shows how fast each learns, and not which is better elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from grouprl.bench import harness, plan
from grouprl.objective import returns_to_go


def median_centred(rewards: Tensor, lengths: Tensor, group: Tensor) -> Tensor:
    """[S]: the return-to-go of each step less the median of the batch, on the scale of its standard deviation."""
    to_go = returns_to_go(rewards, lengths, gamma=0.99)
    return (to_go - to_go.median()) / (to_go.std() + 1e-8)


def main() -> None:
    planned = plan.read(Path(__file__).with_suffix(".yaml"))
    plan.check(planned)
    out = Path("runs/compare")
    harness.run(planned, out, jobs=2)
    print(harness.report(harness.rows_in(planned, out), out, planned.name, about=planned.about))


if __name__ == "__main__":
    main()
