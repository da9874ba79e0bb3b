"""Provenance: hashes that follow contents, git state of a real repository, and what is not recorded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from klreg_verl.experiment import plan, provenance, recipe

ROOT = Path(__file__).parents[1]


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, timeout=900)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    git(package.parent, "init", "-q")
    (package / "a.py").write_text("x = 1\n")
    return package


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert provenance.hash_path(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_the_hash_of_a_folder_follows_names_and_contents_and_nothing_else(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a").write_text("1")
    (two / "empty").mkdir()
    assert provenance.hash_path(one) == provenance.hash_path(two)
    (two / "sub" / "a").write_text("23")
    assert provenance.hash_path(one) != provenance.hash_path(two)
    (two / "sub" / "a").write_text("1")
    (two / "sub" / "a").rename(two / "sub" / "b")
    assert provenance.hash_path(one) != provenance.hash_path(two)


def test_a_linked_file_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("1")
    for name in ("linked", "copied"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "a").symlink_to(tmp_path / "blob")
    (tmp_path / "copied" / "a").write_text("1")
    assert provenance.hash_path(tmp_path / "linked") == provenance.hash_path(tmp_path / "copied")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent does not exist, so its hash cannot be recorded"):
        provenance.hash_path(tmp_path / "absent")


def test_a_folder_outside_any_repository_has_no_commit_and_says_why(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) == {
        "commit": None,
        "reason": "not in a git repository, or git is not installed",
    }


def test_an_untracked_folder_is_not_at_the_commit_of_the_repository_around_it(repository: Path) -> None:
    git(repository.parent, "commit", "-q", "--allow-empty", "-m", "m")
    state = provenance.git_state(repository)
    assert state["commit"] is None and "does not track" in state["reason"]


def test_a_clean_and_a_changed_tree_are_told_apart(repository: Path) -> None:
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "m")
    clean = provenance.git_state(repository)
    assert len(clean["commit"]) == 40 and not clean["dirty"] and clean["diff"] == ""
    (repository / "a.py").write_text("x = 2\n")
    (repository.parent / "new.txt").write_text("")
    changed = provenance.git_state(repository)
    assert changed["commit"] == clean["commit"] and changed["dirty"]
    assert "-x = 1\n+x = 2" in changed["diff"] and changed["untracked"] == ["new.txt"]
    assert changed["diff_sha256"] == hashlib.sha256(changed["diff"].encode()).hexdigest() != clean["diff_sha256"]


def test_a_huge_diff_is_cut_and_says_so(repository: Path) -> None:
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "m")
    (repository / "a.py").write_text("y\n" * provenance.MAX_DIFF)
    state = provenance.git_state(repository)
    assert len(state["diff"]) == provenance.MAX_DIFF and state["diff_truncated"]


def test_function_hashes_follow_the_source_of_the_named_functions_only(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text("raise SystemExit\ndef kl_penalty(a):\n    return a\ndef other():\n    pass\n")
    expected = hashlib.sha256(b"def kl_penalty(a):\n    return a").hexdigest()
    assert provenance.function_hashes(path, "kl_penalty") == {"verl.kl_penalty": expected}


def test_the_kl_sources_are_those_of_the_files() -> None:
    path = ROOT / "klreg_verl" / "core" / "kl.py"
    sources = provenance.kl_sources()
    assert sources["klreg_verl.core.kl"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "klreg_verl.core.penalties" in sources


def test_the_record_is_json_with_hashes_of_what_is_read_and_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-value")
    (tmp_path / "train.parquet").write_bytes(b"t")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    spec = plan.expand(recipe.load(ROOT / "recipes" / "quickstart.yaml"))[0]
    record = provenance.collect(
        spec, {"train": tmp_path / "train.parquet"}, model=tmp_path / "model", extra={"gradient": "none"}
    )
    text = json.dumps(record)
    assert "very-secret-value" not in text
    assert record["data"]["train"]["sha256"] == hashlib.sha256(b"t").hexdigest()
    assert record["model"]["sha256"] == record["reference"]["sha256"] == provenance.hash_path(tmp_path / "model")
    assert record["spec_hash"] == spec.hash and record["gradient"] == "none"
    assert record["host"]["cores"] == os.cpu_count() and record["host"]["memory_gb"] > 0


def test_an_extra_entry_cannot_replace_a_recorded_one() -> None:
    spec = plan.expand(recipe.load(ROOT / "recipes" / "quickstart.yaml"))[0]
    with pytest.raises(ValueError, match="extra holds git, time, which provenance records itself"):
        provenance.collect(spec, {}, extra={"time": 0, "git": 1})


def test_only_installed_packages_are_listed() -> None:
    listed = provenance.versions(("pytest", "a-package-that-is-not-there"))
    assert listed == {"pytest": pytest.__version__}
