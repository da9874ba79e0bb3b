"""compute_score in verl's reward worker, under the two managers that call it: in threads, and in own actors."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_models import write_tokenizer
from stack import ROOT
from verl_stack import environment

from launch.guardian import Place, below
from launch.session import End, Session, ray_session

pytestmark = pytest.mark.timeout(3600)

SLOW = ("(x+1)^{2008}(y+1)^{999}", "(y+1)^{999}(x^2+2x+1)^{1004}")
ROWS = [
    *(("deepscaler", rf"so \boxed{{x^2+{2 * n}x+{n * n + n % 2}}}", f"(x+{n})^2") for n in range(24)),
    ("math500", r"\boxed{\frac{1}{2}}", "0.5"),
    ("palindrome", "abba", "baab"),
    ("palindrome", r"\boxed{abba}", "baab"),
    ("deepscaler", rf"\boxed{{{SLOW[1]}}}", SLOW[0]),
    ("deepscaler", r"\boxed{9^{9^{9}}}", "7"),
]
RIGHT = [*(float(n % 2 == 0) for n in range(24)), 1.0, 1.0, 0.0, 0.0, 0.0]
TIMEOUTS = [0.0] * 27 + [1.0, 1.0]  # too slow; refused as a bomb


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of characters that decodes to what it encoded."""
    from tokenizers import Tokenizer, decoders

    folder = tmp_path_factory.mktemp("model")
    characters = sorted({character for _, response, _ in ROWS for character in response})
    write_tokenizer(folder, ("<pad>", "<end>", "?", *characters))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with ray_session(Place(gpus=0, object_store_bytes=80 * 2**20), variables()) as made:
        yield made


@pytest.mark.parametrize("manager", ["naive", "remote"])
def test_verls_reward_worker_grades_and_leaves_no_process(manager, session, tokenizer_folder, tmp_path):
    grades = graded(session, manager, tokenizer_folder, tmp_path / "log")
    assert [grade["acc"] for grade in grades] == [grade["reward"] for grade in grades] == RIGHT
    assert [grade["timeout"] for grade in grades] == TIMEOUTS
    assert {tuple(grade) for grade in grades} == {
        ("reward", "score", "acc", "pred", "format_ok", "truncated", "timeout", "echoed")
    }
    assert graders_end(session)


def variables() -> dict[str, str]:
    platform = {name: os.environ[name] for name in ("VERL_PLATFORM",) if name in os.environ}
    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")]))))
    return environment(**platform) | {"PYTHONPATH": python_path, "RAY_USAGE_STATS_ENABLED": "0"}


def graded(session: Session, manager: str, folder: Path, log: Path) -> list[dict[str, float | str]]:
    program = Path(__file__).parent / "grade_in_ray.py"
    command = [sys.executable, str(program), str(folder), manager, json.dumps(ROWS)]
    session.start(command, {}, log)
    assert session.wait(1200) == End(0), log.read_text()[-4000:]
    return json.loads(next(line for line in log.read_text().splitlines() if line.startswith("[{")))


def graders_end(session: Session, seconds: float = 120) -> bool:
    """Whether no grading process is left on the session's Ray, now that the actors which owned them are gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lines = [line_of(process) for process in below(psutil.Process(session._process.pid))]
        if not any("grading/worker.py" in line for line in lines):
            return True
        time.sleep(0.2)
    return False


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
