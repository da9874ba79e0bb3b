"""The files of a run: what is planned is what gets built, a user's own files stay where they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.plan import RunSpec
from launch import inputs

TINY = {"hidden_size": 32, "heads": 1, "layers": 1, "steps": 1, "batch_size": 2, "measured_prompts": 3}
RECIPE = f"""\
question: q
model: {{path: tiny, options: {json.dumps(TINY)}}}
tasks: {{p: {{builtin: palindrome, options: {{train_size: 12, test_size: 4}}}}}}
kl: {{placement: reward, estimator: k1, follows: reverse, beta: 0.1}}
arms: {{reverse: {{}}}}
seeds: [1]
"""


def only_spec(folder: Path, text: str, *overrides: str) -> RunSpec:
    (folder / "study.yaml").write_text(text)
    (spec,) = plan.expand(recipe.load(folder / "study.yaml", overrides))
    return spec


def test_planned_paths_are_where_the_builders_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("KLREG_CACHE", str(tmp_path / "link"))
    spec = only_spec(tmp_path, RECIPE)
    planned = inputs.planned_files(spec, tmp_path / "runs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "study.yaml"]  # nothing was made
    assert not list((tmp_path / "real").iterdir())

    notes: list[str] = []
    built = inputs.prepare(spec, tmp_path / "runs", notes.append)
    assert built == planned
    assert built.train.is_file() and built.val.is_file() and (built.model / "config.json").is_file()
    assert built.checkpoints == tmp_path / "runs/study/reverse/p/seed1/checkpoints"
    assert notes[-1].startswith("tiny model: ") and notes[-1].endswith("(100 %)")

    notes.clear()
    assert inputs.prepare(spec, tmp_path / "runs", notes.append) == built
    assert notes == []  # found, not built again


def test_a_tiny_model_for_the_gpu_is_trained_in_a_process_of_its_own(tmp_path: Path):
    """On a CPU, where both ways give the same bits."""
    from data_prep import tiny_model

    notes: list[tuple[int, int, str]] = []
    options = tiny_model.TinyModelOptions(**TINY)
    made = inputs._apart(options, tmp_path / "apart", lambda *told: notes.append(told))
    here = tiny_model.cache(options, tmp_path / "here", lambda *_: None)
    assert made.name == here.name and notes[-1][:2] == (1, 1)
    assert (made / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    assert inputs._apart(options, tmp_path / "apart", pytest.fail) == made  # found, so no process is begun


PARENT = """
import sys
from launch import inputs
child = "import json, os, time; print(json.dumps([0, 1, str(os.getpid())]), flush=True); time.sleep(60)"
inputs._follow([sys.executable, "-c", child], sys.stderr, lambda done, total, text: print(text, flush=True))
"""


def test_that_process_ends_with_whoever_waits_for_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.terminate()
    child.wait(10)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_what_stops_the_tiny_model_on_the_gpu_is_told(tmp_path: Path):
    spec = only_spec(tmp_path, RECIPE, "model.options.device=cuda")
    with pytest.raises(ValueError, match="The tiny model could not be made on the GPU: .*torch finds no CUDA device"):
        inputs.model_folder(spec.model, tmp_path / "cache", lambda text: None)
    assert not list((tmp_path / "cache").glob("tiny-model-*"))


def test_the_cache_lies_beside_the_runs_unless_the_environment_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KLREG_CACHE", "")
    assert inputs.cache_root(tmp_path / "runs") == tmp_path / "runs/.cache"
    monkeypatch.setenv("KLREG_CACHE", "~/klreg")
    assert inputs.cache_root(tmp_path / "runs") == Path.home().resolve() / "klreg"


def test_deepscalers_files_are_found_beside_the_recipe_and_held_to_the_runs_tokenizer_and_limit(tmp_path: Path):
    problems = [{"problem": "x" * size, "answer": "1"} for size in range(1, 40)]
    (tmp_path / "math.json").write_text(json.dumps(problems))
    text = RECIPE.replace(
        "{builtin: palindrome, options: {train_size: 12, test_size: 4}}",
        "{builtin: deepscaler, options: {source: math.json, test_size: 4, style: question}}",
    )
    spec = only_spec(tmp_path, text + "train: {max_prompt_tokens: 30}\n")
    planned = inputs.planned_files(spec, tmp_path / "runs")
    notes: list[str] = []
    built = inputs.task_files(spec, inputs.cache_root(tmp_path / "runs"), notes.append)
    assert built == (planned.train, planned.val) and planned.train.parent.name.startswith("deepscaler-")
    assert notes[0].startswith("DeepScaleR data: ")
    card = json.loads((planned.train.parent / "card.json").read_text())
    # a token a letter and three of the template: 1 to 27 letters fit, and 4 of these 27 are held out
    assert card["read"]["deepscaler"]["dropped"] == {"over 30 tokens": 12}
    assert [card["files"][name]["rows"] for name in ("train.parquet", "test.parquet")] == [23, 4]
    other = inputs.planned_files(only_spec(tmp_path, text + "train: {max_prompt_tokens: 31}\n"), tmp_path / "runs")
    assert other.train != planned.train


def test_a_source_that_is_not_there_is_refused_before_anything_is_built(tmp_path: Path):
    text = RECIPE.replace(
        "{builtin: palindrome, options: {train_size: 12, test_size: 4}}",
        "{builtin: deepscaler, options: {source: ./gone}}",
    )
    spec = only_spec(tmp_path, text)
    with pytest.raises(ValueError, match=f"{tmp_path}/gone is not there. Name a JSON, JSONL or parquet file"):
        inputs.planned_files(spec, tmp_path / "runs")


def test_a_users_own_files_and_folder_are_taken_as_they_are(tmp_path: Path):
    (tmp_path / "model").mkdir()
    text = """\
