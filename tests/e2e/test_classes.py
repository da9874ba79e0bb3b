"""A stock command under KLREG_KL: the KL acts beside every advantage and policy loss of verl's that is not refused."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from stack import ROOT, Lab, build_inputs, plain_verl, shared_segments, stack_processes, wait_until_gone

from klreg_verl.core.objective import ACTOR, CORRECTION, LOSS
from launch import guardian

pytestmark = [pytest.mark.full(minutes=6), pytest.mark.timeout(3000)]

QUICK = ROOT / "recipes" / "quickstart.yaml"
SMALL = ["train.prompts_per_step=8", "train.updates_per_batch=2", "train.warmup_steps=0", "logging.tensorboard=false"]
LEAN = ["eval.before=true", "eval.every=0", "save.every=1000"]
ADVANTAGES = (
    *("rloo", "rloo_vectorized", "grpo", "grpo_vectorized", "grpo_passk", "opo", "gpg"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "klreg_grpo", "klreg_dr_grpo"),
)
MODES = ("vanilla", "gspo", "sapo", "geo_mean", "gpg", "cispo", "dppo_tv", "dppo_kl", "clip_cov", "kl_cov")
CLASSES: list[dict[str, Any]] = [
    *({"algorithm.adv_estimator": name} for name in ADVANTAGES),
    {"algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": False},
    *({f"{LOSS}.loss_mode": mode} for mode in MODES),
    {f"{LOSS}.loss_mode": "dro", f"{LOSS}.dro_beta": 0.1},
    {f"{ACTOR}.entropy_coeff": 0.01},
    {f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"},
    {f"{CORRECTION}.rollout_is": "token"},
    {f"{CORRECTION}.rollout_rs": "token_k3", f"{CORRECTION}.rollout_rs_threshold": 0.5},
]
STEPS = [each for each in CLASSES for _ in range(2)]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> str:
    """The log of one stock command, two steps for every class."""
    folder = tmp_path_factory.mktemp("classes")
    lab = Lab(folder / "runs", cache)
    before, segments = stack_processes(), shared_segments()
    build_inputs(QUICK, lab)
    (folder / "classes.json").write_text(json.dumps(STEPS))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"KLREG_CLASSES": str(folder / "classes.json"), "VERL_USE_EXTERNAL_MODULES": "classes"}
    exports = [f"export {name}={value}" for name, value in {**variables, "PYTHONPATH": path}.items()]
    script = lab.klreg("plan", QUICK, *SMALL, *LEAN, f"train.steps={len(STEPS)}", "--as-verl", "forward")
    process = plain_verl("\n".join([*exports, script]), folder / "plain", lab)
    code = process.wait(timeout=2700)
    text = (folder / "plain" / "log").read_text()
    wait_until_gone(before)
    guardian.remove_unused(shared_segments() - segments)
    assert code == 0, text[-4000:]
    return text


def lines(output: str) -> dict[int, dict[str, float]]:
    """verl's console lines by step: `step:1 - kl/beta:0.2 - ...`."""
    found = {}
    for step, rest in re.findall(r"step:(\d+) - (.*)", output):
        pairs = re.findall(r"([\w@./-]+):(?:np\.\w+\()?([-+\w.]+)", rest)
        found[int(step)] = {
            key: float(value) for key, value in pairs if re.fullmatch(r"[-+]?[\d.]+(e[-+]\d+)?|nan", value)
        }
    return found


def test_the_kl_acts_in_every_class_that_is_not_refused(output: str):
    measured = lines(output)
    assert set(range(1, len(STEPS) + 1)) <= set(measured)
    for step, given in enumerate(STEPS, start=1):
        line = measured[step]
        assert math.isfinite(line["actor/grad_norm"]) and math.isfinite(line["actor/pg_loss"]), (given, line)
        assert line["kl/penalty"] == pytest.approx(0.2 * line["actor/kl_loss"], rel=1e-3, abs=1e-6), given
        assert ("rollout_corr/rollout_is_mean" in line) == (f"{CORRECTION}.rollout_is" in given), given
    assert max(line["kl/penalty"] for line in measured.values() if "kl/penalty" in line) > 0


def test_the_log_has_the_doctors_sentence_with_the_updates_and_verls_validation_metrics(output: str):
    assert "[klreg] k3 is added to the loss with beta 0.2. It follows the forward KL" in output
    assert "With 2 updates per batch this holds for the first one only" in output
    assert "val-core/palindrome/acc/mean@4:" in output and "eval/palindrome/accuracy:" in output
    assert "best@" not in "".join(re.findall(r"step:0 - .*", output))
