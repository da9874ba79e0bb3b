"""The `klreg` command as a user meets it: what it prints, its exit codes, and that no bad input ends in a traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from click.testing import Result
from run_folders import HOLDER, write_run, write_study
from typer.testing import CliRunner

from data_prep import palindrome, tiny_model
from klreg_verl.cli import app
from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.store import RunFolder
from klreg_verl.verl_hooks import names
from launch import preflight

ROOT = Path(__file__).parent.parent

Klreg = Callable[..., Result]

STUDY: dict[str, Any] = {
    "question": "q",
    "model": {"path": "tiny"},
    "tasks": {"p": {"builtin": "palindrome"}},
    "train": {"steps": 4},
    "kl": {"beta": 0.1},
    "arms": {
        "none": {"kl": {"placement": "none"}},
        "reverse": {"kl": {"placement": "reward", "estimator": "k1", "follows": "reverse"}},
    },
    "seeds": [1, 2],
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A recipe of two arms and two seeds; the folder beside it holds nothing else."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path


@pytest.fixture
def klreg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Klreg:
    """The command in this process, on a machine with the tested verl, a CPU and enough memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KLREG_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("KLREG_CACHE", raising=False)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(preflight, "_installed", lambda name: names.TESTED[name])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64e9, total=64e9))

    def call(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert "Traceback" not in result.output
        return result

    return call


def told(result: Result) -> str:
    """The output as one line: a terminal's width breaks messages."""
    return " ".join(result.output.split())


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------------------------------------------- surface

DATA = ("data palindrome", "data deepscaler", "data skill", "data tiny-model", "data check")
COMMANDS = (
    "submit",
    "smoke",
    "kl",
    "replay",
    "power",
    "retry",
    "cancel",
    "logs",
    "gc",
    "run",
    "plan",
    "status",
    "report",
    "doctor",
    "export",
    "eval",
    "data",
    *DATA,
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_subcommand_has_help(klreg: Klreg, command: str):
    result = klreg(*command.split(), "--help")
    assert result.exit_code == 0
    assert "usage:" in result.output.lower()


def test_the_help_names_every_subcommand(klreg: Klreg):
    assert all(name in klreg("--help").output for name in ("run", "plan", "status", "report", "doctor", "data"))


def test_an_unknown_subcommand_or_option_is_bad_input(klreg: Klreg, study: Path):
    assert klreg("rnu").exit_code == 2
    assert klreg("plan", study, "--frobnicate").exit_code == 2


# ---------------------------------------------------------------------------------------------------- plan, status


def test_plan_says_what_would_run_and_writes_nothing(klreg: Klreg, study: Path):
    before = files_below(study.parent)
    result = klreg("plan", study)
    assert result.exit_code == 0
    assert "2 settings x 2 seeds = 4 runs" in result.output
    assert re.findall(r"pending\s+(\S+)", result.output) == [
        f"{arm}/p/seed{seed}" for arm in ("none", "reverse") for seed in (1, 2)
    ]
    klreg("plan", study, "--show", "reverse")
    klreg("plan", study, "--as-verl", "reverse")
    klreg("status", study)
    assert klreg("run", study, "--dry-run").exit_code == 0
    assert files_below(study.parent) == before


def test_plan_and_status_as_json_have_the_same_rows_and_each_what_the_other_has_not(klreg: Klreg, study: Path):
    rows = json.loads(klreg("plan", study, "--json").stdout)
    slurm = {"job": "", "slurm": "", "left": ""}
    cost = {key: rows[0].pop(key) for key in ("step_seconds", "hours_left", "gpu_hours_left", "disk_bytes")}
    assert set(cost.values()) == {None}  # nothing has run, and the model is not built
    assert json.loads(klreg("status", study, "--json").stdout)[0] == rows[0] | slurm
    specs = plan.expand(recipe.load(study))
    assert [row["run_id"] for row in rows] == [spec.run_id for spec in specs]
    assert [row["hash"] for row in rows] == [spec.hash[:12] for spec in specs]
    rest = {"status": "pending", "step": 0, "steps": 4, "attempt": 0, "kl": None, "reason": ""}
    rest |= {"accuracy": None, "score": None}
    assert {key: value for key, value in rows[0].items() if key not in ("run_id", "hash")} == rest


def test_plan_as_csv_has_a_line_for_each_run(klreg: Klreg, study: Path):
    lines = klreg("plan", study, "--csv").stdout.splitlines()
    assert lines[0].startswith("run_id,hash,status,step,steps,attempt,") and lines[0].endswith(",disk_bytes")
    assert [line.partition(",")[0] for line in lines[1:]] == [spec.run_id for spec in plan.expand(recipe.load(study))]


@pytest.mark.parametrize(
    "options",
    [
        ["--csv", "--gpu", "h100"],
        ["--show", "reverse", "--gpu", "h100"],
        ["--show", "reverse", "--as-verl", "none"],
        ["--csv", "--json"],
    ],
)
def test_plan_answers_one_question_at_a_time(klreg: Klreg, study: Path, options: list[str]):
    result = klreg("plan", study, *options)
    given = " and ".join(option for option in options if option.startswith("--"))
    assert result.exit_code == 2 and f"{given} do not go together" in told(result)


def test_a_changed_recipe_is_neither_done_nor_forgiven_nor_swept(klreg: Klreg, study: Path, monkeypatch):
    """Its folders hold the runs of the recipe before the change."""
    for spec, status in zip(plan.expand(recipe.load(study)), ("done", "failed", "done", "done"), strict=True):
        folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
        folder.create(spec)
        folder.append_metrics(4, {})
        folder.set_state(status, step=4, steps=4)
    changed_key = "train.temperature=0.5"
    for command in (
        ["submit", study, changed_key, "--profile", "generic", "--dry-run"],
        ["retry", study, changed_key, "--profile", "generic"],
        ["gc", study, changed_key, "--yes"],
    ):
        result = klreg(*command)
        assert result.exit_code == 2 and "holds another run" in told(result), result.output
    assert klreg("status", study).output.count("failed") == 1  # not forgiven


def test_plan_says_what_is_left_to_do_from_steps_that_were_measured(klreg: Klreg, study: Path):
    assert "time unknown until a run has done two steps" in klreg("plan", study).output
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    for step, seconds in ((1, 500.0), (2, 90.0)):
        folder.append_metrics(step, {"time/step_s": seconds})
    # 4 runs of 4 steps, of which 2 are done; the first step warms up and is not counted: 14 x 90 s = 0.35 h
    assert "estimate: 0.35 worker-hours of steps left" in klreg("plan", study).output


def test_plan_for_a_gpu_says_fit_and_cost_for_people_and_machines(klreg: Klreg, study: Path):
    lines = klreg("plan", study, "--gpu", "h100").output.splitlines()
    assert any(line.startswith("fit on H100, 1 GPU (") for line in lines)
    assert any(line.startswith("whole recipe on H100: ") and "(arithmetic;" in line for line in lines)
    rows = json.loads(klreg("plan", study, "--gpu", "h100", "--json").stdout)
    assert all(row["fit"]["fits"] and row["cheapest"]["resources"]["nodes"] == 1 for row in rows)
    assert "fit" not in json.loads(klreg("plan", study, "--json").stdout)[0]


def test_plan_for_a_gpu_that_nobody_knows_is_bad_input(klreg: Klreg, study: Path):
    result = klreg("plan", study, "--gpu", "voodoo2")
    assert result.exit_code == 2 and "'voodoo2' is no GPU that is known here: B200, H200" in told(result)


def test_plan_says_how_to_ask_for_the_fit_of_a_model_that_is_not_tiny(klreg: Klreg, study: Path):
    model = "model.path=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert "fit: not asked; --gpu h100" in klreg("plan", study, model).output
    assert "fit" not in klreg("plan", study).output
    large = klreg("plan", study, model, "train.max_response_tokens=65536", "--gpu", "rtx-4090").output
    assert "DOES NOT FIT. training: " in large and " of 24.0 GiB can be used on RTX-4090" in large


def test_status_shows_steps_numbers_and_the_reason_of_a_failure(klreg: Klreg, study: Path):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    folder.append_metrics(2, {"train/accuracy": 0.5, "kl_ref/k1_response": 0.25})
    folder.set_state("failed", reason="KeyError: 'x'", step=2, steps=4, attempt=3)
    line = klreg("status", study).output.splitlines()[0]
    assert line.split() == "failed none/p/seed1 step 2/4 attempt 3 accuracy 0.500 kl 0.250 KeyError: 'x'".split()
    row = json.loads(klreg("status", study, "--json").stdout)[0]
    assert (row["accuracy"], row["kl"], row["attempt"]) == (0.5, 0.25, 3)


def test_a_finished_run_is_done_pending_with_more_steps_and_in_conflict_with_another_recipe(klreg: Klreg, study: Path):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    folder.append_metrics(4, {})
    folder.set_state("done", step=4)

    def status(*overrides: str) -> str:
        return json.loads(klreg("plan", study, "--json", *overrides).stdout)[0]["status"]

    assert (status(), status("train.steps=9"), status("train.temperature=0.5")) == ("done", "pending", "conflict")


def test_overrides_reach_the_plan(klreg: Klreg, study: Path):
    rows = json.loads(klreg("plan", study, "seeds=[7]", "train.steps=9", "--json").stdout)
    assert [(row["run_id"], row["steps"]) for row in rows] == [("none/p/seed7", 9), ("reverse/p/seed7", 9)]


def test_show_prints_verls_settings_of_the_arm(klreg: Klreg, study: Path):
    settings = json.loads(klreg("plan", study, "train.learning_rate=0.5", "--show", "reverse").stdout)
    assert settings["actor_rollout_ref.actor.optim.lr"] == 0.5
    assert settings["trainer.device"] == "cpu"
    assert settings["trainer.default_local_dir"].endswith("/runs/study/reverse/p/seed1/checkpoints")


@pytest.mark.parametrize("arm", ["none", "reverse"])
def test_as_verl_prints_a_script_that_bash_can_read_and_whose_kl_file_loads(klreg: Klreg, study: Path, arm: str):
    script = klreg("plan", study, "--as-verl", arm).stdout
    assert f"\nKLREG_MODULES={study.parent} " in script  # modules of the user's own lie beside the recipe
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=120)
    # run it with verl's start replaced by one that prints its arguments
    recorder = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['KLREG_KL']]))\n"
    (study.parent / "bin").mkdir()
    (study.parent / "bin" / "python").write_text(recorder)
    (study.parent / "bin" / "python").chmod(0o755)
    path = {"PATH": f"{study.parent / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-e"], input=script, text=True, env=path, capture_output=True, timeout=120)
    arguments, kl_file = json.loads(done.stdout)
    assert arguments[:2] == ["-m", "verl.trainer.main_ppo"]
    assert '++actor_rollout_ref.actor.strategy="fsdp2"' in arguments
    spec = next(spec for spec in plan.expand(recipe.load(study)) if spec.arm == arm)
    assert recipe.load_kl(study.parent / kl_file).kl == spec.kl


