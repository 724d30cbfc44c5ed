import asyncio
import contextlib
import functools
import gc
import math
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.generate.estimate import groups_with_signal
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards import event_loop
from grouprl.lm.rewards.call import RewardCaller, Rewards, total
from grouprl.lm.settings.config import GRPOConfig
from grouprl.runs import watchdog

TEXT = [Prompt(0, "2 + 2 =", {"answer": 4}, (1, 2)), Prompt(1, "2 + 3 =", {"answer": 5}, (1, 3))]
CHAT = [Prompt(i, [{"role": "user", "content": row.prompt}], row.columns, row.ids) for i, row in enumerate(TEXT)]
IDS = [[7], [8, 9]]


def call(functions: Any, rows: list[Prompt] = TEXT, weights: Any = None, state: Any = None) -> Rewards:
    return RewardCaller(functions, weights)(rows, ["4", "6"], IDS, state)


def right(completions: list[str], answer: list[int], **kwargs: Any) -> list[float]:
    return [float(text == str(number)) for text, number in zip(completions, answer, strict=True)]


# --- what a function is given ----------------------------------------------------------------------------------------


def test_a_function_is_given_all_that_trl_gives_it() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0, 0.0]

    state = SimpleNamespace(global_step=3)
    call(reward, state=state)
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["2 + 2 =", "2 + 3 ="],
        "completions": ["4", "6"],
        "completion_ids": [[7], [8, 9]],
        "trainer_state": state,
        "answer": [4, 5],
    }


def test_completions_of_messages_are_messages() -> None:
    def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        assert prompts == [row.prompt for row in CHAT]
        return [float(len(messages[0]["content"])) for messages in completions]

    assert call(reward, CHAT).values.tolist() == [[1.0], [1.0]]


def test_a_function_without_kwargs_is_given_only_what_it_names() -> None:
    def by_name(answer: list[int], extra: int = 10) -> list[float]:
        return [float(number + extra) for number in answer]

    assert call([right, by_name]).values.tolist() == [[1.0, 14.0], [0.0, 15.0]]


def test_a_column_that_some_rows_lack_is_none_there() -> None:
    rows = [TEXT[0], Prompt(1, "hello", {}, (1,))]
    assert call(lambda answer: [1.0 if number is None else 0.0 for number in answer], rows).values.tolist() == [
        [0],
        [1],
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completions, solution: [0.0],
            r"asks for 'solution', which is neither a column of the dataset \(answer\)",
        ),
        (lambda completions, /, **kw: [0.0], "takes 'completions' by position only"),
    ],
)
def test_a_signature_that_cannot_be_served_is_a_usage_error(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(function)


def test_a_column_under_a_name_that_is_taken_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"has a column 'completions'.*rename_column"):
        call(right, [Prompt(i, "a", {"completions": 1, "answer": 1}, (1,)) for i in range(2)])


