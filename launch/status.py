"""How runs stand: what their folders say, and what Slurm says of the jobs that will go on with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import run_folder
from launch import slurm

Row = dict[str, Any]
REFRESH_SECONDS = 2.0
OVER = ("done", "failed", "conflict", "damaged")


def rows(specs: Sequence[RunSpec], runs_dir: Path) -> list[Row]:
    """A row for each run. Where Slurm is not here, or does not answer, its columns are empty."""
    tasks = queue(specs, runs_dir)
    return [with_slurm(_row(spec, runs_dir), tasks.get(spec.run_id)) for spec in specs]


def _row(spec: RunSpec, runs_dir: Path) -> Row:
    """One run, or what is wrong with its folder: a damaged one hides no other."""
    try:
        return row(spec, runs_dir)
    except (ValueError, OSError) as error:
        unknown = {"step": 0, "steps": spec.train.steps, "attempt": 0, "accuracy": None, "score": None, "kl": None}
        return {"run_id": spec.run_id, "hash": spec.hash[:12], "status": "damaged", **unknown, "reason": str(error)}


def queue(specs: Sequence[RunSpec], runs_dir: Path) -> dict[str, slurm.Task]:
    """Run ids to their newest tasks; empty where Slurm cannot be asked."""
    try:
        return slurm.tasks(runs_dir / specs[0].recipe) if specs else {}
    except (ValueError, slurm.SlurmError):
        return {}


def row(spec: RunSpec, runs_dir: Path) -> Row:
    """One run and how it stands, from its folder alone."""
    folder = run_folder(spec, runs_dir)
    state = folder.state()
    last = (folder.read_metrics() or [{}])[-1]
    present = folder.spec()
    is_other = present is not None and present.hash != spec.hash
    status = "pending" if state.status == "done" and not folder.is_done(spec) else state.status
    return {
        "run_id": spec.run_id,
        "hash": spec.hash[:12],
        "status": "conflict" if is_other else status,
        "step": last.get("step", 0),
        "steps": spec.train.steps,
        "attempt": state.attempt,
        "accuracy": last.get("train/accuracy"),
        "score": last.get("train/score") if folder.is_graded() else None,
        "kl": last.get("kl_ref/k1_response"),
        "reason": "the folder holds another run, `klreg run` says which" if is_other else state.reason,
    }


def with_slurm(found: Row, task: slurm.Task | None) -> Row:
    """The row with the task that will do it, its state, and the time it has left; or how the last task ended."""
    element = task.element if task and task.is_live else None
    job, state, left = (element.name, element.state, element.left) if element else ("", "", "")
    seen = found | {"job": job, "slurm": state, "left": left}
    if element and element.state == "RUNNING" and found["status"] in ("pending", "interrupted"):
        seen["reason"] = found["reason"] or f"starting on {element.nodes}"
    elif element and element.state == "PENDING" and not found["reason"]:
        seen["reason"] = f"waits: {element.reason}"
    elif task and not element and found["status"] in ("pending", "interrupted"):
        seen["reason"] = "; ".join(filter(None, [found["reason"], task.ended()]))
    return seen


def line(found: Mapping[str, Any]) -> str:
    """One row as text."""
    numbers = "  ".join(f"{name} {found[name]:.3f}" for name in ("accuracy", "score", "kl") if found[name] is not None)
    job = f"  {found['slurm']} {found['job']} left {found['left']}" if found.get("slurm") else ""
    return (
        f"{found['status']:<12} {found['run_id']:<40} step {found['step']}/{found['steps']}  "
        f"attempt {found['attempt']}{job}  {numbers}  {found['reason']}"
    )


def watch(look: Callable[[], list[Row]], show: Callable[[list[Row]], None]) -> None:
    """Show the rows again and again until every run is over."""
    while True:
        found = look()
        show(found)
        if all(each["status"] in OVER and not each["slurm"] for each in found):
            return
        time.sleep(REFRESH_SECONDS)
