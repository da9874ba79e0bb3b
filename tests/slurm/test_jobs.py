"""Jobs on a real Slurm of three nodes: they run, are interrupted in every way, and lose or double no step. The driver
is a stand-in that uses Ray on every node and keeps run folders as ours does; verl itself is in test_stack.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lab import Lab, metrics

pytestmark = pytest.mark.timeout(600)


def chain(steps: int) -> list[float]:
    """The stand-in's lines of an uninterrupted run."""
    values, value = [], 0.5
    for step in range(1, steps + 1):
        value = (value * 7919.0 + step * 0.618034) % 1.0
        values.append(value)
    return values


def submit(lab: Lab, *arguments: str, profile: str = "") -> int:
    """Job id of `klreg submit`; `profile` is added to the lab's."""
    path = lab.shared / "lab.yaml"
    if profile:
        path = lab.shared / "changed.yaml"
        keys = {line.partition(":")[0] for line in profile.splitlines()}
        kept = [
            line for line in (lab.shared / "lab.yaml").read_text().splitlines() if line.partition(":")[0] not in keys
        ]
        path.write_text("\n".join([*kept, profile, ""]))
    output = lab.klreg("submit", study(lab), "--profile", path, *arguments)
    return int(re.search(r"^job (\d+):", output, re.MULTILINE)[1])


def study(lab: Lab) -> Path:
    return lab.shared / "study" / "study.yaml"


def folder(lab: Lab, arm: str = "none") -> Path:
    return lab.shared / "runs" / "study" / arm / "mine" / "seed1"


def state(lab: Lab, arm: str = "none") -> dict:
    path = folder(lab, arm) / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"status": "pending"}


def assert_whole(lab: Lab, arm: str = "none", steps: int = 6) -> None:
    """Done, and every step there once, as if nothing had happened."""
    assert state(lab, arm)["status"] == "done", lab.logs()
    lines = metrics(folder(lab, arm))
    assert [line["step"] for line in lines] == list(range(steps + 1))
    assert [line["train/accuracy"] for line in lines[1:]] == chain(steps)


def assert_ends(lab: Lab, job: int, expected: str, seconds: float = 300) -> None:
    assert set(lab.wait(job, seconds).values()) == {expected}, lab.logs()


def wait_for_step(lab: Lab, step: int, arm: str = "none") -> None:
    lab.until(lambda: (metrics(folder(lab, arm)) or [{"step": 0}])[-1]["step"] >= step, f"step {step}", 240)


def test_an_array_of_two_node_runs_is_done_once_with_one_report_and_nothing_left(lab: Lab):
    job = submit(lab)
    assert_ends(lab, job, "COMPLETED")
    for arm in ("none", "reverse"):
        assert_whole(lab, arm)
        assert re.search(r"used \[\('node\d'", (folder(lab, arm) / "latest" / "log").read_text())
    assert (lab.shared / "runs" / "study" / "report.html").exists()
    assert not lab.remains()
    assert "0 to submit, 2 done" in lab.klreg(
        "submit", lab.shared / "study/study.yaml", "--profile", lab.shared / "lab.yaml"
    )
    rows = json.loads(lab.klreg("status", lab.shared / "study/study.yaml", "--json"))
    assert [row["status"] for row in rows] == ["done", "done"]


LONG = ["--arm", "none", "train.steps=40"]


def head(lab: Lab, job: int) -> int:
    """Number of the node that the job's first node is."""
    return int(lab.job(job)["BatchHost"].removeprefix("node"))


def other(lab: Lab, job: int) -> int:
    """Number of the job's second node."""
    names = lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).split()
    return next(int(name.removeprefix("node")) for name in names if name != lab.job(job)["BatchHost"])


def time_limit(lab: Lab, job: int) -> None:
    """What Slurm sends before a time limit or a preemption: to the batch script alone."""
    lab.run("scancel", "--batch", "--signal=USR1", f"{job}_0")


def requeue(lab: Lab, job: int) -> None:
    lab.run("scontrol", "requeue", f"{job}_0")


def preempt(lab: Lab, job: int) -> None:
    """A job of a partition that comes first wants every node."""
    lab.run("sbatch", "-p", "main", "-N3", "--exclusive", "-t", "1", "--output=/dev/null", "--wrap", "sleep 3")


def kill_the_driver(lab: Lab, job: int) -> None:
    lab.kill(head(lab, job), "-m klreg_verl.verl_hooks.main")


def kill_the_runner(lab: Lab, job: int) -> None:
    lab.kill(head(lab, job), "-m launch.runner")


def kill_rays_head(lab: Lab, job: int) -> None:
    lab.kill(head(lab, job), "gcs_server")


def kill_the_other_nodes_ray(lab: Lab, job: int) -> None:
    lab.kill(other(lab, job), "raylet/raylet")


def kill_slurmd_of_the_other_node(lab: Lab, job: int) -> None:
    lab.kill_slurmd(other(lab, job))


def kill_slurmd_of_the_first_node(lab: Lab, job: int) -> None:
    lab.kill_slurmd(head(lab, job))


