"""The local runner: what it tells an attempt, how it follows it, what it makes of its end. The driver here is a small
Python process that writes metrics; that verl's driver does so is shown in tests/e2e."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from klreg_verl.experiment import claims, plan, recipe
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import ModelSpec
from klreg_verl.experiment.store import RunFolder, run_folder
from klreg_verl.verl_hooks import cpu, overrides
from launch import gpu, inputs, local, preflight
from launch.display import Start
from launch.local import Interrupted, Outcome
from launch.session import End

RECIPE = """\
question: q
model: {path: ./model}
tasks: {mine: {train: a.parquet, val: b.parquet, reward: "rewards:score"}}
kl: {placement: reward, estimator: k1, follows: reverse, beta: 0.1}
arms: {reverse: {}}
seeds: [1]
train: {steps: 3}
"""


class Seen:
    """A display that remembers."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.starts: list[Start] = []

    def note(self, text: str) -> None:
        self.events.append(text)

    def skip(self, spec: RunSpec) -> None:
        self.events.append("skip")

    def start(self, spec: RunSpec, steps_done: int) -> None:
        self.events.append(("start", steps_done))

    def starting(self, spec: RunSpec, start: Start) -> None:
        self.starts.append(start)

    def step(self, spec: RunSpec, line: dict[str, Any]) -> None:
        self.events.append(line["step"])

    def end(self, spec: RunSpec, status: str, reason: str) -> None:
        self.events.append((status, reason))


class Here:
    """A session without Ray: it starts `code` in place of verl's driver, with the environment and log it is given."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.argv: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.argv = argv
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HEAD + self.code], env={**os.environ, **environment}, stdout=out, stderr=out
            )

    def wait(self, seconds: float) -> End | None:
        assert self.process is not None
        try:
            return End(self.process.wait(seconds))
        except subprocess.TimeoutExpired:
            return None


HEAD = """
import os, sys, time
from pathlib import Path
from klreg_verl.experiment.store import RunFolder
folder = RunFolder(os.environ["KLREG_RUN"])
def step(*numbers):
    for number in numbers:
        folder.append_metrics(number, {"train/accuracy": 0.5})
