"""A Slurm cluster for tests, and what they do with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "nsenter", "ip", "pgrep")
NEEDED_TO_ACCOUNT = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb-install-db")
READY_SECONDS = 60


class Lab:
    """A controller, nodes, and a shared folder; commands run on the controller, as on a login node."""

    def __init__(self, base: Path, nodes: int, accounting: bool = False) -> None:
        self.base, self.shared = base, base / "shared"
        base.mkdir(parents=True)
        command = ["bash", str(Path(__file__).parent / "lab.sh"), str(base), str(nodes)]
        command += ["accounting"] * accounting
        pipe = subprocess.PIPE
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KLREG_", "VERL_", "RAY_", "SLURM"))}
        self.process = subprocess.Popen(command, env=kept, stdin=pipe, stdout=pipe, start_new_session=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if line.strip() != "ready":
            rest = self.process.stdout.read().decode()
            self.close()
            raise RuntimeError(f"the cluster did not come up: {line}{rest}")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.init = int(children[0])
        self.environment = {
            **kept,
            "SLURM_CONF": str(base / "etc" / "slurm.conf"),
            "HOME": str(base / "home"),
            "KLREG_RUNS": str(self.shared / "runs"),
            "KLREG_CACHE": str(self.shared / "cache"),
            "COLUMNS": "200",
        }

    def close(self) -> None:
        """End the namespace, and with it everything that ran there."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ commands

    def run(self, *command: str | Path, check: bool = True, timeout: float = 120, **variables: str) -> str:
        """Output of a command on the controller."""
        entered = ["nsenter", "-t", str(self.init), "-n", "-m", "-p", "-u", "-i", *map(str, command)]
        done = subprocess.run(
            entered, env=self.environment | variables, cwd=ROOT, timeout=timeout, text=True, capture_output=True
        )
        output = done.stdout + done.stderr
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{output}")
        self.code = done.returncode
        return output

    def klreg(self, *arguments: str | Path, check: bool = True, timeout: float = 300, **variables: str) -> str:
        """`klreg ...` on the controller."""
        return self.run(sys.executable, "-m", "klreg_verl.cli", *arguments, check=check, timeout=timeout, **variables)

    def on_node(self, node: int, *command: str) -> str:
        """Output of a command in a node's namespaces."""
        init = (self.base / "log" / f"node{node}.init").read_text().strip()
        return self.run("nsenter", "-t", init, "-n", "-m", "-p", "-u", "-i", *command, check=False)

    # ------------------------------------------------------------------------------------------------ jobs

    def idle(self) -> int:
        """Nodes that could take a job."""
        return len(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split())

    def states(self, job: int) -> dict[str, str]:
        """State of each task."""
        text = self.run("squeue", "-h", "-r", "-t", "all", "-j", str(job), "-o", "%i %T")
        return dict(line.split() for line in text.splitlines())

    def job(self, job: int, task: int = 0) -> dict[str, str]:
        """All that scontrol says about a task."""
        text = self.run("scontrol", "show", "job", "-o", f"{job}_{task}")
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait(self, job: int, seconds: float = 240) -> dict[str, str]:
        """Until every task is over; their states."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: all(state in over for state in self.states(job).values()), f"job {job}", seconds)
        return self.states(job)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
        """Wait for something; its logs are in the failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds} s\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The end of everything that jobs and runs wrote."""
        files = sorted([*self.shared.rglob("slurm/*/logs/*.log"), *self.shared.rglob("attempts/*/log")])
        queue = self.run("squeue", "-t", "all", "-r", check=False) + self.run("sinfo", check=False)
        return queue + "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files)

    # ------------------------------------------------------------------------------------------------ processes

    def processes(self, node: int) -> list[tuple[int, str]]:
        """(pid in the node, command line) of what is neither Slurm nor the node itself."""
        text = self.on_node(node, "ps", "-eo", "pid=,args=", "-ww")
        rows = [line.strip().split(None, 1) for line in text.splitlines()]
        own = ("slurmd", "slurmstepd", "ps -eo", "bash " + str(self.base), "sleep 60")
        return [(int(pid), args) for pid, args in rows if not args.startswith(own) and "slurmstepd" not in args[:40]]

    def remains(self) -> list[str]:
        """What runs of jobs have left on any node."""
        marks = ("ray", "gcs_server", "raylet", "launch", "guardian", "verl", "VLLM")
        nodes = range(1, len(list((self.base / "log").glob("node*.init"))) + 1)
        return [
            f"node{node}: {args[:120]}"
            for node in nodes
            for _, args in self.processes(node)
            if any(mark in args for mark in marks)
        ]

    def kill(self, node: int, what: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the first process of a node whose command line has `what`."""
        pid = next(pid for pid, args in self.processes(node) if what in args)
        self.on_node(node, "kill", f"-{number}", str(pid))

    def kill_slurmd(self, node: int) -> None:
        """kill -9 of a node's slurmd; it comes back after 60 s."""
        pid = (self.base / "log" / f"slurmd-node{node}.pid").read_text().strip()
        self.on_node(node, "kill", "-9", pid)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, a dictionary per step."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
