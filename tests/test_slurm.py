"""What `klreg submit` checks and writes. Slurm is real in tests/slurm; here partitions are what sinfo printed."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from verl_stack import spec

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import LoggingSpec, ModelSpec, ResourcesSpec
from klreg_verl.experiment.store import run_folder
from launch import preflight, slurm
from launch import profile as profiles
from launch.job_folder import Job, new_folder, place_of
from launch.profile import Container, Ports, Profile

SINFO = """\
gpu*|12|64|512000|gpu:h100:8(S:0-1)|2-00:00:00|up
gpu*|4|32+|256000+|gpu:a100:4|2-00:00:00|up
debug|2|8|32000|(null)|30:00|up
long|2|8|32000|gpu:2|infinite|up
old|2|8|32000|gpu:2|infinite|down
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that profiles below declare as shared."""
    monkeypatch.delenv("KLREG_CACHE", raising=False)
    return tmp_path


@pytest.fixture
def known() -> list[slurm.Partition]:
    return [slurm._partition(line) for line in SINFO.splitlines() if line.endswith("|up")]


def run(root: Path, **sections: object) -> RunSpec:
    return replace(spec(root=str(root)), **sections)


def profile(root: Path, **values: object) -> Profile:
    return Profile(**({"name": "p", "shared": (str(root), "/work", "/usr", "/opt", "/venv")} | values))


def problems(root: Path, given: RunSpec, where: Profile, seconds: float | None = None) -> list[str]:
    measured = {} if seconds is None else {given.run_id: seconds}
    found = slurm.check([given], where, root / "runs", measured)
    return [each for each in found if not each.startswith("the environment")]


# ---------------------------------------------------------------------------------------------------- the recipe


def test_a_profile_that_fits_has_no_problems(root: Path):
    resources = ResourcesSpec(nodes=2, gpus_per_node=8)
    assert problems(root, run(root, resources=resources), profile(root, nodes=2, gpus_per_node=8)) == []
    assert problems(root, run(root, resources=resources), profile(root)) == []  # as the recipe asks


def test_workers_of_recipe_and_profile_must_be_the_same_number(root: Path):
    (nodes, gpus) = problems(root, run(root), profile(root, nodes=2, gpus_per_node=8))
    assert "the recipe's resources.nodes is 1 and profile p has 2" in nodes
    assert "resources.gpus_per_node is 1 and profile p has 8" in gpus
    assert "say resources.gpus_per_node=8, or use a profile with 1" in gpus


def test_an_engine_fills_at_most_a_node(root: Path):
    resources = ResourcesSpec(nodes=2, gpus_per_node=4, tensor_parallel=8)
    (problem,) = problems(root, run(root, resources=resources), profile(root))
    assert "tensor_parallel=8 spans nodes of 4 GPUs" in problem


def test_a_tracker_that_the_profile_silences_is_told(root: Path):
    (problem,) = problems(
        root, run(root, logging=LoggingSpec(wandb="online")), profile(root, environment={"WANDB_MODE": "offline"})
    )
    assert "logging.wandb is online and the profile sets WANDB_MODE=offline" in problem


def test_steps_that_do_not_fit_the_time_limit_or_the_notice_are_told(root: Path):
    where = profile(root, time="1:00:00", notice_seconds=600)
    assert problems(root, run(root), where, seconds=599) == []
    (lost,) = problems(root, run(root), where, seconds=700)
    assert "a step takes 700 s and the notice before the time limit is 600 s: the step in hand would be lost" in lost
    (never,) = problems(root, run(root), where, seconds=3100)
    assert "3100 s, and 1:00:00 less 600 s of notice leave no room for one" in never


# ---------------------------------------------------------------------------------------------------- paths


def test_paths_outside_the_shared_folders_are_told_by_name(root: Path):
    where = profile(root, shared=(str(root / "shared"),))
    given = run(root / "shared", model=ModelSpec(path="/data/model"))
    found = problems(root, given, where)
    assert [each.partition(" is not")[0] for each in found] == [
        f"the runs' folder {root}/runs",
        f"the cache {root}/runs/.cache",
        "a file of the recipe /data/model",
    ]


def test_without_shared_folders_those_that_every_node_has_for_itself_are_refused():
    given = run(Path("/home/me/study"))
    found = slurm.check([given], Profile(venv="/home/me/venv"), Path("/tmp/runs"), {})
    assert [each.partition(",")[0] for each in found[:2]] == [
        "the runs' folder /tmp/runs is on /tmp",
        "the cache /tmp/runs/.cache is on /tmp",
    ]


def test_the_file_system_of_a_path_is_that_of_the_longest_mount():
    assert slurm.file_system(Path("/proc/self")) == "proc"
    assert slurm.file_system(Path("/dev/shm/x")) == "tmpfs"


# ---------------------------------------------------------------------------------------------------- the cluster


def test_partitions_are_read_as_sinfo_prints_them(known: list[slurm.Partition]):
    assert [(p.name, p.is_default, p.nodes, p.cpus, p.memory_mb, p.gpus, p.limit) for p in known] == [
        ("gpu", True, 12, 64, 512000, 8, 172800),
        ("gpu", True, 4, 32, 256000, 4, 172800),
        ("debug", False, 2, 8, 32000, 0, 1800),
        ("long", False, 2, 8, 32000, 2, float("inf")),
    ]
    assert known[0].gpu_types == {"h100"} and known[3].gpu_types == frozenset()


CLUSTER = {
    "partition 'gpus' is unknown or down. There are: debug, gpu, long.": {"partition": "gpus"},
    "partition 'old' is unknown or down. There are: debug, gpu, long.": {"partition": "old"},
    "partition debug: time 4:00:00 is over its limit of 0.5 h.": {"partition": "debug"},
    "partition long: no node has 8 GPUs a node (gpus_per_node); it has at most 2.": {"partition": "long"},
    "partition gpu: no node has GPUs of type b200 (gpu_type); it has at most a100, h100.": {"gpu_type": "b200"},
    "partition gpu: no node has 128 CPUs a node (cpus_per_node); it has at most 64.": {"cpus_per_node": 128},
    "partition gpu: no node has 600 GB a node (memory_gb); it has at most 500 GB.": {"memory_gb": 600},
}


@pytest.mark.parametrize("expected", CLUSTER)
def test_what_a_cluster_does_not_have_is_told_before_slurm_lets_it_wait_for_ever(root, known, expected):
    given = run(root, resources=ResourcesSpec(gpus_per_node=8))
    assert slurm.check_cluster([given], profile(root, **CLUSTER[expected]), known) == [expected]


def test_more_nodes_than_fit_are_told(root: Path, known: list[slurm.Partition]):
    given = run(root, resources=ResourcesSpec(nodes=14, gpus_per_node=8))
    assert slurm.check_cluster([given], profile(root), known) == [
        "partition gpu: 14 nodes are needed and 12 of its nodes fit what is asked for."
    ]


def test_what_fits_is_fine_and_a_cluster_without_default_partition_wants_a_name(root, known):
    given = run(root, resources=ResourcesSpec(nodes=12, gpus_per_node=8))
    assert slurm.check_cluster([given], profile(root, gpu_type="h100", memory_gb=500), known) == []
    named = [replace(each, is_default=False) for each in known]
    assert "names no partition" in slurm.check_cluster([given], profile(root), named)[0]


def test_without_slurm_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sinfo is not on this machine's PATH. Submit from a login node.*--dry-run"):
        slurm.partitions()


def test_a_controller_that_is_down_is_said_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "COMMAND_SECONDS", 0.2)
    with pytest.raises(slurm.SlurmError, match="sinfo did not answer within 0 s: is slurmctld up?"):
        slurm.partitions()


# ---------------------------------------------------------------------------------------------------- the script


def head(script: str) -> dict[str, str]:
    """Options of a script's head."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict((line + "=").split("=", 1) for line in lines)


