"""What a plan says is compared, and what a dry run says differs."""

from __future__ import annotations

from pathlib import Path

import pytest
from verl_stack import REVERSE, spec

from klreg_verl.analysis.summary import follows
from klreg_verl.experiment import recipe
from launch import compared

TEXT = """\
question: Does it?
model: {path: tiny}
tasks: {palindrome: {builtin: palindrome}}
seeds: [1]
kl: {beta: 0.2}
arms:
  none: {kl: {placement: none}}
  reverse: {kl: {placement: reward, estimator: k1, follows: reverse}}
  partial: {kl: {placement: reward, estimator: k1, follows: reverse, credit: token}}
"""


def told(folder: Path, text: str) -> dict[str, tuple[str, str]]:
    """arm -> its block and the doctor's sentence."""
    (folder / "study.yaml").write_text(text)
    lines = compared.arms(recipe.load(folder / "study.yaml"))
    pairs = zip(lines[::2], lines[1::2], strict=True)
    return {block.split()[1]: (block, sentence.strip()) for block, sentence in pairs}


def test_every_arm_is_told_with_the_beta_and_the_controller_that_it_shares(tmp_path: Path):
    pytest.importorskip("torch")
    found = told(tmp_path, TEXT)
    block = "placement=reward  estimator=k1  follows=reverse  beta=0.2  controller.kind=fixed"
    assert found["reverse"][0].endswith(block)
    assert found["partial"][0].endswith(f"{block}  credit=token")  # what the two differ in
    assert found["none"][1] == "No KL term: the distance to the reference is measured and nothing acts on it."
    assert "KL(pi || pi_ref), of whole responses" in found["reverse"][1]
    assert "(credit token)" in found["partial"][1] and "per token" in found["partial"][1]


def test_a_grid_is_told_once_with_all_its_values(tmp_path: Path):
    pytest.importorskip("torch")
    text = TEXT.replace("kl: {beta: 0.2}", "grid: {kl.beta: [0.1, 0.3]}")
    found = told(tmp_path, text)
    assert list(found) == ["none", "reverse", "partial"] and "  beta=0.1,0.3  " in found["reverse"][0]


def test_settings_of_all_are_shown_once_and_of_an_arm_only_what_differs():
    runs = [
        (spec(arm=arm, seed=seed, kl=REVERSE), {"shared": 1, "of_arm": arm, "of_seed": seed})
        for arm in ("a", "b")
        for seed in (1, 2)
    ]
    lines = compared.differences(runs)
    assert lines[:2] == ["all runs", "  shared=1"]
    assert [line for line in lines if "of_" in line] == [
        *('  of_arm="a"', "  of_seed by seed: 1, 2", '  of_arm="b"', "  of_seed by seed: 1, 2")
    ]
    assert compared.differences(runs[:1]) == [runs[0][0].run_id, "  shared=1", '  of_arm="a"', "  of_seed=1"]


def test_a_report_tells_arms_that_differ_in_credit_or_correction_alone_apart():
    kl = {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.2, "credit": "sequence"}
    assert follows(kl) == "reverse KL: k1 in the reward, beta 0.2"
    assert follows(kl | {"credit": "token"}) == "reverse KL: k1 in the reward, credit token, beta 0.2"
    loss = kl | {"placement": "loss", "estimator": "k3", "correction": "importance"}
    assert follows(loss) == "reverse KL: k3 in the loss, correction importance, beta 0.2"
