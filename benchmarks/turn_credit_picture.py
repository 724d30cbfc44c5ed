"""Draw docs/images/credit_per_turn.png: a group of four episodes, each turn coloured by its advantage.

python benchmarks/turn_credit_picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from grouprl.objective import gigpo, outcome, timestep

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "credit_per_turn.png"
EPISODES = (
    (("hall", 0.0), ("kitchen", 0.2), ("safe", 1.0)),
    (("hall", 0.0), ("hall", -0.2), ("kitchen", 0.2), ("safe", 1.0)),
    (("hall", 0.0), ("cellar", -0.5), ("kitchen", 0.2), ("safe", 0.0)),
    (("hall", 0.0), ("cellar", -0.5)),
)
"""Where each turn was taken, and its reward."""


def credits() -> dict[str, Tensor]:
    """Advantages ``[T]`` of all turns, without divisions by standard deviations."""
    rewards = torch.tensor([reward for episode in EPISODES for _, reward in episode], dtype=torch.float64)
    places = [place for episode in EPISODES for place, _ in episode]
    states = torch.tensor([sorted(set(places)).index(place) for place in places])
    lengths, group = torch.tensor([len(episode) for episode in EPISODES]), torch.zeros(len(EPISODES)).long()
    return {
        "outcome: one for the whole episode": outcome(rewards, lengths, group, scale="none"),
        "timestep: against the same turn of the others": timestep(rewards, lengths, group),
        "gigpo: outcome, and against equal states": gigpo(rewards, lengths, group, states, scale="none"),
    }


def main() -> None:
    """Draw it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    found = credits()
    most = max(float(a.abs().max()) for a in found.values())
    for axis, (title, advantages) in zip(axes, found.items(), strict=True):
        turn = iter(advantages.tolist())
        for row, episode in enumerate(EPISODES):
            for column, (place, reward) in enumerate(episode):
                advantage = next(turn)
                colour = plt.get_cmap("RdYlGn")(0.5 + 0.45 * advantage / most)
                axis.add_patch(plt.Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, facecolor=colour))
                axis.text(column + 0.5, row + 0.26, place, ha="center", fontsize=8)
                axis.text(column + 0.5, row + 0.58, f"{advantage:+.2f}", ha="center", fontsize=13, weight="bold")
                axis.text(column + 0.5, row + 0.85, f"reward {reward:g}", ha="center", fontsize=8)
        axis.set(xlim=(0, 4), ylim=(4, 0), title=title)
        axis.set_xticks([c + 0.5 for c in range(4)], [f"turn {c + 1}" for c in range(4)])
        axis.set_yticks([r + 0.6 for r in range(4)], [f"episode {r + 1}" for r in range(4)])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.savefig(PICTURE, dpi=90)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
