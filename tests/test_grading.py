"""The grader as a whole: nothing that a model writes hangs it, breaks it or fools it; real answers grade right.

The real files are DeepScaleR's components (tests/real_data.py).
"""

from __future__ import annotations

import json
import random
import string
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from real_data import agentica

from data_prep.grading import worker
from data_prep.grading.bombs import refusal
from data_prep.grading.mathematics import POOL, _verified
from data_prep.grading.notation import tidy
from data_prep.grading.rationals import number
from data_prep.rewards import compute_score

math_verify = pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")

HANG_SECONDS = 60.0
"""Far from what a call takes, which has two seconds, and from what a hang would."""
FILES = ("train/aime", "train/math", "test/aime", "test/amc", "test/math", "test/minerva", "test/olympiad_bench")

SEEDS = [
    r"\frac{1}{2}",
    r"x^2+2x+1",
    r"\sqrt{3}-\frac{\pi}{4}",
    r"(1, 2] \cup \{5\}",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"2516_8",
    r"80\%",
    r"1 \le x < 5",
    r"\binom{10}{3} + 5!",
    r"\log_2 8 + \sin(\pi/6)",
    r"3.5 \times 10^{-7} \text{ kg}",
    r"\lfloor x \rfloor",
    r"i^2 + |z|",
    "1,234,567",
]
PIECES = [
    *string.printable,
    *(r"\boxed{", "}", "{", r"\{", r"\frac", r"\sqrt", "^{", "_{", r"\left(", r"\right)", "$", "$$", r"\[", r"\text{"),
    *("<think>", "</think>", "<answer>", "</answer>", r"\sum_{k=1}^{", r"\int_0^1", r"\lim_{x \to 0}", "!", "^", "**"),
    *("\u2212", "\u0665", "\u00b2", "\uff15", "\u200b", "\u202e", "\ud800", "\x00", "\x1b[2J", "\u0301", "\U0001d7d3"),
    *("9", "99", "10^{9}", "x", "=", "<", r"\pm", r"\infty", "nan", "inf", "1e999", "0/0", r"\frac{1}{0}", "lambda"),
]
BOMBS = [
    "9^{9^{9}}",
    "9^9^9^9",
    "((9^{99})^{99})^{99}",
    "(" * 30 + "x" + ")^2" * 30,
    "2^{1000000007}",
    "99999999!",
    "((9!)!)!",
    r"\binom{1000000000}{500000000}",
    r"\sum_{k=1}^{1000000000} \frac{1}{k}",
    r"\sum_{k=1}^{9999} \sum_{j=1}^{9999} \frac{1}{kj+1}",
    r"\prod_{k=1}^{9999} (1+x^k)",
    r"\int_0^1 \frac{\sin(x^x)}{\ln(x+\sqrt{x})} dx",
    "(x+1)^{2008}(y+1)^{999}(z+1)^{999}",
    "(" * 150 + "1" + ")" * 150,
    r"\sqrt{" * 29 + "2" + "}" * 29,
    "1" * 5000,
    "+".join(f"x_{{{n}}}^{{{n}}}" for n in range(90)),
    r"\frac{1}{" * 25 + "x" + "}" * 25,
]
CODE = [
    r"\pi*0+len(open('{path}','w').name)",
    r"__import__('os').system('touch {path}')",
    r"\text{{__import__('os').system('touch {path}')}}",
    r"exec(\"open('{path}','w')\")",
    r"\begin{{pmatrix}} open('{path}','w') \end{{pmatrix}}",
    r"Symbol('x').__class__.__init__.__globals__['os'].system('touch {path}')",
    r"(lambda: open('{path}','w'))()",
    r"f\left(open('{path}','w')\right)",
    r"\sqrt{{open('{path}','w')}}+1",
    r"1;import os;os.system('touch {path}')",
    r"\input{{{path}}} \write18{{touch {path}}}",
]


def mutated(rng: random.Random) -> str:
    """An answer with some characters cut out, doubled, swapped or put in."""
    text = list(rng.choice(SEEDS))
    for _ in range(rng.randint(0, 6)):
        place = rng.randrange(len(text) + 1)
        text[place : place + rng.randint(0, 2)] = rng.choices(PIECES, k=rng.randint(0, 3))
    return "".join(text)


def wrapped(answer: str, rng: random.Random) -> str:
    forms = (r"\boxed{%s}", r"x</think> so \boxed{%s}.", r"\boxed{\boxed{%s}", r"$\boxed{%s}$", r"\boxed{1} \boxed{%s")
    return rng.choice(forms).replace("%s", answer)


def fuzz(path: Path, count: int) -> Iterator[tuple[str, str]]:
    """Right answers and responses: `count` of them, the same every time."""
    rng = random.Random(4)
    fixed = [*BOMBS, *(code.format(path=path) for code in CODE), *("{" * 2**20, r"\boxed{" * 2**17, "1+" * 2**19)]
    for answer in fixed:
        yield rng.choice(SEEDS), rf"\boxed{{{answer}}}"
    for _ in range(8):
        yield rng.choice(SEEDS), "".join(rng.choices(PIECES, k=2**18))
    for _ in range(count - len(fixed) - 8):
        answer = mutated(rng) if rng.random() < 0.7 else "".join(rng.choices(PIECES, k=rng.randint(0, 40)))
        yield rng.choice(SEEDS), wrapped(answer, rng)


