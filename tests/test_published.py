"""Published runs stay what they are: every later version reads them, takes them for done and judges them alike."""

from __future__ import annotations

import csv
import functools
import json
import shutil
import tarfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from klreg_verl.analysis import cards, report, runs
from klreg_verl.evaluation import store
from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, run_folder
from klreg_verl.experiment.strict import away_from_default

ROOT = Path(__file__).parent.parent
STUDIES = tuple(sorted(path.parent.name for path in (ROOT / "recipes/results").glob("*/runs.tar.xz")))
HASHES = json.loads((Path(__file__).parent / "published_hashes.json").read_text())


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with every published run."""
    folder = tmp_path_factory.mktemp("published")
    for study in STUDIES:
        with tarfile.open(ROOT / "recipes/results" / study / "runs.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@functools.cache
def wanted(study: str) -> list[RunSpec]:
    """What the recipe asks for today."""
    return plan.expand(recipe.load(ROOT / "recipes" / f"{study}.yaml"))


def stored(folder: Path) -> dict[str, RunSpec]:
    specs = [RunFolder(path).spec() for path in runs.run_folders(folder)]
    return {spec.run_id: spec for spec in specs if spec}


def with_one_more(spec: Any, value: int = 0) -> Any:
    """The settings as a version has them that knows one more, at 0 where nothing is written."""

    @dataclass(frozen=True, kw_only=True)
    class Later(type(spec)):
        added: int = 0

    return Later(**{field.name: getattr(spec, field.name) for field in fields(spec)}, added=value)


@pytest.mark.parametrize("study", STUDIES)
def test_the_hashes_of_published_runs_are_these(unpacked: Path, study: str) -> None:
    # Another hash here means that a default was changed, or that a setting was renamed or lost: give the new
    # behaviour a new name or value, and what there was keeps its own.
    assert {name: spec.hash[:16] for name, spec in stored(unpacked / study).items()} == HASHES[study]


@pytest.mark.parametrize("study", STUDIES)
def test_the_recipe_as_it_is_takes_its_published_runs_for_done(unpacked: Path, study: str) -> None:
    folders = {spec.run_id: run_folder(spec, unpacked) for spec in wanted(study)}
    assert [spec.run_id for spec in wanted(study) if not folders[spec.run_id].is_done(spec)] == []
    assert set(folders) == set(HASHES[study])
    spec = wanted(study)[0]
    other = replace(spec, train=replace(spec.train, learning_rate=2 * spec.train.learning_rate))
    assert not folders[spec.run_id].is_done(other)


def test_a_hash_in_a_file_is_not_believed(unpacked: Path, tmp_path: Path) -> None:
    spec = wanted(STUDIES[0])[0]
    folder = RunFolder(shutil.copytree(run_folder(spec, unpacked).path, tmp_path / "run"))
    values = json.loads(folder.spec_path.read_text())
    folder.spec_path.write_text(json.dumps(values | {"hash": "of another rule"}))
    assert folder.is_done(spec)
    values["train"]["learning_rate"] *= 2
    folder.spec_path.write_text(json.dumps(values | {"hash": spec.hash}))
    assert not folder.is_done(spec)


@pytest.mark.parametrize("section", ["model", "task", "train", "kl", "eval"])
def test_a_setting_that_is_added_changes_no_hash_until_it_is_used(section: str) -> None:
    spec = wanted(STUDIES[0])[-1]
    later = {value: replace(spec, **{section: with_one_more(getattr(spec, section), value)}) for value in (0, 1)}
    assert later[0].hash == spec.hash and later[0].differs(spec) == [f"{section}.added: 0 != (absent)"]
    assert later[1].hash != spec.hash


def test_a_section_that_is_added_changes_no_hash_until_it_is_used() -> None:
    spec = wanted(STUDIES[0])[-1]
    assert with_one_more(spec).hash == spec.hash != with_one_more(spec, 1).hash


def test_only_what_is_away_from_its_default_is_hashed() -> None:
    spec = next(spec for spec in wanted("kl_direction_cpu") if spec.arm == "forward")
    content = away_from_default(spec.kl, spec.to_json()["kl"])
    assert content == {"placement": "loss", "estimator": "k3", "follows": "forward", "beta": 0.2}
    controlled = replace(spec.kl, controller=replace(spec.kl.controller, kind="matched_kl", target=0.3))
    assert away_from_default(controlled, {"controller": {"kind": "matched_kl", "target": 0.3, "gain": None}}) == {
        "controller": {"kind": "matched_kl", "target": 0.3}
    }


def test_a_default_of_an_older_version_is_not_taken_for_todays() -> None:
    # The older version had 0.1 where nothing was written, and wrote it out; today nothing written means 0.2.
    older = RunSpec.from_json({**(spec := wanted(STUDIES[0])[0]).to_json(), "train": {"clip_ratio": 0.1}})
    assert older.hash != replace(older, train=replace(older.train, clip_ratio=0.2)).hash
    assert spec.train.clip_ratio == 0.2


def test_seeds_made_by_two_versions_are_compared_by_what_they_were_asked_for(unpacked: Path, tmp_path: Path) -> None:
    for spec in wanted("kl_direction_cpu")[:2]:
        shutil.copytree(run_folder(spec, unpacked).path, tmp_path / spec.run_id)
    path = tmp_path / spec.run_id / "spec.json"
    values = json.loads(path.read_text())
    for clip_ratio, found in (({}, []), ({"clip_ratio": 0.1}, ["spec.train.clip_ratio"])):
        train = {key: value for key, value in values["train"].items() if key != "clip_ratio"} | clip_ratio
        path.write_text(json.dumps(values | {"train": train}))
        fields = [each.field for each in cards.undeclared(runs.load(tmp_path))]
        assert [field for field in fields if field.startswith("spec.")] == found


@pytest.mark.parametrize("study", STUDIES)
def test_published_evaluations_are_found_by_name(unpacked: Path, study: str) -> None:
    tables = sorted((unpacked / study).rglob("evals/step*.parquet"))
    assert tables
    for path in tables:
        settings = json.loads(pyarrow.parquet.read_schema(path).metadata[store.METADATA])
        del settings["reward_source"]
        assert path.stem.endswith(store.content_hash(settings)), path


@pytest.mark.full
@pytest.mark.parametrize("study", STUDIES)
def test_published_runs_give_the_published_claims(unpacked: Path, study: str) -> None:
    read = recipe.load(ROOT / "recipes" / f"{study}.yaml")
    report.write_report(unpacked / study, {"name": study, "arms": list(read.arms), "claims": read.claims})
    found = read_table(unpacked / study / "claims.csv")
    expected = read_table(ROOT / "recipes/results" / study / "claims.csv")
    assert len(found) == len(expected) and {each["claim"] for each in found} >= set(read.claims)  # one was taken out
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("claim", "registered", "outcome", "pairs", "margin"):
            assert ours[key] == theirs[key]
        for key in ("difference", "low", "high"):
            assert number(ours[key]) == pytest.approx(number(theirs[key]), rel=1e-6, abs=1e-9, nan_ok=True)


def number(text: str) -> float:
    """NaN for a claim that is not compared."""
    return float(text or "nan")


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