"""


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).write_bytes(b"rows")
    (tmp_path / "study.yaml").write_text(RECIPE)
    return plan.expand(recipe.load(tmp_path / "study.yaml"))[0]


@pytest.fixture
def files(spec: RunSpec, tmp_path: Path) -> overrides.Files:
    return inputs.planned_files(spec, tmp_path / "runs")


def run(spec: RunSpec, files: overrides.Files, runs: Path, code: str) -> tuple[Outcome, list[Any], RunFolder]:
    seen = Seen()
    outcome = local.run_one(spec, files, runs, "cpu", Here(code), seen)
    return outcome, seen.events, run_folder(spec, runs)


# ---------------------------------------------------------------------------------------------------- ends


def test_a_run_that_does_every_step_is_done(spec, files, tmp_path):
    outcome, events, folder = run(spec, files, tmp_path / "runs", "step(0, 1, 2, 3)")
    assert (outcome.status, outcome.reason) == ("done", "")
    assert events == [("start", 0), 0, 1, 2, 3, ("done", "")]  # step 0 is the evaluation before training
    state = folder.state()
    assert (state.status, state.step, state.steps, state.attempt) == ("done", 3, 3, 1)
    assert folder.is_done(spec)


def test_until_the_first_line_the_display_is_told_what_the_run_is_at_and_how_long_it_usually_takes(
    spec, files, tmp_path
):
    waits = "folder.latest.joinpath('progress').mkdir(exist_ok=True); "
    waits += "folder.latest.joinpath('progress/trainer.json').write_text(TOLD); time.sleep(1.5); step(1, 2, 3)"
    told = {"phase": "start", "doing": "waiting for vLLM", "step": 0}
    code = f"TOLD = {json.dumps(json.dumps(told))}; {waits}"
    first, again = Seen(), Seen()
    local.run_one(spec, files, tmp_path / "runs", "cpu", Here(code), first)
    assert [start.usual for start in first.starts] == [None] * len(first.starts)
    assert first.starts[-1].doing == "step 0, waiting for vLLM"
    assert [start.seconds for start in first.starts] == sorted(start.seconds for start in first.starts)
    assert first.starts[-1].log == run_folder(spec, tmp_path / "runs").latest.resolve() / "log"
    took = json.loads((run_folder(spec, tmp_path / "runs").latest / local.STARTED).read_text())["seconds"]
    assert took > 1.5
    other = replace(spec, seed=2)
    local.run_one(other, files, tmp_path / "runs", "cpu", Here(code), again)
    assert {start.usual for start in again.starts} == {took}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("step(1); sys.exit(0)", "the driver ended before the last step, without an error"),
        ("step(1); sys.exit(3)", "the driver ended with exit code 3 and left no traceback"),
        ("step(1); raise KeyError('needle')", "KeyError: 'needle'"),
        ("step(1); os.kill(os.getpid(), 9)", "the driver was killed by SIGKILL"),
        ("step(1, 2, 3); sys.exit(3)", "the driver ended with exit code 3 and left no traceback"),
    ],
)
def test_any_other_end_is_a_failure_with_its_reason(spec, files, tmp_path, code, reason):
    outcome, events, folder = run(spec, files, tmp_path / "runs", code)
    assert (outcome.status, outcome.reason) == ("failed", reason)
    assert events[-1] == ("failed", reason)
    assert (folder.state().status, folder.state().reason) == ("failed", reason)
    assert not folder.is_locked()


def test_a_run_that_its_alarms_end_fails_with_an_end_of_its_own(spec, files, tmp_path):
    code = "from klreg_verl.verl_hooks.watch import AlarmRaised\nstep(1); raise AlarmRaised('kl_above: 3 nats')"
    outcome, _, folder = run(spec, files, tmp_path / "runs", code)
    assert (outcome.status, folder.state().status) == ("failed", "failed")
    end = json.loads((folder.attempts_dir / "1" / "end.json").read_text())
    assert end["status"] == "alarm" and "kl_above: 3 nats" in end["reason"]


@pytest.fixture
def two(spec, tmp_path, monkeypatch) -> list[RunSpec]:
    """Two runs, and a session without Ray for whoever runs them."""
    monkeypatch.setattr(local, "_session", lambda *_: contextlib.nullcontext(Here("step(1, 2, 3)")))
    return plan.expand(recipe.load(tmp_path / "study.yaml", overrides=["seeds=[1,2]"]))


def test_shared_runs_are_left_to_who_works_on_them_and_the_others_are_done(two, tmp_path):
    runs, seen = tmp_path / "runs", Seen()
    with run_folder(two[0], runs).lock():
        with pytest.raises(ValueError, match="in use by process .* --share takes the runs that nobody works on"):
            local.run(two, runs, "cpu", seen)
        assert preflight.free(two, runs) == two[1:]
        outcomes = local.run(two, runs, "cpu", seen, share=True)
    assert [(outcome.spec.seed, outcome.status) for outcome in outcomes] == [(2, "done")]
    assert seen.events[0] == f"reverse/mine/seed1 is left to process {os.getpid()} on {socket.gethostname()}"
    assert [outcome.status for outcome in local.run(two, runs, "cpu", seen)] == ["done", "done"]
    with contextlib.ExitStack() as both:
        for each in two:
            both.enter_context(run_folder(each, runs).lock())
        with pytest.raises(ValueError, match="none is left to share"):
            preflight.free(two, runs)


def test_who_came_first_leaves_a_run_that_was_taken_meanwhile_and_does_not_fail(two, tmp_path):
    class Taker(Seen):
        """Once the first run is there, another process takes the second."""

        def start(self, spec: RunSpec, steps_done: int) -> None:
            super().start(spec, steps_done)
            taken.enter_context(run_folder(two[1], tmp_path / "runs").lock())

    with contextlib.ExitStack() as taken:
        outcomes = local.run(two, tmp_path / "runs", "cpu", Taker())
    assert [(outcome.spec.seed, outcome.status) for outcome in outcomes] == [(1, "done")]


def test_a_run_that_another_process_finished_meanwhile_is_not_begun_again(spec, files, tmp_path):
    run(spec, files, tmp_path / "runs", "step(1, 2, 3)")
    outcome, events, folder = run(spec, files, tmp_path / "runs", "step(4)")
    assert (outcome.status, events, folder.state().attempt) == ("done", ["skip"], 1)


def test_what_a_kill_left_behind_is_removed_by_the_next_attempt(spec, files, tmp_path):
    folder = run_folder(spec, tmp_path / "runs")
    folder.create(spec)
    (folder.path / ".state.json.1.2.tmp").write_text("{")
    run(spec, files, tmp_path / "runs", "step(1, 2, 3)")
    assert not list(folder.path.glob(".*.tmp"))


def test_a_second_attempt_shows_the_steps_that_it_repeats_and_keeps_the_first_ones_log(spec, files, tmp_path):
    run(spec, files, tmp_path / "runs", "step(0, 1, 2); print('first'); sys.exit(1)")
    resume = """
