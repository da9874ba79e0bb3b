"""The checks before anything starts: each bad input is refused with what, why and what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from run_folders import HOLDER

from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import run_folder
from klreg_verl.verl_hooks import names
from launch import gpu, host, preflight, slurm
from launch.profile import Profile

RECIPE = """\
question: q
model: {path: tiny}
tasks: {mine: {train: a.parquet, val: b.parquet, reward: "my_rewards_PLACE:score"}}
arms: {none: {kl: {placement: none}}}
seeds: [1]
train: {steps: 4}
"""


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    (tmp_path / "study.yaml").write_text(RECIPE.replace("PLACE", tmp_path.name))
    return plan.expand(recipe.load(tmp_path / "study.yaml"))[0]


@pytest.fixture
def write_reward(tmp_path: Path):
    """The user's reward module; its name differs between tests, because Python imports a name once."""

    def write(text: str) -> None:
        (tmp_path / f"my_rewards_{tmp_path.name}.py").write_text(text)

    return write


def test_the_tested_verl_on_a_tested_python_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "_installed", dict(names.TESTED).__getitem__)
    assert preflight.check_software().detail == ", ".join(f"{name} {version}" for name, version in names.TESTED.items())


@pytest.mark.parametrize("version", [(3, 13), (3, 10)])
def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]):
    Version = namedtuple("Version", "major minor micro releaselevel serial")
    monkeypatch.setattr(sys, "version_info", Version(*version, 0, "final", 0))
    with pytest.raises(ValueError, match=rf"Python 3\.{version[1]}: .*no wheels for it. Use Python 3.11 \(`make"):
        preflight.check_software()


def test_another_verl_and_none_at_all_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "TESTED", {"pytest": "0.0.1"})
    with pytest.raises(ValueError, match=f"pytest {pytest.__version__} is installed and the hooks were made for 0.0.1"):
        preflight.check_software()
    monkeypatch.setattr(preflight, "TESTED", {"no-such-package": "1"})
    with pytest.raises(ValueError, match="no-such-package is not installed.*`make setup`.*`klreg plan`.* do not"):
        preflight.check_software()


