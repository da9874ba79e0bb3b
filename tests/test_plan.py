"""The plan: order, names and hashes of runs, and the round trip of a spec."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.strict import ConfigError

TEXT = """\
question: Does it?
model: {path: tiny}
tasks:
  easy: {builtin: palindrome, options: {max_length: 4}}
  hard: {builtin: palindrome, options: {max_length: 8}}
seeds: [1, 2]
grid: {kl.beta: [0.1, 0.01]}
arms:
  none: {kl: {placement: none}}
  reverse: {kl: {placement: reward, estimator: k1, follows: reverse}}
"""


def runs(folder: Path, text: str = TEXT, *overrides: str, name: str = "study.yaml") -> list[RunSpec]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return plan.expand(recipe.load(folder / name, overrides))


def hashes(specs: list[RunSpec]) -> dict[str, str]:
    return {spec.run_id: spec.hash for spec in specs}


def test_the_order_is_arms_tasks_grid_seeds(tmp_path: Path) -> None:
    assert [spec.run_id for spec in runs(tmp_path)] == [
        "none/easy/seed1",
        "none/easy/seed2",
        "none/hard/seed1",
        "none/hard/seed2",
        "reverse/easy/beta=0.1/seed1",
        "reverse/easy/beta=0.1/seed2",
        "reverse/easy/beta=0.01/seed1",
        "reverse/easy/beta=0.01/seed2",
        "reverse/hard/beta=0.1/seed1",
        "reverse/hard/beta=0.1/seed2",
        "reverse/hard/beta=0.01/seed1",
        "reverse/hard/beta=0.01/seed2",
    ]


def test_all_runs_have_different_hashes_and_loading_again_gives_the_same(tmp_path: Path) -> None:
    first, again = hashes(runs(tmp_path)), hashes(runs(tmp_path))
    assert first == again
    assert len(set(first.values())) == len(first) == 12


def test_adding_a_seed_an_arm_a_task_or_a_grid_value_changes_no_other_hash(tmp_path: Path) -> None:
    before = hashes(runs(tmp_path))
    more = TEXT.replace("seeds: [1, 2]", "seeds: [0, 1, 2]").replace("[0.1, 0.01]", "[0.5, 0.1, 0.01]")
    more = more.replace("seeds:", "  third: {builtin: palindrome, options: {max_length: 5}}\nseeds:")
    more += "  forward: {kl: {placement: loss, estimator: k3, follows: forward}}\n"
    after = hashes(runs(tmp_path, more))
    assert len(after) == 63  # 3 tasks x 3 seeds x (1 + 3 + 3) settings
    assert {run_id: after[run_id] for run_id in before} == before


def test_steps_saving_samples_and_logging_are_not_hashed(tmp_path: Path) -> None:
    before = hashes(runs(tmp_path))
    overrides = ("train.steps=99", "save.every=5", "samples.every=3", "logging.wandb=offline")
    assert hashes(runs(tmp_path, TEXT, *overrides)) == before


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=1e-5",
        "train.prompts_per_step=8",
        "eval.temperature=0.5",
        "resources.gpus_per_node=2",
        "tasks.easy.options.seed=3",
        "model.options.seed=3",
        "verl.trainer.log_val_generations=1",
    ],
)
def test_what_changes_the_computation_changes_the_hash(tmp_path: Path, override: str) -> None:
    before, after = runs(tmp_path), runs(tmp_path, TEXT, override)
    assert before[0].hash != after[0].hash
    assert before[0].differs(after[0])


def test_names_are_not_hashed(tmp_path: Path) -> None:
    renamed = TEXT.replace("  reverse:", "  k1-reward:").replace("easy", "short")
    before, after = runs(tmp_path), runs(tmp_path, renamed, name="other.yaml")
    assert [spec.hash for spec in before] == [spec.hash for spec in after]


@pytest.mark.parametrize(
    "task",
    [
        "{train: d/a, val: d/b, reward: 'r:f'}",
        "{builtin: deepscaler, options: {source: d/a.json, evaluation: d/b, tokenizer: ./model, test_size: 4}}",
    ],
)
def test_a_study_that_moves_with_its_data_keeps_its_hashes(tmp_path: Path, task: str) -> None:
    text = TEXT.replace("{builtin: palindrome, options: {max_length: 4}}", task)
    before = runs(tmp_path / "here", text.replace("path: tiny", "path: ./model"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    after = plan.expand(recipe.load(tmp_path / "there" / "study.yaml"))
    assert before[0].task != after[0].task
    assert [spec.hash for spec in before] == [spec.hash for spec in after]


def test_a_spec_survives_json_and_keeps_its_hash(tmp_path: Path) -> None:
    for spec in runs(tmp_path, TEXT, "verl.ray_kwargs.ray_init.b=[1,{c: 2}]", "train.loss_aggregation=token-mean"):
        text = json.dumps(spec.to_json())
        read = RunSpec.from_json(json.loads(text))
        assert read == spec
        assert read.hash == spec.hash == json.loads(text)["hash"]
        assert json.loads(text)["run_id"] == spec.run_id


def test_a_spec_of_another_version_is_refused_by_key(tmp_path: Path) -> None:
    values = runs(tmp_path)[0].to_json()
    with pytest.raises(ConfigError, match=r"x/spec.json: train.stepz: unknown key 'stepz'. Did you mean 'steps'\?"):
        RunSpec.from_json({**values, "train": {**values["train"], "stepz": 1}}, file="x/spec.json")


def test_a_key_that_an_older_version_did_not_have_takes_its_default(tmp_path: Path) -> None:
    spec = runs(tmp_path)[0]
    values = spec.to_json()
    del values["train"]["clip_ratio"]
    assert RunSpec.from_json(values).hash == spec.hash


def test_the_difference_names_dotted_keys_and_both_values(tmp_path: Path) -> None:
    spec = runs(tmp_path)[4]
    other = replace(
        spec, seed=9, arm="x", kl=replace(spec.kl, beta=0.3), train=replace(spec.train, steps=3), verl={"a.b": 1}
    )
    assert spec.differs(other) == ["seed: 1 != 9", "kl.beta: 0.1 != 0.3", "verl.a.b: (absent) != 1"]
    assert replace(spec, verl={"a": {}}).differs(spec) == ["verl.a: a mapping with the keys (none) != (absent)"]
    assert spec.differs(replace(spec, arm="x", train=replace(spec.train, steps=3))) == []


def test_two_arms_that_are_the_same_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none/easy/seed1 and zero/easy/seed1 are the same run"):
        runs(tmp_path, TEXT + "  zero: {kl: {placement: none}, train: {steps: 3}}\n")


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        ([("kl.beta", 0.1)], "beta=0.1"),
        ([("kl.beta", 1e-06)], "beta=1e-06"),
        ([("kl.beta", 0.1), ("train.steps", 2)], "beta=0.1,steps=2"),
        ([("train.temperature", 1.0), ("eval.temperature", 0.5)], "train.temperature=1.0,eval.temperature=0.5"),
        ([("eval.before", True)], "before=true"),
        ([("model.revision", None)], "revision=null"),
    ],
)
def test_a_grid_point_is_named_by_its_keys_and_values(grid: list[tuple[str, object]], name: str) -> None:
    assert plan.grid_name(grid) == name


def test_values_that_cannot_be_folder_names_stay_different() -> None:
    one, two = (plan.grid_name([("model.path", value)]) for value in ("org/model", "org-model"))
    assert two == "path=org-model"
    assert one.startswith("path=org-model-") and "/" not in one
