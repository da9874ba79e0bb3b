"""Cost and disk: each number is computed here from what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from verl_stack import spec

from klreg_verl.experiment import estimate
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import ModelSpec, ResourcesSpec, SamplesSpec, SaveSpec, TrainSpec
from klreg_verl.experiment.store import RunFolder

TRAIN = TrainSpec(steps=10, prompts_per_step=4, responses_per_prompt=2, max_prompt_tokens=30, max_response_tokens=70)


def measured(root: Path, one: RunSpec, *seconds: float) -> RunFolder:
    """The run's folder with lines of steps that took so long."""
    folder = RunFolder(root / one.recipe / one.run_id)
    folder.create(one)
    for step, value in enumerate(seconds, start=1):
        folder.append_metrics(step, {"time/step_s": value})
    return folder


def of(root: Path, specs: list[RunSpec], model: Path | None = None) -> list[estimate.Estimate]:
    found = estimate.estimate(specs, root, lambda _: model)
    return [found[one.run_id] for one in specs]


def test_nothing_is_known_before_anything_has_run(tmp_path: Path):
    (found,) = of(tmp_path, [spec(train=TRAIN)])
    assert found == estimate.Estimate(step_seconds=None, hours_left=None, gpu_hours_left=None, disk_bytes=None)
    assert estimate.in_words([found]) == (
        "estimate: time unknown until a run has done two steps; disk unknown until the model is here"
    )


def test_steps_left_are_counted_at_the_median_of_the_runs_own_times_its_workers(tmp_path: Path):
    one = spec(train=TRAIN, resources=ResourcesSpec(gpus_per_node=4))
    measured(tmp_path, one, 500.0, 30.0, 40.0, 35.0)  # the first warms up
    (found,) = of(tmp_path, [one])
    assert found.step_seconds == 35.0
    assert found.hours_left == pytest.approx(6 * 35 / 3600)
    assert found.gpu_hours_left == pytest.approx(4 * 6 * 35 / 3600)


def test_a_run_that_has_not_begun_takes_its_arms_time_and_else_that_of_runs_with_as_many_workers(tmp_path: Path):
    runs = [spec(train=TRAIN, arm=arm, seed=seed) for arm in ("a", "b") for seed in (1, 2)]
    wide = spec(train=TRAIN, arm="wide", resources=ResourcesSpec(gpus_per_node=4))
    measured(tmp_path, runs[0], 1.0, 10.0)
    measured(tmp_path, runs[2], 1.0, 20.0)
    third = replace(runs[0], arm="c")
    found = of(tmp_path, [*runs, third, wide])
    assert [each.step_seconds for each in found] == [10.0, 10.0, 20.0, 20.0, 15.0, None]
    assert "in 5 of 6 runs" in estimate.in_words(found)


def test_runs_whose_steps_do_more_work_do_not_lend_their_time(tmp_path: Path):
    short = spec(train=TRAIN, seed=1)
    measured(tmp_path, short, 1.0, 10.0)
    others = [
        spec(train=replace(TRAIN, max_response_tokens=700), seed=2),
        spec(train=TRAIN, model=ModelSpec(path="me/large"), seed=3),
        spec(train=TRAIN, verl={"actor_rollout_ref.rollout.max_num_seqs": 8}, seed=4),
    ]
    longer = spec(train=replace(TRAIN, steps=99), seed=5)  # more steps, each as long
    assert estimate.step_times([short, *others, longer], tmp_path) == {short.run_id: 10.0, longer.run_id: 10.0}


def test_disk_is_the_checkpoints_kept_one_that_is_being_written_and_the_samples(tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(10, 20), "b": torch.zeros(5)}, model / "one.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(3, dtype=torch.bfloat16)}, model / "two.safetensors")
    assert estimate.parameters(model) == 208
    one = spec(train=TRAIN, save=SaveSpec(every=2, keep=3), samples=SamplesSpec(every=4, prompts=2))
    samples = 3 * 2 * 2 * 100 * 8  # steps 1, 5 and 9; 2 prompts of 2 responses, up to 100 tokens, 8 bytes a token
    assert of(tmp_path, [one], model)[0].disk_bytes == 208 * 12 * (3 + 1) + samples
    assert estimate.samples_bytes(replace(one, samples=SamplesSpec(every=0))) == 0


@pytest.mark.parametrize(
    ("every", "at_end", "expected"),
    [
        (2, True, 3),  # after 2, 4, ..., 10: the two kept and one on its way
        (6, True, 2),  # after 6 and 10
        (6, False, 1),  # after 6
        (1000, True, 1),
        (1000, False, 1),  # none, unless it is asked to stop
    ],
)
def test_no_more_checkpoints_are_counted_than_a_run_saves(every: int, at_end: bool, expected: int):
    one = spec(train=TRAIN, save=SaveSpec(every=every, keep=2, at_end=at_end))
    assert estimate.checkpoints_at_once(one) == expected


def test_a_checkpoint_that_is_there_says_more_than_the_model(tmp_path: Path):
    one = spec(train=TRAIN, save=SaveSpec(every=2, keep=2), samples=SamplesSpec(every=0))
    folder = measured(tmp_path, one)
    step = folder.checkpoints_dir / "global_step_2" / "actor"
    step.mkdir(parents=True)
    (step / "model.pt").write_bytes(b"x" * 1000)
    assert of(tmp_path, [one])[0].disk_bytes == 3000


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_sizes_in_words(count: float, text: str):
    assert estimate.size(count) == text
