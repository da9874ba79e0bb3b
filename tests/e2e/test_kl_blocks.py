"""Every KL setting that a recipe can say, on one live stack; a right one pulls back, and a void one does not."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from stack import ROOT, Lab, finish, metrics

from klreg_verl.core import penalties
from klreg_verl.experiment.kl_settings import EXACT, SAMPLED

pytestmark = pytest.mark.timeout(2400)

QUICK = ROOT / "recipes" / "quickstart.yaml"
LEAN = ["eval.before=false", "eval.every=0", "save.every=1000", "samples.every=0", "train.warmup_steps=0"]


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


VOID = block("loss", "k1", 5.0)
PHASES = {
    "drift": (12, {"placement": "none"}),
    "void": (16, VOID),
    "reverse": (22, block("reward", "k1", 5.0, credit="reward_to_go")),
    "drift again": (12, {"placement": "none"}),
    "void again": (16, VOID),
    "forward": (28, block("loss", "k3", 5.0)),
}
"""Steps and block; beta 5 drowns the task. k1 in the loss only adds noise, which drifts away from the reference. Adam's
steps are as long as its learning rate, so a pull ends in a small cloud around the reference and not on it: each begins
far enough away that the cloud is a third of the KL there."""
PROBE_EVERY = 2
OWN = """
from types import SimpleNamespace
k2 = SimpleNamespace(value=lambda d: d * d / 2, coefficient=lambda d: d)
"""


def control_blocks() -> list[dict[str, Any]]:
    return [each for steps, each in PHASES.values() for each in [each] * steps]


def all_blocks() -> list[dict[str, Any]]:
    """The run: the controls, then every name, then every controller."""
    before = [*control_blocks(), *every_block()]
    return [*before, *moved_blocks(len(before) + 1)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> list[dict[str, Any]]:
    """The metrics of one run with a step for every block."""
    folder = tmp_path_factory.mktemp("blocks")
    lab = Lab(folder / "runs", cache)
    blocks = all_blocks()
    (folder / "blocks.json").write_text(json.dumps(blocks))
    (folder / "math_of_my_own.py").write_text(OWN)
    variables = {
        "KLREG_SWITCH": str(folder / "blocks.json"),
        "VERL_USE_EXTERNAL_MODULES": "switching",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(folder)]),
    }
    settings = [*LEAN, f"train.steps={len(blocks)}"]
    settings += [f"probes.exact_every={PROBE_EVERY}", f"reference.reset_every={len(control_blocks()) + 10}"]
    finish(lab.start("run", QUICK, "--arm", "forward", *settings, **variables), timeout=2100)
    return metrics(lab.folder("quickstart", "forward"))


def test_a_large_beta_pulls_back_in_both_right_places_and_k1_in_the_loss_does_not(lines: list[dict[str, Any]]):
    """By the exact KL, mean of the last three probes of a phase: a sampled one's heavy tail hides a factor of two."""
    ends = itertools.accumulate(steps for steps, _ in PHASES.values())
    last = {name: probes(lines[:end])[-3:] for name, end in zip(PHASES, ends, strict=True)}
    kl = {name: sum(line["kl_ref/exact_token"] for line in each) / 3 for name, each in last.items()}
    assert kl["void"] > 0.75 * kl["drift"], kl
    assert kl["reverse"] < 0.75 * kl["void"], kl
    assert kl["void again"] > 0.75 * kl["drift again"], kl
    assert kl["forward"] < 0.75 * kl["void again"], kl


def probes(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "kl_ref/exact_token" in line]


def test_every_block_of_a_recipe_acts_on_one_live_stack(lines: list[dict[str, Any]]):
    blocks = all_blocks()
    assert [line["step"] for line in lines] == list(range(1, len(blocks) + 1))
    for given, line in zip(blocks, lines, strict=True):
        placement, estimator = given["placement"], given.get("estimator")
        assert math.isfinite(line["kl/beta"]) if "controller" in given else line["kl/beta"] == given.get("beta", 0.0)
        assert ("actor/kl_loss" in line) == (placement in ("loss", "both")), given
        assert ("kl/advantage_share" in line) == (placement in ("reward", "both")), given
        assert math.isfinite(line["actor/grad_norm"]) and math.isfinite(line["kl/penalty"]), given
        assert ("adaptive_kl/raw_kl" in line) == (estimator not in (None, *EXACT)), given
        assert ("kl/cap_fraction" in line) == ("cap" in given), given
        assert ("kl_ref/exact_token" in line) == (line["step"] % PROBE_EVERY == 0), given
        if placement in ("reward", "both") and line["kl_ref/k3_token"] > 1e-6:
            assert line["kl/advantage_share"] > 0, given


def test_every_controller_moves_beta_in_either_place(lines: list[dict[str, Any]]):
    step = len(control_blocks()) + len(every_block()) + 1
    rules, moved = controllers_from(step), lines[step - 1 :]
    for rule, first, second in zip(rules, moved[::2], moved[1::2], strict=True):
        assert first["kl/beta"] == 0.1, rule
        assert second["kl/beta"] != pytest.approx(0.1, rel=1e-3), rule
        assert second["adaptive_kl/current_beta"] == second["kl/beta"], rule
    after = {rule["kind"]: line["kl/beta"] for rule, line in zip(rules, moved[1::2], strict=True)}
    assert after["linear"] == pytest.approx(0.15)  # 0.1 + (0.2 - 0.1) * 1 / 2
    assert after["exponential"] == pytest.approx(0.2)  # 0.1 * (0.4 / 0.1) ** (1 / 2)
    assert after["cosine"] == pytest.approx(0.2)  # 0.3 + (0.1 - 0.3) * (1 + cos(pi / 2)) / 2


def test_the_sampled_kl_is_the_exact_one_on_average_and_a_reset_makes_it_zero(lines: list[dict[str, Any]]):
    exact = sum(line["kl_ref/exact_token"] for line in probes(lines))
    for name in ("k1", "k3"):
        assert sum(line[f"kl_ref/{name}_token"] for line in probes(lines)) == pytest.approx(exact, rel=0.2)
    moved = len(control_blocks()) + 10
    assert [line["step"] for line in lines if line.get("reference/moved_at")] == [moved]
    assert lines[moved]["kl_ref/k3_token"] == pytest.approx(0.0, abs=1e-5)
    assert lines[moved - 1]["kl_ref/k3_token"] > 1e-3
