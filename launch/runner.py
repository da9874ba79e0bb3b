"""What runs on the first node of a job: Ray's head, then the runs of one task, one after the other.

`python -m launch.runner JOB ATTEMPT`, started by job.py. Each run is an attempt of local.py's, in the same folders.
Here is what a cluster adds: other nodes, a request to stop, a budget of attempts, exit codes that say what can resume.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, RunLocked, run_folder
from launch import budget, inputs, local, preflight
from launch.display import PlainDisplay
from launch.guardian import new_token
from launch.job import DONE, FAILED, LOST, NOT_FORMED, STOPPED, say
from launch.job_folder import Job, clean_environment, place_of
from launch.local import Interrupted, Outcome
from launch.meeting import Meeting, NotMet
from launch.session import End, Session, ray_session

LOCK_SECONDS = 180.0
"""How long another attempt, on a node that Slurm has lost sight of, may take to end itself."""
LOOK_SECONDS = 2.0
DEATH_SECONDS = 5.0
"""Between the death of a node's processes and the end of its connection."""


class NodeLost(Interrupted):
    """A node of the job, or Ray, is gone."""

    end = "lost"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Superseded(Interrupted):
    """A newer attempt of this task runs elsewhere."""

    end, reason = "lost", "Slurm had lost sight of the node and started the job anew"


