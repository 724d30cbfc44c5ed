import pytest

from grouprl.lm.tasks.untrusted import is_algebra, is_literal, is_sum

HOSTILE = [
    "__import__('os').system('true')",
    "().__class__.__base__.__subclasses__()",
    "eval('1')",
    "open('x', 'w')",
    "(lambda: 1)()",
    "[x for x in [1]]",
    "9**9**9",
    "9**(9**9)",
    "2**(99999999)",
    "factorial(99999)",
    "x.subs(x, 1)",
    "(x).diff",
    "S('x')",
    "exit()",
    "'a' * 10**9",
    "1" * 2000,
    "[" * 2000,
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("allows", [is_literal, is_sum, is_algebra])
def test_what_could_run_or_compute_for_ever_is_refused(text, allows):
    assert not allows(text)


@pytest.mark.parametrize("text", ["[[1, 0], [0, 1]]", "['a', 'b']", "ABCD", "1 2 3\n4 5 6", "_ Q\nQ _", "-5", ""])
def test_literals_and_plain_words_may_pass(text):
    assert is_literal(text)


@pytest.mark.parametrize("text", ["49*(85 - 1)/14 - 42 - 73", "1", "((1))"])
def test_sums_may_pass(text):
    assert is_sum(text)


@pytest.mark.parametrize("text", ["x + 1", "8 ** 2", "7 // 2", "3!", "1e9", "1, 2"])
def test_what_is_more_than_a_sum_is_refused(text):
    assert not is_sum(text)


@pytest.mark.parametrize(
    "text",
    [
        "-5*X**9 - 2*X**6/3 + 4*X**3 + C",
        "-4*(-2*x - 8)**(3/2)/3 + C",
        "-exp(x)*sin(x) + E**(x)*cos(2*x) + C",
        "E**(-2*x)",
        "x**(-1) + sqrt(x) - 0.5*log(x)",
    ],
)
def test_the_algebra_that_is_asked_for_may_pass(text):
    assert is_algebra(text)


@pytest.mark.parametrize(
    "text", ["x**100", "x**2**3", "((x**9)**9)**9 + (x + 1)**2", "x**(y**2)", "foo(x)", "x_1", "x[0]"]
)
def test_other_algebra_is_refused(text):
    assert not is_algebra(text)
