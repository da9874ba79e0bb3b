"""analysis.stopping: none at its earlier evaluations as a baseline; tilted optimum and best of n beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import KL_BLOCKS, write_run

from klreg_verl.analysis import runs, stopping
from klreg_verl.analysis.summary import Group, group_runs
from klreg_verl.core import optimum
from klreg_verl.core.diversity import Answers

METRIC = "eval/palindrome/accuracy"


def write(folder: Path, arm: str, seed: int, kl_per_step: float, lift: float = 0.0) -> None:
    """Forty steps whose KL is `kl_per_step` times the step; accuracy 0.4 + 0.3 KL, `lift` more after step 0."""
    rows: list[dict[str, float]] = [{"step": 0, METRIC: 0.4}]
    for step in range(1, 41):
        # s - 0.5 makes the mean of the ten steps around an evaluation its own
        rows.append({"step": step, "kl_ref/k1_response": kl_per_step * (step - 0.5)})
        if step % 10 == 0:
            rows[-1][METRIC] = 0.4 + 0.3 * kl_per_step * step + lift + 0.001 * seed * (lift > 0)
    write_run(folder, arm, rows, seed=seed, kl=KL_BLOCKS[arm])


def groups(folder: Path) -> list[Group]:
    return group_runs(runs.load(folder), ["none", "reverse"])


def test_an_arm_on_the_frontier_gains_nothing_and_one_above_it_its_lift(tmp_path: Path) -> None:
    for seed in (1, 2, 3, 4, 5):
        write(tmp_path / "on", "none", seed, 0.02)
        write(tmp_path / "on", "reverse", seed, 0.01)
        write(tmp_path / "above", "none", seed, 0.02)
        write(tmp_path / "above", "reverse", seed, 0.01, lift=0.05)
    on, control = stopping.compare(groups(tmp_path / "on"))
    above, _ = stopping.compare(groups(tmp_path / "above"))
    # evaluated after 20, 30, 40 steps, KL over steps 21 to 40: both have the mean of step 30, KL 0.3
    assert on.kl.mean == pytest.approx(0.3) and on.comparison.mean == pytest.approx(0.0, abs=1e-9)
    assert control.is_control and control.comparison.mean == pytest.approx(0.0, abs=1e-9)
    assert above.comparison.differences == pytest.approx([0.05 + 0.001 * seed for seed in (1, 2, 3, 4, 5)])
    told = stopping.sentence(stopping.compare(groups(tmp_path / "above")))
    assert "reverse +0.0530 [0.0510, 0.0550] at KL 0.30" in told and "(the control)" in told


def test_a_run_beyond_the_frontier_is_left_out(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write(tmp_path, "none", seed, 0.02)
        write(tmp_path, "reverse", seed, 0.2 if seed == 3 else 0.01)
    first = stopping.compare(groups(tmp_path))[0]
    assert first.comparison.seeds == (1, 2) and first.comparison.unpaired == (3,)
    assert stopping.sentence([first]) == ""  # two seeds are no finding


def test_without_an_arm_without_kl_there_is_no_baseline(tmp_path: Path) -> None:
    for seed in (1, 2):
        write(tmp_path, "reverse", seed, 0.01)
    assert stopping.compare(groups(tmp_path)) == []


def drawn(right: int, draws: int) -> Answers:
    return Answers(counts=(right,) if right else (), num_samples=draws, num_possible=None)


def test_best_of_n_has_its_bound_of_the_kl_and_is_below_the_tilted_optimum() -> None:
    prompts = [drawn(500, 1000)] * 40  # p is one half on all prompts
    best = optimum.best_of(prompts, (1, 2, 4))
    assert [kl for kl, _ in best] == pytest.approx([0.0, math.log(2) - 0.5, math.log(4) - 0.75])
    # 1 - (1 - p)^n at p = 1/2; the beliefs are narrow around it
    assert [value for _, value in best] == pytest.approx([0.5, 0.75, 0.9375], abs=0.01)
    curve = np.array(sorted(optimum.tilted(prompts, np.geomspace(0.05, 20, 60).tolist())))
    for kl, value in best[1:]:
        assert value <= np.interp(kl, curve[:, 0], curve[:, 1]) + 1e-3


def test_the_tilted_optimum_is_predicts_own() -> None:
    prompts = [drawn(3, 16), drawn(9, 16), drawn(0, 16)] * 5
    found = optimum.predict(prompts, 0.5, "reverse", samples=4)
    assert optimum.tilted(prompts, [0.5])[0] == pytest.approx((found.kl, found.accuracy))