question: q
model: {path: ./model}
tasks: {mine: {train: a.parquet, val: b.parquet, reward: "rewards:score"}}
arms: {none: {kl: {placement: none}}}
seeds: [1]
"""
    spec = only_spec(tmp_path, text)
    built = inputs.prepare(spec, tmp_path / "runs", pytest.fail)
    assert (built.train, built.val, built.model) == (tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "model")
    assert inputs.planned_files(spec, tmp_path / "runs") == built


def test_an_unknown_option_of_a_builder_is_refused_with_its_place(tmp_path: Path):
    spec = only_spec(tmp_path, RECIPE, "tasks.p.options.train_sise=3")
    with pytest.raises(ValueError, match="options.train_sise: unknown key.*Did you mean 'train_size'"):
        inputs.planned_files(spec, tmp_path / "runs")


def test_a_builders_progress_is_told_once_per_quarter():
    notes: list[str] = []
    report = inputs._reporter(notes.append, "tiny model")
    for done in range(0, 141):
        report(done, 140, f"step {done}")
    quarters = {0: 0, 35: 25, 70: 50, 105: 75, 140: 100}
    assert notes == [f"tiny model: step {done} ({percent} %)" for done, percent in quarters.items()]


def test_the_kl_file_reads_back_as_the_arms_kl(tmp_path: Path):
    for change in (
        [],
        ["kl.estimator=k3", "kl.placement=loss", "kl.follows=forward", "kl.aggregation=token-mean"],
        ["kl.estimator=k3", "kl.allow_biased=true", "kl.follows=none"],
        ["kl.placement=none"],
        ["kl.beta=0"],
        ["kl.beta=1e-6"],  # JSON's spelling, which YAML 1.1 takes for text
        ["kl.controller={kind: matched_kl, target: 0.3, signal: response}", "kl.credit=reward_to_go", "kl.cap=20"],
        ["kl.shaping={kind: clip, threshold: 0.5}", "reference.ema=0.99", "alarms={kl_above: 0.2, stop: true}"],
    ):
        spec = only_spec(tmp_path, RECIPE, *change)
        (tmp_path / "kl.yaml").write_text(inputs.kl_yaml(spec))
        expected = recipe.KLBlock(kl=spec.kl, reference=spec.reference, alarms=spec.alarms)
        assert recipe.load_kl(tmp_path / "kl.yaml") == expected
