"""The batch script's only command: the steps of one task of a job array, from start to requeue.

    runner step   on the first node: Ray's head, then the runs one after the other (runner.py)
    nodes step    on all others, one srun for all: they join (node.py), once the head has written its invitation
    signals       USR1, or the time limit coming near: ask the runner to save and stop
    end           the runner's exit code is the job's; 75, 76 and 85 requeue it first

Standard library only, and run by its path with `python -I`: it works outside the container, with the system's Python,
3.6 or newer.
Nobody calls `ray stop` here, which would end the Ray of any other job of this user on the node; Slurm ends the steps.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

DONE, FAILED, NOT_FORMED, LOST, STOPPED = 0, 1, 75, 76, 85
RESUMABLE = (NOT_FORMED, LOST, STOPPED)
LOOK_SECONDS = 0.2
LAST_SECONDS = 90
"""Before the time limit whatever still runs is ended, so that the job is requeued and not TIMEOUT; of a short notice,
half."""
PATIENCE_SECONDS = 30
"""For a runner that has been told to end, or whose other nodes are gone."""
COMMAND_SECONDS = 60
MOST_IDLE_STARTS = 3
"""Starts in a row that come to no attempt at a run: what ends them is not the run, and would go on."""


class Task:
    """One attempt of one task of the array."""

    def __init__(self, folder):
        self.asked = ""
        self.is_cancelled = False
        self.next_look = 0.0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self.hear)
        self.folder = Path(folder)
        self.job = json.loads((self.folder / "job.json").read_text())
        self.index = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
        self.place = self.folder / "tasks" / str(self.index)
        self.number = self.new_attempt()
        self.attempt = self.place / str(self.number)
        self.end_time = end_time()
        self.notice = self.job["profile"]["notice_seconds"]

    def new_attempt(self):
        """Make the next attempt's folder and declare it the one that counts."""
        self.place.mkdir(exist_ok=True)
        number = 1 + max((int(path.name) for path in self.place.iterdir() if path.name.isdigit()), default=0)
        (self.place / str(number)).mkdir(mode=0o700)
        replace_file(self.place / "current", str(number))
        return number

    def run(self):
        """All of it; returns the exit code."""
        nodes = hosts()
        say(f"task {self.index}, attempt {self.number} on {', '.join(nodes)}; {self.left()}")
        wanted = self.job["nodes"][self.index]
        if len(nodes) != wanted:
            say(f"the job has {len(nodes)} nodes and its runs need {wanted}")
            return FAILED
        runner = self.step("launch.runner", nodes[0], ["-N1", "-n1", "-w", nodes[0]])
        others = None
        try:
            others = self.bring_others(runner, nodes)
            return self.watch(runner, others)
        finally:
            end_steps([step for step in (runner, others) if step is not None])

    def bring_others(self, runner, nodes):
        """Start the other nodes' step once the head waits for them."""
        if len(nodes) == 1:
            return None
        invitation = self.attempt / "invitation.json"
        while not invitation.exists():
            if runner.poll() is not None:
                return None
            self.look()
            time.sleep(LOOK_SECONDS)
        count = str(len(nodes) - 1)
        where = ["-N", count, "-n", count, "--ntasks-per-node=1", "-w", ",".join(nodes[1:])]
        return self.step("launch.node", "the other nodes", where)

    def step(self, module, name, where):
        """A step of the job; srun hands its exit code on."""
        command = [
            "srun",
            *self.job["srun"],
            *where,
            *self.job["steps"],
            "-m",
            module,
            str(self.folder),
            str(self.attempt),
        ]
        say(f"starting {module} on {name}")
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def watch(self, runner, others):
        """Until the runner ends, or cannot go on; returns the exit code."""
        alone_since = None
        while True:
            code = runner.poll()
            if code is not None:
                return exit_code(code)
            self.look()
            now = time.time()
            if self.end_time is not None and now > self.end_time - min(LAST_SECONDS, self.notice / 2):
                say("the time limit is here and the run has not stopped: ending it, the last checkpoint counts")
                return STOPPED
            if not self.is_current():
                say("a newer attempt of this task has started elsewhere: ending this one")
                self.is_cancelled = True
                return LOST
            if others is not None and others.poll() is not None:
                alone_since = alone_since or now
                if now > alone_since + PATIENCE_SECONDS:
                    say("the step of the other nodes has ended and the runner has not noticed")
                    return LOST
            time.sleep(LOOK_SECONDS)

    def look(self):
        """Ask the runner to stop when a signal or the time limit says so."""
        if not self.asked and self.end_time is not None:
            if time.time() > self.end_time - self.notice:
                self.asked = "the time limit is near"
        if self.asked and not (self.attempt / "stop").exists():
            say(f"{self.asked}: asking the run to save and stop")
            replace_file(self.attempt / "stop", self.asked)

    def is_current(self):
        """Whether no newer attempt has begun; Slurm starts one when it lost sight of this node."""
        if time.time() < self.next_look:
            return True
        self.next_look = time.time() + 2.0
        return (self.place / "current").read_text() == str(self.number)

    def hear(self, number, frame):
        """USR1: time limit or preemption; TERM: the job is being cancelled, and must not come back by itself."""
        self.asked = self.asked or signal.Signals(number).name
        self.is_cancelled = self.is_cancelled or number == signal.SIGTERM

    def requeue(self, code):
        """Back into the queue if that can help; Slurm then kills this process."""
        if code not in RESUMABLE or self.is_cancelled:
            return
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) >= self.job["profile"]["requeues"]:
            say("not requeued: the profile's limit of requeues is reached; `klreg submit` goes on")
            return
        if self.idle_starts(code) >= MOST_IDLE_STARTS:
            why = self.reason() or "its lines above say why"
            say(f"not requeued: {MOST_IDLE_STARTS} starts in a row made no attempt at a run: {why}")
            return
        name = os.environ.get("SLURM_ARRAY_JOB_ID", "")
        name = name + "_" + str(self.index) if name else os.environ["SLURM_JOB_ID"]
        say(f"exit code {code}: requeueing {name}")
        done = subprocess.run(["scontrol", "requeue", name], timeout=COMMAND_SECONDS, check=False)
        if done.returncode:
            say("scontrol refused to requeue; `klreg submit` goes on where this attempt ended")
            return
        time.sleep(PATIENCE_SECONDS)

    def idle_starts(self, code):
        """How many starts in a row, up to this one, ended by themselves before any run began."""
        if code != STOPPED and not (self.attempt / "began").exists():
            replace_file(self.attempt / "idle", str(code))
        count = 0
        while (self.place / str(self.number - count) / "idle").exists():
            count += 1
        return count

    def reason(self):
        """Why the runner ended, in its own words."""
        path = self.attempt / "reason"
        return " ".join(path.read_text().split()) if path.exists() else ""

    def left(self):
        if self.end_time is None:
            return "no time limit"
        return f"{self.end_time - time.time():.0f} s left"


