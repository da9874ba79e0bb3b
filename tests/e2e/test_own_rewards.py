"""A user's own parquet with two rewards: one that grades from -1 to 1.75, and one that says right or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from stack import Lab, metrics

pytestmark = [pytest.mark.timeout(1200), pytest.mark.full(minutes=5)]

REWARDS = '''
def graded(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """-1 for no letter, else up to 1.75 for vowels."""
    letters = [letter for letter in solution_str.lower() if letter.isalpha()]
    return 1.75 * sum(letter in "aeiou" for letter in letters) / len(letters) if letters else -1.0


def right(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """A number again, but 0 or 1 alone: whether it begins with a letter of the first half."""
    return float(solution_str.strip()[:1].lower() < "n")
'''

RECIPE = """
question: Which number tells how well it does?
model: {path: tiny}
tasks:
  graded: {train: train.parquet, val: val.parquet, reward: "scores_of_mine:graded"}
  binary: {train: train.parquet, val: val.parquet, reward: "scores_of_mine:right"}
train: {steps: 2, prompts_per_step: 8, responses_per_prompt: 4, max_prompt_tokens: 64, max_response_tokens: 12}
eval: {responses_per_prompt: 2}
kl: {beta: 0.1}
arms:
  reverse: {kl: {placement: reward, estimator: k1, follows: reverse}}
seeds: [1]
"""


def own_project(folder: Path) -> Path:
    """The recipe's file, beside the reward's module and two parquet files."""
    folder.mkdir()
    (folder / "scores_of_mine.py").write_text(REWARDS)
    (folder / "own.yaml").write_text(RECIPE)
    for name, words in (("train", [f"word{n}" for n in range(32)]), ("val", [f"new{n}" for n in range(8)])):
        rows = [
            {
                "data_source": "own",
                "prompt": [{"role": "user", "content": word}],
                "ability": "own",
                "reward_model": {"style": "rule", "ground_truth": word},
                "extra_info": {"index": index},
            }
            for index, word in enumerate(words)
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_reward_that_grades_is_told_by_its_score_and_one_that_does_not_by_accuracy(lab: Lab, tmp_path: Path):
    lab.klreg("run", own_project(tmp_path / "project") / "own.yaml")
    graded, binary = (lab.runs / "own" / "reverse" / task / "seed1" for task in ("graded", "binary"))

    assert json.loads((graded / "headline.json").read_text()) == {"headline": "score"}
    assert json.loads((binary / "headline.json").read_text()) == {"headline": "accuracy"}
    scored, told = metrics(graded), metrics(binary)
    # before training, and after the last step although eval.every is 0
    assert [("eval/own/score" in line, "eval/own/accuracy" in line) for line in scored] == [
        *((True, False), (False, False), (True, False))
    ]
    assert [("eval/own/score" in line, "eval/own/accuracy" in line) for line in told] == [
        *((True, True), (False, False), (True, True))
    ]
    for line in scored[1:]:
        samples = pd.read_parquet(graded / "samples" / f"step_{line['step']:06d}.parquet")
        assert "train/accuracy" not in line and line["train/score"] == pytest.approx(samples["score"].mean())
        assert samples["valid"].isna().all() and (samples["score"] != 0).any()
    for line in told[1:]:
        assert line["train/accuracy"] == pytest.approx(line["train/score"])
        samples = pd.read_parquet(binary / "samples" / f"step_{line['step']:06d}.parquet")
        assert line["train/accuracy"] == pytest.approx(samples["valid"].astype(float).mean())

    report = (lab.runs / "own" / "report.md").read_text()
    assert "Score" in report and "mean score" in report and "accuracy" in report