# ---------------------------------------------------------------------------------------------------- run


def test_a_dry_run_shows_checks_and_every_setting(klreg: Klreg, study: Path):
    result = klreg("run", study, "--dry-run", "--arm", "reverse", "--seed", "2")
    assert result.exit_code == 0
    for text in ("platform: cpu", "software: verl", "disk: ", "memory: 64 GB", "task p: built here"):
        assert text in result.output
    assert '  algorithm.adv_estimator="klreg_rloo"' in result.output
    assert result.output.splitlines()[-1] == "1 runs; nothing was started."


def test_several_arms_are_one_choice(klreg: Klreg, study: Path):
    result = klreg("run", study, "--dry-run", "--arm", "reverse", "--arm", "none", "--seed", "2")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "2 runs; nothing was started.")


def test_a_run_of_what_is_done_starts_nothing_and_writes_the_report(klreg: Klreg, study: Path):
    for spec in plan.expand(recipe.load(study)):
        folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
        folder.create(spec)
        folder.append_metrics(4, {"train/accuracy": 0.5})
        folder.set_state("done", step=4, steps=4)
    result = klreg("run", study)
    assert result.exit_code == 0, result.output
    assert (study.parent / "runs" / "study" / "report.html").is_file()
    assert "starting" not in result.output


