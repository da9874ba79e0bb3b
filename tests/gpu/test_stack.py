"""The whole stack on one GPU: Ray, verl, vLLM on CUDA, FSDP2, a frozen reference; the quick study as it is.

`python -m pytest tests/gpu -q -s`. The CPU's numbers are those committed under recipes/results/quickstart.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from stack import ROOT, Lab, metrics, remains, stack_processes

from klreg_verl.experiment import fit, plan, recipe
from launch import gpu

pytestmark = pytest.mark.timeout(3000)

QUICK = ROOT / "recipes" / "quickstart.yaml"
ON_CPU = ROOT / "recipes" / "results" / "quickstart" / "summary.csv"
ON_A_GPU = ("train.micro_batch=64", "verl.actor_rollout_ref.rollout.gpu_memory_utilization=0.1")
"""A step in one piece, and no more KV cache than a model of a million parameters needs."""
STEPS = plan.expand(recipe.load(QUICK))[0].train.steps
LAST = 10


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, cache: Path, attention: list[str]) -> Lab:
    """The three arms, run once for all tests here."""
    found = Lab(tmp_path_factory.mktemp("gpu") / "runs", cache)
    before = stack_processes()
    found.klreg("run", QUICK, *ON_A_GPU, *attention, timeout=2800)
    assert not remains(before)
    return found


@pytest.mark.parametrize("arm", ["none", "reverse", "forward"])
def test_an_arm_trains_measures_its_kl_and_keeps_trainer_and_sampler_together(study: Lab, arm: str):
    lines = metrics(study.folder("quickstart", arm))
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    first, last = lines[1], lines[-1]
    # bfloat16 rounds a log-probability by up to 2^-8 of its logit; step 1 is the reference itself, up to that
    assert abs(first["kl_ref/k1_token"]) < 0.02 and abs(first["kl_rollout/k1_token"]) < 0.02
    assert last["kl_ref/k1_response"] > 5 * abs(first["kl_ref/k1_response"])
    card = json.loads((study.folder("quickstart", arm) / "provenance.json").read_text())
    assert card["platform"] == "cuda" and card["host"]["gpus"]


def test_the_log_says_the_platform(study: Lab):
    log = next((study.folder("quickstart", "none") / "attempts").rglob("log")).read_text()
    assert "[klreg] platform: cuda\n" in log


@pytest.mark.parametrize("arm", ["none", "reverse", "forward"])
def test_accuracy_is_the_cpus_within_sampling_error(study: Lab, arm: str):
    """Means of the last ten steps, with their errors over steps. Two trajectories of one seed that round differently
    are as far apart as two seeds: four errors, and 0.08 at the least."""
    rows = {row["arm"]: row for row in csv.DictReader(ON_CPU.open())}
    here = [line["train/accuracy"] for line in metrics(study.folder("quickstart", arm))[-LAST:]]
    error = math.hypot(statistics.stdev(here) / LAST**0.5, float(rows[arm]["accuracy_error"]))
    print(f"\n{arm}: accuracy {statistics.mean(here):.3f} here, {float(rows[arm]['accuracy']):.3f} on the CPU")
    assert abs(statistics.mean(here) - float(rows[arm]["accuracy"])) < max(4 * error, 0.08)


def test_measured_steps_reach_the_plan(study: Lab, attention: list[str]):
    devices, _ = gpu.here()
    kind = gpu.kind_of(devices)
    if kind is None:
        pytest.skip(f"{devices[0].name} is in no table of fit.py")
    rows = json.loads(study.klreg("plan", QUICK, *ON_A_GPU, *attention, "--gpu", "here", "--json"))
    assert {row["fit"]["time"]["source"] for row in rows} <= {"measured", "scaled"}
    assert all(row["fit"]["fits"] for row in rows) and kind.name in fit.GPUS