class Watched:
    """A session that also watches the other nodes, the request to stop and the newest attempt."""

    def __init__(self, session: Session, attempt: Path, nodes: Meeting | None) -> None:
        self.session, self.attempt, self.nodes = session, attempt, nodes
        self.run: RunFolder | None = None
        self.next_look = 0.0

    def start(self, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Start a run's driver."""
        self.run = RunFolder(environment["KLREG_RUN"])
        (self.attempt / "began").touch()
        self.session.start(argv, environment, log)

    def wait(self, seconds: float) -> End | None:
        """How the run ended, if it does within `seconds`.

        Raises:
            NodeLost: rather than any error that this caused in the driver.
            Superseded: this attempt does not count any more.
        """
        end = self.session.wait(seconds)
        if end is not None and end.code != 0:
            self.blame(end)
        if end is None and time.monotonic() > self.next_look:
            self.next_look = time.monotonic() + LOOK_SECONDS
            self.look()
        return end

    def end(self, reason: str) -> None:
        """Kill the run's driver; `wait` then tells the reason."""
        self.session.end(reason)

    def blame(self, end: End) -> None:
        """Raise NodeLost if the driver's error comes from one."""
        if end.lost and end.lost.startswith("Ray's"):
            raise NodeLost(end.lost)
        deadline = time.monotonic() + DEATH_SECONDS
        while self.nodes and time.monotonic() < deadline and not self.nodes.lost():
            time.sleep(0.1)
        self.look_at_nodes()

    def look(self) -> None:
        """Everything that can end a run besides itself."""
        self.look_at_nodes()
        if (self.attempt.parent / "current").read_text() != self.attempt.name:
            raise Superseded
        assert self.run is not None
        if is_stop_asked(self.attempt) and not self.run.stop_asked():
            self.run.ask_to_stop()

    def look_at_nodes(self) -> None:
        if self.nodes and (lost := self.nodes.lost()):
            raise NodeLost(f"node {lost} was lost")


def is_stop_asked(attempt: Path) -> bool:
    """Whether job.py has heard that the job must end soon."""
    return (attempt / "stop").exists()


def main() -> int:
    """Entry point; returns the exit code."""
    folder, attempt = Path(sys.argv[1]), Path(sys.argv[2])
    job = Job.read(folder)
    specs = job.tasks[int(attempt.parent.name)]
    clean_environment(attempt)
    new_token(attempt)
    display = PlainDisplay(len(specs))

    def tell(code: int, text: str) -> int:
        say(text)
        (attempt / "reason").write_text(text)
        return code

    try:
        with local.stop_signals():
            code = run_all(job, specs, attempt, display)
    except NotMet as error:
        return tell(NOT_FORMED, f"the nodes of the job did not come together: {error}")
    except Interrupted as stop:
        return tell(LOST, stop.reason)
    except (RunLocked, ValueError, OSError) as error:
        return tell(FAILED, str(error))
    except RuntimeError as error:
        return tell(LOST, str(error))
    report_if_last(job, folder)
    return code


def run_all(job: Job, specs: tuple[RunSpec, ...], attempt: Path, display: PlainDisplay) -> int:
    """The unfinished runs of a task, on one Ray; returns the exit code."""
    root = Path(job.runs_dir)
    waiting = [spec for spec in specs if not run_folder(spec, root).is_done(spec)]
    for spec in specs:
        if spec not in waiting:
            display.skip(spec)
    if not waiting:
        return DONE
    if job.profile.platform == "cuda":
        environment = local.session_environment(waiting[0], "cuda")
        for finding in preflight.check_gpus(waiting, root, environment):
            say(f"{finding.what}: {finding.detail}")
    files = {spec.run_id: inputs.prepare(spec, root, display.note) for spec in waiting}
    with cluster(job, waiting[0], attempt) as session:
        if job.probe:
            probe(job, waiting[0], session.session.address, files[waiting[0].run_id].model, attempt)
        for spec in waiting:

            def once(spec: RunSpec = spec) -> Outcome:
                return local.run_one(spec, files[spec.run_id], root, job.profile.platform, session, display)

            outcome = settle(spec, job, attempt, once, display)
            if outcome.status == "interrupted":
                return STOPPED
    settled = [job.run_folder(spec).state().status for spec in specs]
    return DONE if all(status == "done" for status in settled) else FAILED


def probe(job: Job, spec: RunSpec, address: str, model: Path, attempt: Path) -> None:
    """Try the cluster out; what was found is in the attempt's folder."""
    asked = [address, str(attempt), str(spec.resources.nodes), str(spec.resources.gpus_per_node)]
    command = [sys.executable, "-P", "-m", "launch.probe", *asked, job.profile.platform, str(model)]
    code = subprocess.run(command, env=local.session_environment(spec, job.profile.platform)).returncode
    say("the cluster was tried out" if code == 0 else f"trying the cluster out ended with exit code {code}")


def settle(spec: RunSpec, job: Job, attempt: Path, once: Callable[[], Outcome], display: PlainDisplay) -> Outcome:
    """Try a run until it is done, asked to stop, or out of budget, which marks it failed.

    Raises:
        RunLocked: another job works in its folder.
    """
    folder = job.run_folder(spec)
    while True:
        if is_stop_asked(attempt):
            return Outcome(spec=spec, status="interrupted", reason="asked to stop before it began")
        if reason := budget.refusal(folder, job.profile.budget):
            return _give_up(spec, folder, reason, display)
        before = len(budget.attempts(folder))
        outcome = patiently(once)
        if outcome.status != "failed":
            return outcome
        if len(budget.attempts(folder)) == before:  # refused before an attempt was made
            return outcome


def _give_up(spec: RunSpec, folder: RunFolder, reason: str, display: PlainDisplay) -> Outcome:
    with folder.lock():
        folder.set_state("failed", reason=reason, step=folder.last_step())
    display.end(spec, "failed", reason)
    return Outcome(spec=spec, status="failed", reason=reason)


def patiently(once: Callable[[], Outcome]) -> Outcome:
    """An attempt, once an older one that still holds the folder has ended itself. Raises RunLocked."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return once()
        except RunLocked:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


@contextmanager
def cluster(job: Job, spec: RunSpec, attempt: Path) -> Iterator[Watched]:
    """Ray over all nodes of the job, ready.

    Raises:
        NotMet: other nodes did not come, or did not join Ray.
        RuntimeError: the head did not start.
    """
    profile, others = job.profile, spec.resources.nodes - 1
    gpus = spec.resources.gpus_per_node
    place = place_of(profile, gpus, attempt)
    with Meeting(others, profile.interface, place.ports) if others else nullcontext() as nodes:
        if nodes:
            nodes.invite(attempt)
            place = replace(place, ip=nodes.gather(profile.form_seconds))
        environment = local.session_environment(spec, profile.platform)
        with ray_session(place, environment) as session:
            if nodes:
                added = {name: value for name, value in environment.items() if os.environ.get(name) != value}
                nodes.send({"head": session.address, "gpus": gpus, "environment": added})
                wait_for_nodes(session.address, others + 1, nodes, profile.form_seconds)
            say(f"Ray is up on {others + 1} node(s) at {session.address}")
            yield Watched(session, attempt, nodes)


def wait_for_nodes(address: str, wanted: int, nodes: Meeting, seconds: float) -> None:
    """Until Ray counts all nodes. Raises NotMet."""
    from ray._raylet import GcsClient

    client = GcsClient(address=address)
    deadline = time.monotonic() + seconds
    while (alive := _alive(client)) < wanted:
        if lost := nodes.lost():
            raise NotMet(f"{lost} could not join Ray; its lines above say why")
        if time.monotonic() > deadline:
            raise NotMet(f"{alive} of {wanted} nodes joined Ray within {seconds:.0f} s")
        time.sleep(0.1)


def _alive(client: object) -> int:
    found = client.get_all_node_info(timeout=5)  # type: ignore[attr-defined]
    return sum(node.state == 0 for node in found.values())


def report_if_last(job: Job, folder: Path) -> None:
    """Once no run of the submission is left to do, write the recipe's report; one task does."""
    with open(folder / ".report.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if any(job.run_folder(spec).state().status not in ("done", "failed") for spec in job.specs):
            return
        command = [sys.executable, "-P", "-m", "klreg_verl.cli", "report", str(Path(job.runs_dir) / job.recipe)]
        if subprocess.run(command, env=os.environ | {"COLUMNS": "120"}).returncode:
            say("the report could not be written; `klreg report` says why")


if __name__ == "__main__":
    sys.exit(main())