def script(root: Path, where: Profile, runs: int = 3, **sections: object) -> str:
    specs = [run(root, seed=seed, **sections) for seed in range(runs)]
    return slurm.render(slurm.make_job(specs, where, root / "runs"), root / "runs/study/slurm/1")


def test_the_script_of_a_gpu_job(root: Path):
    where = profile(
        root, partition="gpu", account="me", gpu_type="h100", memory_gb=0, exclusive=True, sbatch=("--reservation=x",)
    )
    options = head(script(root, where, resources=ResourcesSpec(nodes=2, gpus_per_node=8)))
    assert {name: value.rstrip("=") for name, value in options.items()} == {
        "job-name": "klreg-study",
        "array": "0-2%8",
        "partition": "gpu",
        "account": "me",
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "8",
        "gpus-per-node": "h100:8",
        "mem": "0G",
        "exclusive": "",
        "time": "4:00:00",
        "signal": "B:USR1@300",
        "requeue": "",
        "open-mode": "append",
        "chdir": f"{root}/runs/study/slurm/1",
        "output": f"{root}/runs/study/slurm/1/logs/%a.log",
        "reservation": "x",
    }


def test_a_folder_with_spaces_and_an_option_with_a_quoted_value_are_one_word_each(tmp_path: Path):
    spaced = tmp_path / "my runs # 1"
    spaced.mkdir()
    where = profile(tmp_path, platform="cpu", constraint="[rack1*2&rack2*4]", sbatch=("--comment='a b'", "-w node1"))
    job = slurm.make_job([run(tmp_path)], where, spaced)
    text = slurm.render(job, spaced)
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert [f"--chdir={spaced}"] in words
    assert [f"--output={spaced}/logs/%a.log"] in words
    assert ["--constraint=[rack1*2&rack2*4]"] in words
    assert words[-2:] == [["--comment=a b"], ["-w", "node1"]]