def test_a_failure_of_the_stack_is_told_without_a_traceback_and_exits_with_1(klreg, study, monkeypatch):
    from launch import local

    def fail(*_: object) -> None:
        raise RuntimeError("Ray did not start: no room")

    monkeypatch.setattr(local, "run", fail)
    result = klreg("run", study)
    assert (result.exit_code, "Ray did not start: no room" in result.output) == (1, True)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_is_told_once_and_exits_as_a_shell_has_it(klreg, study, monkeypatch, name, code):
    from launch import local

    def stop(*_: object) -> None:
        raise local.Interrupted(name)

    monkeypatch.setattr(local, "run", stop)
    result = klreg("run", study)
    assert result.exit_code == code
    assert result.output == (f"platform: cpu\nStopped by {name}. The same command resumes from the last checkpoint.\n")


def test_failed_runs_show_their_log_even_if_the_report_cannot_be_written(klreg, study, monkeypatch):
    from klreg_verl.analysis import report
    from launch import local

    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    (folder.new_attempt() / "log").write_text("a line\nthe last line\n")
    outcome = local.Outcome(spec=spec, status="failed", reason="the driver was killed by SIGKILL")
    monkeypatch.setattr(local, "run", lambda *_: [outcome])

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", fail)
    result = klreg("run", study)
    assert result.exit_code == 1
    for text in ("none/p/seed1 failed: the driver was killed by SIGKILL", "the last line", "whole log: ", "No space"):
        assert text in result.output


