"""What an environment returned, checked: the one gate through which every reset and step passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from grouprl.errors import GrouprlError, TrainingError, error_text, line_of_fault, with_type
from grouprl.lm.rewards.returned import plain_float
from grouprl.objective.groups import LARGEST_RETURN
from grouprl.runs.time_limit import within


@dataclass(frozen=True)
class Step:
    """What a step, or a reset, came to."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


class Calls:
    """Calls into one environment, or into functions of the user's that belong to it.

    Args:
        name: the environment's, for messages.
        timeout: seconds that a call of the environment, or of a function of the user's, may take; None for any time.

    A call that takes longer raises TimeoutError, and ``late`` says what was called.
    """

    def __init__(self, name: str, timeout: float | None) -> None:
        self.name, self._timeout = name, timeout
        self.late = ""

    def reset(self, call: Callable[[], Any]) -> Step:
        """What ``reset`` returned. Raises TrainingError if that is no pair, TimeoutError if it took too long."""
        result = self._run(call, "in reset", "reset")
        if not (isinstance(result, tuple | list) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise self.error("reset must return (observation, info), info being a dict", result, "in reset")
        return Step(result[0], 0.0, False, False, result[1])

    def step(self, call: Callable[[], Any], turn: int) -> Step:
        """What ``step`` returned. Raises TrainingError if it failed or is no five-tuple, TimeoutError as ``reset``."""
        when = f"at turn {turn}"
        result = self._run(call, when, "step")
        if not isinstance(result, tuple | list) or len(result) != 5:
            many = f"{len(result)} values: " if isinstance(result, tuple | list) else ""
            rule = "step must return (observation, reward, terminated, truncated, info)"
            raise TrainingError(f"{self.name} failed {when}: {rule}; it returned {many}{with_type(result)}")
        observation, reward, terminated, truncated, info = result
        value = plain_float(reward)
        if value is None or not abs(value) <= LARGEST_RETURN:
            rule = f"the reward that step returns must be one finite number, at most {LARGEST_RETURN:g} in size"
            raise self.error(rule, reward, when)
        for flag, given in (("terminated", terminated), ("truncated", truncated)):
            if plain_float(given) not in (0.0, 1.0):
                raise self.error(f"{flag}, which step returns, must be True or False", given, when)
        if not isinstance(info, Mapping):
            raise self.error("the info that step returns must be a dict", info, when)
        return Step(observation, value, bool(terminated), bool(truncated), info)

    def text(self, function: Callable[[], Any], source: str, when: str) -> str:
        """The text that ``function`` gives. Raises TrainingError if it fails or gives something else."""
        where, own = f"in {source}, {when}", source == "obs_to_text"
        said = self._run(function, where, source) if own else self._guarded(function, where)
        if not isinstance(said, str):
            fix = "return text" if source == "obs_to_text" else "give obs_to_text, a function that makes it text"
            raise TrainingError(f"{self.name} failed {when}: {source} gave {with_type(said)}, which is no text; {fix}")
        return said

    def action(self, parser: Callable[[], Any], when: str, *, own: bool) -> Any:
        """What an action parser gives; None too for the ValueError by which it may say that it cannot parse.

        Args:
            own: whether it is a function of the user's.
        """

        def parse() -> Any:
            try:
                return parser()
            except GrouprlError:
                raise
            except ValueError:
                return None

        where = f"in action_parser, {when}"
        # It alone reads what the model wrote, perhaps by a regular expression that takes for ever.
        return self._run(parse, where, "action_parser", computes=True) if own else self._guarded(parse, where)

    def masks(self, call: Callable[[], Any], when: str) -> Any:
        """What ``action_masks`` of the environment gives. Raises TrainingError if it fails."""
        return self._run(call, f"in action_masks, {when}", "action_masks")

    def key(self, call: Callable[[], Any], when: str) -> Hashable:
        """What a function for the keys of states gives. Raises TrainingError if it fails or that is not hashable."""
        given = self._run(call, f"in state, {when}", "state")
        try:
            hash(given)
        except TypeError:
            raise self.error("state must return what can be compared and hashed, such as text", given, when) from None
        return given  # type: ignore[no-any-return]

    def error(self, rule: str, given: Any, when: str) -> TrainingError:
        """What to say of a value that breaks a rule."""
        return TrainingError(f"{self.name} failed {when}: {rule}; it returned {with_type(given)}")

    def _run(self, call: Callable[[], Any], when: str, what: str, *, computes: bool = False) -> Any:
        self.late = what
        return self._guarded(lambda: within(self._timeout, call, computes=computes), when)

    def _guarded(self, call: Callable[[], Any], when: str) -> Any:
        try:
            return call()
        except (GrouprlError, TimeoutError):
            raise
        except (Exception, SystemExit) as error:  # an environment that exits is no end of training
            raise TrainingError(
                f"{self.name} failed {when}: {error_text(error)}; the fault is inside it{line_of_fault(error)}"
            ) from error