class Judge:
    def score(self, completions: Any, **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    def __call__(self, completions: Any, **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    def by_name(self, completions: Any) -> list[float]:
        return [1.0] * len(completions)


def scaled(factor: float, completions: Any, **kwargs: Any) -> list[float]:
    return [factor] * len(completions)


@pytest.mark.parametrize(
    ("function", "column", "message"),
    [
        (Judge().score, "self", "'self', and reward function 'score' has that name for itself; rename the column"),
        (Judge(), "self", "'self', and reward function 'Judge' has that name for itself"),
        (functools.partial(Judge().score), "self", "'self', and reward function 'score' has that name"),
        (functools.partial(scaled, 2.0), "factor", "'factor', and reward function 'scaled' has that name"),
        (functools.partial(scaled, factor=2.0), "factor", "the place of factor=2.0 that functools.partial gave"),
        (right, 3, "a column 3, and reward function 'right' is given columns by name"),
    ],
)
def test_a_column_that_a_function_cannot_be_given_is_a_usage_error(function: Any, column: Any, message: str) -> None:
    rows = [Prompt(i, "a", {column: 1, "answer": 1}, (1,)) for i in range(2)]
    with pytest.raises(UsageError, match=message):
        call(function, rows)


def test_a_column_of_any_name_is_no_matter_to_a_function_that_does_not_ask_for_it() -> None:
    rows = [Prompt(i, "a", {"self": 1, 3: 2}, (1,)) for i in range(2)]
    assert call(Judge().by_name, rows).values.tolist() == [[1.0], [1.0]]


# --- what it may return ----------------------------------------------------------------------------------------------


class Measured:
    """A number of another library."""

    def __float__(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    "returned",
    [
        [1, True],
        (1.0, 1.0),
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.bfloat16),
        np.ones(2, dtype=np.float32),
        [np.float64(1), np.int64(1)],
        [torch.tensor(1.0), torch.tensor(True)],
        np.array([1.0, 1], dtype=object),
        np.ma.masked_array([1.0, 1.0]),
        [Fraction(1), Decimal(1)],
        [Measured(), np.array(1.0)],
    ],
)
def test_numbers_of_every_kind_are_rewards(returned: Any) -> None:
    values = call(lambda **kw: returned).values
    assert values.dtype == torch.float64
    assert values.tolist() == [[1.0], [1.0]]


def test_none_says_that_a_function_does_not_apply() -> None:
    values = call([lambda **kw: [None, 2.0], right]).values
    assert math.isnan(values[0, 0])
    assert values[:, 1].tolist() == [1.0, 0.0]


class Unspeakable:
    def __repr__(self) -> str:
        return str(1 / 0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards for 2 completions; return a list of 2 numbers"),
        ("ab", "returned 'ab' of str"),
        (1.0, r"returned 1\.0 of float"),
        (None, "returned None of NoneType"),
        ({0: 1.0, 1: 1.0}, "of dict"),
        ([1.0, "1"], r"returned '1' of str for completion 1 of 2, of the prompt '2 \+ 3 ='"),
        ([[1.0], [1.0]], r"returned \[1\.0\] of list for completion 0"),
        (torch.ones(2, 1), r"an array of shape \[2, 1\]"),
        (torch.tensor(1.0), r"an array of shape \[\]"),
        (np.ones((1, 2)), r"an array of shape \[1, 2\]"),
        (
            [1.0, math.nan],
            r"returned nan for completion 1 of 2, of the prompt '2 \+ 3 ='; return a finite number, at most",
        ),
        ([math.inf, 1.0], "returned inf for completion 0"),
        ([1j, 1.0], "of complex"),
        ([1.0, 10**400], "returned inf for completion 1"),
        ([-(10**400), 1.0], "returned -inf for completion 0"),
        ([Fraction(10**400), 1.0], "returned inf for completion 0"),
        ([Decimal("1e400"), 1.0], "returned inf for completion 0"),
        ([Decimal("nan"), 1.0], "returned nan for completion 0"),
        ([np.complex64(1), 1.0], "of complex"),
        ([np.str_("1"), 1.0], "of str"),
        ([b"1", 1.0], "of bytes"),
        ([torch.ones(1), 1.0], r"returned tensor\(\[1\.\]\) of Tensor for completion 0"),
        (torch.ones(2, device="meta"), "whose entries cannot be read"),
        ([Unspeakable(), 1.0], "returned a value of type Unspeakable of Unspeakable"),
    ],
)
def test_anything_else_is_an_error_that_names_function_and_completion(returned: Any, message: str) -> None:
    def judge(**kwargs: Any) -> Any:
        return returned

    with pytest.raises(TrainingError, match="reward function 'judge' .*" + message):
        call(judge)