# ---------------------------------------------------------------------------------------------------- report, doctor


def test_report_of_a_folder_of_runs(klreg: Klreg, study: Path):
    folder = write_study(study.parent / "elsewhere", arms=("none",), steps=2)
    result = klreg("report", folder)
    assert result.exit_code == 0
    assert f"report: {folder / 'report.html'}" in told(result)
    assert (folder / "report.html").is_file()


def test_a_report_names_the_planned_runs_that_have_no_folder(klreg: Klreg, study: Path):
    write_run(study.parent / "runs" / "study", "none", [], task="p", status="failed", reason="x", steps=4)
    assert klreg("report", study).exit_code == 0
    text = (study.parent / "runs" / "study" / "report.md").read_text()
    # two arms and two seeds are planned, none/p/seed1 is there
    for run_id in ("none/p/seed2", "reverse/p/seed1", "reverse/p/seed2"):
        assert f"- `{run_id}`: not started" in text
    assert "- `none/p/seed1`: not started" not in text


def test_a_report_of_a_folder_asks_what_its_runs_asked(klreg: Klreg, study: Path):
    (spec, *_) = plan.expand(recipe.load(study))
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    klreg("report", study.parent / "runs" / "study")
    assert (study.parent / "runs" / "study" / "report.md").read_text().startswith("# q\n")


def test_further_measures_of_diversity_are_had_on_request(klreg: Klreg, study: Path):
    folder = write_study(study.parent / "elsewhere", arms=("none",), steps=2)
    for options, is_there in ([], False), (["--further"], True):
        assert klreg("report", folder, "--embedder", "ngrams", *options).exit_code == 0
        text = (folder / "report.md").read_text()
        assert ("self-BLEU" in text, "Vendi score" in text) == (is_there, is_there)


def test_report_of_runs_that_failed_before_their_first_step(klreg: Klreg, study: Path):
    folder = study.parent / "runs" / "study"
    write_run(folder, "none", [], status="failed", reason="KeyError: 'x'", steps=4)
    result = klreg("report", study)
    assert result.exit_code == 0
    assert "failed" in result.output


def test_doctor_as_a_table_as_json_and_for_one_arm(klreg: Klreg, study: Path):
    assert "placement" in klreg("doctor").output.splitlines()[0]
    rows = json.loads(klreg("doctor", "--json").stdout)
    verdicts = {(row["placement"], row["estimator"]): row["verdict"] for row in rows}
    assert verdicts["reward", "k1"] == "ok"
    assert verdicts["loss", "k1"] == "void"
    assert "reverse KL" in klreg("doctor", "--spec", f"{study}#reverse").output


# ---------------------------------------------------------------------------------------------------- bad input


