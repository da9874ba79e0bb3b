"""The real stack in three starts: a run that is killed, its resumption, and a plain verl command at its side.

The run takes another KL block at almost every step (switching.py): every name that a recipe can say acts, a right one
pulls back, and a void one does not. What needs more starts is in the other files, for `make test-all`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from stack import (
    QUICK,
    Lab,
    build_inputs,
    finish,
    kill_9,
    metrics,
    plain_verl,
    remains,
    samples,
    shared_segments,
    stack_processes,
    wait_for_step,
    wait_until_gone,
)

from klreg_verl.core import penalties
from klreg_verl.experiment.kl_settings import EXACT, SAMPLED
from launch import guardian

pytestmark = pytest.mark.timeout(3600)


def block(placement: str, estimator: str, beta: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"placement": placement, "estimator": estimator, "follows": "none", "beta": beta, **more}


def every_block() -> list[dict[str, Any]]:
    """Each advertised name at least once."""
    shapings = [{"kind": "clip", "threshold": 0.5}, {"kind": "sigmoid"}, {"kind": "length_normalized"}]
    aggregations = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
    return [
        {"placement": "none"},
        *(block("loss", name) for name in SAMPLED),
        *(block("loss", "k3", correction=correction) for correction in penalties.CORRECTIONS),
        *(block("loss", "k2", aggregation=aggregation) for aggregation in aggregations),
        *(block("loss", "k3", shaping=shaping) for shaping in shapings),
        block("loss", "k3", cap=0.01),
        *(block("reward", name) for name in SAMPLED),
        *(block("reward", "k1", credit=credit) for credit in penalties.CREDITS),
        block("reward", "k1", baseline="none"),
        *(block("reward", "k1", shaping=shaping) for shaping in shapings),
        block("both", "k3", aggregation="seq-mean-token-sum"),
        block("reward", "k1", normalize_with_reward=True),
        block("loss", "math_of_my_own:k2"),
        *(block("loss", name) for name in EXACT),
    ]


def controllers_from(step: int) -> list[dict[str, Any]]:
    """Each moves beta after one step of a policy that has left the reference.

    They take over at `step` and every second step after it, and a schedule has done half of its steps by then.
    """
    return [
        {"kind": "linear", "beta_end": 0.2, "steps": 2 * step},
        {"kind": "exponential", "beta_end": 0.4, "steps": 2 * (step + 2)},
        {"kind": "cosine", "beta_end": 0.3, "steps": 2 * (step + 4)},
        {"kind": "verl_adaptive", "signal": "token", "target": 1e-6, "horizon": 100},
        {"kind": "multiplicative", "signal": "response", "target": 1e-6},
        {"kind": "dynamic", "reward_threshold": 0.0},
        {"kind": "matched_kl", "signal": "response", "target": 1e-6, "beta_min": 1e-3, "beta_max": 10.0},
    ]


def moved_blocks(step: int) -> list[dict[str, Any]]:
    """Two steps of each controller from `step` on, in turns in the loss and in the reward."""
    places = itertools.cycle([("loss", "k3"), ("reward", "k1")])
    return [each for rule in controllers_from(step) for each in [block(*next(places), controller=rule)] * 2]


ADAPTIVE = {"kind": "verl_adaptive", "target": 0.001, "signal": "token"}
OWN = block("loss", "k3", 0.2, controller=ADAPTIVE) | {"follows": "forward"}
PHASES = {
    "own": [OWN] * 2,
    "controllers": moved_blocks(3),
    "void": [block("loss", "k1", 5.0)] * 12,
    "reverse": [block("reward", "k1", 5.0, credit="reward_to_go")] * 20,
    "names": every_block(),
    "own again": [OWN] * 4,
    "forward": [block("loss", "k3", 5.0)] * 24,
}
"""The blocks of the steps. beta 5 drowns the task, and 0.1 does not, so the policy drifts away under the controllers
and under the names. k1 in the loss only adds noise, which drifts away from the reference. Adam's steps are as long as
its learning rate, so a pull ends in a small cloud around the reference and not on it: each begins far enough away."""
BLOCKS = [each for phase in PHASES.values() for each in phase]
ENDS = dict(zip(PHASES, itertools.accumulate(map(len, PHASES.values())), strict=True))
SAVED = ENDS["own again"] - 2
"""The step after which there is a checkpoint; the kill comes after the next one."""
RESET = ENDS["reverse"] + 13
"""The step after which the policy is the reference."""
STUDY = {
    "base": str(QUICK),
    "tasks": {"palindrome": {"options": {"test_size": 16}}},
    "train": {"steps": len(BLOCKS), "warmup_steps": 0},
    "eval": {"every": 0},
    "save": {"every": SAVED},
    "probes": {"exact_every": 2},
    "reference": {"reset_every": RESET},
    "arms": {"forward": {"kl": {key: OWN[key] for key in ("beta", "controller")}}},
}
USERS = """
from types import SimpleNamespace
k2 = SimpleNamespace(value=lambda d: d * d / 2, coefficient=lambda d: d)
"""


@dataclass(frozen=True, kw_only=True)
class Story:
    """What the three starts left."""

    lab: Lab
    folder: Path
    """Of the run, to its end."""
    killed: str
    """What `klreg run` said when its driver was killed."""
    lost: list[dict[str, Any]]
    """The metrics that were there then."""
    plain: Path
    """Folder of the plain command: its log, and verl's dump of responses."""
    left: dict[str, list[str]]
    """Processes of the stack after the kill, and at the end."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics of the steps."""
        return metrics(self.folder)[1:]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Story]:
    place = tmp_path_factory.mktemp("story")
    lab, study = Lab(place / "runs", cache), place / "study.yaml"
    study.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    build_inputs(study, lab)
    before, segments = stack_processes(), shared_segments()
    command, folder = ["run", study, "--arm", "forward"], lab.folder("study", "forward")
    run = lab.start(*command, **switched(place))
    try:
        plain = start_plain(lab, study, place / "plain")
        wait_for_step(folder, SAVED + 1, run, 1)
        assert plain.wait(timeout=1800) != 0
        kill_9("verl_hooks.main", before)
        killed, _ = run.communicate(timeout=1200)
    finally:
        run.terminate()
    assert run.returncode == 1, killed
    wait_until_gone(before)
    guardian.remove_unused(shared_segments() - segments)  # stock verl leaves vLLM's behind; our launcher does not
    lost = metrics(folder)
    finish(lab.start(*command, **switched(place)))
    left = {"processes": remains(before), "shared memory": sorted(shared_segments() - segments)}
    yield Story(lab=lab, folder=folder, killed=killed, lost=lost, plain=place / "plain", left=left)