def test_only_the_user_can_read_what_holds_the_values_of_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "ask", lambda *command: "7")
    job = slurm.make_job([run(tmp_path)], profile(tmp_path, platform="cpu", environment={"KEY": "s"}), tmp_path)
    submitted = slurm.submit(job, tmp_path / "study")
    modes = {path.name: path.stat().st_mode & 0o777 for path in submitted.folder.glob("job.*")}
    assert modes == {"job.json": 0o600, "job.sbatch": 0o600}


def test_a_cpu_job_asks_for_no_gpu_and_short_runs_share_a_job(root: Path):
    options = head(script(root, profile(root, platform="cpu", runs_per_job=2, max_parallel=1)))
    assert options["array"] == "0-1%1="
    assert not [name for name in options if "gpu" in name or name == "gres"]


@pytest.mark.parametrize("name", sorted(path.stem for path in profiles.SHIPPED.glob("*.yaml")))
def test_bash_can_read_every_script_and_nothing_hides_the_exit_code(root: Path, name: str):
    where = replace(profiles.load(name), modules=("cuda/12.8",), environment={"A": "it's $HOME"}, setup=("ulimit -l",))
    text = script(root, where, resources=ResourcesSpec(nodes=where.nodes or 1, gpus_per_node=where.gpus_per_node or 1))
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "export A='it'\"'\"'s $HOME'" in text
    assert text.splitlines()[-1].startswith("exec ")  # the job's exit code is this program's
    for trap in ("| tee", "ray stop", "symmetric-run", "$SLURM_GPUS_PER_NODE", "$0", "BASH_SOURCE"):
        assert trap not in text


def test_an_image_that_is_not_there_is_told(root: Path):
    def found(image: str) -> list[str]:
        return problems(root, run(root), profile(root, container=Container(kind="pyxis", image=image)))

    assert found(f"{root}/k.sqsh") == [
        f"the container's image {root}/k.sqsh is not there. launch/env/klreg.def says how one is built."
    ]
    assert found("registry.org/klreg:1") == []
    (root / "k.sqsh").touch()
    assert found(f"{root}/k.sqsh") == []


def test_the_platform_is_the_profiles_and_not_the_submitting_shells(root: Path):
    def said(where: Profile) -> str:
        lines = [line for line in script(root, where).splitlines() if line.startswith(("unset", "export"))]
        show = 'echo "${VERL_PLATFORM:-none} ${VERL_ENGINE_DEVICE:-none}"'
        environment = {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "PATH": os.environ["PATH"]}
        command = ["bash", "-c", "\n".join([*lines, show])]
        return subprocess.run(command, env=environment, text=True, capture_output=True).stdout.strip()

    assert said(profile(root)) == "none none"
    assert said(profile(root, platform="cpu")) == "cpu none"
    assert said(profile(root, environment={"VERL_PLATFORM": "nvidia"})) == "nvidia none"


