"""The study end to end, as a user runs it. Steps are few; what is checked is exact."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from stack import (
    QUICK,
    ROOT,
    Lab,
    build_inputs,
    finish,
    kill_9,
    log,
    metrics,
    plain_verl,
    remains,
    samples,
    shared_segments,
    stack_processes,
    wait_for,
    wait_for_step,
    wait_until_gone,
)

from klreg_verl.experiment.store import RunFolder
from launch import guardian

pytestmark = pytest.mark.timeout(3600)

ADVANTAGES = ROOT / "recipes" / "rloo_vs_grpo.yaml"
SMALL = ["train.steps=2", "train.prompts_per_step=8", "train.responses_per_prompt=4", "train.warmup_steps=0"]
LEAN = ["eval.before=false", "eval.every=0", "save.every=1"]


@pytest.mark.full(minutes=6)  # six starts
def test_four_arms_run_agree_at_step_one_and_leave_a_report_and_nothing_else(lab: Lab, tmp_path: Path):
    before, segments = stack_processes(), shared_segments()
    study = with_a_fourth_arm(tmp_path)
    command = ["run", study, *SMALL, "save.every=1", "alarms.kl_below=1000", "alarms.warm_up=1"]
    folders = {arm: lab.folder("four", arm) for arm in ("none", "reverse", "forward", "drawn")}
    output = in_two_terminals(lab, command, folders["none"])
    lines = {arm: metrics(folder) for arm, folder in folders.items()}

    assert [line["step"] for line in lines["none"]] == [0, 1, 2]
    assert 0 < lines["none"][0]["eval/palindrome/accuracy"] < 1
    first = {arm: line[1] for arm, line in lines.items()}
    for key in ("train/accuracy", "entropy/token", "response/length", "diversity/unique_valid"):
        assert first["none"][key] == pytest.approx(first["reverse"][key], abs=1e-6)
        assert first["none"][key] == pytest.approx(first["forward"][key], abs=1e-6)
    tokens = {arm: samples(folder, 1)["token_ids"].map(tuple).tolist() for arm, folder in folders.items()}
    assert tokens["none"] == tokens["reverse"] == tokens["forward"] == tokens["drawn"]
    assert len(set(tokens["none"])) > 16  # 32 responses: every request has a seed of its own

    for arm, line in lines.items():
        assert line[1]["kl_ref/k1_response"] == pytest.approx(0.0, abs=1e-4)  # step 1 is the starting policy
        assert line[2]["kl_ref/k3_token"] > 1e-7  # step 2 is not, in every arm
        assert abs(line[1]["kl_rollout/k1_token"]) < 1e-3  # vLLM and trainer agree
        assert line[1]["kl/beta"] == (0.0 if arm == "none" else 0.2)
    assert "[klreg] KL placement=loss estimator=k3 follows=forward beta=0.2" in log(folders["forward"])
    for folder in folders.values():
        assert json.loads((folder / "state.json").read_text())["status"] == "done"
        assert json.loads((folder / "provenance.json").read_text())["versions"]["verl"] == "0.9.1"
        assert list((folder / "tensorboard").rglob("events.*"))
        assert "alarm/kl_below" not in line[1] and line[2]["alarm/kl_below"] == 1  # step 1 is warm-up
        assert "[klreg] alarm kl_below at step 2" in log(folder)
    assert lines["drawn"][1]["kl_ref/forward_sampled"] == pytest.approx(0.0, abs=0.05)  # drawn from this very policy
    assert (lab.runs / "four" / "report.html").stat().st_size > 50_000
    assert "kl_below" in (lab.runs / "four" / "report.md").read_text()
    assert "report:" in output
    assert not remains(before)
    assert shared_segments() <= segments

    assert "starting" not in lab.klreg(*command)  # nothing is left to do
    look_back(lab, folders["none"], lines["none"])


def in_two_terminals(lab: Lab, command: list[str | Path], first: Path) -> str:
    """The output of a command whose runs a second one shares, once it is at the first of them; each did some."""
    process = lab.start(*command)
    wait_for(lambda: RunFolder(first).is_locked(), process)
    shared = lab.klreg(*command, "--share")
    output = finish(process)
    assert "none/palindrome/seed1: done" in output and "reverse/palindrome/seed1: done" in shared
    return output


def beginning(folder: Path) -> dict[str, list]:
    """What the first three steps were; the third is after the checkpoint and is made again by every attempt."""
    keys = ("kl/beta", "kl_ref/k3_token", "reference/moved_at")
    found = {key: [line[key] for line in metrics(folder)[:3]] for key in keys}
    return found | {"tokens": samples(folder, 3)["token_ids"].map(tuple).tolist()}


def with_a_fourth_arm(folder: Path) -> Path:
    """The quick study and forward KL proper, as a user's recipe."""
    path = folder / "four.yaml"
    drawn = "{placement: loss, estimator: reference_samples, follows: forward, draw: {prompts: 8, per_prompt: 2}}"
    path.write_text(f"base: {QUICK}\narms: {{drawn: {{kl: {drawn}}}}}\n")
    return path


def look_back(lab: Lab, folder: Path, lines: list[dict]) -> None:
    """`klreg kl` and `klreg replay` on what the run left."""
    replayed = json.loads(lab.klreg("replay", folder, "--step", "1", "--only", "loss/k*", "--json"))
    assert replayed["k1_token"] == pytest.approx(lines[2]["kl_ref/k1_token"], abs=1e-4)  # as the run measured it
    assert replayed["gradient_norm"] == pytest.approx(lines[2]["actor/grad_norm"], rel=0.02)
    record = json.loads((folder / "provenance.json").read_text())
    between = ["kl", folder / "checkpoints" / "global_step_2", record["model"]["path"]]
    asked = ["--prompts", record["data"]["val"]["path"], "--max-prompts", "4", "--max-tokens", "12", "--json"]
    found = json.loads(lab.klreg(*between, *asked))
    assert 0 < found["reverse"]["token"]["mean"] < 1, found