SAVED = "SIGUSR1: asking the run to save and stop"
INTERRUPTIONS = {
    time_limit: SAVED,
    requeue: "DUE TO JOB REQUEUE",
    preempt: SAVED,
    kill_the_driver: "failed: the driver was killed by SIGKILL",
    kill_the_runner: "exit code 76: requeueing",
    kill_rays_head: "Ray's gcs_server was killed",
    kill_the_other_nodes_ray: "node node[123] was lost",
    kill_slurmd_of_the_other_node: "attempt 2 on",
    kill_slurmd_of_the_first_node: "attempt 3 on",
}
"""What is done to a running job -> what its log says then."""
ONE_AFTER_THE_OTHER = {
    "as Slurm does it": (time_limit, requeue, preempt),
    "killed processes": (kill_the_driver, kill_the_runner, kill_rays_head, kill_the_other_nodes_ray),
    "lost nodes": (kill_slurmd_of_the_other_node, kill_slurmd_of_the_first_node),
}


@pytest.mark.parametrize("kind", ["as Slurm does it", "killed processes", "lost nodes"])
def test_an_interrupted_run_goes_on_where_it_was_and_no_step_is_lost_or_doubled(lab: Lab, kind: str):
    seconds = "2.5" if kind == "lost nodes" else "0.6"  # Slurm notices after 15 s or more
    job = submit(lab, *LONG, profile=f"partition: spot\nenvironment: {{STANDIN_SECONDS: '{seconds}'}}")
    log = lab.shared / "runs/study/slurm/1/logs/0.log"
    for number, interrupt in enumerate(ONE_AFTER_THE_OTHER[kind], start=1):
        wait_for_step(lab, last(lab) + 3)
        seen = log.read_text().count("\n")
        interrupt(lab, job)
        lab.until(lambda: re.search(INTERRUPTIONS[interrupt], tail(log, seen)), interrupt.__name__, 180)  # noqa: B023
        lab.until(lambda: (folder(lab) / "attempts" / str(number + 1)).exists(), "the next attempt", 240)  # noqa: B023
        if INTERRUPTIONS[interrupt] == SAVED:  # the step in hand, too
            assert "is this attempt's last" in (folder(lab) / "attempts" / str(number) / "log").read_text()
    assert_ends(lab, job, "COMPLETED")
    assert_whole(lab, steps=40)
    for number, interrupt in enumerate(ONE_AFTER_THE_OTHER[kind], start=2):
        if INTERRUPTIONS[interrupt] == SAVED:
            assert not (folder(lab) / "attempts" / str(number) / "discarded.jsonl").exists()
    assert len(list((folder(lab) / "attempts").iterdir())) == 1 + len(ONE_AFTER_THE_OTHER[kind])
    lab.until(lambda: not lab.remains(), "nothing left", 60)


def last(lab: Lab) -> int:
    """The run's last step."""
    return (metrics(folder(lab)) or [{"step": 0}])[-1]["step"]


def tail(log: Path, lines: int) -> str:
    """What was written after so many lines."""
    return "\n".join(log.read_text().splitlines()[lines:])


def test_a_run_that_fails_twice_in_the_same_way_is_left_alone_and_the_next_one_goes_on(lab: Lab):
    job = submit(lab, profile="runs_per_job: 2\nenvironment: {STANDIN_FAIL: 'none:5'}")
    assert_ends(lab, job, "FAILED")
    assert lab.job(job)["ExitCode"] == "1:0"
    assert_whole(lab, "reverse")
    assert state(lab)["reason"] == "failed twice in the same way: RuntimeError: the stand-in fails at step 5"
    rows = json.loads(lab.klreg("status", study(lab), "--json"))
    assert [(row["status"], row["step"], row["attempt"]) for row in rows] == [("failed", 4, 2), ("done", 6, 1)]
    assert "1 failed (`klreg retry`" in lab.klreg("submit", study(lab), "--profile", lab.shared / "lab.yaml")
    assert "the stand-in fails at step 5" in lab.klreg("logs", study(lab), "--arm", "none")

    output = lab.klreg("retry", study(lab), "--profile", lab.shared / "lab.yaml")  # without what made it fail
    again = int(re.search(r"^job (\d+):", output, re.MULTILINE)[1])
    assert_ends(lab, again, "COMPLETED")
    assert_whole(lab)
    assert "attempt 1 on" in lab.klreg("logs", folder(lab), "--job")


def test_the_time_limit_is_respected_by_saving_and_coming_back(lab: Lab):
    profile = "time: '3:00'\nnotice_seconds: 90\nenvironment: {STANDIN_SECONDS: '1'}"
    job = submit(lab, "--arm", "none", "train.steps=1000", "save.every=1000", profile=profile)
    attempts = folder(lab) / "attempts"
    lab.until(lambda: (attempts / "2" / "log").exists(), "a second attempt", 400)
    text = (attempts / "1" / "log").read_text()
    saved = int(re.search(r"asked to stop: step (\d+) is saved and is this attempt's last", text)[1])
    log = (lab.shared / "runs/study/slurm/1/logs/0.log").read_text()
    assert re.search("(the time limit is near|SIGUSR1): asking the run to save and stop", log)
    wait_for_step(lab, saved + 2)
    lab.run("scancel", str(job))
    assert_ends(lab, job, "CANCELLED")
    lines = metrics(folder(lab))
    assert [line["train/accuracy"] for line in lines[1:]] == chain(len(lines) - 1)
    assert not list(attempts.glob("*/discarded.jsonl"))  # the step in hand was saved


