"""The doctor's kept answers: the same as fresh ones, never older than the source, and no torch where they are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import write_run

from data_prep import palindrome
from klreg_verl.core.objective import Objective
from klreg_verl.experiment import recipe, verdicts
from klreg_verl.experiment.kl_settings import KLSpec
from klreg_verl.experiment.strict import ConfigError

ROOT = Path(__file__).parent.parent
HEAVY = ("matplotlib", "pandas", "ray", "scipy", "torch", "transformers", "verl", "vllm")
K1 = KLSpec(placement="reward", estimator="k1", follows="reverse", beta=0.1)
RECIPE = """\
question: q
model: {path: tiny}
tasks: {p: {builtin: palindrome}}
kl: {beta: 0.1}
arms: {reverse: {kl: {placement: reward, estimator: k1, follows: reverse}}}
seeds: [1]
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KLREG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "verdicts"


class Doctor:
    """Answers with what it is set to, and counts how often it is asked."""

    def __init__(self, verdict: str | None) -> None:
        self.verdict, self.asked = verdict, 0

    def __call__(self) -> str | None:
        self.asked += 1
        return self.verdict


@pytest.mark.parametrize("verdict", [None, "", "no: k1 – in the loss\nis void"])
def test_a_question_is_answered_once_and_each_question_has_its_own_answer(cache: Path, verdict: str | None) -> None:
    doctor, other = Doctor(verdict), Doctor("another")
    assert [verdicts.about(K1, {"asked": "x"}, doctor) for _ in range(3)] == [verdict] * 3
    assert verdicts.about(replace(K1, beta=0.2), {"asked": "x"}, other) == "another"
    assert verdicts.about(K1, {"asked": "y"}, other) == "another"
    assert (doctor.asked, other.asked, len(list(cache.iterdir()))) == (1, 2, 3)


def test_changed_source_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    for name in ("core/kl.py", "doctor/rules.py", "experiment/kl_settings.py"):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("one = 1\n")
    monkeypatch.setattr(verdicts, "PACKAGE", package)

    def answer(now: str) -> str | None:
        verdicts._source.cache_clear()
        return verdicts.about(K1, {}, lambda: now)

    assert [answer("first"), answer("unread")] == ["first", "first"]
    for name in ("core/kl.py", "doctor/rules.py", "experiment/kl_settings.py"):
        (package / name).write_text("one = 2\n")
        assert [answer(name), answer("unread")] == [name, name]
    (package / "core" / "new.py").write_text("")
    assert answer("a new file") == "a new file"
    monkeypatch.setattr(verdicts, "version", lambda name: "99")
    assert answer("another torch") == "another torch"
    verdicts._source.cache_clear()


def damages() -> dict[str, object]:
    return {
        "truncated": lambda text: text[:-3],
        "empty": lambda text: "",
        "another answer": lambda text: text.replace("right", "wrong"),
        "no hash": lambda text: text.partition("\n")[2],
        "not text": lambda text: None,
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_answered_anew(cache: Path, damage: str) -> None:
    verdicts.about(K1, {}, Doctor("right"))
    (path,) = cache.iterdir()
    changed = damages()[damage](path.read_text())
    path.write_bytes(b"\xff\xfe\x00") if changed is None else path.write_text(changed)
    doctor = Doctor("right")
    assert [verdicts.about(K1, {}, doctor) for _ in range(2)] == ["right", "right"] and doctor.asked == 1


def test_an_answer_under_the_name_of_another_question_is_not_taken(cache: Path) -> None:
    verdicts.about(K1, {}, Doctor("of k1"))
    (path,) = cache.iterdir()
    verdicts.about(replace(K1, beta=0.2), {}, Doctor("of another beta"))
    (other,) = set(cache.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    assert verdicts.about(K1, {}, Doctor("of k1")) == "of k1"


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file where the folder would be")
    assert verdicts.about(K1, {}, Doctor("right")) == "right"
    monkeypatch.delenv("KLREG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "no/absolute/path")
    assert verdicts.about(K1, {}, Doctor("right")) == "right"


def test_an_estimator_of_the_users_own_is_judged_every_time(cache: Path) -> None:
    doctor = Doctor("own")
    for _ in range(2):
        assert verdicts.about(replace(K1, estimator="mine:value"), {}, doctor) == "own"
    assert doctor.asked == 2 and not cache.exists()


def test_a_refusal_is_the_same_from_the_cache(cache: Path) -> None:
    void = replace(K1, placement="loss")
    said = []
    for _ in range(2):
        with pytest.raises(ConfigError, match="here: kl.estimator='k1' with kl.placement='loss' is void") as error:
            recipe.check_kl(void, "here", Objective())
        said.append(str(error.value))
    assert said[0] == said[1] and len(list(cache.iterdir())) == 1
    recipe.check_kl(K1, "here", Objective())
    recipe.check_kl(replace(void, allow_biased=True, follows="none"), "here", Objective())


def klreg(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """Exit code, output, and heavy packages that the command imported in a process of its own."""
    code = (
        "import json, sys\nfrom klreg_verl.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n"
        f"    print(json.dumps([end.code or 0, sorted(set({HEAVY}) & set(sys.modules))]))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
    text, _, last = done.stdout.rstrip("\n").rpartition("\n")
    status, heavy = json.loads(last)
    return status, text, heavy


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a run; its KL was judged before."""
    monkeypatch.setenv("KLREG_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "study.yaml"
    path.write_text(RECIPE)
    folder = write_run(tmp_path / "runs" / "other", "reverse", [{"step": 1, "train/accuracy": 0.5}])
    spec = recipe_spec(path)
    (folder / "spec.json").write_text(json.dumps(spec.to_json()))
    (folder / "latest").symlink_to("attempts/1")
    (folder / "attempts/1/log").write_text("the last line\n")
    recipe.check_claims(recipe.load(path))
    return path


def recipe_spec(path: Path):
    from klreg_verl.experiment import plan

    return replace(plan.expand(recipe.load(path))[0], recipe="other", task_name="palindrome")


def test_plan_status_logs_and_help_import_nothing_heavy(study: Path) -> None:
    run = study.parent / "runs/other/reverse/palindrome/seed1"
    assert "torch" in klreg("plan", study)[2]  # the control: the doctor has not been asked about the arm before
    for arguments, expected in (
        (("--help",), "doctor"),
        (("plan", study), "1 settings x 1 seeds = 1 runs"),
        (("plan", study, "--json"), '"status": "pending"'),
        (("status", study), "pending"),
        (("status", run), "step 1/40"),
        (("logs", run), "the last line"),
        (("doctor", "--spec", f"{study}#reverse"), "the reverse KL"),
    ):
        status, text, heavy = klreg(*arguments)
        assert (status, heavy) == (0, []) and expected in text, arguments


def test_data_check_imports_neither_torch_nor_the_stack(tmp_path: Path) -> None:
    options = palindrome.PalindromeOptions(train_size=4, test_size=4)
    folder = palindrome.cache(options, tmp_path, lambda *_: None)
    status, text, heavy = klreg("data", "check", folder / "train.parquet")
    assert status == 0 and "train.parquet" in text
    assert heavy in ([], ["pandas"])  # pyarrow's


def test_the_doctors_table_is_the_same_from_the_cache(cache: Path) -> None:
    first, again = klreg("doctor", "--estimator", "k2"), klreg("doctor", "--estimator", "k2")
    assert first[:2] == again[:2] and first[2] == ["torch"] and again[2] == []
    assert klreg("doctor", "--estimator", "k2", "--json")[2] == ["torch"]
