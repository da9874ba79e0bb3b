"""Expressions that would cost an algebra system minutes or gigabytes are refused, ordinary answers are not."""

import pytest

from data_prep.grading.bombs import exponents, refusal

BOMBS = {
    "9^{9^{9}}": "a power tower of numbers",
    "9^9^9": "a power tower of numbers",
    "9^{9^9}": "a power tower of numbers",
    "9**9**9": "a power tower of numbers",
    r"2^{\left(3^{4}\right)}": "a power tower of numbers",
    "x^{y^{z^{w}}}": "a power tower",
    "((9^{99})^{99})^{99}": "a power of powers",
    "{{9^{99}}^{99}}^{99}": "a power of powers",
    "(" * 30 + "x" + ")^2" * 30: "a power of powers",  # 2^30, and as many steps if each power read its group
    "2^{1000000007}": "an exponent or bound of more than 4 digits",
    "2^{-12345}": "an exponent or bound of more than 4 digits",
    "2^12345": "an exponent or bound of more than 4 digits",
    "2^{12,345}": "an exponent or bound of more than 4 digits",
    r"\sum_{k=1}^{100000} \frac{1}{k}": "an exponent or bound of more than 4 digits",
    r"\prod_{k=1}^{10 000} (1+x^k)": "an exponent or bound of more than 4 digits",
    "99999!": "a giant factorial",
    "9!!": "a giant factorial",
    "(9!)!": "a giant factorial",
    "(10^{6})!": "a giant factorial",
    "(123456+1)!": "a giant factorial",
    r"\binom{1000000}{500000}": "a giant binomial coefficient",
    r"\binom{10^9}{2}": "a giant binomial coefficient",
    "(" * 40 + "1" + ")" * 40: "nested more than 30 deep",
    r"\left(" * 31 + "1" + r"\right)" * 31: "nested more than 30 deep",
    "{" * 500: "nested more than 30 deep",
    "1+" * 501: "longer than 1000 characters",
}
ORDINARY = [
    "2^{1999}",
    "e^{x^2}",
    "2^{2^n}",
    "e^{-x^{2}/2}",
    r"\frac{10!}{(10-3)!}",
    r"\frac{n!}{(n-k)!}",
    "100!",
    r"\binom{20}{10}",
    r"(x+1)^{2008}(y+1)^{999}",
    r"\frac{4 \cdot 999^{4}}{27}",
    "10^{10}, 10^3",
    r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}",
    "x^{10}+x^9+x^8",
    "123456789",
    "",
]


@pytest.mark.parametrize("text", BOMBS, ids=lambda text: text[:24])
def test_a_bomb_is_refused_with_its_reason(text):
    assert refusal(text) == BOMBS[text]


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_answer_is_let_through(text):
    assert refusal(text) == ""


def test_an_exponent_is_its_group_or_runs_to_the_next_sign():
    assert exponents("x^{2+y^3} + 5^12*z^(a)") == ["2+y^3", "3", "12", "a"]
