"""Run a recipe on this machine: one Ray, the unfinished runs one after the other, then the report.

    specs -> preflight -> inputs (data, model; cached) -> Session (Ray) -> for each run: attempt -> verl's driver

A run's driver is verl's own main with our settings (klreg_verl/verl_hooks/main.py); this module never sees a tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from klreg_verl import doctor
from klreg_verl.experiment import claims, own_code, provenance
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, RunLocked, Status, atomic_write, run_folder, write_json
from klreg_verl.verl_hooks import checkpoints, cpu, overrides
from launch import failure, gpu, guardian, host, inputs, preflight
from launch.display import Display, Start
from launch.session import AttachedSession, Session, attached_session, ray_session
from launch.stall import Stall

OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's object store on a CPU: a tiny model's batches are megabytes, and Ray would take a third of the memory."""
LOOK_SECONDS = 0.3
STARTED = "started.json"
"""In an attempt's folder: the seconds until its first line."""
ALARM = "AlarmRaised"
"""The error of verl_hooks/watch.py with which a run's own alarms end it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run ended."""

    spec: RunSpec
    status: Status
    reason: str = ""
    end: str = ""
    """What end.json says, where that is not the status."""


class Interrupted(Exception):
    """The user, or the system, asked us to stop."""

    reason = "stopped by a signal"
    """What the run's state says."""
    end = "signal"
    """What end.json says."""


def run(
    specs: Sequence[RunSpec],
    runs_dir: Path,
    platform: str,
    display: Display,
    ray_address: str | None = None,
    share: bool = False,
) -> list[Outcome]:
    """Run what is unfinished, in order; a failed run does not stop the next.

    Args:
        specs: the runs, as `experiment.plan.expand` gives them.
        runs_dir: where run folders live.
        platform: "cpu" or "cuda".
        display: told of every step.
        ray_address: a Ray that is there already, whose nodes have this environment and see all paths; None: our own.
        share: begin although another process works on some of them.

    Returns:
        How each run ended, but for those that another process works on when their turn comes: they are left to it.

    Raises:
        Interrupted: after the current run was marked interrupted and everything was ended.
        RuntimeError: Ray did not start.
        ValueError: a run's folder holds another run, or, unless shared, another process works in it.
    """
    (preflight.check_same if share else preflight.check_folders)(specs, runs_dir)
    waiting = [spec for spec in specs if not run_folder(spec, runs_dir).is_done(spec)]
    outcomes = [Outcome(spec=spec, status="done") for spec in specs if spec not in waiting]
    for outcome in outcomes:
        display.skip(outcome.spec)
    if not waiting:
        return outcomes
    files = {spec.run_id: inputs.prepare(spec, runs_dir, display.note) for spec in waiting}
    with stop_signals(display.note), _session(waiting, platform, ray_address) as session:
        for spec in waiting:
            try:
                outcomes.append(run_one(spec, files[spec.run_id], runs_dir, platform, session, display))
            except RunLocked:  # by a `klreg run --share` that began later
                display.note(f"{spec.run_id} is left to {run_folder(spec, runs_dir).holder()}")
    return outcomes


def _session(
    specs: Sequence[RunSpec], platform: str, ray_address: str | None
) -> AbstractContextManager[Session | AttachedSession]:
    environment = session_environment(specs[0], platform)
    if ray_address is not None:
        return attached_session(ray_address, environment)
    workers = max(spec.resources.gpus_per_node for spec in specs)
    logical = {"gpus": workers, "object_store_bytes": OBJECT_STORE_BYTES} if platform == "cpu" else {}
    return ray_session(guardian.Place(slots=host.ray_slots(workers), **logical), environment)


