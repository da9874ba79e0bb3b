"""Checkpoints of verl's FSDP workers as Hugging Face folders, and what `klreg eval` and `klreg export` are given."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import need_transformers, network, write_model, write_tokenizer
from typer.testing import CliRunner
from verl_stack import spec

from klreg_verl.cli import app
from klreg_verl.evaluation import command, export, subjects
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, write_json
from klreg_verl.replay import models
from klreg_verl.verl_hooks import checkpoints

need_transformers()


def write_checkpoint(folder: Path, model: torch.nn.Module, **config: Any) -> Path:
    """What verl leaves of a step with one worker: whole weights, configuration and tokenizer beside."""
    described = folder / "actor" / "huggingface"
    described.mkdir(parents=True)
    model.config.save_pretrained(described)
    model.generation_config.save_pretrained(described)
    write_tokenizer(described, template="{{ messages }}")
    for name, value in config.items():
        path = described / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    torch.save(model.state_dict(), folder / "actor" / "model_world_size_1_rank_0.pt")
    return folder


def write_run(root: Path, start: Path, steps: dict[int, torch.nn.Module]) -> RunFolder:
    """A run folder with whole checkpoints, as far as evaluations look at it."""
    run_spec: RunSpec = spec()
    run = RunFolder(root / run_spec.recipe / run_spec.run_id)
    run.create(run_spec)
    write_json(run.provenance_path, {"model": {"path": str(start)}})
    for step, model in steps.items():
        folder = write_checkpoint(checkpoints.step_folder(run.checkpoints_dir, step), model)
        checkpoints.mark_complete(folder)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    start = write_model(tmp_path / "start", network(1), template="{{ messages }}")
    return write_run(tmp_path / "runs", start, {10: network(2), 20: network(3)})


# ------------------------------------------------------------------------------------------------------- export


def test_an_export_is_the_checkpoints_model(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "global_step_5", network(1))
    made = export.export(checkpoint, tmp_path / "out", facts={"step": 5})
    ours, theirs = models.load(made), models.load(checkpoint)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(ours.network(ids).logits, theirs.network(ids).logits)
    assert ours.stop_tokens == theirs.stop_tokens
    assert ours.tokenizer.chat_template == "{{ messages }}"
    assert export.card(made)["step"] == 5
    assert sorted(path.name for path in made.glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("config", "asked", "found"), [("bfloat16", "auto", "bfloat16"), ("float32", "float16", "float16")]
)
def test_weights_have_the_configurations_type_or_the_one_asked_for(tmp_path: Path, config: str, asked: str, found: str):
    from safetensors.torch import load_file

    checkpoint = write_checkpoint(tmp_path / "global_step_5", network(1), dtype=config)
    made = export.export(checkpoint, tmp_path / "out", dtype=asked)
    weights = load_file(made / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{found}"}
    assert json.loads((made / "config.json").read_text())["dtype"] == found


def test_an_export_of_other_weights_is_known_for_it(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "global_step_5", network(1))
    made = export.export(checkpoint, tmp_path / "out")
    assert export.is_current(made, checkpoint / "actor")
    shard = checkpoint / "actor" / "model_world_size_1_rank_0.pt"
    os.utime(shard, ns=(0, 1))
    assert not export.is_current(made, checkpoint / "actor")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda actor: (actor / "model_world_size_1_rank_0.pt").unlink(), "holds no weights of verl's FSDP workers"),
        (lambda actor: shutil.rmtree(actor / "huggingface"), "no configuration"),
        (lambda actor: torch.save({"a": torch.ones(2)}, actor / "model_world_size_1_rank_0.pt"), "do not fit"),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_leaves_nothing(tmp_path: Path, damage: Any, message: str):
    checkpoint = write_checkpoint(tmp_path / "global_step_5", network(1))
    damage(checkpoint / "actor")
    with pytest.raises(ValueError, match=message):
        export.export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_5"]


def test_export_overwrites_nothing_and_knows_its_types(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "global_step_5", network(1))
    with pytest.raises(ValueError, match="--dtype int8 is not one of auto, float32"):
        export.export(checkpoint, tmp_path / "out", dtype="int8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        export.export(checkpoint, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- subjects


def test_a_run_is_its_newest_whole_checkpoint_or_the_one_asked_for(run: RunFolder):
    assert [(one.step, one.path.name) for one in subjects.find(str(run.path))] == [(20, "global_step_20")]
    assert [one.step for one in subjects.find(f"{run.path}@all")] == [10, 20]
    (ten,) = subjects.find(f"{run.path}@10")
    assert (ten.name, ten.evals, ten.exported) == (
        "arm/palindrome/seed7 step 10",
        run.evals_dir,
        run.path / "exports" / "step10",
    )
    (start,) = subjects.find(f"{run.path}@0")
    assert (start.step, start.path.name, start.is_start) == (0, "start", True)


def test_a_run_is_found_below_the_runs_folder(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLREG_RUNS", str(run.path.parents[3]))
    (found,) = subjects.find("study/arm/palindrome/seed7")
    assert found.run is not None and found.run.path == run.path


def test_a_checkpoint_of_a_run_belongs_to_the_run(run: RunFolder, tmp_path: Path):
    for path in (run.checkpoints_dir / "global_step_10", run.checkpoints_dir / "global_step_10" / "actor"):
        (found,) = subjects.find(str(path))
        assert (found.step, found.evals) == (10, run.evals_dir)
    alone = write_checkpoint(tmp_path / "elsewhere" / "global_step_7", network(1))
    (found,) = subjects.find(str(alone), out=tmp_path / "results")
    assert (found.step, found.run, found.evals) == (7, None, tmp_path / "results")


def test_checkpoints_without_a_run_are_exported_apart(tmp_path: Path):
    """Same step, same place of the results: two models all the same."""
    for name, seed in (("one", 1), ("two", 2)):
        write_checkpoint(tmp_path / name / "global_step_7", network(seed))
    texts = [str(tmp_path / name / "global_step_7") for name in ("one", "two")]
    found = [one for text in texts for one in subjects.find(text, out=tmp_path / "results")]
    made = [one.folder(lambda text: None) for one in found]
    assert {path.parent for path in made} == {tmp_path / "exports"}
    assert subjects.model_hash(made[0]) != subjects.model_hash(made[1])
    assert [one.folder(lambda text: pytest.fail(text)) for one in found] == made  # found again


def test_a_model_folder_keeps_its_evaluations_beside_it(tmp_path: Path):
    folder = write_model(tmp_path / "model", network(1))
    (found,) = subjects.find(str(folder))
    assert (found.name, found.step, found.evals) == ("model", 0, tmp_path / "evals" / "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{run}@15", "has no whole checkpoint of that step. Steps that can be evaluated: 0, 10, 20"),
        ("{run}@newest", "has no whole checkpoint of that step"),
        ("{tmp}/nix", "is neither a run nor a folder"),
        ("{tmp}", "holds no model: neither config.json, nor shards"),
    ],
)
def test_what_is_no_model_is_refused(run: RunFolder, tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        subjects.find(text.format(run=run.path, tmp=tmp_path))


def test_a_checkpoint_that_is_not_whole_is_not_evaluated(run: RunFolder):
    (run.checkpoints_dir / "global_step_20" / checkpoints.MARKER).unlink()
    assert [one.step for one in subjects.find(str(run.path))] == [10]
    with pytest.raises(ValueError, match="global_step_20: no COMPLETE marker"):
        subjects.find(str(run.checkpoints_dir / "global_step_20"))


def test_runs_are_compared_with_their_starts_each_model_once(run: RunFolder):
    asked = [one for text in ("", "@10", "@20") for one in subjects.find(f"{run.path}{text}")]
    every = command.with_starts(asked, None, False, None)
    assert [(one.step, one.is_start) for one in every] == [(0, True), (20, False), (10, False)]
    assert [one.step for one in command.with_starts(asked, None, True, None)] == [20, 10]
    with pytest.raises(ValueError, match="--start and --no-start contradict"):
        command.with_starts(asked, "x", True, None)


def test_responses_are_as_long_as_in_the_run(run: RunFolder):
    found = subjects.find(str(run.path))
    assert command.sampling_of(found, None, 4, 1.0, 1.0, 1, None).max_tokens == 32
    with pytest.raises(ValueError, match="max_tokens=0 cannot work"):
        command.sampling_of(found, 0, 4, 1.0, 1.0, 1, None)
    assert command.sampling_of(found, 5, 4, 1.0, 1.0, 1, None).max_tokens == 5
    assert command.sampling_of([], None, 4, 1.0, 1.0, 1, None).max_tokens == 1024


def test_a_starting_model_that_is_gone_is_named(run: RunFolder, tmp_path: Path):
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(ValueError, match="its starting model, .*start, is not there any more. Give it with --start"):
        subjects.start_of(run)


def test_an_export_is_made_once_and_anew_for_other_weights(run: RunFolder):
    notes: list[str] = []
    (subject,) = subjects.find(f"{run.path}@10")
    made = subject.folder(notes.append)
    assert subject.folder(notes.append) == made and len(notes) == 1
    before = subjects.model_hash(made)
    torch.save(network(9).state_dict(), subject.path / "actor" / "model_world_size_1_rank_0.pt")
    assert subjects.model_hash(subject.folder(notes.append)) != before
    assert "is of other weights than the checkpoint's" in notes[1]


def test_an_export_of_another_dtype_is_not_what_is_evaluated(run: RunFolder):
    (subject,) = subjects.find(f"{run.path}@10")
    export.export(subject.path, subject.exported, dtype="float16")
    notes: list[str] = []
    assert export.card(subject.folder(notes.append))["dtype"] == "float32"
    assert "or of another dtype: exported anew" in notes[0]


def test_models_that_differ_in_weights_alone_share_a_frame(run: RunFolder, tmp_path: Path):
    ten, twenty = (one.folder(lambda text: None) for one in subjects.find(f"{run.path}@all"))
    assert subjects.frame_hash(ten) == subjects.frame_hash(twenty)
    assert subjects.model_hash(ten) != subjects.model_hash(twenty)
    copy = shutil.copytree(ten, tmp_path / "copy")
    (copy / "README.md").write_text("says nothing about the model")
    assert subjects.model_hash(copy) == subjects.model_hash(ten)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert subjects.frame_hash(copy) != subjects.frame_hash(ten)


# ------------------------------------------------------------------------------------------------------- the commands


def test_the_commands_say_what_is_wrong(run: RunFolder, tmp_path: Path):
    def klreg(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in result.output
        return result.exit_code, " ".join(result.output.split())

    code, text = klreg("export", run.path, "--step", 10, "--out", tmp_path / "made")
    assert (code, f"arm/palindrome/seed7 step 10: {tmp_path / 'made'}" in text) == (0, True)
    code, text = klreg("export", run.path, "--step", 10, "--dtype", "float16")
    assert (code, f"step 10: {run.path / 'exports' / 'step10-float16'}" in text) == (0, True)
    code, text = klreg("export", tmp_path / "start")
    assert (code, "is a model folder already" in text) == (2, True)
    code, text = klreg("eval", tmp_path / "start")
    assert (code, "A model folder has no task of its own. Say which: --task" in text) == (2, True)
    code, text = klreg("eval", run.path)
    assert (code, "its validation file, (never built), is not there any more" in text) == (2, True)
    code, text = klreg("eval", run.path, "--task", "retention")
    assert (code, "No recipe of these runs says `retention: {skills: ...}`" in text) == (2, True)
    code, text = klreg("eval", tmp_path / "start", "--task", "palindrome", "--temperature", 0)
    assert (code, "16 greedy samples (temperature 0) are all the same" in text) == (2, True)