def changed(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


BAD_RECIPES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("unknown key", {"trian": {"steps": 4}}, ["trian: unknown key", "Did you mean 'train'"]),
    ("unknown key below", {"train": {"stesp": 4}}, ["study.yaml:", "train.stesp: unknown key", "Did you mean 'steps'"]),
    (
        "a typo in an estimator",
        {"arms": {"a": {"kl": {"placement": "reward", "estimator": "k11", "follows": "reverse"}}}},
        ["arms.a.kl.estimator", "'k11'", "k1, k2, k3"],
    ),
    (
        "negative beta",
        {"arms": {"a": {"kl": {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": -0.1}}}},
        ["arms.a.kl.beta: -0.1 is negative", "Give 0 or more"],
    ),
    (
        "batch not divisible by the updates",
        {"train": {"prompts_per_step": 16, "updates_per_batch": 3}},
        ["updates_per_batch: 3 does not divide prompts_per_step=16", "Change one of the two"],
    ),
    (
        "batch not divisible by the workers",
        {"train": {"prompts_per_step": 5, "responses_per_prompt": 5}, "resources": {"gpus_per_node": 2}},
        ["5 prompts x 5 responses cannot be shared equally by 2 workers"],
    ),
    (
        "a void KL",
        {"arms": {"a": {"kl": {"placement": "loss", "estimator": "k1", "follows": "reverse"}}}},
        ["arms.a.kl", "allow_biased"],
    ),
    ("an unknown option of the data", {"tasks": {"p": {"builtin": "palindrome", "options": {"sise": 3}}}}, ["sise"]),
]


@pytest.mark.parametrize(("changes", "texts"), [pytest.param(c, t, id=name) for name, c, t in BAD_RECIPES])
def test_a_bad_recipe_is_refused_before_anything_starts(
    klreg: Klreg, study: Path, changes: dict[str, Any], texts: list[str]
):
    result = klreg("run", changed(study, **changes), "--dry-run")
    assert result.exit_code == 2
    assert [text for text in texts if text not in told(result)] == [], told(result)
    assert klreg("run", study).exit_code == 2
    assert files_below(study.parent) == {"study.yaml"}


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["train.stesp=3"], ["override 'train.stesp=3'", "Did you mean"]),
        (["trian.steps=3"], ["override 'trian.steps=3'", "Did you mean"]),
        (["train.steps"], ["is not of the form key=value"]),
        (["arms.nix.kl.beta=1"], ["there is no 'nix' in arms", "Known: none, reverse"]),
        (["train.steps=many"], ["train.steps"]),
        (["--arm", "nix"], ["there is no arm 'nix'. Known: none, reverse."]),
        (["--task", "nix"], ["there is no task 'nix'. Known: p."]),
        (["--seed", "9"], ["there is no seed 9. Known: 1, 2."]),
        (["--seed", "1", "--seed", "9"], ["there is no seed 9. Known: 1, 2."]),
    ],
)
def test_a_bad_override_or_choice_is_refused(klreg: Klreg, study: Path, arguments: list[str], texts: list[str]):
    result = klreg("run", study, *arguments, "--dry-run")
    assert result.exit_code == 2
    assert [text for text in texts if text not in told(result)] == [], told(result)


@pytest.mark.parametrize("command", [["run"], ["plan"], ["status"], ["report"]])
def test_a_recipe_that_is_not_there_is_refused(klreg: Klreg, tmp_path: Path, command: list[str]):
    result = klreg(*command, tmp_path / "nix.yaml")
    assert (result.exit_code, "nix.yaml: no such file" in told(result)) == (2, True)


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["plan"], ["submit", "--profile", "generic"]])
def test_a_recipe_that_is_a_folder_is_refused(klreg: Klreg, tmp_path: Path, command: list[str]):
    result = klreg(*command, tmp_path)
    assert (result.exit_code, "Is a directory" in told(result)) == (2, True)


@pytest.mark.parametrize("command", ["status", "retry", "cancel", "logs", "gc"])
def test_a_folder_that_is_no_runs_is_refused_where_a_run_may_be_named(klreg: Klreg, tmp_path: Path, command: str):
    result = klreg(command, tmp_path)
    assert (result.exit_code, "is no run's folder: it has no spec.json" in told(result)) == (2, True)


