"""A real training run on a GPU: recipes/kl_direction_gpu.yaml, three arms of a model made on the spot, to a report.

    KLREG_BENCH_OUT=FOLDER python -m pytest tests/bench/gpu/test_training.py -q -s

keeps the study, without its checkpoints, as one file in FOLDER.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from data_prep import tiny_model
from data_prep.cache import options_from
from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.store import RunFolder
from launch import gpu

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "kl_direction_gpu.yaml"
LAST = 10
"""Steps at the end over which an arm is summed up."""


@pytest.mark.gpu
@pytest.mark.timeout(7200)
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None,
    reason="no CUDA device, or no vLLM (launch/env/setup_gpu.sh)",
)
def test_three_arms_train_and_the_kl_terms_hold_the_policy(tmp_path: Path):
    runs = tmp_path / "runs"
    klreg("run", RECIPE, "--runs-dir", runs)
    if out := os.environ.get("KLREG_BENCH_OUT"):
        klreg("report", RECIPE, "--anonymous", "--runs-dir", runs)
        keep(runs / RECIPE.stem, Path(out))
    specs = plan.expand(recipe.load(RECIPE))
    kl = {spec.arm: mean_of_last(runs / spec.recipe / spec.run_id, "kl_ref/k1_response") for spec in specs}
    assert max(kl["reverse"], kl["forward"]) < kl["none"]


def klreg(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "klreg_verl.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=7000)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stderr[-4000:]


def mean_of_last(folder: Path, key: str) -> float:
    return statistics.mean(line[key] for line in RunFolder(folder).read_metrics()[-LAST:])


NOT_KEPT = ("checkpoints", "exports", "tensorboard", "attempts", "latest", ".lock")


def keep(study: Path, out: Path) -> None:
    """One file with what recipes/results has of a study: report, tables, figures, run folders without checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / f"{study.name}.tar.xz", "w:xz") as tar:
        tar.add(study, study.name, filter=lambda entry: None if Path(entry.name).name in NOT_KEPT else entry)


def test_what_is_kept_is_the_study_without_its_checkpoints(tmp_path: Path):
    run = tmp_path / "study" / "none" / "seed1"
    for name in ("metrics.jsonl", "checkpoints/global_step_1/weights.pt", "samples/step_000001.parquet"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    keep(tmp_path / "study", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "study.tar.xz") as tar:
        files = {entry.name for entry in tar if entry.isfile()}
    assert files == {"study/none/seed1/metrics.jsonl", "study/none/seed1/samples/step_000001.parquet"}


def test_the_recipe_trains_at_least_fifty_steps_of_a_model_between_50_and_150_million_parameters():
    specs = plan.expand(recipe.load(RECIPE))
    assert [spec.arm for spec in specs] == ["none", "reverse", "forward"]
    assert all(spec.train.steps >= 50 for spec in specs)
    options = options_from(tiny_model.TinyModelOptions, specs[0].model.options, "model.options")
    with torch.device("meta"):
        made = tiny_model.build_model(options, tiny_model.build_tokenizer())
    assert 50e6 < made.num_parameters() < 150e6
    assert gpu.model_of(specs[0]).parameters == made.num_parameters()