def test_containers_hold_the_steps_and_the_batch_script_stays_outside(root: Path):
    apptainer = Container(kind="apptainer", image="/s/k.sif", mounts=("/s",), python="python3.11")
    job = slurm.make_job([run(root)], profile(root, container=apptainer), root / "runs")
    assert job.steps == ("apptainer", "exec", "--nv", "--bind", "/s", "/s/k.sif", "python3.11", "-P")
    assert job.python == "python3"
    pyxis = Container(kind="pyxis", image="/s/k.sqsh", mounts=("/s:/s", "/d:/d"), options=("--container-writable",))
    job = slurm.make_job([run(root)], profile(root, container=pyxis), root / "runs")
    assert job.steps == ("python", "-P")
    assert {"--container-image=/s/k.sqsh", "--container-mounts=/s:/s,/d:/d", "--container-writable"} <= set(job.srun)


def test_the_environment_is_the_profiles_and_the_submitters_cache(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLREG_CACHE", "/shared/cache")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    where = profile(root, environment={"HF_HOME": "/other", "NCCL_DEBUG": "WARN"})
    assert slurm.environment(slurm.make_job([run(root)], where, root)) == {
        "PYTHONUNBUFFERED": "1",
        "KLREG_CACHE": "/shared/cache",
        "HF_HOME": "/other",
        "NCCL_DEBUG": "WARN",
    }


def test_inputs_are_checked_before_anything_is_built_or_submitted(root: Path, monkeypatch: pytest.MonkeyPatch):
    given = run(root, model=ModelSpec(path=str(root / "model")))
    (root / "model").mkdir()
    image = Container(kind="pyxis", image="registry.org/klreg:1")
    notes: list[str] = []
    with pytest.raises(ValueError, match=f"{root}/model"):  # it is empty
        slurm.prepare([given], profile(root, container=image), root / "runs", notes.append)
    assert notes == []
    monkeypatch.setattr(preflight, "TESTED", {"no-such-package": "1"})
    with pytest.raises(ValueError, match="no-such-package is not installed"):
        slurm.prepare([given], profile(root), root / "runs", notes.append)


# ---------------------------------------------------------------------------------------------------- folders


def test_a_job_survives_the_way_through_its_file(root: Path):
    where = profile(root, ports=Ports(first=20000, last=21000), container=Container(kind="pyxis", image="x"))
    job = slurm.make_job([run(root, seed=1), run(root, seed=2)], where, root / "runs")
    folder = new_folder(root / "runs" / "study")
    job.write(folder)
    assert Job.read(folder) == job
    assert [one.hash for one in Job.read(folder).specs] == [one.hash for one in job.specs]


def test_submissions_are_numbered_and_none_is_written_over(root: Path):
    assert [new_folder(root / "study").name for _ in range(3)] == ["1", "2", "3"]
    assert (root / "study/slurm/3/logs").is_dir()  # Slurm ends a job without a word where that is missing


def test_runs_are_sorted_into_what_to_submit_and_what_not(root: Path):
    runs = [run(root, arm=arm) for arm in ("new", "waits", "broken", "ready")]
    for status, one in zip(("failed", "done"), runs[2:], strict=True):
        folder = run_folder(one, root / "runs")
        folder.create(one)
        folder.set_state(status, step=one.train.steps)
    choice = slurm.choose(runs, root / "runs", [runs[1].run_id])
    assert [[each.arm for each in kind] for kind in (choice.missing, choice.queued, choice.failed, choice.done)] == [
        ["new"],
        ["waits"],
        ["broken"],
        ["ready"],
    ]
    changed = [replace(each, train=replace(each.train, temperature=0.9)) for each in runs]
    assert [each.arm for each in slurm.choose(changed, root / "runs", []).done] == []  # another run's end
    expected = "1 to submit, 1 done, 1 in the queue, 1 failed (`klreg retry` tries them again)"
    assert choice.describe() == expected


def test_rays_share_of_a_node_is_the_jobs_and_not_the_machines(root: Path, tmp_path: Path):
    place = place_of(profile(root, cpus_per_node=64, memory_gb=3), 8, tmp_path)
    assert (place.slots, place.gpus, place.object_store_bytes) == (64, 8, 10**9)  # a third of 3 GB
    assert place_of(profile(root, platform="cpu"), 1, tmp_path).object_store_bytes == 256 * 2**20
    assert place_of(profile(root, object_store_gb=2.5), 1, tmp_path).object_store_bytes == 2_500_000_000
    assert place_of(profile(root, cpus_per_node=2), 1, tmp_path).slots == 16  # fewer, and TransferQueue waits for ever
    assert place_of(profile(root), 8, tmp_path).slots == 3 * 8 + 12  # of the 8 CPUs that the profile asks for