def test_what_concerns_one_run_takes_its_folder_and_what_is_not_there_is_said(klreg: Klreg, study: Path):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    assert klreg("retry", folder.path).output == "No run has failed.\n"
    assert "there is no such log; the run has 0 attempts" in told(klreg("logs", folder.path))
    assert "never submitted" in told(klreg("logs", folder.path, "--job"))
    attempt = folder.new_attempt()
    (attempt / "log").write_text("\x1b[31m(TaskRunner pid=1) ERROR 01-31 12:00:00 [core.py:1] one\ntwo\n")
    assert klreg("logs", folder.path).output.splitlines() == [str((attempt / "log").resolve()), "one", "two"]
    assert klreg("logs", study, "--arm", "none", "--seed", "1", "--lines", "1").output.splitlines()[1:] == ["two"]
    assert "4 runs fit: none/p/seed1" in told(klreg("logs", study))
    assert json.loads(klreg("status", folder.path, "--json").stdout)[0]["run_id"] == spec.run_id
    assert klreg("gc", folder.path).output == "0 B to remove\n"


def test_failed_runs_that_were_never_submitted_are_retried_with_a_profile_only(klreg: Klreg, study: Path):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    folder.set_state("failed", reason="x")
    result = klreg("retry", study)
    assert (result.exit_code, "no submission whose profile could be used again" in told(result)) == (2, True)


def test_a_report_of_what_never_ran_and_a_doctors_unknown_arm_are_refused(klreg: Klreg, study: Path):
    result = klreg("report", study)
    assert (result.exit_code, "Run the recipe first" in told(result)) == (2, True)
    result = klreg("doctor", "--spec", f"{study}#nix")
    assert (result.exit_code, "there is no arm 'nix'" in told(result)) == (2, True)


# ------------------------------------------------------------------------------------------ bad machine, bad folder


def test_no_disk(klreg: Klreg, study: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.3e9))
    result = klreg("run", study)
    assert (result.exit_code, "0.3 GB free, runs need at least 2 GB" in told(result)) == (2, True)


def test_no_memory(klreg: Klreg, study: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3e9))
    result = klreg("run", study)
    assert (result.exit_code, "3.0 GB of memory are available" in told(result)) == (2, True)


def test_python_3_13(klreg: Klreg, study: Path, monkeypatch: pytest.MonkeyPatch):
    version = namedtuple("version", "major minor micro releaselevel serial")(3, 13, 0, "final", 0)
    monkeypatch.setattr(preflight, "sys", SimpleNamespace(version_info=version))
    result = klreg("run", study)
    assert (result.exit_code, "Python 3.13: verl and vLLM have no wheels for it" in told(result)) == (2, True)


@pytest.mark.parametrize("place", ["study.yaml", "study.yaml/runs", "/proc/klreg"])
def test_a_runs_folder_that_cannot_be_made(klreg: Klreg, study: Path, place: str):
    result = klreg("run", study, "--runs-dir", place)
    assert (result.exit_code, "run folders cannot be made there" in told(result)) == (2, True)
    assert klreg("plan", study, "--runs-dir", place).exit_code == 0


def test_a_run_folder_of_another_recipe(klreg: Klreg, study: Path):
    spec = plan.expand(recipe.load(study))[3]  # the last one: found before the first one starts
    RunFolder(study.parent / "runs" / "study" / spec.run_id).create(spec)
    result = klreg("run", study, "kl.beta=0.2")
    assert result.exit_code == 2
    for text in ("reverse/p/seed2 holds another run", "kl.beta: 0.1 != 0.2", spec.hash[:12], "another --runs-dir"):
        assert text in told(result)


def test_a_second_run_in_the_same_folder(klreg: Klreg, study: Path):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            result = klreg("run", study)
            assert json.loads(klreg("status", study, "--json").stdout)[0]["status"] == "running"
        finally:
            holder.kill()
    assert (result.exit_code, f"is in use by process {holder.pid}" in told(result)) == (2, True)
    assert klreg("run", study, "--dry-run").exit_code == 0  # the dead hold nothing


# ---------------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and parquet files as a user may bring them."""
    folder = tmp_path_factory.mktemp("own")

    def quiet(done: int, total: int, text: str) -> None:
        pass

    for name in ("model", "data"):
        (folder / name).mkdir()
    palindrome.build(palindrome.PalindromeOptions(train_size=8, test_size=4), folder / "data", quiet)
    options = tiny_model.TinyModelOptions(hidden_size=32, heads=1, layers=1, steps=1, batch_size=2, measured_prompts=3)
    tiny_model.build(options, folder / "model", quiet)
    return folder


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A user's project: recipe, model, data, reward; each may be damaged."""
    folder = tmp_path / "own"
    shutil.copytree(built, folder)
    (folder / "rewards_of_test_cli.py").write_text("def score(**_): return 0.0\n")
    task = {"train": "data/train.parquet", "val": "data/test.parquet", "reward": "rewards_of_test_cli:score"}
    changed(folder / "study.yaml", model={"path": "./model"}, tasks={"mine": task})
    return folder


