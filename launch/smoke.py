"""`klreg smoke`: a job of minutes that tries out everything a study needs of a cluster, with a verdict a line each.

The job measures the cluster itself (probe.py), runs two steps with a checkpoint, and comes back for a third step from
it: the same run with more steps, as any extended run.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.selection import selected
from klreg_verl.experiment.store import run_folder
from klreg_verl.verl_hooks import checkpoints
from launch import slurm
from launch.gpu import WITHOUT_FLASH
from launch.job_folder import Job, Submitted
from launch.profile import Profile

RECIPE = Path(__file__).parent / "trial" / "smoke.yaml"
"""In a folder without modules: it is on the path of the runs, and `profile` is one of Python's own, too."""
FIRST_STEPS = 2
SAME = 0.05
"""Nats a token: sampler and trainer of one model differ by rounding, in bfloat16 by about 0.01."""
POLL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One thing that was tried."""

    what: str
    fine: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.fine else 'FAIL'}  {self.what}: {self.detail}"


def make_job(profile: Profile, runs_dir: Path, overrides: Sequence[str]) -> Job:
    """One task: the run with two steps, then the same run with one more."""
    nodes, gpus = profile.nodes or 1, profile.gpus_per_node or 1
    count = nodes * gpus
    workers = [f"resources.nodes={nodes}", f"resources.gpus_per_node={gpus}"]
    prompts = [f"train.prompts_per_step={count * -(-8 // count)}"]  # 8 or more, shared equally
    _, (spec,) = selected(RECIPE, [*workers, *prompts, *_attention(profile), *overrides])
    first = replace(spec, train=replace(spec.train, steps=FIRST_STEPS))
    job = slurm.make_job([spec], profile, runs_dir)
    return replace(job, tasks=((first, spec),), probe=True)


def _attention(profile: Profile) -> list[str]:
    """Torch's attention, where flash-attn is missing or, in a container, may be; a step's 4 responses a prompt fit."""
    is_here = profile.container.kind == "none" and importlib.util.find_spec("flash_attn") is not None
    if profile.platform == "cpu" or is_here:
        return []
    return ["train.micro_batch=4", *(f"verl.{key}={json.dumps(value)}" for key, value in WITHOUT_FLASH.items())]


def wait(submitted: Submitted, tell: Callable[[str], None]) -> None:
    """Until Slurm has finished with the job; tells each new state."""
    seen = ""
    while True:
        found = slurm.elements([submitted]).get(submitted.element(0))
        state = "unknown to Slurm" if found is None else f"{found.state} {found.nodes}".strip()
        if state != seen:
            tell(f"job {submitted.element(0)}: {state}")
            seen = state
        if found is None or not found.is_live:
            return
        time.sleep(POLL_SECONDS)


def verdicts(job: Job, submitted: Submitted) -> list[Verdict]:
    """What the job has shown, in the order in which a study would need it."""
    spec = job.specs[-1]
    folder = run_folder(spec, Path(job.runs_dir))
    lines = folder.read_metrics()
    ends = sorted(folder.attempts_dir.glob("*/end.json"), key=lambda path: int(path.parent.name))
    return [
        *_probed(submitted),
        _metric("vLLM samples what the trainer computes", lines, "kl_rollout/k1_token", "nats/token"),
        _metric("reference pass, equal to the policy at step 1", lines, "kl_ref/k3_token", "nats/token"),
        _steps(lines, folder.state().reason),
        _saved(folder.checkpoints_dir),
        _resumed(ends, lines, spec),
    ]


def _probed(submitted: Submitted) -> list[Verdict]:
    files = sorted(submitted.folder.glob("tasks/0/*/probe.json"))
    if not files:
        log = submitted.log(0)
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        why = "".join(last) or "the job left no log"
        return [Verdict(what="nodes", fine=False, detail=f"Ray was never up on all of them. {why} ({log})")]
    found = json.loads(files[-1].read_text())
    return [Verdict(what=what, fine=fine, detail=detail) for what, fine, detail in found]


def _metric(what: str, lines: Sequence[dict[str, Any]], key: str, unit: str) -> Verdict:
    value = next((line.get(key) for line in lines if line["step"] == 1), None)
    if value is None:
        return Verdict(what=what, fine=False, detail="no step was done")
    return Verdict(what=what, fine=abs(value) < SAME, detail=f"they differ by {value:.1e} {unit}")


def _steps(lines: Sequence[dict[str, Any]], reason: str) -> Verdict:
    done = [line for line in lines if 1 <= line["step"] <= FIRST_STEPS]
    seconds = [line["time/step_s"] for line in done if line.get("time/step_s") is not None]
    detail = f"{', '.join(f'{value:.1f} s' for value in seconds)}" if done else reason or "none was done"
    return Verdict(what="two steps", fine=len(done) == FIRST_STEPS, detail=detail)


def _saved(root: Path) -> Verdict:
    whole = [step for step in checkpoints.steps(root) if not checkpoints.problems(checkpoints.step_folder(root, step))]
    detail = f"whole after steps {', '.join(map(str, whole))}" if whole else f"nothing whole in {root}"
    return Verdict(what="save", fine=bool(whole), detail=detail)


def _resumed(ends: Sequence[Path], lines: Sequence[dict[str, Any]], spec: RunSpec) -> Verdict:
    steps = [line["step"] for line in lines]
    fine = steps == list(range(1, spec.train.steps + 1)) and len(ends) > 1
    reasons = [json.loads(path.read_text())["reason"] for path in ends]
    detail = f"{len(ends)} attempts did steps {steps}" + "".join(f"; {reason}" for reason in reasons if reason)
    return Verdict(what="resume", fine=fine, detail=detail)
