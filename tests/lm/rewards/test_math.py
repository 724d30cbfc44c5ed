import importlib.machinery
import threading

import pytest

from grouprl.errors import UsageError
from grouprl.lm.rewards import math as under_test
from grouprl.lm.rewards.math import math_accuracy


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(under_test, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"math_accuracy needs math-verify; run: .*pip install .*\[math\]"):
        math_accuracy(["p"], ["1"], answer=["1"])


def test_a_missing_column_is_named(monkeypatch):
    monkeypatch.setattr(under_test, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(UsageError, match="math_accuracy needs the column 'answer'; it was given: label"):
        math_accuracy(["p"], ["1"], label=["1"])


class TestInstalled:
    @pytest.fixture(autouse=True)
    def _needs_the_package(self):
        pytest.importorskip("math_verify")

    @pytest.mark.parametrize(
        ("answer", "reply", "right"),
        [
            ("1/2", "The answer is 0.5", 1.0),
            ("1/2", "so $x = \\frac{2}{4}$", 1.0),
            ("1/2", "\\boxed{\\frac{1}{2}} of 77 cakes", 1.0),
            ("1/2", "2", 0.0),
            ("1/2", "one half", 0.0),
            ("1/2", "", 0.0),
            ("x^2+1", "\\boxed{1 + x^2}", 1.0),
            ("$x^2+1$", "$x^2$", 0.0),
            ("\\frac{\\sqrt{3}}{2}", "$\\sqrt{3}/2$", 1.0),
            ("He sells 9*2 of them.\n#### 18", "#### 18", 1.0),
            ("1,234", "It costs 1234 dollars.", 1.0),
            ("\\text{east}", "\\boxed{\\text{east}}", 1.0),
            (18, "18", 1.0),
            ("there is no number here", "\\boxed{3}", None),
            ("", "3", None),
            (None, "3", None),
        ],
    )
    def test_expressions_are_compared_by_value(self, answer, reply, right):
        assert math_accuracy(["p"], [reply], answer=[answer]) == [right]
        assert math_accuracy(["p"], [[{"role": "assistant", "content": reply}]], solution=[answer]) == [right]

    def test_it_works_outside_the_main_thread(self):
        got = []
        thread = threading.Thread(target=lambda: got.extend(math_accuracy(["p"], ["0.5"], answer=["1/2"])))
        thread.start()
        thread.join()
        assert got == [1.0]

    def test_a_comparison_without_end_is_wrong_and_the_next_one_is_made(self, monkeypatch):
        monkeypatch.setattr(under_test._worker, "_timeout", 2.0)
        replies = ["\\boxed{9^{9^{9}}}", "\\boxed{2^{10^{12}}}", "\\boxed{3}"]
        assert math_accuracy(["p"] * 3, replies, answer=["3"] * 3) == [0.0, 0.0, 1.0]

    def test_only_the_end_of_a_long_reply_is_read(self):
        assert math_accuracy(["p"], ["\\boxed{3} " + "la " * 100_000], answer=["3"]) == [0.0]
        assert math_accuracy(["p"], ["la " * 100_000 + "\\boxed{3}"], answer=["3"]) == [1.0]

    def test_a_reply_is_never_run(self, tmp_path):
        code = f"__import__('pathlib').Path({str(tmp_path / 'trace')!r}).touch()"
        math_accuracy(["p"] * 3, [code, f"${code}$", f"\\boxed{{{code}}}"], answer=["3"] * 3)
        assert not (tmp_path / "trace").exists()