def test_a_users_own_files_pass(klreg: Klreg, own: Path):
    result = klreg("run", own / "study.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "vocabulary fits its tokenizer" in result.output
    assert "parquet files have verl's schema, the reward function is there" in result.output


def test_plan_names_all_that_is_not_there_at_once_with_file_and_line_as_run_and_show_do(klreg: Klreg, own: Path):
    text = (own / "study.yaml").read_text().replace("rewards_of_test_cli:score", "rewards_that_are_gone:score")
    (own / "study.yaml").write_text(text)
    line = next(number for number, each in enumerate(text.splitlines(), 1) if each.strip().startswith("reward:"))
    (own / "data" / "test.parquet").unlink()
    shutil.rmtree(own / "model")
    places = [
        f"tasks.mine.val: {own / 'data' / 'test.parquet'} is not there.",
        f"model.path: {own / 'model'} is not a folder.",
        f"study.yaml:{line}: tasks.mine.reward: cannot import 'rewards_that_are_gone'",
    ]
    for command in (["plan"], ["plan", "--show", "reverse"], ["run", "--dry-run"], ["submit", "--profile", "generic"]):
        result = klreg(command[0], own / "study.yaml", *command[1:])
        assert result.exit_code == 2 and all(place in told(result) for place in places), result.output


def test_plan_refuses_what_show_refuses_with_file_and_line(klreg: Klreg, study: Path):
    changed(study, verl={"actor_rollout_ref.actor.optim.lr": 1e-5})
    for command in (["plan"], ["plan", "--json"], ["plan", "--show", "none"], ["run", "--dry-run"]):
        result = klreg(command[0], study, *command[1:])
        assert result.exit_code == 2
        assert re.search(r"study.yaml:\d+: verl.actor_rollout_ref.actor.optim.lr: klreg sets this key", told(result))


def test_a_recipe_has_a_name_and_a_run_a_path_below_the_runs_folder(klreg: Klreg, study: Path, monkeypatch):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    (folder.new_attempt() / "log").write_text("said\n")
    (study.parent / "recipes").mkdir()
    shutil.move(study, study.parent / "recipes" / "study.yaml")
    monkeypatch.chdir(study.parent)
    for run in (folder.path, Path("study") / spec.run_id, Path("runs") / "study" / spec.run_id):
        assert klreg("logs", run).output.splitlines()[-1] == "said"
        assert klreg("status", run).output.split()[1] == spec.run_id
        assert klreg("gc", run).exit_code == klreg("retry", run).exit_code == 0
    for command in (["plan"], ["status"], ["gc"], ["run", "--dry-run"]):
        assert klreg(command[0], "study", *command[1:]).exit_code == 0


def no_tokenizer(own: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json"):
        (own / "model" / name).unlink(missing_ok=True)


def larger_vocabulary(own: Path) -> None:
    path = own / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vocab_size": 2 * config["vocab_size"]}))


def other_schema(own: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["1 + 1"], "answer": [2]}), own / "data" / "train.parquet")