VICTIMS = {
    "verl_hooks.main": "the driver was killed by SIGKILL",
    "ray::WorkerDict": "ActorDiedError|actor died unexpectedly",
    "VLLM::EngineCore": "vLLM's engine .* was killed|EngineDeadError",  # where verl was waiting, or was just asking
}
"""Whom to kill -9 -> what `klreg run` says then."""


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(["verl_hooks.main"], id="driver"),
        pytest.param(["ray::WorkerDict", "VLLM::EngineCore"], id="workers"),
    ],
)
@pytest.mark.full(minutes=6)  # test_three_starts kills a driver each time
def test_a_run_whose_processes_are_killed_one_by_one_resumes_and_repeats_what_was_not_saved(
    lab: Lab, victims: list[str]
):
    moving = ["kl.controller={kind: verl_adaptive, target: 0.001, signal: token}", "reference.ema=0.5"]
    command = ["run", ADVANTAGES, *SMALL, *LEAN, "train.steps=4", "save.every=2", *moving, "--arm", "dr_grpo"]
    before = stack_processes()
    folder = lab.folder("rloo_vs_grpo", "dr_grpo")
    lost = []
    for attempt, victim in enumerate(victims):
        process = lab.start(*command)
        wait_for_step(folder, 3, process, attempt + 1)
        kill_9(victim, before)
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 1
        assert re.search(VICTIMS[victim], output), output
        assert not remains(before)
        lost.append(beginning(folder))

    lab.klreg(*command)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    for attempt in range(2, len(victims) + 2):
        discarded = (folder / f"attempts/{attempt}/discarded.jsonl").read_text().splitlines()
        assert json.loads(discarded[0])["step"] == 3
    again = beginning(folder)
    assert len(set(again["kl/beta"])) == 3  # the controller moved beta at every step
    assert again["reference/moved_at"] == [1, 2, 3]
    assert lost == [again] * len(victims)  # same data, seeds, weights and reference; beta to the last bit
    assert sorted(p.name for p in (folder / "checkpoints").glob("global_step_*")) == ["global_step_2", "global_step_4"]
    assert not remains(before)


@pytest.mark.full(minutes=4)  # two starts, and two workers
def test_two_studies_side_by_side_two_workers_and_a_plain_verl_command(lab: Lab, tmp_path: Path):
    """A user's own project on two FSDP workers, while verl's own main runs with our hooks next to it."""
    model = build_inputs(QUICK, lab)
    project = users_project(tmp_path / "project", lab, model)
    before, segments = stack_processes(), shared_segments()
    own = lab.start("run", "vowels.yaml", cwd=project)
    alarmed = ["alarms.kl_above=-1", "alarms.warm_up=0", "alarms.stop=true"]  # at any KL
    script = lab.klreg("plan", QUICK, *SMALL, *LEAN, *alarmed, "--as-verl", "forward")
    plain = plain_verl(script, tmp_path / "plain", lab)

    finish(own)
    folder = lab.runs / "vowels" / "forward" / "vowels" / "beta=0.1" / "seed3"
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert 0 < lines[0]["train/score"] < 1
    assert lines[0]["kl_ref/k3_token"] > 1e-3  # the reference is not the starting model
    assert "kl_ref_t1/k3_token" not in lines[0]
    assert 0 < lines[1]["kl_ref_t1/k3_token"] < lines[1]["kl_ref/k3_token"]  # at 0.9 the models' logits differ by more
    assert "diversity/coverage" not in lines[0] or lines[0]["diversity/coverage"] is None
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    actor = folder / "checkpoints" / "global_step_2" / "actor"
    assert len(list(actor.glob("model*_rank_1.pt"))) == 1  # the model really was sharded over two workers

    assert plain.wait(timeout=2400) != 0
    output = (tmp_path / "plain" / "log").read_text()
    assert "AlarmRaised: alarms.stop is true, and an alarm was raised. kl_above" in output
    assert "step:1 " in output and "step:2 " not in output
    assert "[klreg] KL placement=loss estimator=k3 follows=forward beta=0.2" in output
    assert "kl_ref/k1_response:" in output
    wait_until_gone(before)
    guardian.remove_unused(shared_segments() - segments)  # stock verl leaves vLLM's behind; our launcher does not


def users_project(folder: Path, lab: Lab, model: Path) -> Path:
    """Copy the fixture project out of the repository; give it parquet files and a reference model of its own."""
    folder.mkdir()
    for name in ("my_rewards.py", "vowels.yaml"):
        (folder / name).write_text((Path(__file__).parent / "project" / name).read_text())
    perturbed(model, folder / "other_model")
    from data_prep import palindrome

    built = palindrome.cache(palindrome.PalindromeOptions(train_size=64, test_size=8), lab.cache, lambda *_: None)
    for split, name in (("train", "train"), ("test", "val")):
        table = pd.read_parquet(built / f"{split}.parquet")
        table["data_source"] = "vowels"
        keep = table[["data_source", "prompt", "ability", "reward_model", "extra_info"]]
        keep = keep.assign(extra_info=[{"index": int(info["index"])} for info in keep["extra_info"]])
        keep.to_parquet(folder / f"{name}.parquet")
    return folder


def perturbed(model: Path, folder: Path) -> None:
    """A copy of a model, every weight changed by about 5 %."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: w * (1 + 0.05 * torch.randn(w.shape, generator=generator)) for name, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