def test_a_function_that_raises_is_named_and_its_error_kept() -> None:
    def judge(**kwargs: Any) -> list[float]:
        raise KeyError("score")

    with pytest.raises(TrainingError, match="'judge' raised KeyError: 'score'") as caught:
        call([right, judge])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_usage_error_of_a_function_is_passed_on_as_it_is() -> None:
    def plain(**kwargs: Any) -> list[float]:
        raise UsageError("needs the column 'solution'")

    async def judge(**kwargs: Any) -> list[float]:
        raise UsageError("needs the column 'solution'")

    for function in (plain, judge):
        with pytest.raises(UsageError, match=r"^needs the column 'solution'$"):
            call(function)


def test_a_completion_that_no_function_applies_to_is_a_usage_error() -> None:
    def even(answer: list[int], **kwargs: Any) -> list[float | None]:
        return [1.0 if number % 2 == 0 else None for number in answer]

    with pytest.raises(
        UsageError, match=r"applies to completion 1 of 2, of the prompt '2 \+ 3 =': even, even_2 returned"
    ):
        call([even, even])


# --- logging ---------------------------------------------------------------------------------------------------------


def test_logged_columns_and_metrics_come_back_with_the_rewards() -> None:
    def reward(log_extra: Any, log_metric: Any, completions: list[str]) -> list[float]:
        for text in completions:
            log_extra("length", [len(text)])
            log_metric("accuracy", text == "4")
        return [0.0, 0.0]

    caller = RewardCaller(reward)
    for _ in range(2):  # nothing of one call is left in the next
        rewards = caller(TEXT, ["4", "66"], IDS)
        assert rewards.extras == {"length": [1, 2]}
        assert rewards.metrics == {"accuracy": 0.5}


def test_a_logged_column_of_the_wrong_length_is_an_error() -> None:
    def reward(log_extra: Any) -> list[float]:
        log_extra("length", [1])
        return [0.0, 0.0]

    with pytest.raises(TrainingError, match=r"log_extra\('length', \.\.\.\) was given 1 values for 2 completions"):
        call(reward)


# --- asynchronous functions ------------------------------------------------------------------------------------------


