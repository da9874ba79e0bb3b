"""verl, Ray, vLLM and FSDP on two nodes of a real Slurm: a run is stopped before its time limit, comes back, and is the
run that it would have been. Takes minutes and about 14 GB."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from lab import ROOT, Lab, metrics

MISSING = [name for name in ("verl", "vllm", "ray") if importlib.util.find_spec(name) is None]
NEEDED_GB = 14

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make setup)"),
]

PROFILE = """\
platform: cpu
nodes: 2
gpus_per_node: 1
cpus_per_node: 2
time: "40:00"
notice_seconds: 120
max_parallel: 1
shared: [{shared}, {root}, {prefix}]
"""
SMALL = ["train.steps=3", "train.prompts_per_step=8", "train.responses_per_prompt=4", "train.warmup_steps=0"]
LEAN = ["eval.before=false", "eval.every=0", "save.every=100", "resources.nodes=2", "--arm", "forward"]


@pytest.fixture
def profile(lab: Lab) -> Path:
    """Two nodes with one worker each, if there is room; the tiny model from where other tests keep it."""
    if psutil.virtual_memory().available < NEEDED_GB * 1e9:
        pytest.skip(f"less than {NEEDED_GB} GB of memory are available")
    if kept := os.environ.get("KLREG_TEST_CACHE"):
        shutil.copytree(kept, lab.shared / "cache", dirs_exist_ok=True)
    path = lab.shared / "cpu.yaml"
    path.write_text(PROFILE.format(shared=lab.shared, root=ROOT, prefix=sys.prefix))
    return path


def test_the_smoke_job_finds_everything_fine(lab: Lab, profile: Path):
    output = lab.klreg("smoke", "--profile", profile, timeout=1500, check=False)
    verdicts = [line for line in output.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert lab.code == 0, output + lab.logs()
    assert [line.partition(":")[0].split(None, 1)[1] for line in verdicts] == [
        "nodes",
        "shared files",
        "collectives",
        "model without internet",
        "vLLM samples what the trainer computes",
        "reference pass, equal to the policy at step 1",
        "two steps",
        "save",
        "resume",
    ]
    assert "all-reduce over 2 workers with gloo" in output
    assert not lab.remains()


def test_a_two_node_run_that_is_stopped_and_comes_back_is_the_run_it_would_have_been(lab: Lab, profile: Path):
    quick = ROOT / "recipes" / "quickstart.yaml"

    stopped, whole = lab.shared / "stopped", lab.shared / "whole"
    job = submit(lab, quick, profile, stopped)
    folder = stopped / "quickstart" / "forward" / "palindrome" / "seed1"
    lab.until(lambda: metrics(folder), "the first step", 900)
    lab.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    lab.until(lambda: (folder / "attempts" / "2").exists(), "a second attempt", 400)
    assert set(lab.wait(job, 900).values()) == {"COMPLETED"}, lab.logs()
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert not (folder / "attempts" / "2" / "discarded.jsonl").exists()
    first = (folder / "attempts" / "1" / "log").read_text()
    saved = int(re.search(r"asked to stop: step (\d) is saved and is this attempt's last", first)[1])
    assert saved < 3
    actor = folder / "checkpoints" / "global_step_3" / "actor"
    assert len(list(actor.glob("model_world_size_2_rank_*.pt"))) == 2  # sharded over the nodes

    again = submit(lab, quick, profile, whole)
    assert set(lab.wait(again, 900).values()) == {"COMPLETED"}, lab.logs()
    other = whole / "quickstart" / "forward" / "palindrome" / "seed1"
    for step in (1, 2, 3):
        tokens = [samples(each, step)["token_ids"].map(tuple).tolist() for each in (folder, other)]
        flipped = sum(one != another for one, another in zip(*tokens, strict=True))
        assert flipped <= (0 if step <= saved else len(tokens[0]) // 4)  # rounding may flip a draw after the resume
        mine, theirs = (metrics(each)[step - 1] for each in (folder, other))
        assert mine["kl/beta"] == theirs["kl/beta"]
        assert mine["kl_ref/k3_token"] == pytest.approx(theirs["kl_ref/k3_token"], rel=1e-2, abs=1e-6)
    assert not lab.remains()


def submit(lab: Lab, recipe, profile, runs) -> int:
    output = lab.klreg("submit", recipe, "--profile", profile, "--runs-dir", runs, *SMALL, *LEAN, timeout=600)
    return int(re.search(r"^job (\d+):", output, re.MULTILINE)[1])


def samples(folder, step: int) -> pd.DataFrame:
    return pd.read_parquet(folder / "samples" / f"step_{step:06d}.parquet").sort_values(["group", "sample"])