BAD_FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing parquet": (
        lambda own: (own / "data" / "test.parquet").unlink(),
        ["data/test.parquet is not there", "klreg data --help"],
    ),
    "parquet of a wrong schema": (
        other_schema,
        [
            "data/train.parquet has no column 'data_source', 'prompt', 'reward_model'; found: question, answer",
            "Expected:",
        ],
    ),
    "no parquet at all": (
        lambda own: (own / "data" / "train.parquet").write_text("a,b\n"),
        ["data/train.parquet cannot be read as parquet"],
    ),
    "a model folder without tokenizer": (no_tokenizer, ["model has no tokenizer", "save_pretrained"]),
    "vocabulary larger than the tokenizer": (larger_vocabulary, ["is larger than the tokenizer's", "nats per token"]),
    "no model folder": (lambda own: shutil.rmtree(own / "model"), ["model is not a folder"]),
    "no reward function": (
        lambda own: changed(
            own / "study.yaml",
            model={"path": "./model"},
            tasks={"mine": {"train": "data/train.parquet", "val": "data/test.parquet", "reward": "nix_nix:score"}},
        ),
        ["tasks.mine.reward: cannot import 'nix_nix'", "looked for in the recipe's folder"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_before_anything_starts(klreg: Klreg, own: Path, case: str):
    damage, texts = BAD_FILES[case]
    damage(own)
    result = klreg("run", own / "study.yaml", "--dry-run")
    assert result.exit_code == 2
    assert [text for text in texts if text not in told(result)] == [], told(result)


def test_data_check_tells_rows_or_what_is_wrong(klreg: Klreg, own: Path):
    result = klreg("data", "check", own / "data" / "train.parquet")
    assert (result.exit_code, "8 rows in verl's schema" in told(result)) == (0, True)
    result = klreg("data", "check", own / "study.yaml")
    assert (result.exit_code, "cannot be read as parquet" in told(result)) == (2, True)


def test_data_check_tries_a_users_reward_function(klreg: Klreg, own: Path):
    (own / "scoring_of_data_check.py").write_text(
        "def score(solution_str, ground_truth, **_): return float(solution_str == 'x')"
    )
    files = [own / "data" / name for name in ("train.parquet", "test.parquet")]
    result = klreg("data", "check", *files, "--reward", "data_prep.rewards:compute_score")
    assert result.exit_code == 0 and "given as responses, 8 of 8 ground truths score above" in told(result)
    result = klreg("data", "check", *files, "--reward", "scoring_of_data_check:nothing")
    assert (result.exit_code, "cannot import 'scoring_of_data_check'" in told(result)) == (2, True)  # not beside us


def test_data_builders_take_their_own_arguments(klreg: Klreg, tmp_path: Path):
    made = klreg("data", "palindrome", "--out", tmp_path / "made", "--train-size", "5", "--test-size", "2")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "made" / "train.parquet").is_file()
    assert klreg("data", "palindrome", "--out", tmp_path / "made").exit_code == 2  # exists already
    assert (
        klreg("data", "skill", "--out", tmp_path / "skill", "--skill", "number_sorting", "--size", "4").exit_code == 0
    )
    (tmp_path / "x.json").write_text(json.dumps([{"problem": f"{n}?", "answer": n} for n in range(9)]))
    made = klreg("data", "deepscaler", "--out", tmp_path / "d", "--source", tmp_path / "x.json", "--test-size", "2")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "d" / "card.json").is_file()


# ---------------------------------------------------------------------------------------------------- as a process


BLOCKED = """
import sys

sys.modules.update(dict.fromkeys(["verl", "ray", "vllm", "transformers", "tensordict", "reasoning_gym", "psutil"]))

from typer.testing import CliRunner
from klreg_verl.cli import app

recipe = sys.argv[1]
for call in (["doctor"], ["plan", recipe], ["plan", recipe, "--show", "none"], ["plan", recipe, "--as-verl", "none"],
             ["status", recipe], ["report", recipe], ["run", recipe]):
    result = CliRunner().invoke(app, call)
    assert "Traceback" not in result.output and (result.exception is None or type(result.exception) is SystemExit)
    assert (result.exit_code == 0) == (call[0] != "run"), (call, result.output)
assert "`make setup`" in result.output, result.output
"""


def environment(home: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(home), "VERL_PLATFORM": "cpu"}


def test_doctor_plan_status_and_report_need_no_verl_ray_vllm_or_transformers(study: Path):
    spec = plan.expand(recipe.load(study))[0]
    folder = RunFolder(study.parent / "runs" / "study" / spec.run_id)
    folder.create(spec)
    folder.append_metrics(1, {"train/accuracy": 0.5})
    command = [sys.executable, "-c", BLOCKED, str(study)]
    where = {"cwd": study.parent, "env": environment(study.parent)}
    done = subprocess.run(command, **where, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_ends_the_command_quietly(study: Path):
    command = f"{sys.executable} -m klreg_verl.cli run {study} --dry-run --runs-dir {study.parent} | head -1"
    where = {"cwd": study.parent, "env": environment(study.parent)}
    done = subprocess.run(["bash", "-c", command], **where, capture_output=True, text=True, timeout=900)
    assert done.stdout == "platform: cpu\n"
    assert "Traceback" not in done.stderr
