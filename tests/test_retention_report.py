"""The report's tables of retained skills and of evaluations, from literal run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from klreg_verl.analysis import report, retention
from klreg_verl.analysis.runs import load
from klreg_verl.analysis.summary import group_runs


def write_seed(folder: Path, seed: int, values: list[float | None], arm: str = "none") -> Path:
    """A run of two steps whose validations had these accuracies at steps 0, 1 and 2."""
    lines = [{"step": step} for step in range(3)]
    for line, value in zip(lines, values, strict=True):
        line |= {"train/accuracy": 0.5} if line["step"] else {}
        line |= {} if value is None else {"retention/spell": value}
    return write_run(folder, arm, lines, seed=seed)


def evaluation(run: Path, step: int, accuracy: float, **changes: Any) -> None:
    """A record of `klreg eval` beside its table, whose content the report does not read."""
    share = {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "error": 0.05}
    record = {
        "task": "palindrome",
        "step": step,
        "prompts": 64,
        "samples": 16,
        "temperature": 0.6,
        "accuracy": share,
        "pass": {"1": share, "16": {**share, "mean": 0.95}},
        "maj": {"1": share, "16": share},
        "distinct_right": 2.345,
        **changes,
    }
    (run / "evals").mkdir(exist_ok=True)
    stem = run / "evals" / f"step{step}-palindrome-abc"
    stem.with_suffix(".json").write_text(json.dumps(record))
    stem.with_suffix(".parquet").touch()


def test_a_skill_is_compared_end_against_end_and_with_the_pooled_start(tmp_path: Path):
    # one starting model, measured as 0.9 by seed 1 (in both arms alike) and as 0.5 by seed 2: pooled 0.7, error 0.2
    write_seed(tmp_path / "study", 1, [0.9, None, 0.5])
    write_seed(tmp_path / "study", 2, [0.5, 0.4, 0.6])
    write_seed(tmp_path / "study", 1, [0.9, None, 0.6], arm="reverse")
    write_seed(tmp_path / "study", 2, [0.5, None, 0.61], arm="reverse")
    groups = group_runs(load(tmp_path / "study"), ["none", "reverse"])
    (none, (spell,)), (reverse, (held,)) = retention.retained(groups)
    assert (none.label, reverse.label) == ("none", "reverse")
    # after: 0.5 and (0.4 + 0.6) / 2 = 0.5, no error; so the change's error is the pooled start's, 0.2
    assert (spell.before.mean, spell.after.mean, spell.change.mean) == pytest.approx((0.7, 0.5, -0.2))
    assert spell.change.standard_error == pytest.approx(0.2)
    # end against end 0.1 and 0.11: a start that differs by 0.4 between seeds does not enter
    assert held.against.mean == pytest.approx(0.105) and held.against.standard_error == pytest.approx(0.005)
    assert retention.retained_cells([spell]) == [("spell", "0.70 ± 0.20", "0.50 ± 0.00", "−0.20 ± 0.20", "–")]


def test_starts_of_other_weights_are_not_pooled(tmp_path: Path):
    for arm, sha, value in (("none", "a", 0.9), ("reverse", "b", 0.3)):
        lines = [{"step": 0, "retention/spell": value}, {"step": 1, "train/accuracy": 0.5, "retention/spell": 0.5}]
        write_run(tmp_path / "study", arm, lines, provenance={"model": {"sha256": sha}})
    groups = group_runs(load(tmp_path / "study"), ["none", "reverse"])
    assert [skills[0].before.mean for _, skills in retention.retained(groups)] == [0.9, 0.3]


def test_a_run_that_failed_is_not_in_after(tmp_path: Path):
    write_seed(tmp_path / "study", 1, [0.9, None, 0.5])
    failed = write_seed(tmp_path / "study", 2, [0.1, 0.0, None])
    (failed / "state.json").write_text('{"status": "failed"}')
    write_seed(tmp_path / "study", 3, [0.3, None, None])  # finished, never measured again
    ((_, (spell,)),) = retention.retained(group_runs(load(tmp_path / "study")))
    # the start is the same weights in all three: (0.9 + 0.1 + 0.3) / 3; after is the first run's alone
    assert (spell.before.mean, spell.after.mean) == pytest.approx((1.3 / 3, 0.5))


def test_evaluations_are_listed_by_task_run_and_step(tmp_path: Path):
    run = write_seed(tmp_path / "study", 1, [None] * 3)
    change = {"solved_new": [3, 4], "solved_lost": [7], "by_chance": 0.84}
    evaluation(run, 20, 0.6, against=change)
    evaluation(run, 0, 0.4)
    rows = [retention.cells(row, "none") for row in retention.evaluated(load(tmp_path / "study"))]
    assert rows == [
        ["none", "0", "64 x 16 at T = 0.6", "0.400 [0.300, 0.500]", "0.950 [0.300, 0.500]", "0.400 [0.300, 0.500]"]
        + ["2.35", "–", "–"],
        ["none", "20", "64 x 16 at T = 0.6", "0.600 [0.500, 0.700]", "0.950 [0.500, 0.700]", "0.600 [0.500, 0.700]"]
        + ["2.35", "2 (0.8)", "1 (0.8)"],
    ]
    assert len(rows[0]) == len(retention.HEAD)


def test_an_evaluation_without_its_table_or_with_a_broken_record_is_left_out(tmp_path: Path):
    run = write_seed(tmp_path / "study", 1, [None] * 3)
    for step in (0, 10, 20, 30):
        evaluation(run, step, 0.5)
    (run / "evals" / "step0-palindrome-abc.parquet").unlink()  # a resumed run took it back
    (run / "evals" / "step10-palindrome-abc.json").write_text("{")
    (run / "evals" / "step20-palindrome-abc.json").write_text('{"task": "palindrome"}')
    assert [row.step for row in retention.evaluated(load(tmp_path / "study"))] == [30]


def test_both_reports_have_both_tables(tmp_path: Path):
    evaluation(write_seed(tmp_path / "study", 1, [0.9, None, 0.5]), 2, 0.6)
    paths = report.write_report(tmp_path / "study", {"question": "q"})
    html, markdown = paths.html.read_text(), paths.markdown.read_text()
    assert '<section id="retention">' in html and '<section id="checkpoints">' in html
    assert "| none | spell | 0.900 | 0.500 | −0.400 | – |" in markdown
    assert "| none, seed 1 | 2 | 64 x 16 at T = 0.6 | 0.600 [0.500, 0.700] |" in markdown


def test_a_study_that_measured_neither_has_neither_table(tmp_path: Path):
    write_seed(tmp_path / "study", 1, [None] * 3)
    paths = report.write_report(tmp_path / "study", {"question": "q"})
    assert "Skills that were not trained" not in paths.html.read_text() + paths.markdown.read_text()
    assert "Checkpoints evaluated" not in paths.html.read_text() + paths.markdown.read_text()