def switched(place: Path) -> dict[str, str]:
    """The variables that make a run take the blocks."""
    (place / "blocks.json").write_text(json.dumps(BLOCKS))
    (place / "math_of_my_own.py").write_text(USERS)
    return {
        "KLREG_SWITCH": str(place / "blocks.json"),
        "VERL_USE_EXTERNAL_MODULES": "switching",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(place)]),
    }


def start_plain(lab: Lab, study: Path, folder: Path) -> Any:
    """The same study's reverse arm as a plain verl command, which an alarm ends after its first step."""
    settings = ["eval.before=false", "alarms.kl_above=-1", "alarms.warm_up=0", "alarms.stop=true"]  # at any KL
    script = lab.klreg("plan", study, *settings, "--as-verl", "reverse").rstrip()
    return plain_verl(f"{script} '++trainer.rollout_data_dir=\"{folder}/dump\"'", folder, lab)


def test_a_plain_verl_command_has_the_hooks_and_obeys_them(story: Story):
    output = (story.plain / "log").read_text()
    assert "AlarmRaised: alarms.stop is true, and an alarm was raised. kl_above" in output
    assert "step:1 " in output and "step:2 " not in output
    assert "[klreg] KL placement=reward estimator=k1 follows=reverse beta=0.2" in output
    assert "kl_ref/k1_response:" in output


def test_arms_agree_token_for_token_at_step_one(story: Story):
    ours = samples(story.folder, 1)
    dump = [json.loads(line) for line in (story.plain / "dump" / "1.jsonl").read_text().splitlines()]
    assert sorted(ours["response"]) == sorted(row["output"] for row in dump)
    assert len(set(ours["token_ids"].map(tuple))) > 32  # of 64: every request has a seed of its own
    first, printed = story.lines[0], re.search(r"step:1 - (.*)", (story.plain / "log").read_text())[1]
    theirs = dict(each.split(":", 1) for each in printed.split(" - "))
    for key in ("train/accuracy", "response/length", "diversity/unique_valid"):
        assert first[key] == pytest.approx(float(theirs[key]), abs=1e-6), key
    assert first["kl_ref/k1_response"] == pytest.approx(0.0, abs=1e-4)  # step 1 is the starting policy
    assert story.lines[1]["kl_ref/k3_token"] > 1e-7  # step 2 is not
    assert abs(first["kl_rollout/k1_token"]) < 1e-3  # vLLM and trainer agree


def test_a_run_whose_driver_is_killed_resumes_and_repeats_what_was_not_saved(story: Story):
    assert "the driver was killed by SIGKILL" in story.killed
    whole = metrics(story.folder)
    assert [line["step"] for line in whole] == list(range(len(BLOCKS) + 1))
    discarded = [json.loads(line) for line in (story.folder / "attempts/2/discarded.jsonl").read_text().splitlines()]
    assert discarded[0]["step"] == SAVED + 1
    keys = ("kl/beta", "kl_ref/k3_token", "train/score", "response/length")  # data, seeds, weights, reference, beta
    for key in keys:
        assert [line[key] for line in story.lost[1 : SAVED + 2]] == [line[key] for line in whole[1 : SAVED + 2]], key
    betas = [whole[step]["kl/beta"] for step in range(SAVED - 1, SAVED + 3)]
    assert len(set(betas)) == 4  # the controller moved beta at every step, before the kill and after it
    assert story.left == {"processes": [], "shared memory": []}
    assert json.loads((story.folder / "state.json").read_text())["status"] == "done"
    assert json.loads((story.folder / "provenance.json").read_text())["versions"]["verl"] == "0.9.1"
    assert list((story.folder / "tensorboard").rglob("events.*"))