time.sleep(0.8)   # start-up
folder.discard_after(1, folder.latest.resolve())
time.sleep(0.8)
step(2)
time.sleep(0.8)
step(3)
"""
    outcome, events, folder = run(spec, files, tmp_path / "runs", resume)
    assert outcome.status == "done"
    assert [event for event in events if isinstance(event, int)] == [2, 3]  # 2 again, not the first attempt's lines
    assert (folder.attempts_dir / "1" / "log").read_text() == "first\n"
    assert folder.latest.resolve().name == "2"
    assert folder.state().attempt == 2


def test_a_folder_in_use_is_not_touched(spec, files, tmp_path):
    folder = run_folder(spec, tmp_path / "runs")
    folder.create(spec)
    with folder.lock(), pytest.raises(ValueError, match="is in use by process"):
        local.run([spec], tmp_path / "runs", "cpu", Seen())
    assert not folder.attempts_dir.exists()


def test_what_is_done_is_skipped_without_starting_anything(spec, files, tmp_path):
    run(spec, files, tmp_path / "runs", "step(1, 2, 3)")
    seen = Seen()
    (outcome,) = local.run([spec], tmp_path / "runs", "cpu", seen)
    assert (outcome.status, seen.events) == ("done", ["skip"])


def test_a_done_folder_of_another_recipe_is_refused_not_skipped(spec, files, tmp_path):
    run(spec, files, tmp_path / "runs", "step(1, 2, 3)")
    stronger = replace(spec, kl=replace(spec.kl, beta=0.3))
    with pytest.raises(ValueError, match=r"(?s)holds another run.*kl.beta: 0.1 != 0.3"):
        local.run([stronger], tmp_path / "runs", "cpu", Seen())


# ---------------------------------------------------------------------------------------------------- what it is told


def test_an_attempt_is_told_everything_by_files_and_environment(spec, files, tmp_path):
    show = """
import json
names = ("KLREG_KL", "KLREG_RUN", "TENSORBOARD_DIR")
print(json.dumps({name: os.environ[name] for name in names} | {"wandb": [n for n in os.environ if "WANDB" in n]}))
step(1, 2, 3)
"""
    here = Here(show)
    local.run_one(spec, files, tmp_path / "runs", "cpu", here, Seen())
    folder = run_folder(spec, tmp_path / "runs")
    attempt = folder.attempts_dir / "1"
    told = json.loads((attempt / "log").read_text())
    assert told == {
        "KLREG_KL": str(attempt / "kl.yaml"),
        "KLREG_RUN": str(folder.path),
        "TENSORBOARD_DIR": str(folder.path / "tensorboard"),
        "wandb": [name for name in os.environ if "WANDB" in name],
    }
    assert recipe.load_kl(attempt / "kl.yaml").kl == spec.kl
    settings = json.loads((attempt / "verl.json").read_text())
    assert settings == overrides.settings(spec, files, "cpu")
    assert here.argv[:4] == [sys.executable, "-P", "-m", "klreg_verl.verl_hooks.main"]
    assert here.argv[4:] == overrides.hydra_arguments({**settings, "hydra.run.dir": attempt / "hydra"})
    card = json.loads(folder.provenance_path.read_text())
    assert "reverse KL" in card["gradient"]
    assert card["platform"] == "cpu"
    assert json.loads((attempt / "provenance.json").read_text()) == card


def test_one_wandb_run_spans_all_attempts(spec, files, tmp_path):
    online = replace(spec, logging=replace(spec.logging, wandb="offline"))
    folder = run_folder(online, tmp_path / "runs")
    told = local._wandb(online, folder)
    assert told["WANDB_MODE"] == "offline"
    assert told["WANDB_RUN_ID"] == online.hash[:16]
    assert told["WANDB_RESUME"] == "allow"
    assert local._wandb(spec, folder) == {}


def test_the_sessions_environment_is_the_users_with_the_platforms_defaults_under_it(spec, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/users/own")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("VERL_ENGINE_DEVICE", raising=False)
    told = local.session_environment(spec, "cpu")
    assert told["KLREG_MODULES"] == spec.root  # the last on the path, and not PYTHONPATH, which is the first
    assert told["PYTHONPATH"] == "/users/own"
    assert told["OMP_NUM_THREADS"] == "7"
    assert told["VERL_ENGINE_DEVICE"] == cpu.ENVIRONMENT["VERL_ENGINE_DEVICE"]
    assert "VERL_ENGINE_DEVICE" not in local.session_environment(spec, "cuda")
    assert gpu.ENVIRONMENT.items() <= local.session_environment(spec, "cuda").items()


# ---------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def heard():
    """No signal is ignored from outside: a background job may start with SIGINT ignored, nohup's with SIGHUP."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("interrupted_a_line", [False, True])