def exit_code(code):
    """A step's, as srun tells it. What a signal killed can be resumed."""
    if code < 0 or code >= 128:
        return LOST
    return code


def hosts():
    """The nodes of this job."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return output(command).split()


def end_time():
    """When Slurm ends this job [s since 1970], or None; older Slurms do not say so in the environment."""
    if os.environ.get("SLURM_JOB_END_TIME"):
        return float(os.environ["SLURM_JOB_END_TIME"])
    text = output(["squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%e"]).strip()
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").timestamp()
    except ValueError:
        return None


def output(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=COMMAND_SECONDS, check=True)
    return done.stdout.decode()


def end_steps(steps):
    """srun hands SIGTERM on; a step that ignores it is ended by Slurm with the job."""
    alive = [step for step in steps if step.poll() is None]
    for step in alive:
        step.terminate()
    deadline = time.time() + PATIENCE_SECONDS
    for step in alive:
        try:
            step.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            step.kill()
            step.wait()


def replace_file(path, text):
    """Old or new content, nothing else."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(str(temporary), str(path))


def say(text):
    """A line of the job's log, with the time."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} job: {text}", flush=True)


def main():
    """Entry point: the submission's folder."""
    task = Task(sys.argv[1])
    code = task.run()
    why = task.reason()
    say(f"exit code {code}" + (f": {why}" if why else ""))
    task.requeue(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
