"""Episodes of an agent, played with a person watching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.generate.collect import EVALUATION_STARTS
from grouprl.lm.generate.episodes import Episode
from grouprl.lm.messages import message_text, text_of
from grouprl.lm.run.trained import Trained, open_trained
from grouprl.lm.sample.streams import EVALUATION, Stream
from grouprl.runs import RunFolder
from grouprl.runs.files import user_path


def is_agent(source: str) -> bool:
    """Whether a run's model acts in several turns: with tools, or in an environment."""
    if not (user_path(source) / "config.yaml").is_file():
        return False
    recipe = RunFolder.open(source).read_config().get("recipe") or {}
    return bool(recipe.get("environment") or recipe.get("tools"))


class Watching:
    """A run's model, which plays one episode after the other.

    Args:
        trained: the run. sampled: sample instead of taking what is likeliest.
    """

    def __init__(self, trained: Trained, sampled: bool) -> None:
        self._trained, self._next = trained, 0
        self._settings = trained.setup.policy.sampling(greedy=not sampled)
        self._stream = Stream(trained.config.seed, EVALUATION)
        first: Any = trained.data.held_out[0].get("prompt")
        self._opening: Any = first[:-1] if self.asks and not isinstance(first, str) else []
        if not self.asks:
            self.about = (
                f"{trained.recipe.subject}: Enter plays an episode from a held-out start, a number the start of that "
                "seed, q ends it"
            )
        else:
            question = first if isinstance(first, str) else text_of(first[-1].get("content"))
            self.about = f"{trained.recipe.subject}; try: {question} (an empty line ends it)"

    @classmethod
    def open(cls, source: str, *, sampled: bool = False, max_tokens: int | None = None) -> Watching:
        """Take up a run. Raises UsageError as :func:`~grouprl.lm.run.trained.open_trained`."""
        limit = {} if max_tokens is None else {"max_turn_length": max_tokens}
        return cls(open_trained(source, {}, **limit), sampled)

    @property
    def asks(self) -> bool:
        """Whether a person asks questions, and not an environment."""
        return self._trained.recipe.environment is None

    def play(self, line: str) -> Iterator[str]:
        """Play an episode: what was said in it, line by line.

        Args:
            line: the question; or of an environment the seed of its start, or "" for the next held-out start.

        Raises UsageError for a line that is neither.
        """
        start, judged = self._row(line)
        row = self._trained.setup.read([start], "what was typed")[0]
        number = EVALUATION_STARTS + self._next
        drawn = self._trained.setup.player.draw([row], 1, self._stream, [number], self._settings)
        episode = drawn.completions[0]
        assert isinstance(episode, Episode)
        yield from _said(episode, judged)

    def _row(self, line: str) -> tuple[dict[str, Any], bool]:
        """What an episode starts from, and whether rewards judge it: no row says what answers a new question."""
        if self.asks:
            held_out = self._trained.data.held_out
            as_text = isinstance(held_out[0]["prompt"], str)
            prompt = line if as_text else [*self._opening, {"role": "user", "content": line}]
            row = next((row for row in held_out if row["prompt"] == prompt), None)
            return ({**held_out[0], "prompt": prompt}, False) if row is None else (row, True)
        if line and not line.isdecimal():
            raise UsageError(f"{line!r} is no number of a start; press Enter for the next one, or type q to end")
        held_out = self._trained.data.held_out
        row = held_out[self._next % len(held_out)]
        self._next += not line
        return {**row, "seed": int(line)} if line else row, True


def _said(episode: Episode, judged: bool) -> Iterator[str]:
    """An episode as lines: who says what, how it ended, and if it is judged the reward of each turn and their sum."""
    turn = 0
    for i, message in enumerate(episode.messages):
        model = i in episode.spoken
        yield f"{'model' if model else message['role']}: {message_text(message).strip()}"
        if model:
            reward = episode.rewards[turn]
            turn += 1
            if reward and judged:
                yield f"  reward {reward:+g}"
    end = "ended" if episode.terminated else "was cut off"
    solved = {0.0: ", not solved", 1.0: ", solved"}.get(episode.metrics.get("success", -1.0), "")
    reached = f", return {sum(episode.rewards):g}" if judged else ""
    yield f"{turn} turns{reached}; the episode {end}{solved}"
