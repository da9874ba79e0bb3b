"""A real Slurm, started for these tests alone and ended with them; where it is missing, root may let CI install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_models import network, write_model

from data_prep import schema

sys.path.insert(0, str(Path(__file__).parent))

from lab import NEEDED, ROOT, Lab  # noqa: E402

PACKAGES = ("slurm-wlm", "munge", "iproute2", "procps")
RECIPE = """\
question: Does it come back?
model: {path: ./model}
tasks: {mine: {train: a.parquet, val: b.parquet, reward: "rewards:score"}}
train: {steps: 6, prompts_per_step: 4, responses_per_prompt: 2, micro_batch: 2}
save: {every: 2}
resources: {nodes: 2, gpus_per_node: 1}
verl:
  actor_rollout_ref.model.override_config.attn_implementation: sdpa
  actor_rollout_ref.model.use_remove_padding: false
arms:
  none: {kl: {placement: none}}
  reverse: {kl: {placement: reward, estimator: k1, follows: reverse, beta: 0.1}}
seeds: [1]
"""
PROFILE = """\
nodes: 2
gpus_per_node: 1
cpus_per_node: 2
time: "10:00"
notice_seconds: 60
max_parallel: 1
form_seconds: 240
requeues: 30
shared: [{shared}, {root}, {prefix}]
venv: {prefix}
object_store_gb: 0.1
setup:
  - export PATH={shared}/study/bin:$PATH CPATH={shared}/study/include
  - export RAY_ADDRESS=10.77.0.99:6379
  - export TMPDIR={shared}/a-long-folder-that-a-site-makes-for-every-job/and-a-longer-one-below/which-nobody-expects
  - mkdir -p $TMPDIR
"""
"""Its set-up lays traps that break others: somebody's stale Ray, a folder too long for sockets. Two more are there
without it: with GPUs Slurm sets ROCm's variable, too, beside which verl refuses to start, and the home has a token of
somebody's Ray. `venv` is named so that `submit` leaves it alone: its torch is the CPU's, which only the runs'
folder hides (standin/sitecustomize.py)."""

NVIDIA_SMI = """\
#!/bin/sh
case "$1" in --query-gpu=*)
    for i in 0 1 2 3 4 5 6 7; do echo "$i, GPU-$i, Stand-in, 81559, 0, 580.65, [N/A]"; done
esac
"""
"""Eight GPUs that are in no table, as lab.sh's nodes have them."""


def missing() -> list[str]:
    """Programs that are needed and not here."""
    return [name for name in NEEDED if shutil.which(name) is None]


def install() -> None:
    """From Debian's packages, as root and where CI asks for it."""
    if not (missing() and os.environ.get("CI") and os.geteuid() == 0 and shutil.which("apt-get")):
        return
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 300}
    subprocess.run(["apt-get", "update"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], **quiet)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Together they take half an hour on two cores, so they run when asked for."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.full)
            if not os.environ.get("KLREG_SLURM"):
                item.add_marker(pytest.mark.skip(reason="a private Slurm takes half an hour: `make slurm` starts one"))


@contextmanager
def lab_of_three_nodes(accounting: bool = False) -> Iterator[Lab]:
    """Three nodes, so that a job finds two when one is lost; skips where it cannot be."""
    install()
    if missing():
        pytest.skip(
            f"not installed: {', '.join(missing())} (apt-get install --no-install-recommends {' '.join(PACKAGES)})"
        )
    if ROOT.is_relative_to("/tmp") or Path(sys.prefix).is_relative_to("/tmp"):
        pytest.skip(f"every node of the lab has a /tmp of its own, so it sees neither {ROOT} nor {sys.prefix}")
    try:
        made = Lab(Path(f"/var/tmp/klreg-lab-{os.getpid()}-{time.time_ns() % 10**6}"), 3, accounting)
    except RuntimeError as error:
        pytest.skip(f"no cluster can be made here: {error}")
    yield made
    made.close()


@contextmanager
def emptied(cluster: Lab) -> Iterator[Lab]:
    """The cluster with an empty shared folder; no job and no process is left on it."""
    shutil.rmtree(cluster.shared)
    write_study(cluster.shared / "study")
    text = PROFILE.format(shared=cluster.shared, root=ROOT, prefix=sys.prefix)
    (cluster.shared / "lab.yaml").write_text(text)
    cluster.until(lambda: cluster.idle() == 3, "three idle nodes")
    yield cluster
    cluster.run("scancel", "--user", cluster.run("id", "-un").strip(), check=False)
    cluster.until(lambda: not cluster.remains(), "nothing left", 60)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Lab]:
    """Without accounting: Slurm remembers every job for an hour."""
    with lab_of_three_nodes() as made:
        yield made


@pytest.fixture
def lab(cluster: Lab) -> Iterator[Lab]:
    """It, as nobody has used it."""
    with emptied(cluster) as clean:
        yield clean


def write_study(folder: Path) -> None:
    """A user's project whose driver is the stand-in."""
    shutil.copytree(Path(__file__).parent / "standin", folder)
    write_model(folder / "model", network(0), template="{{ messages[0]['content'] }}")
    for name in ("bin", "include"):
        (folder / name).mkdir()
    for name, text in {"nvidia-smi": NVIDIA_SMI, "gcc": "#!/bin/sh\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "include" / "Python.h").touch()
    row = schema.make_row(
        data_source="mine", prompt="p", ability="none", ground_truth="g", split="train", index=0, meta={}
    )
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.Table.from_pylist([row], schema=schema.SCHEMA), folder / name)
    (folder / "rewards.py").write_text("def score(**kwargs):\n    return 0.0\n")
    (folder / "study.yaml").write_text(RECIPE)
