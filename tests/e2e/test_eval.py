"""`klreg export` and `klreg eval` with real vLLM on the tiny model: killed in the middle, resumed, models in turns."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from stack import ROOT, Lab

from data_prep import palindrome, tiny_model
from klreg_verl.evaluation import store
from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.store import RunFolder, write_json
from klreg_verl.verl_hooks import checkpoints

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]  # four starts of vLLM

PROMPTS, SAMPLES = 32, 64
ASKED = ["--samples", str(SAMPLES), "--prompts", str(PROMPTS)]


@pytest.fixture
def run(lab: Lab) -> RunFolder:
    """The quick study's first run as if it had saved twice: after step 1 nothing had changed, after step 2 all had."""
    spec = plan.expand(recipe.load(ROOT / "recipes" / "quickstart.yaml"))[0]
    model = tiny_model.cache(tiny_model.TinyModelOptions(), lab.cache, lambda *_: None)
    options = palindrome.PalindromeOptions(**spec.task.options)
    data = palindrome.cache(options, lab.cache, lambda *_: None)
    folder = RunFolder(lab.runs / spec.recipe / spec.run_id)
    folder.create(spec)
    record = {"model": {"path": str(model)}, "data": {"val": {"path": str(data / "test.parquet")}}}
    write_json(folder.provenance_path, record)
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: w * (1 + 0.3 * torch.randn(w.shape, generator=generator)) for name, w in weights.items()}
    for step, state in ((1, weights), (2, noisy)):
        save(checkpoints.step_folder(folder.checkpoints_dir, step), state, model)
    return folder


def save(folder: Path, state: dict[str, torch.Tensor], model: Path) -> None:
    """A checkpoint as verl's only worker leaves it: the tied output weights are in the state dict, too."""
    described = folder / "actor" / "huggingface"
    ignored = shutil.ignore_patterns("*.safetensors", "card.json")
    shutil.copytree(model, described, ignore=ignored)
    whole = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    torch.save(whole, folder / "actor" / "model_world_size_1_rank_0.pt")
    checkpoints.mark_complete(folder)


def workers(lab: Lab) -> list[psutil.Process]:
    """Processes of vLLM that evaluations of this lab started: they have its environment, also without their parent."""
    return [one for one in psutil.process_iter() if is_worker(one, lab)]


def is_worker(one: psutil.Process, lab: Lab) -> bool:
    try:
        return "klreg_verl.evaluation.worker" in one.cmdline() and one.environ().get("KLREG_RUNS") == str(lab.runs)
    except psutil.Error:  # gone, or another user's
        return False


def wait_until_gone(lab: Lab, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while (left := workers(lab)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for one in left:
        one.kill()
    assert not left


def test_an_evaluation_that_is_killed_goes_on_and_models_take_turns_in_one_engine(
    lab: Lab, run: RunFolder, tmp_path: Path
):
    kept = kill_in_the_middle(lab, run)
    wait_until_gone(lab)
    mark(kept)

    records, said = lab.evaluate(f"{run.path}@all", *ASKED)
    started = re.findall(r"starting vLLM for (\d) evaluations: (\d+) samples to draw, (\d+) are there", said)
    assert len(started) == 1  # start and step 2 in turns; step 1 is the start again, and is not sampled at all
    models, drawn, there = map(int, started[0])
    assert (models, drawn + there) == (2, 2 * PROMPTS * SAMPLES) and there >= 512
    wait_until_gone(lab)

    start, one, two = records
    assert [record["step"] for record in records] == [0, 1, 2]
    assert (start["prompts"], start["samples"], start["max_tokens"]) == (PROMPTS, SAMPLES, 12)
    assert 0.1 < start["accuracy"]["low"] < start["accuracy"]["mean"] < start["accuracy"]["high"] < 0.8
    assert start["pass"]["64"]["mean"] > start["pass"]["2"]["mean"] > start["accuracy"]["mean"]
    assert one["against"]["accuracy_gain"]["mean"] == 0.0
    assert (one["against"]["solved_new"], one["against"]["solved_lost"]) == ([], [])
    assert two["against"]["accuracy_gain"]["high"] < 0  # 30 % of noise on every weight leave a tenth of the accuracy
    assert len(two["against"]["solved_lost"]) > 1

    table = pq.read_table(run.evals_dir / start["file"])
    assert table.num_rows == PROMPTS * SAMPLES
    assert MARK in table["response"].to_pylist()  # what was there was not sampled again
    assert len(set(table["seed"].to_pylist())) == PROMPTS * SAMPLES
    assert sorted(path.suffix for path in run.evals_dir.iterdir()) == [".json"] * 3 + [".parquet"] * 3

    again, said = lab.evaluate(f"{run.path}@all", *ASKED)
    assert (again, "starting vLLM" in said) == (records, False)
    alone(lab, run, two, tmp_path)
    wait_until_gone(lab)


MARK = "drawn before the kill"


def kill_in_the_middle(lab: Lab, run: RunFolder) -> Path:
    """kill -9 of `klreg eval` once a part of the first model is on the disk; returns the folder of the parts."""
    process = lab.start("eval", f"{run.path}@all", *ASKED)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"start, palindrome: \d+ of", line):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    (parts,) = run.evals_dir.glob(".step0-*")
    return parts


def mark(parts: Path) -> None:
    """Tell a sample of the first part from what would be drawn anew."""
    first = parts / "part_000001.parquet"
    rows = pq.read_table(first).to_pylist()
    first.unlink()
    store.write_part(parts, [{**rows[0], "response": MARK}, *rows[1:]])


def alone(lab: Lab, run: RunFolder, record: dict[str, Any], tmp_path: Path) -> None:
    """The exported checkpoint in an engine of its own answers as it did when its weights were loaded in place."""
    exported = tmp_path / "exported"
    lab.klreg("export", run.path, "--step", "2", "--out", exported)
    asked = [*ASKED, "--max-tokens", "12", "--task", record["data"]["path"], "--out", tmp_path / "results"]
    (found,), _ = lab.evaluate(exported, *asked)
    assert found["model"]["sha256"] == record["model"]["sha256"]
    ours, theirs = (
        pq.read_table(path) for path in (tmp_path / "results" / found["file"], run.evals_dir / record["file"])
    )
    same = [a == b for a, b in zip(ours["response"].to_pylist(), theirs["response"].to_pylist(), strict=True)]
    assert sum(same) >= 0.99 * len(same)  # rounding may flip a draw where batches differ
