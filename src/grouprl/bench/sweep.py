"""A sweep: Optuna proposes settings, each is run with every seed, and what is killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grouprl.bench import plan, pool
from grouprl.bench.cells import Cell
from grouprl.bench.plan import Plan
from grouprl.bench.rows import Row, Rows, other_code
from grouprl.bench.space import Settings, Space
from grouprl.bench.statistics import iqm
from grouprl.bench.tables import number
from grouprl.errors import DamagedFileError, UsageError, error_text
from grouprl.runs.appended import whole_lines
from grouprl.runs.files import write_bytes

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

SAMPLERS = ("grid", "random", "tpe")
_STARTUP_TRIALS = 4
"""Trials that are run to their ends before any is pruned."""
_DRAWS = 1000
"""Settings that are drawn, one after the other, in the place of one that was tried before."""


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        cell: a run with the settings that stay. space: those that change. seeds: of every trial.
        sampler: grid, random or tpe. trials: how many settings, each counted once; of a grid, all of them.
        metric: greedy or sampled, of the end, whose IQM over the seeds is to be large.
        prune: whether trials that are below the median of the others at the same point end early.
    """

    cell: Cell
    space: Space
    seeds: list[int]
    sampler: str
    trials: int
    metric: str = "greedy"
    prune: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UsageError(f"sampler={self.sampler!r} must be one of {', '.join(SAMPLERS)}")
        if self.metric not in ("greedy", "sampled"):
            raise UsageError(f"metric={self.metric!r} must be greedy or sampled: a sweep looks for large returns")
        if self.prune and self.metric != "greedy":
            raise UsageError(
                f"metric={self.metric!r} with pruning: trials are compared along the way by their greedy evaluations; "
                "prune by greedy, or leave --prune out"
            )
        if not self.space.varied:
            raise UsageError("nothing is swept: give a setting several values, such as --set learning_rate=1e-3,3e-4")

    def cells(self, settings: Settings) -> list[Cell]:
        """The runs of a trial."""
        label = self.space.label(settings)
        own = {**self.cell.settings, **self.space.fixed, **settings}
        return [replace(self.cell, method=label, settings=own, seed=seed) for seed in self.seeds]

    def check(self) -> None:
        """Raises UsageError if a setting, a value or the environment is not possible."""
        tried = self.space.grid() if self.sampler == "grid" else self.space.corners()
        plan.check(Plan("sweep", "", [self.cells(settings)[0] for settings in tried], {}))

    @property
    def name(self) -> str:
        """Of its study: another space or another way to search is another study."""
        what = [self.cell.as_hashed(), asdict(self.space), self.sampler, self.metric, self.prune, self.seeds]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class Swept:
    """What a sweep has found: labels of trials by their value, best first; those that were pruned; those that broke."""

    ranked: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def run(sweep: Sweep, out: Path, *, jobs: int, again: bool = False, say: Callable[[str], None] = print) -> Swept:
    """Do what is left of a sweep in the folder ``out``, which keeps its rows and its study.

    Args:
        jobs: how many runs at once. again: whether to try settings again of which a run failed.

    Raises UsageError if another process works in the folder, or it cannot be written.
    """
    with Rows.held(out) as rows:
        study = _study(sweep, out / "study.journal")
        if again:
            rows.forget_failed()
        return _Search(sweep, study, rows, jobs, again, say).run()


def _study(sweep: Sweep, journal: Path) -> Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with suppress(OSError):  # of one that was killed: this process alone has the folder now
        Path(f"{journal}.lock").unlink()
    if journal.exists() and (data := journal.read_bytes()) != whole_lines(data):
        write_bytes(journal, whole_lines(data))
    points = sweep.cell.points
    try:
        study = optuna.create_study(
            study_name=sweep.name, storage=JournalStorage(JournalFileBackend(str(journal))), load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=points // 4),
        )  # fmt: skip
    except OSError:
        raise
    except Exception as error:  # whatever Optuna meets in lines that are not its own
        raise DamagedFileError(
            f"{journal} is no journal of a sweep, or a damaged one ({error_text(error)}); move it away: "
            "runs that have a row are not done again"
        ) from error
    kind = optuna.samplers.TPESampler if sweep.sampler == "tpe" else optuna.samplers.RandomSampler
    study.sampler = kind(seed=len(study.trials))  # one that goes on draws other numbers than it began with
    return study


@dataclass
class _Running:
    """A trial whose runs are not all done."""

    trial: Trial
    cells: list[Cell]


