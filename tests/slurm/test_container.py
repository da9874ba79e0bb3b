"""With Apptainer: the steps of a job run in the image, Slurm's own commands and the batch script outside."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from lab import ROOT, Lab
from test_jobs import assert_ends, assert_whole, folder, submit, time_limit, wait_for_step

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("apptainer") is None, reason="not installed: apptainer"),
]
INSIDE = "/opt/inside"
"""Where the environment is in the container, and nowhere else."""
OPTIONS = ("--userns",)


@pytest.fixture
def image(lab: Lab) -> Path:
    """A folder as image: a system whose programs are this machine's, bound into it, since no registry is needed so."""
    made = lab.shared / "image"
    for name in ("usr", "etc", "proc", "sys", "dev", "tmp", "var/tmp", "root", "home", "opt/inside"):
        (made / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (made / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "nsswitch.conf", "localtime", "hosts", "resolv.conf"):
        (made / "etc" / name).write_bytes(Path("/etc", name).read_bytes())
    tried = lab.run("apptainer", "exec", *OPTIONS, "--bind", "/usr", made, "true", check=False)
    if lab.code:
        pytest.skip(f"apptainer makes no container here: {tried}")
    return made


def test_a_run_in_a_container_is_stopped_and_comes_back(lab: Lab, image: Path):
    mounts = ["/usr", sys.base_prefix, ROOT, lab.shared, f"{sys.prefix}:{INSIDE}"]
    container = {
        "kind": "apptainer",
        "image": str(image),
        "python": f"{INSIDE}/bin/python",
        "mounts": [str(mount) for mount in mounts],
        "options": list(OPTIONS),
    }
    environment = {"STANDIN_SECONDS": "0.6", "APPTAINERENV_PREPEND_PATH": f"{lab.shared}/study/bin"}
    keys = f"container: {json.dumps(container)}\nenvironment: {json.dumps(environment)}"
    job = submit(lab, "--arm", "none", "train.steps=20", profile=keys)
    wait_for_step(lab, 3)
    assert any(INSIDE in args for _, args in lab.processes(1))
    time_limit(lab, job)
    lab.until(lambda: (folder(lab) / "attempts" / "2").exists(), "the next attempt", 240)
    assert_ends(lab, job, "COMPLETED")
    assert_whole(lab, steps=20)
