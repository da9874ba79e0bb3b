"""analysis.stock: verl's own log and dumps become a run folder and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import synthetic_rows, write_run

from klreg_verl.analysis import report, runs, stock


def write_lines(path: Path, lines: list[dict[str, Any]], torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")


def response(prompt: str, output: str, score: float, step: int) -> dict[str, Any]:
    """A line of verl's dump, as trainer_base._write_generations writes it."""
    return {
        "input": prompt,
        "output": output,
        "gts": "7",
        "score": score,
        "step": step,
        "acc": score == 1.0,
        "pred": output,
    }


def write_stock(folder: Path, steps: int = 3) -> Path:
    """Entropy 0.9, 0.8, ...; step s has s of 4 responses right; validated before training and at the end."""
    data = [{"actor/entropy": 1 - step / 10, "critic/score/mean": step / 4} for step in range(1, steps + 1)]
    lines = [{"step": 0, "data": {"val-core/math/acc/mean@4": 0.25}}]
    lines += [{"step": step, "data": each} for step, each in enumerate(data, start=1)]
    lines[-1]["data"]["val-core/math/acc/mean@4"] = 0.75
    write_lines(folder / "log" / "verl.jsonl", lines)
    for step in range(1, steps + 1):
        drawn = [response(f"p{index // 2}", f"{index}", float(index < step), step) for index in range(4)]
        write_lines(folder / "rollouts" / f"{step}.jsonl", drawn)
    return folder


def test_log_and_dumps_become_a_run(tmp_path: Path) -> None:
    assert stock.is_stock(write_stock(tmp_path))
    (run,) = runs.load(stock.import_run(tmp_path))
    assert (run.run_id, run.status, run.last_step, run.problems) == ("stock/math/seed0", "done", 3, ())
    assert run.training["entropy/token"].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert run.training["train/accuracy"].tolist() == [0.25, 0.5, 0.75]
    assert run.metrics["eval/math/accuracy"].dropna().tolist() == [0.25, 0.75]
    assert run.training["actor/entropy"].tolist() == run.training["entropy/token"].tolist()


def test_the_report_has_its_curves_samples_and_diversity(tmp_path: Path) -> None:
    folder = stock.import_run(write_stock(tmp_path))
    html = report.write_report(folder).html.read_text()
    for anchor in ("courses", "samples", "diversity", "evaluation"):
        assert f'<section id="{anchor}">' in html
    assert "its folder does not say which gradient its KL term followed" in html


def test_importing_again_gives_the_same_and_does_not_read_its_own_output(tmp_path: Path) -> None:
    write_stock(tmp_path)
    first = (stock.import_run(tmp_path) / "stock/math/seed0/metrics.jsonl").read_bytes()
    assert stock.is_stock(tmp_path)
    assert (stock.import_run(tmp_path) / "stock/math/seed0/metrics.jsonl").read_bytes() == first


def test_a_torn_log_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"step": 1, "data": {"actor/entropy": 0.5}}], torn='{"step": 2, "da')
    (run,) = runs.load(stock.import_run(tmp_path))
    assert run.training["entropy/token"].to_dict() == {1: 0.5}


def test_dumps_alone_are_enough_and_a_score_above_zero_is_right_without_acc(tmp_path: Path) -> None:
    lines = [{"input": "p", "output": text, "score": score, "step": 2} for text, score in (("a", 0.5), ("b", 0.0))]
    write_lines(tmp_path / "rollouts" / "2.jsonl", lines)
    write_lines(tmp_path / "validation" / "2.jsonl", lines[:1])
    (run,) = runs.load(stock.import_run(tmp_path))
    assert run.training.loc[2, "train/accuracy"] == 0.5 and run.training.loc[2, "eval/verl/accuracy"] == 1.0


def test_tensorboard_is_read_where_there_is_no_jsonl(tmp_path: Path) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "tb"))
    for step in (1, 2):
        writer.add_scalar("actor/entropy", step / 4, step)
    writer.close()
    (run,) = runs.load(stock.import_run(tmp_path))
    assert run.training["entropy/token"].to_dict() == {1: 0.25, 2: 0.5}


def test_run_folders_of_our_own_and_empty_folders_are_not_stock(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "ours", "none", synthetic_rows("none", 1, 2))
    assert not stock.is_stock(tmp_path / "empty") and not stock.is_stock(tmp_path / "ours")