class _Search:
    """Asks the study for trials, runs them, and tells it what came of them."""

    def __init__(
        self, sweep: Sweep, study: Study, rows: Rows, jobs: int, again: bool, say: Callable[[str], None]
    ) -> None:
        self.sweep, self.study, self.rows, self.jobs, self.say = sweep, study, rows, jobs, say
        self.distributions = sweep.space.distributions()
        self.queue: deque[Cell] = deque()
        self.running: dict[str, _Running] = {}
        """By the label of the trial."""
        self.exhausted = False
        self.given_up = {t.number for t in study.trials if again and _BROKEN in t.user_attrs}
        """Numbers of trials that broke, and whose settings are tried again."""

    def run(self) -> Swept:
        from optuna.trial import TrialState

        self._take_up()
        known = len(self._tried())
        broken = {self._label(t.params) for t in self._kept() if _BROKEN in t.user_attrs}
        self.say(
            f"{self.sweep.trials} trials of {len(self.sweep.seeds)} seeds, {known} done before; rows: {self.rows.path}"
        )
        if others := other_code(self.rows.by_id.values()):
            self.say(others)
        if broken:
            self.say(f"note: of {len(broken)} settings a run failed before, and they stay so; --again tries them again")
        pool.run(
            self._next, self._done, jobs=self.jobs, point=self._point if self.sweep.prune else None,
            dropped=lambda cell: cell.method not in self.running,
        )  # fmt: skip
        found = Swept()
        kept = {self._label(trial.params): trial for trial in self._kept() if trial.state.is_finished()}
        for label, trial in sorted(
            kept.items(), key=lambda one: -(one[1].value if one[1].value is not None else -np.inf)
        ):
            lists = {TrialState.COMPLETE: found.ranked, TrialState.PRUNED: found.pruned}
            lists.get(trial.state, found.broken).append(label)
        for label in found.ranked + found.broken:
            cells = self.sweep.cells(self.sweep.space.of_text(kept[label].params))
            found.rows += [self.rows.by_id[cell.id] for cell in cells if cell.id in self.rows.by_id]
        return found

    def _label(self, params: dict[str, Any]) -> str:
        return self.sweep.space.label(self.sweep.space.of_text(params))

    def _tried(self) -> set[str]:
        """Labels of the trials that have begun."""
        from optuna.trial import TrialState

        return {self._label(trial.params) for trial in self._kept() if trial.state != TrialState.WAITING}

    def _kept(self) -> list[FrozenTrial]:
        """Trials that count: of several with the same settings the last one."""
        return [trial for trial in self.study.trials if not _lost(trial) and trial.number not in self.given_up]

    def _take_up(self) -> None:
        """Trials that were running when a sweep was killed, or are given up, are asked for again; a grid is filled."""
        from optuna.trial import TrialState

        running = self.study.get_trials(states=(TrialState.RUNNING,))
        for trial in running:
            self.study.tell(trial.number, state=TrialState.FAIL)
        if self.sweep.sampler != "grid":
            for trial in [*running, *(self.study.trials[number] for number in sorted(self.given_up))]:
                self.study.enqueue_trial(trial.params)
        if self.sweep.sampler == "grid":
            have = [trial.params or trial.system_attrs.get("fixed_params") for trial in self._kept()]
            for settings in self.sweep.space.grid():
                params = self.sweep.space.as_text(settings)
                if params not in have:
                    self.study.enqueue_trial(params)

    def _next(self) -> Cell | None:
        """The next run: of a trial that has begun, or of a new one while there are any to come."""
        while not self.queue:
            tried = self._tried()
            trial = self._new(tried) if len(tried) < self.sweep.trials and not self.exhausted else None
            if trial is None:
                return None
            cells = self.sweep.cells(self.sweep.space.of_text(trial.params))
            self.running[cells[0].method] = _Running(trial, cells)
            self.queue.extend(cell for cell in cells if cell.id not in self.rows.by_id)
            self._end_if_done(cells[0].method)
        return self.queue.popleft()

    def _new(self, tried: set[str]) -> Trial | None:
        """A trial of settings that were not tried; where the sampler's were, of others that are drawn at random."""
        from optuna.samplers import RandomSampler
        from optuna.trial import TrialState

        trial = self.study.ask(self.distributions)
        if self._label(trial.params) not in tried:
            return trial
        self.study.tell(trial, state=TrialState.FAIL)
        sampler, last = RandomSampler(seed=len(self.study.trials)), self.study.trials[-1]
        for _ in range(_DRAWS):
            drawn = {n: sampler.sample_independent(self.study, last, n, d) for n, d in self.distributions.items()}
            if self._label(drawn) not in tried:
                self.study.enqueue_trial(drawn)
                return self.study.ask(self.distributions)
        self.exhausted = True
        self.say(
            f"note: {len(tried)} settings are tried instead of {self.sweep.trials}: of {_DRAWS:,} more that were drawn "
            "all had been tried"
        )
        return None

    def _done(self, cell: Cell, outcome: pool.Outcome) -> None:
        self.rows.append(cell, outcome, self.jobs)
        failed = outcome["status"] != "done"
        came = f"FAILED: {outcome['error']}" if failed else f"{number(outcome[self.sweep.metric]['mean'])}"
        self.say(f"{cell.method}, seed {cell.seed}: {came}")
        self._end_if_done(cell.method)

    def _end_if_done(self, label: str) -> None:
        """Tell the study of a trial whose runs all have rows."""
        from optuna.trial import TrialState

        one = self.running[label]
        found = [self.rows.by_id.get(cell.id) for cell in one.cells]
        if not all(found):
            return
        del self.running[label]
        scores = [row[self.sweep.metric]["mean"] for row in found if row is not None and row["status"] == "done"]
        if len(scores) == len(found):
            self.study.tell(one.trial, float(iqm(np.array(scores, dtype=np.float64))))
        else:
            one.trial.set_user_attr(_BROKEN, True)
            self.study.tell(one.trial, state=TrialState.FAIL)

    def _point(self, cell: Cell, point: dict[str, Any]) -> None:
        """Report a point of a curve, each at a place of its own; end the trial if the others were better there."""
        from optuna.trial import TrialState

        one = self.running.get(cell.method)
        place = round(cell.points * point["step"] / cell.steps)
        if one is None or place < 1:
            return
        one.trial.report(point["greedy"], self.sweep.seeds.index(cell.seed) * cell.points + place)
        if one.trial.should_prune():
            del self.running[cell.method]
            self.queue = deque(waiting for waiting in self.queue if waiting.method != cell.method)
            self.study.tell(one.trial, state=TrialState.PRUNED)
            self.say(f"{cell.method}: pruned at step {point['step']:,} of seed {cell.seed}")


_BROKEN = "broken"


def _lost(trial: FrozenTrial) -> bool:
    """Whether a trial came to nothing: the sweep was killed meanwhile, or its settings had been tried before."""
    from optuna.trial import TrialState

    return trial.state == TrialState.FAIL and not trial.user_attrs.get(_BROKEN)
