import json
import sys

import pytest

from grouprl.errors import UsageError
from grouprl.lm import tasks
from grouprl.lm.tasks.reasoning_gym import ReasoningGym, _packed, _unpacked


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    with pytest.raises(UsageError, match=r"'?reasoning-gym:chain_sum needs .*pip install .*\[tasks\]"):
        ReasoningGym("chain_sum", '{"min_terms": 7}')


def test_entries_survive_json_with_their_tuples_and_keys():
    entry = {"a": (1, [2, (3,)]), 4: {(5, 6): None}, "dict": {}, "tuple": []}
    assert _unpacked(json.loads(json.dumps(_packed(entry)))) == entry


class TestInstalled:
    @pytest.fixture(autouse=True)
    def _needs_the_package(self):
        pytest.importorskip("reasoning_gym")

    @pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "countdown", "n_queens", "simple_integration"])
    def test_the_right_answer_earns_1_and_the_prompt_asks_for_it(self, name):
        task = tasks.get(f"reasoning-gym:{name}")
        rows = tasks.dataset(task, "train", 3)
        entries = [row["entry"] for row in rows]
        assert task.reward(None, [row["answer"] for row in rows], entry=entries) == [1.0] * 3
        replies = [[{"role": "assistant", "content": f"Hm. <answer>{row['answer']}</answer> !"}] for row in rows]
        assert task.reward(None, replies, entry=entries) == [1.0] * 3
        assert max(task.reward(None, ["", "no idea", "<answer></answer>"], entry=entries)) < 0.5
        assert [m["role"] for m in rows[0]["prompt"]] == ["system", "user"]
        assert rows[0]["prompt"][1]["content"] == rows[0]["question"]
        assert task.reward.__name__ == f"reasoning_gym:{name}"

    def test_rows_follow_from_the_seed_and_splits_are_disjoint(self):
        task = tasks.get("reasoning-gym:chain_sum", min_digits=1, max_digits=1, min_terms=2, max_terms=2)
        assert tasks.dataset(task, "train", 5, 1) == tasks.dataset(task, "train", 5, 1)
        assert tasks.dataset(task, "train", 5, 1) != tasks.dataset(task, "train", 5, 2)
        train = {row["question"] for row in tasks.dataset(task, "train", 300)}
        assert train & {row["question"] for row in tasks.dataset(task, "eval", 10)} == set()

    def test_options_reach_the_data_set_and_wrong_ones_are_refused(self):
        task = tasks.get("reasoning-gym:chain_sum", min_terms=5, max_terms=5)
        assert all(
            row["question"].count("+") + row["question"].count("-") >= 4 for row in tasks.dataset(task, "train", 5)
        )
        with pytest.raises(UsageError, match="chain_sum does not take the options"):
            tasks.get("reasoning-gym:chain_sum", terms=5)
        with pytest.raises(UsageError, match="chain_sum does not take the options"):
            tasks.get("reasoning-gym:chain_sum", min_terms=5, max_terms=2)
        with pytest.raises(UsageError, match="has no option 'seed'"):
            tasks.get("reasoning-gym:chain_sum", seed=5)
        with pytest.raises(UsageError, match="no data set 'chain_sums'; did you mean chain_sum"):
            tasks.get("reasoning-gym:chain_sums")

    def test_a_reply_its_scorer_cannot_read_scores_0(self):
        task = tasks.get("reasoning-gym:prime_factorization")  # its scorer raises at words
        row = tasks.dataset(task, "train", 1)[0]
        assert task.reward(None, ["two times three"], entry=[row["entry"]]) == [0.0]

    @pytest.mark.parametrize(
        "name", ["countdown", "puzzle24", "polynomial_multiplication", "n_queens", "spiral_matrix", "string_insertion"]
    )
    def test_a_reply_is_never_run(self, name, tmp_path):
        task = tasks.get(f"reasoning-gym:{name}")
        row = tasks.dataset(task, "train", 1)[0]
        trace = tmp_path / "trace"
        task.reward(None, [f"__import__('pathlib').Path({str(trace)!r}).touch()"], entry=[row["entry"]])
        assert not trace.exists()

    def test_a_scorer_that_would_run_any_reply_is_refused(self):
        with pytest.raises(UsageError, match="not safe"):
            tasks.get("reasoning-gym:composite")

    def test_a_scorer_unknown_to_evaluate_replies_is_refused(self, monkeypatch):
        monkeypatch.delitem(sys.modules["grouprl.lm.tasks.reasoning_gym"]._EVALUATING, "countdown")
        with pytest.raises(UsageError, match="not safe"):
            tasks.get("reasoning-gym:countdown")