class Watch(threading.Thread):
    """The largest resident memory of the pool's processes, looked at all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for pid in POOL.processes():
                try:
                    self.largest = max(self.largest, psutil.Process(pid).memory_info().rss)
                except psutil.Error:
                    continue


def start() -> None:
    """The program's own start is no part of a call: a worker is kept once the program has loaded everything."""
    while len(POOL.processes()) < 2:
        POOL.is_right(["x+1"], "1+x")


@pytest.mark.slow
@pytest.mark.parametrize("responses", [300, pytest.param(3000, marks=pytest.mark.full(minutes=2))])
def test_nothing_that_a_model_writes_raises_hangs_or_leaves_anything(tmp_path, monkeypatch, responses):
    monkeypatch.chdir(tmp_path)
    start()
    verified, watch = _verified.cache_info().misses, Watch()
    watch.start()
    count, ungraded, slowest = 0, 0, (0.0, "")
    for gold, response in fuzz(tmp_path / "made", responses):
        begun = time.monotonic()
        result = compute_score("deepscaler", response, gold)
        slowest = max(slowest, (time.monotonic() - begun, response[:200]))
        assert list(result) == ["score", "acc", "pred", "format_ok", "truncated", "timeout", "echoed"]
        assert not (result["score"] and result["timeout"])
        count += 1
        ungraded += result["timeout"] == 1.0
    watch.done.set()
    verified = _verified.cache_info().misses - verified
    most = watch.largest / 2**20
    print(f"\n{count} responses, {verified} verified, {ungraded} ungraded")
    print(f"slowest {slowest[0]:.2f} s, most memory {most:.0f} MiB")
    assert count == responses
    assert slowest[0] < HANG_SECONDS, slowest[1]
    assert 0 < watch.largest < worker.MEMORY_BYTES + 300 * 2**20  # and what the program itself takes
    assert list(tmp_path.iterdir()) == []
    assert verified > responses // 20 and ungraded > 5  # the responses reached every part of the grader
    assert compute_score("deepscaler", r"\boxed{x+1}", "1+x")["score"] == 1.0


def test_an_answer_that_is_the_right_one_with_decoration_is_right():
    for gold in SEEDS:
        for form in (r"\boxed{%s}", r"<think>\boxed{7}</think>$$\boxed{ %s }$$", r"\boxed{7}, or rather \boxed{$%s$}."):
            assert compute_score("deepscaler", form.replace("%s", gold), gold)["score"] == 1.0, gold


def goldens(name: str) -> list[str]:
    """The answers of a real file, each of several by itself; null and empty ones left out, as the data step does."""
    answers = [row["answer"] for row in json.loads((agentica() / f"{name}.json").read_text())]
    listed = [answer if isinstance(answer, list) else [answer] for answer in answers]
    return [str(answer) for answers in listed for answer in answers if answer is not None and str(answer).strip()]


@pytest.mark.parametrize("name", FILES)
def test_every_golden_answer_grades_itself_as_right(name):
    wrong = [gold for gold in goldens(name) if compute_score(name, rf"So \boxed{{{gold}}}.", gold)["score"] != 1.0]
    assert wrong == []


@pytest.mark.parametrize("name", FILES)
def test_one_more_than_a_golden_number_is_wrong(name):
    numbers = {gold: number(tidy(gold)) for gold in goldens(name)}
    found = {gold: value.value + 1 for gold, value in numbers.items() if value}
    fooled = [
        gold for gold, more in found.items() if compute_score(name, rf"\boxed{{{latex(more)}}}", gold)["score"] != 0.0
    ]
    assert fooled == []
    assert len(found) >= 0.1 * len(numbers)


def latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@pytest.mark.parametrize("name", FILES)
def test_no_golden_answer_is_refused_as_a_bomb(name):
    assert [gold for gold in goldens(name) if refusal(tidy(gold))] == []


BETTER = [
    # right answer, answer, our verdict; math-verify, reading the whole response, says the contrary
    (r"80\%", "80", True),  # with the ANTLR of a verl environment it cannot read a percent sign
    ("1234", r"1\,234", True),
    ("2516_8", "2516_9", False),
    (r"4.6 \times 10^{-24}", "0.0", False),
]


@pytest.mark.parametrize(("gold", "answer", "ours"), BETTER)
def test_where_the_verdict_is_better_than_math_verifys(gold, answer, ours):
    assert (compute_score("x", rf"\boxed{{{answer}}}", gold)["score"] == 1.0) is ours
    assert math_verifys(rf"\boxed{{{answer}}}", gold) is not ours


def test_no_box_in_finished_reasoning_is_no_answer_where_math_verify_takes_any_number():
    response = "Step 7 gives </think> I do not know, maybe 7"
    assert compute_score("x", response, "7")["score"] == 0.0
    assert math_verifys(response, "7")


@pytest.mark.parametrize("name", FILES)
def test_verdicts_on_real_answers_are_math_verifys(name):
    start()
    golds = random.Random(1).sample(goldens(name), 30)
    others = [golds[-1], *golds[:-1]]
    answers = [*golds, *(gold.replace(r"\frac", r"\dfrac") for gold in golds), *others]
    pairs = [(gold, rf"So \boxed{{{answer}}}.") for gold, answer in zip(golds * 3, answers, strict=True)]
    ours = [compute_score(name, response, gold)["score"] == 1.0 for gold, response in pairs]
    assert [pair for pair, we in zip(pairs, ours, strict=True) if we != math_verifys(pair[1], pair[0])] == []


def math_verifys(response: str, gold: str) -> bool:
    """What math-verify says of the whole response, as its documentation calls it."""
    return math_verify.verify(math_verify.parse(rf"\boxed{{{gold}}}"), math_verify.parse(response))