def test_the_platform_is_what_the_environment_says_or_torch_was_built_for(monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setenv("VERL_PLATFORM", " CPU ")
    assert preflight.detect_platform() == "cpu"
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    assert preflight.detect_platform() == "cuda"
    monkeypatch.delenv("VERL_PLATFORM")
    assert preflight.detect_platform("10.0.0.1:6379") == "cuda"  # whatever this machine has
    for built_for, platform in ((None, "cpu"), ("13.0", "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        assert preflight.detect_platform() == platform


@pytest.mark.parametrize("name", ["cuda", "gpu", "amd"])
def test_a_platform_that_verl_or_we_do_not_know_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VERL_PLATFORM", name)
    with pytest.raises(ValueError, match=f"VERL_PLATFORM={name}: .* cpu and nvidia, by verl's own names.*or unset it"):
        preflight.detect_platform()


def test_a_build_for_cuda_without_a_gpu_is_told_what_is_wrong_and_never_trains_on_the_cpu(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="nvidia-smi is not there.*or train on the CPU with VERL_PLATFORM=cpu"):
        preflight.check_machine([spec], tmp_path, "cuda")
    nvidia_smi(tmp_path, "550.1")
    with pytest.raises(ValueError, match="driver is 550.1, .* Or train on the CPU with VERL_PLATFORM=cpu."):
        preflight.check_machine([spec], tmp_path, "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES='' hides all 1 GPUs.* with VERL_PLATFORM=cpu."):
        preflight.check_machine([spec], tmp_path, "cuda")


def nvidia_smi(folder: Path, driver: str) -> None:
    (folder / "nvidia-smi").write_text(
        f'#!/bin/sh\ncase "$1" in --query-gpu=*) echo "0, GPU-0, NVIDIA H100, 81559, 0, {driver}, Disabled" ;; esac\n'
    )
    (folder / "nvidia-smi").chmod(0o755)


def test_gpus_that_a_cpus_environment_leaves_idle_are_told_and_a_real_model_is_refused(
    spec, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(host, "memory_available", lambda: 10 * 10**9)
    monkeypatch.delenv("VERL_PLATFORM")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def found(one: RunSpec) -> list[str]:
        return [each.what for each in preflight.check_machine([one], tmp_path, "cpu")]

    large = replace(spec, model=replace(spec.model, path="org/model"))
    assert found(large) == ["memory"] and capsys.readouterr().err == ""  # a machine without GPUs
    nvidia_smi(tmp_path, "470.10")
    assert found(large) == ["memory"]  # no run could use it
    nvidia_smi(tmp_path, "580.95")
    assert found(spec) == ["memory", "gpus"]
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "1 GPU(s) here (NVIDIA H100) stay unused: launch/env/setup_gpu.sh" in note
    with pytest.raises(
        ValueError, match="org/model would be trained on the CPU: .*setup_gpu.sh.*say VERL_PLATFORM=cpu"
    ):
        found(large)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert found(large) == ["memory"]


def test_submitting_refuses_a_cpu_build_where_the_job_would_use_it(spec: RunSpec, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(preflight, "_installed", dict(names.TESTED).__getitem__)
    monkeypatch.setattr(gpu, "torch_in", lambda _: gpu.Torch(version="2.13.0+cpu", cuda=None, count=0))

    def refused(**keys: object) -> str:
        with pytest.raises(ValueError) as error:
            slurm.prepare([spec], Profile(**keys), tmp_path / "runs", pytest.fail)
        return str(error.value)

    assert "torch 2.13.0+cpu in " in refused() and "a.parquet" in refused(platform="cpu")
    assert "a.parquet" in refused(venv=sys.prefix)  # not this environment, or one that its profile stands for
    assert "VERL_PLATFORM=cuda: " in refused(venv=sys.prefix, environment={"VERL_PLATFORM": "cuda"})
    padded = replace(spec, verl={gpu.PACKED: False})
    with pytest.raises(ValueError, match="train.micro_batch is not set"):
        slurm.prepare([padded], Profile(venv=sys.prefix), tmp_path / "runs", pytest.fail)


# ---------------------------------------------------------------------------------------------------- machine


def test_no_disk_is_refused_where_the_runs_would_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=1.24e9))
    with pytest.raises(ValueError, match=r"1.2 GB free, runs need at least 2 GB.*--runs-dir or KLREG_RUNS"):
        preflight.check_disk(tmp_path / "not" / "made" / "yet")
    assert asked == [tmp_path]
    assert not list(tmp_path.iterdir())


def test_a_runs_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/klreg")):
        with pytest.raises(ValueError, match=f"{place}: run folders cannot be made there.*--runs-dir"):
            preflight.check_disk(place)


def test_a_runs_checkpoints_need_room_less_those_that_are_there(spec: RunSpec, tmp_path: Path, monkeypatch):
    """12 bytes of 1,777,088,000 parameters, 2 kept and one on its way: 63.975 GB. Of the tiny model logs count more."""
    spec = replace(spec, train=replace(spec.train, steps=10), save=replace(spec.save, every=1))
    large = replace(spec, model=replace(spec.model, path="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"))
    assert preflight.disk_needed([spec, large], tmp_path) == pytest.approx(63.975168)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=60e9))
    with pytest.raises(ValueError, match=r"60.0 GB free, runs need at least 64 GB"):
        preflight.check_disk(tmp_path, preflight.disk_needed([large], tmp_path))
    more = replace(large, save=replace(large.save, keep=5))
    assert preflight.disk_needed([more], tmp_path) == pytest.approx(2 * 63.975168)
    unknown = replace(spec, model=replace(spec.model, path="org/model"))
    assert preflight.disk_needed([spec, unknown], tmp_path) == 2
    folder = run_folder(large, tmp_path)
    folder.create(large)
    folder.checkpoints_dir.mkdir(exist_ok=True)
    with open(folder.checkpoints_dir / "model.pt", "wb") as file:
        file.truncate(40 * 10**9)  # no block of it is written
    assert preflight.disk_needed([large], tmp_path) == pytest.approx(23.975168)
    folder.set_state("done", step=large.train.steps)
    assert preflight.disk_needed([large], tmp_path) == 2


def test_memory_is_counted_per_worker(spec: RunSpec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "memory_available", lambda: 10 * 10**9)
    assert preflight.check_memory([spec]).detail == "10 GB available, about 8 GB needed"
    two = replace(spec, resources=replace(spec.resources, gpus_per_node=2))
    with pytest.raises(ValueError, match=r"10.0 GB of memory are available.* 2 worker\(s\) takes about 12 GB"):
        preflight.check_memory([spec, two])  # 8 + 4
    with pytest.raises(ValueError, match=r"takes about 11 GB \(Ray, vLLM, trainer, 3.0 GB of it reference and"):
        preflight.check_memory([spec], 3 * 10**9)


def test_a_ray_elsewhere_is_not_judged_by_this_machine_and_our_own_has_one_node(spec: RunSpec, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_installed", dict(names.TESTED).__getitem__)
    monkeypatch.setattr(preflight, "check_files", lambda specs: [])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    wide = replace(spec, resources=replace(spec.resources, nodes=2))
    found = preflight.check([wide], tmp_path, "cuda", "10.0.0.1:6379")
    assert [finding.what for finding in found] == ["software", "disk"]
    with pytest.raises(ValueError, match="resources.nodes is 2, .* this machine only. Use `klreg submit`"):
        preflight.check([wide], tmp_path, "cpu")
    with pytest.raises(ValueError, match="1.0 GB of memory are available"):
        preflight.check([spec], tmp_path, "cpu")


# ---------------------------------------------------------------------------------------------------- run folders


def test_a_folder_of_another_run_is_refused_also_when_that_run_is_done(spec: RunSpec, tmp_path: Path):
    folder = run_folder(spec, tmp_path / "runs")
    folder.create(spec)
    folder.set_state("done", step=4)
    preflight.check_folders([spec], tmp_path / "runs")
    preflight.check_folders([replace(spec, train=replace(spec.train, steps=9))], tmp_path / "runs")  # an extension
    hotter = replace(spec, train=replace(spec.train, temperature=0.9))
    with pytest.raises(ValueError, match=r"(?s)holds another run.*train.temperature: 1.0 != 0.9.*--runs-dir"):
        preflight.check_folders([hotter], tmp_path / "runs")


def test_a_folder_that_a_living_process_works_in_is_refused_and_free_after_its_death(spec: RunSpec, tmp_path: Path):
    folder = run_folder(spec, tmp_path / "runs")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on .*Wait for it or stop it"):
            preflight.check_folders([spec], tmp_path / "runs")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    preflight.check_folders([spec], tmp_path / "runs")


# ---------------------------------------------------------------------------------------------------- data


def test_a_builtin_tasks_source_is_looked_for(tmp_path: Path):
    text = RECIPE.replace(
        '{train: a.parquet, val: b.parquet, reward: "my_rewards_PLACE:score"}',
        "{builtin: deepscaler, options: {source: math.json}}",
    )
    (tmp_path / "study.yaml").write_text(text)
    (spec,) = plan.expand(recipe.load(tmp_path / "study.yaml"))
    with pytest.raises(ValueError, match="math.json is not there"):
        preflight.check_files([spec])
    (tmp_path / "math.json").write_text("[]")
    assert preflight.check_files([spec])[-1] == preflight.Finding(what="task mine", detail="built here")


# ---------------------------------------------------------------------------------------------------- reward


def test_a_reward_function_in_the_recipes_folder_is_found_and_the_path_restored(spec: RunSpec, write_reward):
    before = list(sys.path)
    write_reward("def score(data_source, solution_str, ground_truth, extra_info=None): return 0.0")
    preflight.check_reward(spec)
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot import 'my_rewards.*ModuleNotFoundError.*looked for in the recipe's folder"),
        ("def skore(): pass", "has no function 'score'"),
        ("score = 3", "has no function 'score'"),
        ("def score(:", "cannot import .*SyntaxError"),
        ("open('/no/such/table')", "cannot import .*FileNotFoundError"),
    ],
)
def test_a_reward_function_that_is_not_there_or_does_not_import_is_refused(
    spec: RunSpec, write_reward, text: str | None, message: str
):
    if text is not None:
        write_reward(text)
    with pytest.raises(ValueError, match=f"tasks.mine.reward: .*{message}"):
        preflight.check_reward(spec)