def test_a_signal_is_answered_with_a_line_before_anything_is_ended(interrupted_a_line):
    told = []

    def tell(text: str) -> None:
        told.append(text)
        if interrupted_a_line:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with pytest.raises(Interrupted, match="SIGINT"), local.stop_signals(tell):
        os.kill(os.getpid(), signal.SIGINT)
    assert told == ["SIGINT: ending the run, its workers, vLLM and Ray. What was saved stays."]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_marks_the_run_interrupted_and_a_second_one_does_not_disturb_the_clean_up(
    spec, files, tmp_path, number, heard
):
    here, seen = Here("step(1); time.sleep(100)"), Seen()
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def send() -> None:
        while 1 not in seen.events:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(Interrupted, match=signal.Signals(number).name), local.stop_signals():
            try:
                local.run_one(spec, files, tmp_path / "runs", "cpu", here, seen)
            finally:
                for again in before:
                    os.kill(os.getpid(), again)  # while Ray would be closing
    finally:
        thread.join()
        here.process.kill()
        here.process.wait()
    state = run_folder(spec, tmp_path / "runs").state()
    assert (state.status, state.reason, state.step) == ("interrupted", "stopped by a signal", 1)
    assert {n: signal.getsignal(n) for n in before} == before
    end = json.loads((run_folder(spec, tmp_path / "runs").attempts_dir / "1" / "end.json").read_text())
    assert end == {"status": "signal", "reason": "stopped by a signal", "step": 1}  # no fault of the run: budget.py


def test_a_signal_that_is_ignored_already_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with local.stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_signals_are_left_alone():
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with local.stop_signals():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors == []


def test_the_card_of_a_resumed_run_keeps_the_claims_that_its_first_steps_were_taken_under(tmp_path):
    text = "metric: train/accuracy, contrast: [none, reverse], margin: 0.1"
    (tmp_path / "study.yaml").write_text(
        "question: q\nmodel: {path: tiny}\ntasks: {p: {builtin: palindrome}}\nseeds: [1]\nkl: {beta: 0.1}\n"
        "arms:\n  none: {kl: {placement: none}}\n"
        "  reverse: {kl: {placement: reward, estimator: k1, follows: reverse}}\n"
        f"claims: {{c: {{{text}}}}}\n"
    )
    before = plan.expand(recipe.load(tmp_path / "study.yaml"))[0]
    after = plan.expand(recipe.load(tmp_path / "study.yaml", ["claims.c.margin=0.5"]))[0]
    folder = RunFolder(tmp_path / "run")
    folder.create(before)
    folder.provenance_path.write_text(json.dumps({"claims": local._claims(before, folder)}))
    assert claims.registered({"claims": local._claims(after, folder)})["c"]["margin"] == 0.5  # nothing was run yet
    folder.append_metrics(1, {"train/accuracy": 0.5})
    assert claims.registered({"claims": local._claims(after, folder)})["c"]["margin"] == 0.1
    assert local._claims(after, folder)["list"]["c"]["margin"] == 0.5


def test_the_threads_of_a_cpu_run_follow_from_its_model_unless_the_user_says_them(spec, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    tiny, larger = (replace(spec, model=ModelSpec(path=path)) for path in ("tiny", "smollm2"))
    assert local.session_environment(tiny, "cpu")["OMP_NUM_THREADS"] == "1"
    assert local.session_environment(larger, "cpu")["OMP_NUM_THREADS"] == "6"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.session_environment(larger, "cpu")["OMP_NUM_THREADS"] == "3"
