"""Environments whose observations mean something that their spaces do not say: FrozenLake, Taxi and others in words.

Each function here takes an environment and returns its words. None of them imports the environment's package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grouprl.lm.agents.environments.words import Words, chosen, listed


def known_words(env: Any) -> Words | None:
    """The words of an environment that is known here, or None."""
    core = env.unwrapped
    words = _KNOWN.get(type(core).__name__)
    if words is not None and type(core).__module__.startswith("gymnasium.envs.toy_text"):
        return words(core)
    if type(core).__module__.startswith("minigrid."):
        parts = getattr(env.observation_space, "spaces", {})
        if isinstance(parts, dict) and {"image", "direction", "mission"} <= set(parts):
            return _minigrid(core)
    return None


def _named(rules: str, names: Sequence[str], say: Callable[[Any], str], success: float) -> Words:
    """The words of an environment whose actions have names."""
    how = f"Answer with one action: {listed(names)}."
    return Words(f"{rules} {how}", how, say, lambda text: chosen(text, names), names=tuple(names), success=success)


_MOVES = ("left", "down", "right", "up")


def _around(row: int, column: int, goal: tuple[int, int], ground: str, is_safe: Callable[[int, int], bool]) -> str:
    """To which sides of a place one can go, and where the goal is.

    What is good is named, and not what is bad, because language models tend to repeat what they read.
    """
    steps = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
    sides = [move for move, (dy, dx) in steps.items() if is_safe(row + dy, column + dx)]
    dy, dx = goal[0] - row, goal[1] - column
    way = [f"{'down' if dy > 0 else 'up'} {abs(dy)}"] * (dy != 0)
    way += [f"{'right' if dx > 0 else 'left'} {abs(dx)}"] * (dx != 0)
    return f"{ground}: {', '.join(sides) or 'none'}. Goal: {', '.join(way) or 'here'}."


def _frozen_lake(env: Any) -> Words:
    rows, columns = int(env.nrow), int(env.ncol)
    tiles = [[bytes(tile) for tile in row] for row in env.desc]
    goals = [(r, c) for r in range(rows) for c in range(columns) if tiles[r][c] == b"G"]

    def is_safe(row: int, column: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and tiles[row][column] != b"H"

    def say(observation: Any) -> str:
        row, column = divmod(int(observation), columns)
        nearest = min(goals, key=lambda goal: abs(goal[0] - row) + abs(goal[1] - column), default=(row, column))
        return _around(row, column, nearest, "Ice", is_safe)

    slips = any(len(outcomes) > 1 for outcomes in env.P[0].values())
    ice = "The ice is slippery: you may slide to the side. " if slips else ""
    rules = f"You walk over a frozen lake to the goal. A hole ends the game. {ice}".strip()
    return _named(rules, _MOVES, say, success=1.0)


def _cliff_walking(env: Any) -> Words:
    rows, columns = (int(n) for n in env.shape)

    def is_safe(row: int, column: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and not env._cliff[row, column]

    def say(observation: Any) -> str:
        row, column = divmod(int(observation), columns)
        return _around(row, column, (rows - 1, columns - 1), "Ground", is_safe)

    rules = "You walk to the goal in few steps. The cliff costs 100 points and puts you back to the start."
    return _named(rules, ("up", "right", "down", "left"), say, success=-99.0)


def _taxi(env: Any) -> Words:
    names = ("red", "green", "yellow", "blue")

    def place(where: tuple[int, int]) -> str:
        return f"row {where[0]}, column {where[1]}"

    def say(observation: Any) -> str:
        row, column, passenger, destination = (int(n) for n in env.decode(int(observation)))
        waits = "in the taxi" if passenger == 4 else f"at {names[passenger]} ({place(env.locs[passenger])})"
        return (
            f"Taxi: {place((row, column))}. Passenger: {waits}. Destination: {names[destination]} "
            f"({place(env.locs[destination])})."
        )

    rules = (
        "You drive a taxi in a city of 5 rows and 5 columns: pick up the passenger and drop them off at the "
        "destination. Row 0 is in the north, column 0 in the west."
    )
    actions = ("south", "north", "east", "west", "pickup", "dropoff")
    return _named(rules, actions, say, success=0.0)


def _blackjack(env: Any) -> Words:
    def say(observation: Any) -> str:
        total, dealer, ace = observation
        return f"Your cards: {total}{' with a usable ace' if ace else ''}. The dealer shows: {dealer}."

    rules = "You play blackjack: come closer to 21 than the dealer, and not above."
    return _named(rules, ("stick", "hit"), say, success=1.0)


_OBJECTS = ["unseen", "empty", "wall", "floor", "door", "key", "ball", "box", "goal", "lava", "agent"]
_COLOURS = ["red", "green", "blue", "purple", "yellow", "grey"]
_DOORS = ["open", "closed", "locked"]
_HIDDEN = {"unseen", "empty", "floor", "agent"}


def _minigrid(env: Any) -> Words:
    def thing(cell: Any) -> str:
        kind = _OBJECTS[int(cell[0])]
        if kind in ("wall", "goal", "lava"):
            return kind
        state = f"{_DOORS[int(cell[2])]} " if kind == "door" else ""
        return f"{state}{_COLOURS[int(cell[1])]} {kind}"

    def say(observation: Any) -> str:
        """The agent sees a square before it: itself stands in the middle of the nearest row."""
        image = observation["image"]
        width, depth = image.shape[:2]
        x0, y0 = width // 2, depth - 1
        ahead = _OBJECTS[int(image[x0, y0 - 1][0])]
        seen = []
        for x in range(width):
            for y in range(depth):
                kind = _OBJECTS[int(image[x, y][0])]
                if kind in _HIDDEN or kind == "wall" or (x, y) == (x0, y0):
                    continue
                way = [f"{y0 - y} ahead"] * (y < y0) + [f"{abs(x - x0)} {'left' if x < x0 else 'right'}"] * (x != x0)
                seen.append((abs(x - x0) + y0 - y, f"{thing(image[x, y])} {', '.join(way)}"))
        carried = image[x0, y0]
        hands = f" You carry: {thing(carried)}." if _OBJECTS[int(carried[0])] not in _HIDDEN else ""
        before = "nothing" if ahead in _HIDDEN else thing(image[x0, y0 - 1])
        view = "; ".join(text for _, text in sorted(seen)) or "nothing of interest"
        return f"Task: {observation['mission']}. Before you: {before}. You see: {view}.{hands}"

    names = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
    rules = "You stand in a grid of rooms. left and right turn you, forward walks, toggle opens doors."
    return _named(rules, names[: int(env.action_space.n)], say, success=1e-9)


_KNOWN: dict[str, Callable[[Any], Words]] = {
    "FrozenLakeEnv": _frozen_lake,
    "CliffWalkingEnv": _cliff_walking,
    "TaxiEnv": _taxi,
    "BlackjackEnv": _blackjack,
}
