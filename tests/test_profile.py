"""Cluster profiles: shipped ones load, bad ones are refused in words, and times are read as Slurm writes them."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from klreg_verl.experiment.strict import ConfigError
from launch import profile as profiles
from launch.profile import Profile, seconds

SHIPPED = sorted(path.stem for path in profiles.SHIPPED.glob("*.yaml"))


def load(folder: Path, text: str) -> Profile:
    (folder / "mine.yaml").write_text(text)
    return profiles.load(str(folder / "mine.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads_by_name_and_survives_the_way_through_json(name: str):
    found = profiles.load(name)
    assert found.name == name
    assert profiles.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_the_four_kinds_are_shipped_and_the_generic_one_shows_every_key():
    assert SHIPPED == ["cpu_test", "generic", "multi_node", "single_gpu", "single_node"]
    written = yaml.safe_load((profiles.SHIPPED / "generic.yaml").read_text())
    assert set(written) == {field.name for field in fields(Profile)} - {"name"}


def test_what_the_generic_profile_writes_is_the_default():
    generic, default = asdict(profiles.load("generic")), asdict(Profile())
    changed = {key for key in default if generic[key] != default[key]}
    assert changed == {"name", "environment"}  # offline, as most nodes are


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("4:00:00", 4 * 3600),
        ("2-0", 48 * 3600),
        ("1-02:30", 26.5 * 3600),
        ("1-02:30:15", 26.5 * 3600 + 15),
    ],
)
def test_times_are_read_as_slurm_writes_them(text: str, expected: float):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-5", "1-"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(ValueError, match="is no time. Write minutes, H:M:S or D-H:M:S"):
        seconds(text)


BAD = {
    "partiton: gpu": "mine.yaml:1: partiton: unknown key 'partiton'. Did you mean 'partition'?",
    "nodes: two": "mine.yaml:1: nodes: expected a whole number, got 'two'",
    "nodes: 0": "nodes: 0 is too small: at least 1",
    "time: 240": "time: expected text, got 240. Put what you wrote in quotes.",
    "time: soon": "time: 'soon' is no time",
    "time: '5:00'": "notice_seconds: 300 s before the limit of 5:00 leave no minute to work",
    "platform: tpu": "platform: 'tpu' is not one of cuda, cpu",
    "venv: ./venv": "venv: './venv' is not absolute",
    "shared: [data]": "shared: 'data' is not absolute",
    "scratch: /scratch/with/a/name/that/is/too/long": "Ray's sockets below it may have 107 in all",
    "container: {kind: pyxis}": "container.image: None does not go with kind pyxis",
    "container: {kind: none, image: x.sif}": "container.image: 'x.sif' does not go with kind none",
    "ports: {first: 80, last: 9000}": "ports.first: 80 is too small: at least 1024",
    "ports: {first: 20000, last: 20010}": "Ray needs at least 100 ports above 20000",
    "{cpus_per_node: 128, ports: {first: 20000, last: 20100}}": "ports: 128 CPUs a node need at least 136 ports",
    "sbatch: [--gres=gpu:8]": "sbatch: --gres is set from the profile: gpus_per_node, gpu_type",
    "sbatch: [-N 4]": "sbatch: -N is set from the profile: nodes",
    "sbatch: [reservation=x]": "'reservation=x' is no option of sbatch",
    "sbatch: [-C gpu --nodes=9]": "'-C gpu --nodes=9' is more than one option",
    "sbatch: [--comment=a b]": "'--comment=a b' is more than one option. Give each its own line; quote a value with",
    "sbatch: [--mail-user --nodes=9]": "'--mail-user --nodes=9' is more than one option",
    "sbatch: ['--comment=\"a']": "cannot be read as an option of sbatch: No closing quotation",
    'sbatch: ["--comment=a\\n#SBATCH --nodes=9"]': "sbatch: '--comment=a\\n#SBATCH --nodes=9' has a line break",
    'setup: ["a\\rb"]': "setup: 'a\\rb' has a line break or control character",
    'environment: {A: "x\\ny"}': "environment.A: 'x\\ny' has a line break",
    'container: {kind: pyxis, image: "x\\ny"}': "container.image: 'x\\ny' has a line break",
    "partition: gpu; touch canary": "partition: 'gpu; touch canary' is no such name: spaces, quotes, ;",
    "account: $(id)": "account: '$(id)' is no such name",
    "gpu_type: a b": "gpu_type: 'a b' is no such name",
    "account: 00123": "account: expected text, got 123. Put what you wrote in quotes.",
    "environment: {RAY_ADDRESS: auto}": "environment: RAY_ADDRESS is where each job's own Ray is",
    "environment: {ROCR_VISIBLE_DEVICES: '0'}": "beside CUDA_VISIBLE_DEVICES makes verl refuse to start",
    "environment: {'A B': '0'}": "environment: A B is no name of a variable",
    "environment: {A: 1}": "environment.A: expected text, got 1. Put what you wrote in quotes.",
    "budget: {attempts: 0}": "budget.attempts: 0 is too small",
    "name: other": "name: a profile is named by its file",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_profile_is_refused_with_its_line_and_the_reason(tmp_path: Path, text: str):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert BAD[text] in str(error.value)


def test_all_problems_of_a_profile_are_told_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "nodez: 1\ntime: 5\nplatform: tpu\n")
    assert len(error.value.problems) == 3


def test_an_unknown_profile_is_refused_with_the_known_ones_and_a_missing_file_by_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match="no profile 'multinode'. Did you mean 'multi_node'.*Shipped: cpu_test"):
        profiles.load("multinode")
    with pytest.raises(ConfigError, match="no such file"):
        profiles.load(str(tmp_path / "gone.yaml"))
