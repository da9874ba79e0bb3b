"""Run a recipe on this machine: one Ray, the unfinished runs one after the other, then the report.

    specs -> preflight -> inputs (data, model; cached) -> Session (Ray) -> for each run: attempt -> verl's driver

A run's driver is verl's own main with our settings (klreg_verl/verl_hooks/main.py); this module never sees a tensor.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from klreg_verl import doctor
from klreg_verl.experiment import provenance
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, Status, atomic_write, write_json
from klreg_verl.verl_hooks import checkpoints, cpu, overrides
from launch import failure, inputs
from launch.display import Display
from launch.session import Session, ray_session

OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's object store on a CPU: a tiny model's batches are megabytes, and Ray would take a third of the memory."""
LOOK_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run ended."""

    spec: RunSpec
    status: Status
    reason: str = ""


class Interrupted(Exception):
    """The user, or the system, asked us to stop."""


def run(specs: Sequence[RunSpec], runs_dir: Path, platform: str, display: Display) -> list[Outcome]:
    """Run what is unfinished, in order; a failed run does not stop the next.

    Args:
        specs: the runs, as `experiment.plan.expand` gives them.
        runs_dir: where run folders live.
        platform: "cpu" or "cuda".
        display: told of every step.

    Raises:
        Interrupted: after the current run was marked interrupted and everything was ended.
        RuntimeError: Ray did not start.
    """
    waiting = [spec for spec in specs if not run_folder(spec, runs_dir).is_done(spec)]
    done = [Outcome(spec=spec, status="done") for spec in specs if spec not in waiting]
    if not waiting:
        return done
    files = {spec.run_id: inputs.prepare(spec, runs_dir, display.note) for spec in waiting}
    gpus = max(spec.resources.gpus_per_node for spec in waiting) if platform == "cpu" else None
    store = OBJECT_STORE_BYTES if platform == "cpu" else None
    with _stop_signals(), ray_session(gpus, store, session_environment(waiting[0], platform)) as session:
        return done + [run_one(spec, files[spec.run_id], runs_dir, platform, session, display) for spec in waiting]


def run_folder(spec: RunSpec, runs_dir: Path) -> RunFolder:
    """runs/<recipe>/<arm>/<task>/[<grid>/]seed<k>."""
    return RunFolder(runs_dir / spec.recipe / spec.run_id)


def run_one(
    spec: RunSpec, files: overrides.Files, runs_dir: Path, platform: str, session: Session, display: Display
) -> Outcome:
    """One attempt at one run, resumed from its newest whole checkpoint."""
    folder = run_folder(spec, runs_dir)
    folder.create(spec)
    with folder.lock():
        notes = checkpoints.repair(folder.checkpoints_dir)
        attempt = folder.new_attempt()
        settings = overrides.settings(spec, files, platform)
        environment = write_attempt(spec, folder, attempt, files, settings, platform)
        for note in notes:
            display.note(note)
        display.start(spec, checkpoints.newest_complete(folder.checkpoints_dir) or 0)
        folder.set_state("running", steps=spec.train.steps, attempt=int(attempt.name))
        outcome = _watch(spec, folder, attempt, settings, environment, session, display)
        folder.set_state(outcome.status, reason=outcome.reason, step=folder.last_step())
    display.end(spec, outcome.status, outcome.reason)
    return outcome


def _watch(
    spec: RunSpec,
    folder: RunFolder,
    attempt: Path,
    settings: overrides.Settings,
    environment: Mapping[str, str],
    session: Session,
    display: Display,
) -> Outcome:
    """Start verl's driver and follow metrics.jsonl until it ends."""
    log = attempt / "log"
    argv = [sys.executable, "-m", "klreg_verl.verl_hooks.main", *overrides.hydra_arguments(settings)]
    argv.append(f"hydra.run.dir={attempt / 'hydra'}")
    try:
        session.start(argv, environment, log)
        code = None
        shown = folder.last_step() or 0
        while code is None:
            code = session.wait(LOOK_SECONDS)
            shown = _show_new(spec, folder, shown, display)
    except Interrupted:
        folder.set_state("interrupted", reason="stopped by a signal", step=folder.last_step())
        raise
    if code == 0 and folder.last_step() == spec.train.steps:
        return Outcome(spec=spec, status="done")
    return Outcome(spec=spec, status="failed", reason=failure.reason(log, code))


def _show_new(spec: RunSpec, folder: RunFolder, shown: int, display: Display) -> int:
    if (folder.last_step() or 0) > shown:
        for line in folder.read_metrics():
            if line["step"] > shown:
                display.step(spec, line)
                shown = line["step"]
    return shown


def write_attempt(
    spec: RunSpec,
    folder: RunFolder,
    attempt: Path,
    files: overrides.Files,
    settings: overrides.Settings,
    platform: str,
) -> dict[str, str]:
    """Write all that the attempt is told into its folder; returns the driver's environment."""
    kl_file = attempt / "kl.yaml"
    atomic_write(kl_file, kl_yaml(spec))
    write_json(attempt / "verl.json", settings)
    gradient = doctor.explain(spec.kl, spec.train.advantage, spec.train.updates_per_batch)
    card = provenance.collect(
        spec,
        {"train": files.train, "val": files.val},
        model=files.model,
        extra={"gradient": gradient, "platform": platform},
    )
    write_json(folder.provenance_path, card)
    return {
        "KLREG_KL": str(kl_file),
        "KLREG_RUN": str(folder.path),
        "TENSORBOARD_DIR": str(folder.path / "tensorboard"),
        **_wandb(spec, folder),
    }


def kl_yaml(spec: RunSpec) -> str:
    """The arm's KL block as the file that KLREG_KL names; JSON is YAML."""
    block = {key: value for key, value in asdict(spec.kl).items() if value not in (None, False)}
    return json.dumps(block, indent=1) + "\n"


def _wandb(spec: RunSpec, folder: RunFolder) -> dict[str, str]:
    """One W&B run over all attempts; without an id every resume would open a new one."""
    if spec.logging.wandb == "off":
        return {}
    return {
        "WANDB_MODE": spec.logging.wandb,
        "WANDB_DIR": str(folder.path),
        "WANDB_RUN_ID": f"{spec.hash[:16]}",
        "WANDB_RESUME": "allow",
    }


def session_environment(spec: RunSpec, platform: str) -> dict[str, str]:
    """Environment of Ray and of every worker: the platform's, and the recipe's folder for a user's own modules."""
    path = os.pathsep.join(filter(None, [spec.root, os.environ.get("PYTHONPATH", "")]))
    extra = cpu.ENVIRONMENT if platform == "cpu" else {}
    return {**os.environ, "PYTHONPATH": path, **{k: v for k, v in extra.items() if k not in os.environ}}


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Interrupted once; a second Ctrl-C during clean-up is ignored, so that it completes."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
