"""What a person sees: plain lines word for word, the arithmetic of the time left, and the live table as text."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.plan import RunSpec
from launch import display as displays
from launch.display import LiveDisplay, Pace, PlainDisplay, Start

RECIPE = """\
question: q
model: {path: tiny}
tasks: {palindrome: {builtin: palindrome}}
train: {steps: 10}
kl: {estimator: k1, placement: reward, follows: reverse}
grid: {kl.beta: [0.1, 0.2]}
arms: {none: {kl: {placement: none}}, reverse: {}}
seeds: [1]
"""
LINE = {
    "step": 3,
    "train/accuracy": 0.51234,
    "kl_ref/k1_response": 0.0421,
    "entropy/token": 1.25,
    "perf/tokens_per_s": 812.4,
}


@pytest.fixture
def specs(tmp_path: Path) -> list[RunSpec]:
    (tmp_path / "study.yaml").write_text(RECIPE)
    return plan.expand(recipe.load(tmp_path / "study.yaml"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that stands still until it is told to go on."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(displays, "time", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (75, "1:15"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_a_clock_reads_minutes_and_hours(seconds: float, text: str):
    assert displays.clock(seconds) == text


def test_a_number_that_is_absent_or_was_nan_is_a_dash():
    assert displays.number({"a": 1.23456}, "a") == "1.235"
    assert displays.number({"a": None}, "a") == displays.number({}, "a") == "-"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"train/accuracy": 0.5, "train/score": 0.6, "eval/p/accuracy": 0.7}, ("accuracy", 0.5)),
        ({"eval/p/accuracy": 0.7, "eval/p/score": 1.4}, ("accuracy", 0.7)),
        ({"train/score": 0.6, "eval/p/score": 1.4}, ("score", 0.6)),  # the reward grades
        ({"eval/p/score": -0.5}, ("score", -0.5)),
        ({"eval/p/accuracy": None}, ("accuracy", None)),
        ({}, ("accuracy", None)),
    ],
)
def test_the_headline_is_accuracy_or_the_score_of_training_or_else_of_the_evaluation(line, expected):
    assert displays.headline(line) == expected
    assert displays.headline_text(line) == ("-" if expected[1] is None else f"{expected[1]:.3f}")


def test_the_time_left_counts_start_up_once_per_run(specs: list[RunSpec], clock):
    pace = Pace(runs=3)
    pace.start(specs[0], 0)
    clock.now += 30  # start-up and first line: no step yet
    pace.step({"step": 0})
    assert pace.startup_seconds == 30
    clock.now += 4
    pace.step({"step": 1})
    # 9 steps of 4 s, then two runs of 30 s and 10 steps of 4 s
    assert pace.left(specs[0]) == pytest.approx(9 * 4 + 2 * (30 + 10 * 4))
    clock.now += 9
    pace.step({"step": 2})
    # 0.8 * 4 + 0.2 * 9 = 5
    assert pace.step_seconds == pytest.approx(5)
    pace.end(specs[0])
    assert pace.left(specs[0]) == pytest.approx(8 * 5 + 1 * (30 + 10 * 5))
    pace.start(specs[0], 0)  # a second attempt at the same run, which counts once
    pace.end(specs[0])
    assert pace.left(specs[0]) == pytest.approx(10 * 5 + 1 * (30 + 10 * 5))
    pace.end(specs[1])  # done already
    assert pace.left(specs[2]) == pytest.approx(10 * 5)


def test_two_lines_seen_at_once_share_their_time_and_a_resumed_run_starts_where_it_was(specs: list[RunSpec], clock):
    pace = Pace(runs=1)
    pace.start(specs[0], 4)
    pace.step({"step": 5})
    clock.now += 6
    pace.step({"step": 7})
    assert pace.step_seconds == pytest.approx(3)  # two steps in 6 s
    assert pace.left(specs[0]) == pytest.approx(3 * 3)


def test_plain_lines(specs: list[RunSpec], clock, capsys: pytest.CaptureFixture[str]):
    shown = PlainDisplay(runs=1)
    shown.note("tiny model: step 35 of 140 (25 %)")
    shown.start(specs[0], 0)
    shown.step(specs[0], {"step": 0, "eval/palindrome/accuracy": 0.5})
    clock.now += 2
    shown.step(specs[0], LINE | {"step": 1})
    shown.end(specs[0], "done", "")
    shown.start(specs[1], 4)
    shown.end(specs[1], "failed", "ValueError: [x] is not [/y]")
    assert capsys.readouterr().out == (
        "tiny model: step 35 of 140 (25 %)\n"
        "none/palindrome/seed1: starting (10 steps)\n"
        "none/palindrome/seed1 step 0/10 accuracy 0.500 KL - entropy - - tokens/s\n"
        "none/palindrome/seed1 step 1/10 accuracy 0.512 KL 0.042 entropy 1.250 812 tokens/s left 0:18\n"
        "none/palindrome/seed1: done\n"
        "reverse/palindrome/beta=0.1/seed1: starting, resumed after step 4 (10 steps)\n"
        "reverse/palindrome/beta=0.1/seed1: failed: ValueError: [x] is not [/y]\n"
    )


def console() -> Console:
    return Console(file=io.StringIO(), width=100, height=40, force_terminal=True, color_system=None)


def last_frame(console: Console) -> list[str]:
    """Lines of what stands on the terminal at the end (from the last heading on)."""
    text = console.file.getvalue()
    return [line.rstrip() for line in text[text.rindex("arm ") :].splitlines()]


def test_the_live_table_at_its_end(specs: list[RunSpec], clock):
    where = console()
    with LiveDisplay(specs, where) as shown:
        shown.start(specs[0], 0)
        shown.step(specs[0], LINE | {"step": 10})
        shown.end(specs[0], "done", "")
        shown.start(specs[1], 4)
        shown.step(specs[1], LINE | {"step": 5})
        shown.end(specs[1], "failed", "ValueError: [x] is not [/y], see [link=a]")
        shown.skip(specs[2])
    rows = [line.split() for line in last_frame(where) if line.split()[:1] in (["arm"], ["none"], ["reverse"])]
    assert rows == [
        "arm task seed state step accuracy KL [nats] entropy tokens/s".split(),
        "none palindrome 1 done 10/10 0.512 0.042 1.250 812".split(),
        "reverse beta=0.1 palindrome 1 failed 5/10 0.512 0.042 1.250 812".split(),
        "reverse beta=0.2 palindrome 1 done 10/10 - - - -".split(),
    ]
    # brackets are text, not Rich's markup
    assert "reverse/palindrome/beta=0.1/seed1: failed: ValueError: [x] is not [/y], see [link=a]" in " ".join(
        where.file.getvalue().split()
    )


def test_the_live_display_shows_the_current_run_and_the_time_left(specs: list[RunSpec], clock):
    where = console()
    with LiveDisplay(specs[:1], where) as shown:
        shown.start(specs[0], 0)
        shown.step(specs[0], LINE | {"step": 1})
        clock.now += 5
        shown.step(specs[0], LINE | {"step": 2})
        shown._live.refresh()
    assert "none seed 1" in where.file.getvalue()
    assert "0:40 left" in where.file.getvalue()  # 8 steps of 5 s


def test_the_start_shows_what_is_done_for_how_long_how_long_it_usually_takes_and_the_log(
    specs: list[RunSpec], capsys: pytest.CaptureFixture[str]
):
    """On a terminal as it goes on, elsewhere a line for each thing that is done."""
    first, second, third = (
        Start(doing="starting vLLM", seconds=42, usual=75.4, log=Path("runs/[x]/log")),
        Start(doing="starting vLLM", seconds=43, usual=75.4, log=Path("runs/[x]/log")),
        Start(doing="step 1, sampling", seconds=76, usual=None, log=Path("runs/[x]/log")),
    )
    where = console()
    with LiveDisplay(specs[:1], where) as shown:
        shown.start(specs[0], 0)
        shown.starting(specs[0], first)
        shown._live.refresh()
    assert "none: starting vLLM 0:42 of about 1:15, log: runs/[x]/log" in where.file.getvalue()
    plain = PlainDisplay(1)
    for start in (first, second, third):
        plain.starting(specs[0], start)
    assert capsys.readouterr().out.splitlines() == [
        f"{specs[0].run_id}: starting vLLM 0:42 of about 1:15, log: runs/[x]/log",
        f"{specs[0].run_id}: step 1, sampling 1:16, log: runs/[x]/log",
    ]


def test_an_error_inside_leaves_the_terminal_with_its_cursor(specs: list[RunSpec]):
    where = console()
    with pytest.raises(RuntimeError), LiveDisplay(specs, where):
        assert "\x1b[?25l" in where.file.getvalue()  # hidden
        raise RuntimeError
    assert where.file.getvalue().rindex("\x1b[?25h") > where.file.getvalue().rindex("\x1b[?25l")


def test_every_arm_name_and_grid_value_is_text(specs: list[RunSpec]):
    strange = replace(specs[1], grid=(("train.x", ["[red]", "[/]"]),))
    where = console()
    with LiveDisplay([strange], where):
        pass
    assert "reverse x=" in where.file.getvalue()