def test_a_large_beta_pulls_back_in_both_right_places_and_k1_in_the_loss_does_not(story: Story):
    """By the exact KL, mean of the last three probes of a phase: a sampled one's heavy tail hides a factor of two."""
    last = {name: probes(story.lines[:end])[-3:] for name, end in ENDS.items()}
    kl = {name: sum(line["kl_ref/exact_token"] for line in each) / len(each) for name, each in last.items()}
    assert kl["void"] > 0.75 * kl["controllers"], kl
    assert kl["reverse"] < 0.75 * kl["void"], kl
    assert kl["forward"] < 0.75 * kl["own again"], kl


def probes(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "kl_ref/exact_token" in line]


def test_every_block_of_a_recipe_acts(story: Story):
    for given, line in zip(BLOCKS, story.lines, strict=True):
        placement, estimator = given["placement"], given.get("estimator")
        assert math.isfinite(line["kl/beta"]) if "controller" in given else line["kl/beta"] == given.get("beta", 0.0)
        assert ("actor/kl_loss" in line) == (placement in ("loss", "both")), given
        assert ("kl/advantage_share" in line) == (placement in ("reward", "both")), given
        assert math.isfinite(line["actor/grad_norm"]) and math.isfinite(line["kl/penalty"]), given
        assert ("adaptive_kl/raw_kl" in line) == (estimator not in (None, *EXACT)), given
        assert ("kl/cap_fraction" in line) == ("cap" in given), given
        assert ("kl_ref/exact_token" in line) == (line["step"] % 2 == 0), given
        if placement in ("reward", "both") and line["kl_ref/k3_token"] > 1e-6:
            assert line["kl/advantage_share"] > 0, given


def test_every_controller_moves_beta_in_either_place(story: Story):
    rules, moved = controllers_from(3), story.lines[2 : ENDS["controllers"]]
    for rule, first, second in zip(rules, moved[::2], moved[1::2], strict=True):
        assert first["kl/beta"] == 0.1, rule
        assert second["kl/beta"] != pytest.approx(0.1, rel=1e-3), rule
        assert second["adaptive_kl/current_beta"] == second["kl/beta"], rule
    after = {rule["kind"]: line["kl/beta"] for rule, line in zip(rules, moved[1::2], strict=True)}
    assert after["linear"] == pytest.approx(0.15)  # 0.1 + (0.2 - 0.1) * 1 / 2
    assert after["exponential"] == pytest.approx(0.2)  # 0.1 * (0.4 / 0.1) ** (1 / 2)
    assert after["cosine"] == pytest.approx(0.2)  # 0.3 + (0.1 - 0.3) * (1 + cos(pi / 2)) / 2


def test_the_sampled_kl_is_the_exact_one_on_average_and_a_reset_makes_it_zero(story: Story):
    lines = story.lines
    exact = sum(line["kl_ref/exact_token"] for line in probes(lines))
    for name in ("k1", "k3"):
        assert sum(line[f"kl_ref/{name}_token"] for line in probes(lines)) == pytest.approx(exact, rel=0.2)
    assert [line["step"] for line in lines if line.get("reference/moved_at")] == [RESET]
    assert lines[RESET]["kl_ref/k3_token"] == pytest.approx(0.0, abs=1e-5)
    assert lines[RESET - 1]["kl_ref/k3_token"] > 1e-3


def test_a_run_is_validated_before_training_and_at_the_end_and_reported(story: Story):
    lines = metrics(story.folder)
    assert [line["step"] for line in lines if "eval/palindrome/accuracy" in line] == [0, len(BLOCKS)]
    assert 0 < lines[0]["eval/palindrome/accuracy"] < 1
    report = story.folder.parents[2] / "report.html"
    assert report.stat().st_size > 50_000 and "forward" in report.with_suffix(".md").read_text()


def test_the_last_checkpoint_is_evaluated_beside_the_start_and_exported(story: Story, tmp_path: Path):
    (start, end), said = story.lab.evaluate(f"{story.folder}@0", f"{story.folder}@{len(BLOCKS)}", "--samples", "4")
    assert re.findall(r"starting vLLM for (\d) evaluations", said) == ["2"]
    assert (start["step"], end["step"]) == (0, len(BLOCKS))
    assert (start["prompts"], start["samples"]) == (16, 4)
    assert 0 < start["accuracy"]["mean"] < 1
    assert start["model"]["sha256"] != end["model"]["sha256"]
    story.lab.klreg("export", story.folder, "--step", str(len(BLOCKS)), "--out", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights and all(weight.isfinite().all() for weight in weights.values())