def test_two_jobs_on_one_node_do_not_disturb_each_other(lab: Lab):
    profile = "nodes: 1\nmax_parallel: 2\nmemory_gb: 2\nsbatch: [--nodelist=node1]\nenvironment: {STANDIN_SECONDS: '2'}"
    job = submit(lab, "resources.nodes=1", "train.steps=20", profile=profile)
    lab.until(lambda: len([s for s in lab.states(job).values() if s == "RUNNING"]) == 2, "both run")
    assert_ends(lab, job, "COMPLETED")
    assert_whole(lab, steps=20)
    assert_whole(lab, "reverse", steps=20)
    first, second = (metrics_times(lab, arm) for arm in ("none", "reverse"))
    assert first[0] < second[1] and second[0] < first[1]  # at the same time


def metrics_times(lab: Lab, arm: str) -> tuple[float, float]:
    """When the run began and ended."""
    return (folder(lab, arm) / "spec.json").stat().st_mtime, (folder(lab, arm) / "state.json").stat().st_mtime


def test_nodes_that_do_not_come_together_say_why_and_come_back_as_often_as_the_profile_says(lab: Lab):
    job = submit(lab, "--arm", "none", profile="interface: nope0\nrequeues: 1")
    assert_ends(lab, job, "FAILED")
    assert lab.job(job)["ExitCode"] == "75:0"
    log = (lab.shared / "runs/study/slurm/1/logs/0.log").read_text()
    assert "has no IPv4 address at 'nope0'. Interfaces: ['docker0', 'eth0', 'lo']" in log
    assert "attempt 2 on" in log and "attempt 3 on" not in log
    assert "not requeued: the profile's limit of requeues is reached" in log
    assert state(lab)["status"] == "pending"


def test_a_cancelled_job_ends_does_not_come_back_and_is_submitted_again(lab: Lab):
    job = submit(lab, *LONG, profile="environment: {STANDIN_SECONDS: '4'}")
    wait_for_step(lab, 3)
    assert "0 to submit, 0 done, 1 in the queue" in lab.klreg(
        "submit", study(lab), *LONG, "--profile", lab.shared / "changed.yaml"
    )
    assert f"cancelled: {job}_0" in lab.klreg("cancel", study(lab), *LONG)
    assert_ends(lab, job, "CANCELLED")
    lab.until(lambda: not lab.remains(), "nothing left", 60)
    row = json.loads(lab.klreg("status", study(lab), *LONG[2:], "--json"))[0]
    assert (row["status"], row["slurm"]) == ("interrupted", "")
    assert_ends(lab, submit(lab, *LONG), "COMPLETED")
    assert_whole(lab, steps=40)


def test_what_cannot_work_is_said_in_words_before_anything_is_submitted(lab: Lab):
    plain = (lab.shared / "lab.yaml").read_text()
    row = len(plain.splitlines()) + 1
    for name, changes, arguments, expected in (
        ("a", {"partiton: main": ""}, (), f"a.yaml:{row}: partiton: unknown key 'partiton'. Did you mean 'partition'?"),
        ("b", {"partition: gpu": ""}, (), "partition 'gpu' is unknown or down. There are: main, spot."),
        (
            "c",
            {"": "gpus_per_node: 1"},
            ("resources.gpus_per_node=9", "train.prompts_per_step=9", "train.micro_batch=1"),
            "no node has 9 GPUs a node (gpus_per_node)",
        ),
        ("d", {"": "nodes: 2"}, ("resources.nodes=4",), "4 nodes are needed and 3 of its nodes fit"),
        ("e", {"partition: spot\ntime: '3:00:00'": 'time: "10:00"'}, (), "time 3:00:00 is over its limit of 2 h"),
        ("f", {"constraint: nope": ""}, (), "Slurm does not take the job"),
        ("g", {}, ("--runs-dir", "/proc/nowhere"), "the runs' folder /proc/nowhere is not below a folder"),
    ):
        text = plain
        for added, removed in changes.items():
            text = text.replace(removed, "") + added + "\n"
        (lab.shared / f"{name}.yaml").write_text(text)
        output = lab.klreg("submit", study(lab), *arguments, "--profile", lab.shared / f"{name}.yaml", check=False)
        assert (lab.code, expected in output) == (2, True), (name, lab.code, output)
    assert lab.run("squeue", "-h", "-t", "pending,running") == ""
    assert not list((lab.shared / "runs").glob("study/slurm/*"))


def test_runs_that_cannot_be_written_are_refused_before_anything_is_submitted(lab: Lab):
    (lab.shared / "file").write_text("no folder")
    output = lab.klreg(
        "submit", study(lab), "--profile", lab.shared / "lab.yaml", "--runs-dir", lab.shared / "file", check=False
    )
    assert (lab.code, "run folders cannot be made there" in output) == (2, True), output