def run_one(
    spec: RunSpec,
    files: overrides.Files,
    runs_dir: Path,
    platform: str,
    session: Session | AttachedSession,
    display: Display,
) -> Outcome:
    """One attempt at one run, resumed from its newest whole checkpoint."""
    folder = run_folder(spec, runs_dir)
    with folder.lock():
        preflight.check_same([spec], runs_dir)
        if folder.is_done(spec):  # another process was here meanwhile
            display.skip(spec)
            return Outcome(spec=spec, status="done")
        folder.create(spec)
        folder.sweep()
        if preflight.without_optimizer(folder) is not None:  # so it has every step that is asked for
            folder.set_state("done", step=folder.last_step(), steps=spec.train.steps)
            display.skip(spec)
            return Outcome(spec=spec, status="done")
        notes = checkpoints.repair(folder.checkpoints_dir)
        if lost := lost_checkpoints(folder, spec):
            folder.set_state("failed", reason=lost, step=folder.last_step())
            display.end(spec, "failed", lost)
            return Outcome(spec=spec, status="failed", reason=lost)
        attempt = folder.new_attempt()
        settings = overrides.settings(spec, files, platform)
        environment = write_attempt(spec, folder, attempt, files, settings, platform)
        for note in notes:
            display.note(note)
        display.start(spec, checkpoints.newest_complete(folder.checkpoints_dir) or 0)
        folder.set_state("running", steps=spec.train.steps, attempt=int(attempt.name))
        outcome = _watch(spec, folder, attempt, settings, environment, session, display, platform)
        _write_end(folder, attempt, outcome.status, outcome.reason, outcome.end)
    display.end(spec, outcome.status, outcome.reason)
    return outcome


def lost_checkpoints(folder: RunFolder, spec: RunSpec) -> str | None:
    """Why a run that has saved cannot go on, as nothing whole is left; it is never started anew unasked.

    The steps between checkpoints may have changed: the longest of all attempts says that one was saved. A checkpoint is
    whole before the next step's line is written.
    """
    newest, last = checkpoints.newest_complete(folder.checkpoints_dir), folder.last_step() or 0
    told = [json.loads(path.read_text())["trainer.save_freq"] for path in folder.attempts_dir.glob("*/verl.json")]
    if newest is None and last > max([spec.save.every, *told]):
        return (
            f"{last} steps are done and no checkpoint in {folder.checkpoints_dir} is whole: it would start anew. "
            "Restore one (what was not whole is beside it as incomplete_*), or remove the run's folder."
        )
    return None


def _watch(
    spec: RunSpec,
    folder: RunFolder,
    attempt: Path,
    settings: overrides.Settings,
    environment: Mapping[str, str],
    session: Session | AttachedSession,
    display: Display,
    platform: str,
) -> Outcome:
    """Start verl's driver and follow metrics.jsonl until it ends."""
    log = attempt / "log"
    arguments = overrides.hydra_arguments({**settings, "hydra.run.dir": attempt / "hydra"})
    argv = [sys.executable, "-P", "-m", "klreg_verl.verl_hooks.main", *arguments]  # -P: not what lies in this folder
    try:
        session.start(argv, environment, log)
        end, stalled, stall = None, None, Stall(attempt, spec.stall.minutes(platform))
        before = shown = _last_step(folder)
        began, usual, started = time.monotonic(), _usual_start(folder, spec), False
        while end is None:
            end = session.wait(LOOK_SECONDS)
            if end is None and stalled is None and (stalled := stall.reason()):
                session.end(stalled)
            shown, seconds = _show_new(spec, folder, shown, display), time.monotonic() - began
            if not started and shown > before:
                started = True
                write_json(attempt / STARTED, {"seconds": seconds})
            elif not started:
                display.starting(spec, Start(doing=stall.doing(), seconds=seconds, usual=usual, log=log))
    except Interrupted as stop:
        _write_end(folder, attempt, "interrupted", stop.reason, stop.end)
        raise
    if end.code == 0 and folder.last_step() == spec.train.steps:
        return Outcome(spec=spec, status="done")
    if end.code == 0 and folder.stop_asked():
        return Outcome(spec=spec, status="interrupted", reason=f"asked to stop, saved step {folder.last_step()}")
    reason = failure.reason(log, end)
    return Outcome(spec=spec, status="failed", reason=reason, end="alarm" if ALARM in reason else "")