class Meeting:
    """Two asynchronous functions that each wait for the other: they return only if they run side by side."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()

    async def here(self, **kwargs: Any) -> list[float]:
        self.first.set()
        await asyncio.wait_for(self.second.wait(), 10)
        return [1.0, 1.0]

    async def there(self, **kwargs: Any) -> list[float]:
        self.second.set()
        await asyncio.wait_for(self.first.wait(), 10)
        return [2.0, 2.0]


def test_asynchronous_functions_run_side_by_side_and_keep_their_places() -> None:
    meeting = Meeting()
    rewards = call([meeting.here, right, lambda **kw: meeting.there(**kw)])
    assert rewards.values.tolist() == [[1.0, 1.0, 2.0], [1.0, 0.0, 2.0]]
    assert rewards.names == ("here", "right", "lambda")


def test_asynchronous_functions_work_where_a_loop_is_running_already() -> None:
    async def notebook() -> Rewards:
        meeting = Meeting()
        return call([meeting.here, meeting.there])

    assert asyncio.run(notebook()).values.tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_asynchronous_functions_find_the_same_loop_in_every_call() -> None:
    loops: list[Any] = []

    async def reward(**kwargs: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0, 0.0]

    caller = RewardCaller(reward)
    caller(TEXT, ["4", "6"], IDS)
    caller(TEXT, ["4", "6"], IDS)
    assert loops[0] is loops[1]


@pytest.mark.filterwarnings("error")
def test_an_asynchronous_function_that_raises_is_named_and_the_others_are_not_left_behind() -> None:
    done: list[str] = []

    async def judge(**kwargs: Any) -> list[float]:
        raise TimeoutError("no answer")

    async def other(**kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        done.append("other")
        return [0.0, 0.0]

    def broken(**kwargs: Any) -> list[float]:
        raise OSError("no disk")

    with pytest.raises(TrainingError, match="'judge' raised TimeoutError: no answer"):
        call([judge, other])
    assert done == ["other"]
    with pytest.raises(TrainingError, match="'broken' raised OSError"):
        call([other, broken])
    assert done == ["other"]


# --- functions that do not come back ---------------------------------------------------------------------------------


def hangs(**kwargs: Any) -> list[float]:
    time.sleep(600)
    return []


async def waits(**kwargs: Any) -> list[float]:
    await asyncio.sleep(600)
    return []


async def computes(**kwargs: Any) -> list[float]:
    while True:
        sum(range(100))


async def ignores_its_end(**kwargs: Any) -> list[float]:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(600)


async def answers(**kwargs: Any) -> list[float]:
    return [1.0, 1.0]


@pytest.mark.parametrize("function", [hangs, waits, computes, ignores_its_end])
def test_a_function_that_hangs_is_ended_by_name_and_nothing_of_it_stays(
    monkeypatch: pytest.MonkeyPatch, function: Any
) -> None:
    monkeypatch.setattr(event_loop, "_GRACE", 0.2)
    threads = set(threading.enumerate())
    caller = RewardCaller([answers, right, function], timeout=0.1)
    for _ in range(2):  # and the next call finds everything as it was
        with pytest.raises(
            TrainingError, match=f"'{function.__name__}' had not returned after 0.1 s, .* reward_timeout"
        ):
            caller(TEXT, ["4", "6"], IDS)
        left = {thread.name for thread in set(threading.enumerate()) - threads}
        assert left <= {"grouprl-watch"}
    assert RewardCaller(answers, timeout=60)(TEXT, ["4", "6"], IDS).values.tolist() == [[1.0], [1.0]]


def test_a_function_that_hangs_in_a_thread_that_is_not_the_main_one_is_ended() -> None:
    raised: list[BaseException] = []

    def train() -> None:
        try:
            RewardCaller([right, computing], timeout=0.1)(TEXT, ["4", "6"], IDS)
        except TrainingError as error:
            raised.append(error)

    def computing(**kwargs: Any) -> list[float]:
        while True:
            sum(range(100))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    assert "'computing' had not returned after 0.1 s" in str(raised[0])


async def leaves(**kwargs: Any) -> list[float]:
    sys.exit(3)


async def leaves_from_a_task(**kwargs: Any) -> list[float]:
    await asyncio.gather(asyncio.sleep(0), leaves())
    return [1.0, 1.0]


async def is_cancelled(**kwargs: Any) -> list[float]:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("function", "error"),
    [(leaves, "SystemExit: 3"), (leaves_from_a_task, "SystemExit: 3"), (is_cancelled, "CancelledError")],
)
def test_an_asynchronous_function_that_ends_the_process_is_an_error_like_any_other(function: Any, error: str) -> None:
    caller = RewardCaller([answers, function], timeout=60)
    for _ in range(2):
        with pytest.raises(TrainingError, match=f"'{function.__name__}' raised {error}"):
            caller(TEXT, ["4", "6"], IDS)


def test_the_thread_of_asynchronous_functions_ends_with_the_caller() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "grouprl-rewards"]

    before = threads()
    caller = RewardCaller(answers)
    caller(TEXT, ["4", "6"], IDS)
    (own,) = set(threads()) - set(before)
    del caller
    gc.collect()
    own.join(10)
    assert not own.is_alive()


def test_a_function_that_takes_unusually_long_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "_LEAST", 0.01)
    nobody = SimpleNamespace(add=lambda watch: None, remove=lambda watch: None)  # looks while it runs
    monkeypatch.setattr(watchdog, "_watcher", nobody)

    def slower(**kwargs: Any) -> list[float]:
        if seen:
            time.sleep(0.3)
        seen.append(1)
        return [1.0, 1.0]

    async def slower_too(**kwargs: Any) -> list[float]:
        if len(seen) > 1:
            await asyncio.sleep(0.3)
        return [1.0, 1.0]

    seen: list[int] = []
    caller = RewardCaller([right, slower, slower_too])
    for _ in range(2):
        caller(TEXT, ["4", "6"], IDS)
    slow = [message for message in caplog.messages if "usually takes" in message]
    assert len(slow) == 2
    for name, message in zip(("slower", "slower_too"), slow, strict=True):
        assert message.startswith(f"reward function {name!r} took 0.3")
        assert message.endswith("; set reward_timeout, in seconds, to end a run that waits for it")


# --- functions, names and weights ------------------------------------------------------------------------------------


def test_functions_are_called_by_their_names_and_equal_names_are_numbered() -> None:
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            return [0.0, 0.0]

    short = functools.partial(functools.partial(right), answer=[4, 4])
    assert RewardCaller([right, short, Judge(), right]).names == ("right", "right_2", "Judge", "right_3")


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([], "reward_funcs is empty"),
        ("my/reward-model", r"holds 'my/reward-model'; give grouprl\.lm\.rewards\.model\.RewardModel"),
        ([right, torch.nn.Linear(1, 1)], "holds a Linear; give"),
        ([None], "holds None, which cannot be called"),
        ([Meeting], r"holds the class Meeting; give an instance: Meeting\(\.\.\.\)"),
    ],
)
def test_what_is_no_reward_function_is_refused(functions: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RewardCaller(functions)


def test_weights_must_fit_the_functions() -> None:
    assert RewardCaller([right, right], [0.5, 2]).weights.tolist() == [0.5, 2.0]
    assert RewardCaller(right).weights.tolist() == [1.0]
    with pytest.raises(UsageError, match=r"has 1 numbers for 2 reward functions \(right, right_2\)"):
        RewardCaller([right, right], [1.0])
    with pytest.raises(UsageError, match="must be finite"):
        RewardCaller(right, [math.inf])
    with pytest.raises(UsageError, match=r"reward_weights=\[0.0, 0\]: with every weight 0 .* nothing is learned"):
        RewardCaller([right, right], [0.0, 0])
    assert RewardCaller([right, right], [0.0, 1]).weights.tolist() == [0.0, 1.0]  # one may only be watched
    assert RewardCaller(right, [0.0], alone=False).weights.tolist() == [0.0]  # where environments give rewards, all may


def test_the_total_is_the_weighted_sum_of_what_applies() -> None:
    values = torch.tensor([[1.0, 2.0], [math.nan, 3.0], [4.0, math.nan]], dtype=torch.float64)
    assert total(values).tolist() == [3.0, 3.0, 4.0]
    assert total(values, torch.tensor([0.5, 2.0])).tolist() == [4.5, 6.0, 2.0]


def test_no_completions_give_no_rewards() -> None:
    rewards = RewardCaller([lambda **kw: [], lambda **kw: []])([], [], [])
    assert rewards.values.shape == (0, 2)


def test_a_function_that_changes_what_it_is_given_changes_it_for_nobody_else() -> None:
    lock = threading.Lock()  # cannot be copied
    row = Prompt(0, [{"role": "user", "content": "2 + 3 ="}], {"answers": [["5"]], "lock": lock}, (1,))
    seen = []

    def change(prompts, completions, answers, **others: Any) -> list[float]:
        for prompt, completion, answer in zip(prompts, completions, answers, strict=True):
            seen.append((len(prompt), len(completion), len(answer[0])))
            prompt.append("x")
            completion.append("x")
            answer[0].append("6")
        assert others["lock"] == [lock] * len(prompts)
        return [1.0] * len(prompts)

    for _ in range(2):
        RewardCaller([change, change])([row, row], ["5", "6"], [[1], [2]])
    assert seen == [(1, 1, 1)] * 8
    assert row.columns["answers"] == [["5"]]


@pytest.mark.parametrize("name", ["reward", "rewards/first/mean", "loss", "eval_reward", "step", "clip_ratio/low_mean"])
def test_a_metric_that_is_logged_anyway_cannot_be_logged(name: str) -> None:
    def judge(completions, log_metric, **_: Any) -> list[float]:
        log_metric(name, 1.0)
        return [1.0] * len(completions)

    with pytest.raises(UsageError, match="logs a number of that name itself"):
        RewardCaller(judge)([Prompt(0, "a", {}, (1,))], ["b"], [[1]])


def test_other_metrics_are_anybodys_and_nan_is_left_out_of_their_means() -> None:
    def judge(completions, log_metric, **_: Any) -> list[float]:
        for name in ("train_accuracy", "eval_difficulty", "rewards/format_share", "completions/tags", "kl_ref"):
            log_metric(name, 1.0)
        log_metric("half", float("nan"))
        log_metric("half", 3.0)
        log_metric("none", float("nan"))
        return [1.0] * len(completions)

    metrics = RewardCaller(judge)([Prompt(0, "a", {}, (1,))], ["b"], [[1]]).metrics
    assert (metrics["half"], "none" in metrics, len(metrics)) == (3.0, False, 6)


def test_a_metric_must_not_be_infinite_and_a_reward_of_moderate_size() -> None:
    rows = [Prompt(0, "a", {}, (1,))]
    with pytest.raises(TrainingError, match=r"log_metric\('pace', inf\)"):
        RewardCaller(lambda completions, log_metric: log_metric("pace", float("inf")))(rows, ["b"], [[1]])
    with pytest.raises(TrainingError, match="at most 1e\\+18 in size"):
        RewardCaller(lambda completions: [1e200])(rows, ["b"], [[1]])
    with pytest.raises(TrainingError, match="raised SystemExit"):
        RewardCaller(lambda completions: sys.exit(3))(rows, ["b"], [[1]])


@pytest.mark.parametrize("name", ["\ud800", "", " ", "a\nb", "a\x00"])
def test_a_metric_has_a_name_that_files_and_trackers_can_hold(name: str) -> None:
    def judge(completions: Any, log_metric: Any, **_: Any) -> list[float]:
        log_metric(name, 1.0)
        return [1.0] * len(completions)

    with pytest.raises(TrainingError, match="give a name of printable text"):
        call(judge)
    judge.__name__ = f"judge\ud800{name}"
    assert RewardCaller(judge).names[0].isprintable()


def test_a_masked_entry_is_no_reward_of_0() -> None:
    with pytest.raises(TrainingError, match="returned masked"):
        call(lambda completions: [np.ma.masked, 1.0])


def test_a_sum_of_rewards_is_what_it_would_be_without_rounding() -> None:
    rewards = torch.tensor(
        [[0.1, 0.2, -0.3], [1.0, -0.9, 0.0], [0.1, 0.0, 0.0], [1 / 3, 1 / 3, 1e-9]], dtype=torch.float64
    )
    assert total(rewards).tolist()[:3] == [0.0, 0.1, 0.1]
    assert float(total(rewards)[3]) == pytest.approx(2 / 3 + 1e-9, rel=1e-11)
    of_all = torch.tensor([[float("inf"), 1.0], [float("nan"), 2.0], [0.0, 0.0], [1e-300, 1e-300]], dtype=torch.float64)
    assert total(of_all).tolist() == [float("inf"), 2.0, 0.0, 2e-300]
    assert total(torch.tensor([[1 / 3]], dtype=torch.float64)).tolist() == [1 / 3]  # one alone stays as it is


@pytest.mark.parametrize("advantage", ["outcome", "maxrl"])
def test_rewards_that_cancel_are_no_signal(advantage: str) -> None:
    config = GRPOConfig(advantage=advantage, num_generations=4)
    for rewards in ([[0.1, 0.2, -0.3]] + [[0.0] * 3] * 3, [[0.3, -0.1, -0.2]] + [[0.0] * 3] * 3):
        values = torch.tensor(rewards, dtype=torch.float64)
        assert groups_with_signal(config, values, torch.ones(3, dtype=torch.float64), 4).tolist() == [False]
