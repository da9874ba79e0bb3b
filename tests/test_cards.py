"""analysis.cards: what differs without being declared is named, and an anonymous report names nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import card, synthetic_rows, write_run

from klreg_verl.analysis import cards, report, runs


def write(folder: Path, arm: str, seed: int = 1, **changed: object) -> Path:
    return write_run(
        folder,
        arm,
        synthetic_rows(arm, seed, 4),
        seed=seed,
        provenance=card(arm, seed) | {"host": {"cpu": "a"}} | changed,
    )


def test_cards_that_are_alike_have_no_difference(tmp_path: Path) -> None:
    # time, gradient and seed differ in every run: none of them is one
    for arm in ("none", "reverse"):
        for seed in (1, 2):
            write(tmp_path, arm, seed, host={"cpu": "a", "name": f"machine{seed}"})
    assert cards.undeclared(runs.load(tmp_path)) == []


def test_a_field_that_differs_names_its_values_and_runs(tmp_path: Path) -> None:
    write(tmp_path, "none", data_sha256="a" * 64)
    write(tmp_path, "reverse", data_sha256="b" * 64)
    (found,) = cards.undeclared(runs.load(tmp_path))
    assert (found.field, found.within_seed) == ("data_sha256", True)
    assert cards.sentences([found]) == [
        "data_sha256: aaaaaaaaaaaa in none/palindrome/seed1; bbbbbbbbbbbb in reverse/palindrome/seed1; arms of one "
        "seed differ, so their comparison is of this, too."
    ]


def test_a_difference_between_seeds_is_taken_out_by_pairing(tmp_path: Path) -> None:
    for seed in (1, 2):
        for arm in ("none", "reverse"):
            write(tmp_path, arm, seed, host={"cpu": f"kind {seed}"})
    (found,) = cards.undeclared(runs.load(tmp_path))
    assert (found.field, found.within_seed) == ("host.cpu", False)
    assert "paired by seed are free of it" in cards.sentences([found])[0]


def test_seeds_of_one_arm_that_were_asked_for_different_things_are_found(tmp_path: Path) -> None:
    for seed, beta in ((1, 0.1), (2, 0.2)):
        kl = {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": beta}
        write_run(tmp_path, "reverse", [{"step": 1, "train/accuracy": 0.5}], seed=seed, kl=kl)
    assert [each.field for each in cards.undeclared(runs.load(tmp_path))] == ["spec.kl.beta"]


def test_what_arms_declare_is_no_difference(tmp_path: Path) -> None:
    write(tmp_path, "none")
    write(tmp_path, "reverse")
    assert cards.undeclared(runs.load(tmp_path)) == []


def test_comparisons_of_unlike_runs_say_so_everywhere(tmp_path: Path) -> None:
    write(tmp_path, "none", platform="cpu")
    write(tmp_path, "reverse", platform="cuda")
    paths = report.write_report(tmp_path)
    text = paths.markdown.read_text()
    caution = "Not like for like: the run cards differ in platform, which no recipe declared."
    assert text.count(caution) >= 3  # in the findings, and beside each comparison at the end
    assert "## Run cards that differ though no recipe says so" in text
    assert "Cards differ in platform: not declared by the recipe." in paths.lines
    assert '<section id="undeclared">' in paths.html.read_text()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("cannot open /scratch/ada/x.parquet: gone", "cannot open (path): gone"),
        ("see ~/runs/a or C:\\Users\\ada\\x", "see (path) or (path)"),
        ("git@example.org:lab/hidden.git", "(address)"),
        ("https://user:pw@example.org/a b", "(address) b"),
        ("on node7.cluster, rank 1", "on (host), rank 1"),
        ("on node7 and node70", "on (host) and node70"),
        ("0.5 nats/response, 3/4 done", "0.5 nats/response, 3/4 done"),
    ],
)
def test_texts_are_cleaned_of_paths_addresses_and_hosts(given: str, shown: str) -> None:
    assert cards.cleaned(given, ("node7.cluster", "node7")) == shown


def test_an_anonymous_report_has_no_host_path_or_remote_in_any_file(tmp_path: Path) -> None:
    secret = {
        "host": {"name": "node7.cluster", "cpu": "EPYC", "system": "Linux-node7"},
        "git": {"commit": "0" * 40, "remote": "git@example.org:lab/hidden.git", "untracked": ["lovelace.txt"]},
        "data": {"train": {"path": "/scratch/lovelace/train.parquet", "sha256": "d" * 64}},
        "model": {"path": "/scratch/lovelace/model", "sha256": "e" * 64},
    }
    write_run(
        tmp_path,
        "none",
        synthetic_rows("none", 1, 4),
        status="failed",
        reason="node7 lost /scratch/lovelace/train.parquet",
        provenance=card("none", 1) | secret,
    )
    report.write_report(tmp_path, anonymous=True)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".html", ".md", ".csv")}
    assert {"report.html", "report.md", "summary.csv", "metrics_long.csv"} <= texts.keys()
    for name, text in texts.items():
        for word in ("node7", "lovelace", "hidden.git", "example.org", "scratch"):
            assert word not in text, f"{word} in {name}"
    assert "EPYC" in texts["report.html"] and "dddddd" in texts["report.html"]
    assert "(host) lost (path)" in texts["report.md"]
    report.write_report(tmp_path)
    assert "node7" in (tmp_path / "report.html").read_text()