def _usual_start(folder: RunFolder, spec: RunSpec) -> float | None:
    """Median seconds from an attempt's start to its first line, over the recipe's runs so far."""
    recipe = folder.path.parents[2 + bool(spec.grid)]
    found = [path for depth in ("*/*", "*/*/*") for path in recipe.glob(f"{depth}/seed*/attempts/*/{STARTED}")]
    return statistics.median(json.loads(path.read_text())["seconds"] for path in found) if found else None


def _write_end(folder: RunFolder, attempt: Path, status: Status, reason: str, end: str = "") -> None:
    """How an attempt ended, in its folder and as the run's state. An attempt without this file was cut short."""
    step = folder.last_step()
    write_json(attempt / "end.json", {"status": end or status, "reason": reason, "step": step})
    folder.set_state(status, reason=reason, step=step)


def _show_new(spec: RunSpec, folder: RunFolder, shown: int, display: Display) -> int:
    """Show the lines after step `shown`; a driver that resumes first takes back what came after its checkpoint."""
    shown = min(shown, _last_step(folder))
    if _last_step(folder) > shown:
        for line in folder.read_metrics():
            if line["step"] > shown:
                display.step(spec, line)
                shown = line["step"]
    return shown


def _last_step(folder: RunFolder) -> int:
    """-1 before the first line: step 0 is the evaluation before training."""
    last = folder.last_step()
    return -1 if last is None else last


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
    atomic_write(kl_file, inputs.kl_yaml(spec))
    write_json(attempt / "verl.json", settings)
    gradient = doctor.explain(spec.kl, spec.objective)
    skills = {f"retention/{name}": path for name, path in zip(spec.retention.skills, files.retention, strict=True)}
    card = provenance.collect(
        spec,
        {"train": files.train, "val": files.val, **skills},
        model=files.model,
        extra={"gradient": gradient, "platform": platform, "claims": _claims(spec, folder)},
    )
    write_json(attempt / "provenance.json", card)
    write_json(folder.provenance_path, card)
    return {
        "KLREG_KL": str(kl_file),
        "KLREG_RUN": str(folder.path),
        "TENSORBOARD_DIR": str(folder.path / "tensorboard"),
        **_wandb(spec, folder),
    }


def _claims(spec: RunSpec, folder: RunFolder) -> dict[str, Any]:
    """The recipe's claims for the run's card; what it said when the run's first line was written is kept."""
    written = folder.last_step() is not None and folder.provenance_path.exists()
    before = json.loads(folder.provenance_path.read_text(encoding="utf-8")) if written else None
    return claims.card(spec.claims, before, datetime.now(UTC).isoformat(timespec="seconds"))


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
    """Environment of Ray and of every worker: the platform's, and the recipe's folder for a user's own modules.

    A dozen processes import the same packages; without their byte code each compiles them anew, a minute per run.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    extra = cpu.ENVIRONMENT | _threads(spec) if platform == "cpu" else gpu.ENVIRONMENT
    return {**extra, **inherited, own_code.VARIABLE: spec.root}


def _threads(spec: RunSpec) -> dict[str, str]:
    """What the user has not set, by the size of the model."""
    try:
        parameters = gpu.model_of(spec).parameters
    except ValueError:
        parameters = None
    return {"OMP_NUM_THREADS": str(host.threads(parameters, spec.resources.gpus_per_node))}


@contextmanager
def stop_signals(tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Interrupted once; a second Ctrl-C during clean-up is ignored, so that it completes.

    `tell` gets a line at once, since the clean-up takes seconds.

    A signal that is ignored already (nohup) stays so. Outside the main thread Python cannot handle signals at all.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another line
            tell(f"{name}: ending the run, its workers, vLLM and Ray. What was saved stays.")
        raise Interrupted(name)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in _STOPPING if signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
