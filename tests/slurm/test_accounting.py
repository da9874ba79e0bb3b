"""With slurmdbd: an account is demanded, and what squeue has forgotten is asked of sacct."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from conftest import emptied, lab_of_three_nodes
from lab import NEEDED_TO_ACCOUNT, Lab
from test_jobs import assert_whole, folder, study, submit, wait_for_step

MISSING = [name for name in NEEDED_TO_ACCOUNT if shutil.which(name) is None]

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (slurmdbd, mariadb-server)"),
]
OF_THE_LAB = "account: lab"


@pytest.fixture(scope="module")
def accounting() -> Iterator[Lab]:
    with lab_of_three_nodes(accounting=True) as made:
        yield made


@pytest.fixture
def lab(accounting: Lab) -> Iterator[Lab]:
    with emptied(accounting) as clean:
        yield clean


def forgotten(lab: Lab, job: int) -> bool:
    """Whether squeue knows nothing of it."""
    return "Invalid job id" in lab.run("squeue", "-h", "-t", "all", "-j", str(job), check=False)


@pytest.mark.parametrize(
    ("keys", "said"),
    [("account: nobodys", "account"), (f"{OF_THE_LAB}\nqos: best", "qos"), (f"{OF_THE_LAB}\nqos: normal", "")],
)
def test_an_account_or_qos_that_is_not_ours_is_refused_before_anything_is_submitted(lab: Lab, keys: str, said: str):
    path = lab.shared / "changed.yaml"
    path.write_text((lab.shared / "lab.yaml").read_text() + keys + "\n")
    output = lab.klreg("submit", study(lab), "--arm", "none", "--profile", path, check=False)
    assert lab.code == (2 if said else 0), output
    assert ("Slurm does not take the job. sbatch --test-only" in output and f"Invalid {said}" in output) == bool(said)
    assert bool(list((lab.shared / "runs").glob("study/slurm/*"))) != bool(said)


def test_a_job_that_squeue_has_forgotten_is_told_by_sacct_and_its_run_goes_on(lab: Lab):
    slow = f"{OF_THE_LAB}\nenvironment: {{STANDIN_SECONDS: '1'}}"
    job = submit(lab, "--arm", "none", profile=slow)
    wait_for_step(lab, 2)
    lab.klreg("cancel", study(lab))
    lab.until(lambda: forgotten(lab, job), "squeue forgets", 180)
    row = json.loads(lab.klreg("status", study(lab), "--json"))[0]
    assert (row["status"], row["job"]) == ("interrupted", "") and f"job {job}_0 CANCELLED" in row["reason"], row
    again = submit(lab, "--arm", "none", profile=OF_THE_LAB)
    lab.until(lambda: forgotten(lab, again), "squeue forgets", 240)
    assert_whole(lab)
    assert len(list((folder(lab) / "attempts").iterdir())) == 2
    known = lab.run("sacct", "-X", "-n", "-P", "-j", f"{job},{again}", "-o", "JobID,Account,State").splitlines()
    assert [line.split()[0] for line in known] == [f"{job}_0|lab|CANCELLED", f"{again}_0|lab|COMPLETED"]
