"""analysis.cards: what differs without being declared is named, and an anonymous report names nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import card, synthetic_rows, write_run

from klreg_verl.analysis import cards, report, runs
from klreg_verl.experiment import plan, provenance, recipe

ROOT = Path(__file__).parents[1]


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
    write(tmp_path, "none", data={"train": {"path": "/a/x", "sha256": "a" * 64}})
    write(tmp_path, "reverse", data={"train": {"path": "/b/x", "sha256": "b" * 64}})
    (found,) = cards.undeclared(runs.load(tmp_path))
    assert (found.field, found.within_seed) == ("data.train.sha256", True)
    assert cards.sentences([found]) == [
        "data.train.sha256: aaaaaaaaaaaa in none/palindrome/seed1; bbbbbbbbbbbb in reverse/palindrome/seed1; arms of "
        "one seed differ, so their comparison is of this, too."
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


def test_the_card_of_these_tests_has_the_layout_of_a_real_one(tmp_path: Path) -> None:
    (spec,) = plan.expand(recipe.load(ROOT / "recipes" / "quickstart.yaml", ["seeds=[1]"]))[:1]
    (tmp_path / "data").write_text("x")
    real = provenance.collect(spec, {"train": tmp_path / "data", "val": tmp_path / "data"}, model=tmp_path / "data")
    made = card("none", 1)
    assert set(made) == {*real, "gradient", "platform", "claims"}
    for block in ("host", "data", "model", "reference"):
        assert set(made[block]) == set(real[block])
    assert set(made["data"]["train"]) == set(real["data"]["train"])
    assert set(made["kl_source"]) <= set(real["kl_source"])


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"kl_source": {"klreg_verl.core.kl": "0" * 64}}, "kl_source.klreg_verl.core.kl"),
        ({"reference": {"sha256": "0" * 64}}, "reference.sha256"),
        ({"model": {"path": "/elsewhere", "revision": "v2", "sha256": "e" * 64}}, "model.revision"),
        ({"host": {"cpu": "a", "gpus": ["A100"]}}, "host.gpus"),
        ({"python": "3.12.0"}, "python"),
    ],
)
def test_code_reference_model_and_hardware_are_compared(tmp_path: Path, changed: dict, field: str) -> None:
    write(tmp_path, "none", host={"cpu": "a", "gpus": []})
    write(tmp_path, "reverse", **{"host": {"cpu": "a", "gpus": []}} | changed)
    assert [each.field for each in cards.undeclared(runs.load(tmp_path))] == [field]


def test_two_long_values_of_one_length_are_told_apart(tmp_path: Path) -> None:
    hosts = [[f"NVIDIA {name} 80GB HBM3, 81559 MiB, 550.54.15"] * 8 for name in ("H100", "H200")]
    assert len(str(hosts[0])) == len(str(hosts[1])) > 200
    for arm, gpus in zip(("none", "reverse"), hosts, strict=True):
        write(tmp_path, arm, host={"cpu": "a", "gpus": gpus})
    (found,) = cards.undeclared(runs.load(tmp_path))
    assert found.field == "host.gpus"
    assert len({cards.short(value) for value, _ in found.values}) == 2


def lasting(folder: Path, arm: str, steps: int, seed: int = 1) -> None:
    write_run(folder, arm, synthetic_rows(arm, seed, steps), seed=seed)


def test_runs_of_different_length_are_not_compared_silently(tmp_path: Path) -> None:
    for seed in (1, 2):
        lasting(tmp_path, "none", 6, seed)
        lasting(tmp_path, "reverse", 12, seed)
    told = "Not of one length: 6 steps in none/palindrome/seed1, none/palindrome/seed2, 12 steps in "
    assert cards.caution(runs.load(tmp_path)).startswith(told)
    assert told in report.write_report(tmp_path).markdown.read_text()


def test_seeds_of_one_arm_of_different_length_were_declared_by_nobody(tmp_path: Path) -> None:
    lasting(tmp_path, "none", 6, 1)
    lasting(tmp_path, "none", 12, 2)
    assert [each.field for each in cards.undeclared(runs.load(tmp_path))] == ["spec.train.steps"]


def test_code_that_changed_between_attempts_of_a_run_is_named(tmp_path: Path) -> None:
    first, second = card("none", 1) | {"python": "3.11.0"}, card("none", 1) | {"python": "3.12.0"}
    write_run(tmp_path, "none", synthetic_rows("none", 1, 4), provenance=second, attempts=[first, second])
    (found,) = cards.undeclared(runs.load(tmp_path))
    assert cards.sentences([found]) == [
        "python: 3.11.0 in attempt 1 of none/palindrome/seed1; 3.12.0 in attempt 2 of none/palindrome/seed1; it "
        "changed within the run, so the run is of both."
    ]
    paths = report.write_report(tmp_path)
    assert "| none/palindrome/seed1 | python | 2 | `3.12.0` |" in paths.markdown.read_text()
    assert "python, by attempt" in paths.html.read_text()


def test_an_attempt_that_made_no_step_changes_nothing(tmp_path: Path) -> None:
    first, second = card("none", 1) | {"python": "3.11.0"}, card("none", 1) | {"python": "3.12.0"}
    path = write_run(tmp_path, "none", synthetic_rows("none", 1, 4), provenance=second, attempts=[first, second])
    (path / "attempts" / "1" / "end.json").write_text('{"status": "failed", "step": null}')
    assert cards.undeclared(runs.load(tmp_path)) == []


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
        ("~0.5 nats, ~ 3 of 4", "~0.5 nats, ~ 3 of 4"),
        ("~ada/x and ~ada, ada's", "(path) and (path), (user)'s"),
        ("lost /scratch/my data/x.parquet: gone", "lost (path): gone"),
    ],
)
def test_texts_are_cleaned_of_paths_addresses_and_hosts(given: str, shown: str) -> None:
    named = cards.Named(
        hosts=frozenset({"node7.cluster", "node7"}), users=frozenset({"ada"}), paths=frozenset({"/scratch/my data"})
    )
    assert named.cleaned(given) == shown


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
        spec={
            "question": "Does /home/ada.byron/my lab/data help ada.byron, and ~babbage/engine?",
            "model": {"path": "/home/ada.byron/my lab/secret model"},
        },
    )
    report.write_report(tmp_path, anonymous=True)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".html", ".md", ".csv")}
    assert {"report.html", "report.md", "summary.csv", "metrics_long.csv"} <= texts.keys()
    for name, text in texts.items():
        for word in ("node7", "lovelace", "hidden.git", "example.org", "scratch", "byron", "my lab", "babbage"):
            assert word not in text, f"{word} in {name}"
    assert "EPYC" in texts["report.html"] and "dddddd" in texts["report.html"]
    assert "(host) lost (path)" in texts["report.md"]
    report.write_report(tmp_path)
    assert "node7" in (tmp_path / "report.html").read_text()


def test_names_neither_run_as_formulas_in_a_spreadsheet_nor_as_html_in_markdown(tmp_path: Path) -> None:
    question = "<script>alert(1)</script> & <b>bold</b>, p < 0.05, `<kept>`?"
    rows = [row | {"=cmd|x": 1.0, "-ok": -0.5} for row in synthetic_rows("none", 1, 4)]
    write_run(tmp_path, "=1+1", rows, spec={"question": question})
    paths = report.write_report(tmp_path)
    text = paths.markdown.read_text()
    assert "&lt;script>alert(1)&lt;/script> & &lt;b>bold&lt;/b>, p < 0.05, `<kept>`?" in text
    assert "<script" not in text
    metrics = paths.metrics.read_text()
    assert "\n'=1+1," in metrics and ",'=cmd|x,1" in metrics and ",'-ok,-0.5" in metrics  # texts only, no number
    assert "'=1+1" in paths.summary.read_text()
