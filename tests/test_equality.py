"""Answers compared as text, numbers and tuples: what is decided, and what is left to algebra (None)."""

from fractions import Fraction

import pytest

from data_prep.grading.equality import canonical, compare
from data_prep.grading.notation import tidy
from data_prep.grading.rationals import Number, number

SAME = [
    ("5", "5"),
    ("5", "05"),
    ("097", "97"),
    ("5", "5.0"),
    ("142.0", "142"),
    ("5", "$5$"),
    ("5", r"\(5\)"),
    ("5", "5."),
    ("5", "{5}"),
    ("-5", "\u22125"),  # MINUS SIGN
    ("1234", "1,234"),
    ("1234", r"1\,234"),
    ("1234", r"1{,}234"),
    (r"10,\!080", "10080"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{3}", "0.333333"),
    (r"1\frac{1}{2}", "1.5"),
    (r"1\frac{1}{2}", "1 1/2"),
    ("100000", "10^5"),
    ("100000", "1.0 \u00d7 10^{5}"),
    (r"4.6 \times 10^{-24}", "4.6e-24"),
    (r"30^\circ", "30"),
    (r"30^{\circ}", "30\u00b0"),
    (r"\$5.50", "5.5"),
    (r"80\%", "80"),
    (r"80\%", "0.8"),
    (r"90\text{ units}", "90"),
    (r"5\text{ cm}^2", "5"),
    (r"\text{East}", "east"),
    (r"\text{(B)}", "B"),
    ("40_9", "40_{9}"),
    ("40_9", "40"),
    ("40_9", r"40_{\text{nine}}"),
    (r"\left( 3, 4 \right)", "(3,4)"),
    (r"(\frac12, 2)", "(0.5, 2)"),
    ("2,4,3", "3, 2, 4"),
    (r"\{1,2\}", "2,1"),
    ("x + 1", "x+1"),
    (r"\pi r", r"\pi  r"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", ""),
    ("", ""),
    ("5", "-5"),
    ("5", "5000"),
    (r"\frac{1}{3}", "0.333"),
    ("2", "2.0000001"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    ("11", "1/1"),
    (r"4.6 \times 10^{-24}", "0"),
    (r"4.6 \times 10^{-24}", r"4.7 \times 10^{-24}"),
    ("0.0000001", "0.0000002"),
    ("2516_8", "2516_9"),
    ("40_9", "41_9"),
    ("4", "5_9"),
    (r"80\%", "8"),
    ("(3,4)", "(4,3)"),
    ("(3,4)", "(3,4,4)"),
    ("5", "(5,5)"),
    ("(5,6)", "5"),
    ("2", "1,2,3"),
    ("1,2", "2"),
    ("(x,2)", "(2,x)"),
    ("x+1", "x+2"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("54", "x^6-5832"),
    ("x", "X"),
    ("2,4,3", "2,4"),
]
UNDECIDED = [
    ("x+1", "1+x"),
    (r"\sin x", r"\cos x"),
    (r"\sqrt{4}", "2"),
    (r"(\sqrt{4},2)", "(2,2)"),
    ("x=5", "y=2x"),
    ("2", "\\sin x"),
    ("5", "\u0665"),  # ARABIC-INDIC DIGIT FIVE is no digit here
    ("5", "\u00b2"),  # SUPERSCRIPT TWO
    ("1", r"\frac{1}{0}"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_answer_written_differently(gold, answer):
    assert compare(tidy(gold), tidy(answer)) is True
    assert compare(tidy(answer), tidy(gold)) is True


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_a_different_answer(gold, answer):
    assert compare(tidy(gold), tidy(answer)) is False


@pytest.mark.parametrize(("gold", "answer"), UNDECIDED)
def test_what_text_and_numbers_cannot_decide(gold, answer):
    assert compare(tidy(gold), tidy(answer)) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1.50", Fraction(-3, 2)),
        (".5", Fraction(1, 2)),
        ("1,234,567.5", Fraction(2469135, 2)),
        (r"-\frac{-1}{-2}", Fraction(-1, 2)),
        (r"2\cdot10^{-2}", Fraction(1, 50)),
        ("1E3", Fraction(1000)),
        (r"-1\frac{1}{2}", Fraction(-3, 2)),
    ],
)
def test_a_number_is_exact(text, value):
    assert number(tidy(text)).value == value


@pytest.mark.parametrize(
    "text", ["", "x", "1.2.3", "1,2", "12,34", "1/0", r"\frac{1}{0}", "--1", "e5", "1_2", "9" * 401]
)
def test_other_text_is_no_number(text):
    assert number(tidy(text)) is None


def test_a_percentage_is_marked():
    assert number(tidy(r"50\%")) == Number(Fraction(50), False, True)
    assert number(tidy("50")) == Number(Fraction(50), False, False)


def test_words_are_compared_without_case_and_symbols_with_it():
    assert canonical(tidy(r"\text{Evelyn}")) == "evelyn"
    assert canonical("X") == "X"
