"""A recipe's `retention`: what is refused, the files that it makes, and what verl is told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.schema import SCHEMA, write_parquet
from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import RetentionSpec, SkillSpec
from klreg_verl.verl_hooks import overrides
from launch import inputs, retained

pytest.importorskip("reasoning_gym", reason="not installed: reasoning-gym (make setup)")

TINY = {"hidden_size": 32, "heads": 1, "layers": 1, "steps": 1, "batch_size": 2, "measured_prompts": 3}
RECIPE = f"""\
question: q
model: {{path: tiny, options: {json.dumps(TINY)}}}
tasks: {{p: {{builtin: palindrome, options: {{train_size: 12, test_size: 4}}}}}}
train: {{steps: 7, max_prompt_tokens: 16}}
kl: {{placement: reward, estimator: k1, follows: reverse, beta: 0.1}}
retention: {{skills: {{spell_backward: {{}}, own: {{val: own.parquet}}}}, prompts: 5}}
arms: {{reverse: {{}}}}
seeds: [1]
"""
ROW = {
    "data_source": "theirs",
    "prompt": [{"role": "user", "content": "ab"}],
    "ability": "spelling",
    "reward_model": {"style": "rule", "ground_truth": "ba"},
    "extra_info": {"split": "test", "index": 0, "num_valid": None, "meta": "{}"},
}


def only_spec(folder: Path, *changes: str, text: str = RECIPE) -> RunSpec:
    write_parquet([ROW] * 8, folder / "own.parquet")
    (folder / "study.yaml").write_text(text)
    (spec,) = plan.expand(recipe.load(folder / "study.yaml", changes))
    return spec


def test_a_recipe_names_skills_and_their_files(tmp_path: Path):
    spec = only_spec(tmp_path)
    skills = {"spell_backward": SkillSpec(), "own": SkillSpec(val=str(tmp_path / "own.parquet"))}
    assert spec.retention == RetentionSpec(skills=skills, prompts=5)
    assert RunSpec.from_json(spec.to_json()).retention == spec.retention
    assert only_spec(tmp_path, "retention.skills.own.val=other.parquet").retention.skills["own"].val == str(
        Path.cwd() / "other.parquet"
    )


def test_what_is_retained_changes_no_hash(tmp_path: Path):
    """Runs made before a recipe asked for retention go on; it only watches."""
    without = yaml.safe_dump({key: value for key, value in yaml.safe_load(RECIPE).items() if key != "retention"})
    assert only_spec(tmp_path).hash == only_spec(tmp_path, text=without).hash


@pytest.mark.parametrize(
    ("retention", "message"),
    [
        ("{skills: {a/b: {val: x}}}", "retention.skills.a/b: is part of a metric's name. Use letters, digits"),
        ("{prompts: 3}", "retention.prompts: 3 has no effect without skills"),
        ("{skills: {s: {}}, prompts: 0}", "retention.prompts: 0 is too small: at least 1"),
        (
            "{skills: {s: {val: x, options: {seed: 2}}}}",
            "retention.skills.s.options: has no effect on a file that exists",
        ),
        ("{skills: {s: {val: ''}}}", "retention.skills.s.val: is empty"),
        ("{skills: {s: {options: {size: 2}}}}", "options.size: has no effect: retention.prompts says it"),
        ("{skills: {s: {file: x}}}", "retention.skills.s.file: unknown key 'file'"),
        ("{skils: {}}", "Did you mean 'skills'?"),
    ],
)
def test_a_section_that_cannot_work_is_refused(tmp_path: Path, retention: str, message: str):
    text = RECIPE.replace("{skills: {spell_backward: {}, own: {val: own.parquet}}, prompts: 5}", retention)
    with pytest.raises(ValueError) as caught:
        only_spec(tmp_path, text=text)
    assert message in str(caught.value)


def test_retention_needs_what_the_starting_model_could_do(tmp_path: Path):
    with pytest.raises(ValueError, match="eval.before: false leaves out what the starting model could do"):
        only_spec(tmp_path, "eval.before=false")


def test_an_alarm_about_skills_that_nobody_measures_is_refused(tmp_path: Path):
    text = RECIPE.replace("retention: {skills: {spell_backward: {}, own: {val: own.parquet}}, prompts: 5}\n", "")
    with pytest.raises(ValueError, match="alarms.retention_drop: 0.1 has no effect: no skill is measured"):
        only_spec(tmp_path, "alarms.retention_drop=0.1", text=text)
    assert only_spec(tmp_path, "alarms.retention_drop=0.1").alarms.retention_drop == 0.1


def test_planned_files_are_those_that_get_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLREG_CACHE", str(tmp_path / "cache"))
    spec = only_spec(tmp_path)
    planned = inputs.planned_files(spec, tmp_path / "runs")
    assert not (tmp_path / "cache").exists()
    notes: list[str] = []
    built = inputs.prepare(spec, tmp_path / "runs", notes.append)
    assert built == planned == inputs.planned_files(spec, tmp_path / "runs")
    spell, own = map(pq.read_table, built.retention)
    assert set(spell["data_source"].to_pylist()) == {"skill/spell_backward"}
    assert own["data_source"].to_pylist() == ["skill/own"] * 5
    assert spell.num_rows == 5 and spell.schema.equals(SCHEMA) and own.schema.equals(SCHEMA)
    assert any(note.startswith("skill spell_backward: ") for note in notes)


def test_prompts_over_the_runs_limit_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KLREG_CACHE", str(tmp_path / "cache"))
    spec = only_spec(tmp_path, "train.max_prompt_tokens=6")  # three marks around < and at least three letters are 7
    with pytest.raises(ValueError, match="prompts are longer than max_prompt_tokens=6"):
        inputs.prepare(spec, tmp_path / "runs", lambda text: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "retention.skills={nix: {}}",
            "retention.skills.nix: there is no built-in skill of this name. Known: .*val: FILE",
        ),
        ("retention.skills={spell_backward: {options: {sede: 2}}}", "options.sede: unknown key.*Did you mean 'seed'"),
        ("retention.skills={own: {val: nix.parquet}}", "nix.parquet is not there"),
    ],
)
def test_preflight_knows_what_cannot_be_built(tmp_path: Path, change: str, message: str):
    spec = only_spec(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        retained.check(spec)


def test_verl_validates_on_all_files_before_and_at_the_end(tmp_path: Path):
    spec = only_spec(tmp_path)
    files = inputs.planned_files(spec, tmp_path / "runs")
    values = overrides.settings(spec, files, "cpu")
    assert values["data.val_files"] == [str(files.val), *map(str, files.retention)]
    assert len(files.retention) == 2
    assert (values["trainer.test_freq"], values["trainer.val_before_train"]) == (7, True)
    assert values["reward.custom_reward_function.path"] == "pkg://data_prep.rewards"
    every = overrides.settings(only_spec(tmp_path, "eval.every=3"), files, "cpu")
    assert every["trainer.test_freq"] == 3  # and verl adds the last step


def test_a_run_without_skills_is_told_what_it_always_was(tmp_path: Path):
    text = RECIPE.replace("retention: {skills: {spell_backward: {}, own: {val: own.parquet}}, prompts: 5}\n", "")
    spec = only_spec(tmp_path, text=text)
    files = inputs.planned_files(spec, tmp_path / "runs")
    values = overrides.settings(spec, files, "cpu")
    assert (files.retention, values["data.val_files"], values["trainer.test_freq"]) == ((), str(files.val), 7)


def test_beside_a_reward_of_ones_own_skills_are_graded_by_the_project(tmp_path: Path):
    task = {"mine": {"train": "own.parquet", "val": "own.parquet", "reward": "my.rewards:score"}}
    text = yaml.safe_dump(yaml.safe_load(RECIPE) | {"tasks": task}, sort_keys=False)
    spec = only_spec(tmp_path, text=text)
    values = overrides.settings(spec, inputs.planned_files(spec, tmp_path / "runs"), "cpu")
    function = "reward.custom_reward_function"
    assert values[f"{function}.path"] == "pkg://data_prep.retention"
    assert values[f"{function}.name"] == "compute_score"
    assert values[f"{function}.reward_kwargs.own"] == "my.rewards:score"
