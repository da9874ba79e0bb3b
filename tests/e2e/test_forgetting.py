"""A run that forgets: skills that it does not train are validated beside its task, before and at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from stack import Lab, metrics

from data_prep import skills

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]  # a model and a start for one alarm

RECIPE = {
    "question": "Does it forget?",
    "model": {"path": "tiny", "options": {"skills": list(skills.SKILLS)}},
    "tasks": {"palindrome": {"builtin": "palindrome", "options": {"train_size": 200, "test_size": 16}}},
    "train": {
        "steps": 2,
        "prompts_per_step": 8,
        "responses_per_prompt": 4,
        "learning_rate": 0.01,  # far too large: two steps are enough to lose what was never trained
        "max_prompt_tokens": 24,
        "max_response_tokens": 16,
    },
    "retention": {"skills": {name: {} for name in skills.SKILLS}, "prompts": 32},
    "alarms": {"retention_drop": 0.1, "warm_up": 0},
    "arms": {"none": {"kl": {"placement": "none"}}},
    "eval": {"responses_per_prompt": 2},
    "seeds": [1],
}


def test_a_run_says_what_it_forgot(lab: Lab, tmp_path: Path):
    path = tmp_path / "forget.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    lab.klreg("run", path)

    folder = lab.folder("forget", "none")
    lines = metrics(folder)
    measured = {step: {key for key in lines[step] if key.startswith(("retention/", "eval/"))} for step in range(3)}
    wanted = {"eval/palindrome/accuracy", *(f"retention/{name}" for name in skills.SKILLS)}
    assert measured == {0: wanted, 1: set(), 2: wanted}  # before training and at the end, though eval.every is 0
    for name in skills.SKILLS:
        assert lines[0][f"retention/{name}"] > 0.3  # the starting model was supervised on it
    drops = [lines[0][f"retention/{name}"] - lines[2][f"retention/{name}"] for name in skills.SKILLS]
    assert max(drops) > 0.1
    assert lines[2]["alarm/retention_drop"] == 1.0
    assert "[klreg] alarm retention_drop at step 2" in (folder / "latest" / "log").read_text()

    report = (lab.runs / "forget" / "report.md").read_text()
    before = f"{lines[0]['retention/spell_backward']:.3f}"
    assert f"| none | spell_backward | {before} |" in report
    assert "retention_drop" in report
