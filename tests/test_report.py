"""The report of a study: everything that must be in it is in it, and broken folders do not stop it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from run_folders import RECIPE, card, synthetic_rows, write_run, write_study

from klreg_verl.analysis import report
from klreg_verl.analysis.runs import load
from klreg_verl.experiment import claims as claiming
from klreg_verl.experiment.claims import ClaimSpec
from klreg_verl.experiment.store import RunFolder

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def outline(text):
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def written(study):
    return report.write_report(study, RECIPE)


@pytest.fixture(scope="module")
def html(written):
    return written.html.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_refers_to_nothing_outside(html):
    parsed = outline(html)
    assert "http" not in html.lower()
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    references = [value for name, value in parsed.attributes if name in ("href", "src", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)
    assert all(
        not target.strip("'\"").startswith(("/", "http", "data")) for target in re.findall(r"url\(([^)]*)\)", html)
    )


def test_links_inside_the_page_have_their_targets_and_ids_are_unique(html):
    attributes = outline(html).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in attributes if name in ("href", "xlink:href")} <= set(ids)


def test_the_page_has_every_section_and_figure(html):
    assert f"<h1>{RECIPE['question']}</h1>" in html
    shown = "findings scope summary courses frontier diversity optimum gradient evaluation samples checks cards"
    assert [f'<section id="{anchor}">' for anchor in shown.split()] == re.findall(r'<section id="\w+">', html)
    for anchor in shown.split():
        assert f'<section id="{anchor}">' in html
    assert html.count("<svg ") == 11  # seven time courses, two of the mismatch, accuracy against KL, the optimum
    assert "3 arms · 1 task · 1 seed · 3 of 3 runs done" in html
    assert "machinery, not evidence" in html


def test_the_page_states_gradients_cards_and_samples(html):
    assert (
        "k3 in the loss: per token the gradient of KL(reference || policy), on the policy&#x27;s own prefixes." in html
    )
    assert "0123456789abcdef0123456789abcdef01234567" in html
    assert "(500 characters, sha256 " in html
    assert "palindrome, step 1" in html and "palindrome, step 40" in html
    assert "24 possible valid answers" in html


def test_the_page_has_light_dark_and_print(html):
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_all_files_are_written(written, study):
    assert [path.name for path in (written.html, written.markdown, written.summary, written.metrics)] == [
        "report.html",
        "report.md",
        "summary.csv",
        "metrics_long.csv",
    ]
    assert [path.relative_to(study / "figures").as_posix() for path in written.figures] == [
        "overview.png",
        *(f"{name}.png" for name in ("accuracy", "entropy", "kl_k1", "kl_k3", "coverage", "unique_valid", "length")),
        *(f"{name}.png" for name in ("mismatch_k1", "mismatch_max", "kl_accuracy", "optimum")),
    ]
    assert all(path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-" for path in written.figures)
    assert sorted(path.name for path in (study / "tables").iterdir()) == ["diversity.tex", "final.tex", "optimum.tex"]
    assert all(path.stat().st_size > 5_000 for path in written.figures)


def test_tables_hold_the_numbers_of_the_runs(written, study):
    table = pd.read_csv(written.summary).set_index("arm")
    (none, *_) = load(study)
    assert table.loc["none", "accuracy"] == pytest.approx(none.metrics["train/accuracy"].iloc[-10:].mean())
    long = pd.read_csv(written.metrics)
    step3 = long[(long.arm == "none") & (long.step == 3) & (long.key == "entropy/token")]
    assert step3["value"].tolist() == pytest.approx([none.metrics.loc[3, "entropy/token"]])
    assert long.groupby("arm").size().nunique() == 1


def test_the_markdown_has_table_sentences_figures_and_card(written):
    text = written.markdown.read_text(encoding="utf-8")
    assert text.startswith(f"# {RECIPE['question']}\n")
    assert "| reverse | reverse KL: k1 in the reward, beta 0.1 | 0." in text
    assert re.search(
        r"^- none: accuracy rose from 0\.\d+ to 0\.\d+; first 10 against last 10 steps", text, re.MULTILINE
    )
    assert "![Accuracy, KL to the reference, entropy and coverage](figures/overview.png)" in text
    assert "| versions.verl | `0.9.1` |" in text


def test_the_same_runs_give_the_same_bytes(written, study):
    before = {path: path.read_bytes() for path in (written.html, written.markdown, written.summary, *written.figures)}
    report.write_report(study, RECIPE)
    assert {path: path.read_bytes() for path in before} == before


def test_values_worked_out_by_hand_are_in_the_report(tmp_path):
    # last ten steps: five times 0.4 and 0.6: mean 0.5, error 1/30 = 0.033; KL 0.25 in every step: error 0
    rows = [{"step": s, "train/accuracy": 0.4 + 0.2 * (s % 2), "kl_ref/k1_response": 0.25} for s in range(1, 21)]
    write_run(tmp_path, "none", rows)
    written = report.write_report(tmp_path)
    assert "| none | no KL term | 0.500 ± 0.033 | 0.250 ± 0.000 | 20 of 20 | 10 steps |" in written.markdown.read_text()
    assert '<td class="number">0.500<small>± 0.033</small></td>' in written.html.read_text()
    assert written.lines == (
        "arm   gradient follows  Accuracy       KL (k1)        steps     ± over",
        "none  no KL term        0.500 ± 0.033  0.250 ± 0.000  20 of 20  10 steps",
        "Means of the last ten steps.",
    )


def write_graded_run(study: Path, arm: str) -> None:
    """Zeros alone at first, which read as accuracies; then scores, once a response had 1.75."""
    first = {"step": 1, "train/accuracy": 0.0, "train/score": 0.0, "eval/own/accuracy": 0.0, "eval/own/score": 0.0}
    later = [{"step": step, "train/score": -0.25, "eval/own/score": 0.114} for step in range(2, 21)]
    kl = {"kl_ref/k1_response": 0.25}
    responses = pa.table({"group": ["0"], "prompt": ["x"], "response": ["y"], "answer": ["y"], "score": [1.75]})
    stored = responses.append_column("valid", pa.nulls(1, pa.bool_()))
    run = write_run(study, arm, [row | kl for row in (first, *later)], samples={1: stored, 20: stored})
    (run / "headline.json").write_text('{"headline": "score"}')


def test_a_reward_that_grades_is_told_by_its_mean_score_everywhere_and_has_no_predicted_optimum(tmp_path):
    for arm in ("none", "reverse"):
        write_graded_run(tmp_path / "study", arm)
    written = report.write_report(tmp_path / "study")
    assert written.lines[0].split()[3:5] == ["Score", "KL"] and "0.250" in written.lines[1]
    text = written.markdown.read_text() + written.html.read_text()
    assert "mean score went from" in text or "mean score fell from" in text
    assert {row.known.why for row in report.read_study(tmp_path / "study", {}).optima} == {
        "its reward grades, and the prediction is for right and wrong"
    }
    assert not re.search(r"(?<!no optimum is known)\baccuracy (rose|fell|went|ended)|Accuracy, first", text)
    assert "eval/own/score" in text and "eval/own/accuracy" not in text


def test_failed_running_missing_and_broken_runs_are_named(tmp_path):
    write_run(tmp_path, "none", synthetic_rows("none", 1, 12))
    write_run(
        tmp_path, "reverse", synthetic_rows("reverse", 1, 12)[:6], steps=12, status="failed", reason="out <of> memory"
    )
    write_run(tmp_path, "forward", [], steps=12, status="running")
    (tmp_path / "forward" / "palindrome" / "seed2").mkdir()
    planned = ["none/palindrome/seed1", "none/palindrome/seed2"]
    with RunFolder(tmp_path / "forward" / "palindrome" / "seed1").lock():
        written = report.write_report(tmp_path, {"planned": planned})
    html, text = written.html.read_text(), written.markdown.read_text()
    outline(html)
    assert "1 of 5 runs done" in html
    assert "reverse/palindrome/seed1" in html and "out &lt;of&gt; memory" in html
    assert "5 of 12" in html and "not started" in html
    assert "- `reverse/palindrome/seed1`: failed at step 5: out &lt;of> memory" in text
    assert "- `forward/palindrome/seed1`: running at step 0" in text
    assert "- `forward/palindrome/seed2`: pending at step 0: spec.json is missing" in text
    assert "- `none/palindrome/seed2`: not started" in text
    waiting = ["forward/palindrome/seed1 (running)", "forward/palindrome/seed2 (pending)"]
    assert written.lines[-1] == f"Not done: {', '.join([*waiting, 'reverse/palindrome/seed1 (failed)'])}"


def test_a_run_without_metrics_and_a_folder_without_runs_make_a_report(tmp_path):
    (tmp_path / "empty").mkdir()
    written = report.write_report(tmp_path / "empty", {"question": "Is anything here?"})
    assert "<h1>Is anything here?</h1>" in written.html.read_text()
    assert "nothing to read from this report" in written.html.read_text()
    assert written.figures == ()
    write_run(tmp_path / "bare", "none", [])
    outline(report.write_report(tmp_path / "bare").html.read_text())
    assert report.write_report(tmp_path / "empty").lines == ("No runs.",)


def test_metrics_that_nobody_recorded_are_named(tmp_path):
    write_run(tmp_path, "none", [{"step": s, "train/accuracy": 0.5} for s in (1, 2)])
    html = report.write_report(tmp_path).html.read_text()
    assert "Not recorded by any run: Entropy, KL to the reference, k1," in html


def test_texts_from_the_runs_are_escaped(tmp_path):
    provenance = {"gradient": "<script>alert(1)</script>", "host": "<b>"}
    write_run(tmp_path, "none", [{"step": 1, "train/accuracy": 0.5}], provenance=provenance)
    html = report.write_report(tmp_path, {"question": "a < b & c?"}).html.read_text()
    assert "<script>" not in html and "<b>" not in html
    assert "<h1>a &lt; b &amp; c?</h1>" in html


def test_what_a_person_wrote_between_the_findings_marks_is_kept(tmp_path):
    write_run(tmp_path, "none", [{"step": 1, "train/accuracy": 0.5}])
    path = report.write_report(tmp_path).markdown
    path.write_text(path.read_text().replace(report.FINDINGS[1], "Nothing happened.\n" + report.FINDINGS[1]))
    again = report.write_report(tmp_path).markdown.read_text()
    assert f"{report.FINDINGS[0]}\nNothing happened.\n{report.FINDINGS[1]}" in again
    assert report.write_report(tmp_path).markdown.read_text() == again


def test_several_tasks_have_their_own_figures(tmp_path):
    for task in ("palindrome", "mine"):
        write_run(tmp_path, "none", synthetic_rows("none", 1, 12), task=task)
    written = report.write_report(tmp_path)
    html = written.html.read_text()
    outline(html)
    assert {path.parent.name for path in written.figures} == {"palindrome", "mine"}
    assert "mine: none: accuracy " in html and "<h3>mine</h3>" in html


def test_the_terminal_summary_never_exceeds_fifteen_lines(tmp_path):
    for index in range(20):
        write_run(tmp_path, f"arm{index:02d}", [{"step": 1, "train/accuracy": 0.5}], status="failed")
    lines = report.write_report(tmp_path).lines
    assert len(lines) <= 15
    assert "... and 10 more in summary.csv" in lines
    assert lines[-1].endswith("arm03/palindrome/seed1 (failed) and 16 more")


def test_arms_are_shown_in_the_recipes_order(study):
    read = report.read_study(study, {"arms": {"reverse": {}, "none": {}}})
    assert [group.label for group in read.groups] == ["reverse", "none", "forward"]
    assert read.name == "synthetic"


def test_a_report_of_the_runs_alone_keeps_the_recipes_order_by_the_longest_list_that_a_run_was_told(tmp_path):
    told = {"forward": ["forward", "reverse"], "none": ["none", "forward", "reverse"], "reverse": []}
    for arm, arms in told.items():
        run = write_run(tmp_path / "study", arm, rows=[{"step": 1, "train/accuracy": 0.5}])
        spec = json.loads((run / "spec.json").read_text())
        (run / "spec.json").write_text(json.dumps(spec | {"arms": arms}))
    read = report.read_study(tmp_path / "study", {})
    assert [group.label for group in read.groups] == ["none", "forward", "reverse"]


def test_alarms_are_in_the_page_and_in_the_markdown(tmp_path):
    rows = [{"step": step, "train/accuracy": 0.5} for step in range(1, 8)]
    for step in (3, 4, 5, 7):
        rows[step - 1]["alarm/entropy_floor"] = 1.0
    write_run(tmp_path / "study", "arm", rows=rows)
    paths = report.write_report(tmp_path / "study")
    assert "<td>entropy_floor</td><td>4 steps: 3 to 5, 7</td>" in paths.html.read_text()
    assert "| entropy_floor | 4 steps: 3 to 5, 7 |" in paths.markdown.read_text()


# ---------------------------------------------------------------------------------------------------- claims

KEPT = ClaimSpec(metric="diversity/coverage", contrast=("reverse", "none"), margin=0.02, task="palindrome")


def write_claimed(folder: Path) -> Path:
    """Three seeds of two arms, whose cards hold one claim; reverse keeps 0.1 more coverage."""
    entry = {"claims": claiming.card({"kept": KEPT}, None, "monday")}
    for arm, value in (("none", 0.5), ("reverse", 0.6)):
        for seed in (1, 2, 3):
            rows = [{"step": step, "diversity/coverage": value + 0.001 * seed * (arm == "none")} for step in (1, 2)]
            write_run(folder, arm, rows, seed=seed, provenance=card(arm, seed) | entry)
    return folder


def test_claims_are_in_the_page_the_markdown_the_table_and_the_terminal(tmp_path):
    paths = report.write_report(write_claimed(tmp_path), {"claims": {"kept": KEPT}})
    sentence = "kept: diversity/coverage of reverse minus none differs from zero: +0.0980"
    assert sentence in paths.markdown.read_text() and sentence in paths.html.read_text()
    assert "Holm's correction of the p-values inside this list" in paths.markdown.read_text()
    assert (tmp_path / "claims.csv").read_text().splitlines()[1].startswith("kept,diversity/coverage,palindrome,")
    assert paths.lines[-1].startswith("kept  differs: diversity/coverage of reverse minus none +0.09")


def test_a_claim_that_only_the_recipe_has_is_shown_as_exploratory(tmp_path):
    write_study(tmp_path, seeds=(1, 2))
    paths = report.write_report(tmp_path, {"claims": {"late": KEPT}})
    assert "late (exploratory, not registered before the runs):" in paths.markdown.read_text()


def test_without_claims_there_is_no_section_and_no_table(tmp_path):
    paths = report.write_report(write_study(tmp_path, seeds=(1, 2)))
    assert "Claims" not in paths.markdown.read_text() and not (tmp_path / "claims.csv").exists()


def test_many_claims_leave_the_terminal_summary_at_15_lines(tmp_path):
    many = {f"c{number}": KEPT for number in range(12)}
    entry = {"claims": claiming.card(many, None, "monday")}
    for arm in [*(f"arm{number}" for number in range(12)), "none", "reverse"]:
        write_run(tmp_path, arm, [{"step": 1, "diversity/coverage": 0.5}], provenance=card(arm, 1) | entry)
    lines = report.write_report(tmp_path).lines
    assert len(lines) == 15 and lines[-1] == "..." and any(line.startswith("c0") for line in lines)


# ---------------------------------------------------------------------------------------------------- findings first


def test_findings_come_first_and_each_links_to_its_evidence(html):
    body = html[html.index('<section id="findings">') : html.index('<section id="scope">')]
    assert "No claim was written before these runs: everything here is exploratory." in body
    assert "Accuracy, first steps → last steps: none 0." in body
    assert re.search(
        r"reverse against none \(not paired by seed: no evidence of an order, exploratory\): accuracy ", body
    )
    assert "Distinct right answers in 8 draws / in 2 right draws: starting model " in body
    assert body.count('class="evidence"') == body.count("<li ")
    assert html.index('id="findings"') < html.index('id="scope"') < html.index('id="summary"')


def test_with_five_seeds_a_finding_says_what_is_beyond_two_standard_errors(tmp_path):
    # differences reverse minus none by seed: accuracy 0.10, 0.11, ... 0.14: mean 0.12, error 0.0158 / sqrt(5) = 0.0071
    for arm, value in (("none", 0.5), ("reverse", 0.6)):
        for seed in range(1, 6):
            rows = [{"step": step, "train/accuracy": value + 0.01 * (seed - 1) * (arm == "reverse")} for step in (1, 2)]
            write_run(tmp_path, arm, rows, seed=seed)
    text = report.write_report(tmp_path).markdown.read_text()
    assert (
        "- reverse against none (5 paired seeds, exploratory): accuracy +0.1200 ± 0.0071. "
        "Zero is outside the 95 % t interval of: accuracy.\n"
    ) in text


def test_findings_name_what_weakens_them(tmp_path):
    rows = synthetic_rows("none", 1, 12)
    rows[3]["alarm/entropy_floor"] = 1.0
    write_run(tmp_path, "none", rows)
    write_run(tmp_path, "reverse", synthetic_rows("reverse", 1, 12)[:6], steps=12, status="failed", reason="memory")
    text = report.write_report(tmp_path, {"planned": ["none/palindrome/seed9"]}).markdown.read_text()
    assert (
        "- 2 of 3 runs are not done, and nothing is put in their place: reverse/palindrome/seed1 (failed), "
        "none/palindrome/seed9 (not started).\n"
    ) in text
    assert "- Alarms in 1 run: entropy_floor.\n" in text


def test_latex_tables_are_booktabs_and_escape_what_latex_reads(tmp_path):
    write_run(tmp_path, "my_arm", [{"step": step, "train/accuracy": 0.4 + 0.2 * (step % 2)} for step in range(1, 21)])
    report.write_report(tmp_path)
    text = (tmp_path / "tables" / "final.tex").read_text()
    assert text.splitlines()[2:5] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"arm & Accuracy [share valid] & steps & $\pm$ over \\",
    ]
    assert r"my\_arm & 0.500 $\pm$ 0.033 & 20 of 20 & 10 steps \\" in text


def test_an_arm_without_a_finished_run_is_interim_in_every_table_and_finding(tmp_path):
    lines = [{"step": step, "train/accuracy": 0.5, "retention/spell": 0.9 - 0.1 * step} for step in range(3)]
    write_run(tmp_path, "none", lines)
    write_run(tmp_path, "reverse", lines, steps=4, status="failed")
    text = report.write_report(tmp_path).markdown.read_text()
    final, retention = ((tmp_path / "tables" / f"{name}.tex").read_text() for name in ("final", "retention"))
    assert "2 of 4 (interim)" in final and "reverse (interim) & spell" in retention
    assert "2 of 2 (interim)" not in final and "none (interim)" not in retention
    assert text.count("Interim: no finished run of reverse (2 of 4 steps).") == 2  # findings, and at the end


def test_a_claim_without_pairs_has_no_interval_of_nan(tmp_path):
    entry = {"claims": claiming.card({"kept": KEPT}, None, "monday")}
    write_run(tmp_path, "none", [{"step": 1, "diversity/coverage": 0.5}], provenance=card("none", 1) | entry)
    report.write_report(tmp_path)
    text = (tmp_path / "tables" / "claims.tex").read_text()
    assert "nan" not in text and "& -- & -- &" in text


def test_a_figure_that_the_runs_no_longer_give_is_taken_away(tmp_path):
    write_run(tmp_path, "none", [{"step": step, "train/accuracy": 0.5} for step in (1, 2)])
    stale = [tmp_path / "figures" / f"entropy.{kind}" for kind in ("png", "pdf")]
    kept = tmp_path / "figures" / "mine.png"
    kept.parent.mkdir()
    for path in (*stale, kept):
        path.write_text("old")
    report.write_report(tmp_path)
    assert (tmp_path / "figures" / "accuracy.pdf").exists() and kept.exists()
    assert not any(path.exists() for path in stale)


def test_a_table_that_has_no_rows_any_more_is_taken_away(tmp_path):
    write_study(tmp_path, arms=("none",), steps=4)
    report.write_report(tmp_path)
    assert (tmp_path / "diversity.csv").exists() and (tmp_path / "tables" / "diversity.tex").exists()
    for file in (tmp_path / "none" / "palindrome" / "seed1" / "samples").iterdir():
        file.unlink()
    report.write_report(tmp_path)
    assert not (tmp_path / "diversity.csv").exists() and not (tmp_path / "tables" / "diversity.tex").exists()


# ---------------------------------------------------------------------------------------------------- frontiers


def write_grid(folder: Path, arms: tuple[str, ...] = ("forward", "reverse"), seeds: int = 2) -> Path:
    """Every arm at three betas: KL 3, 2, 1 and accuracy 0.6, 0.5, 0.4 (forward 0.1 less); one step is enough."""
    for arm in arms:
        for index, beta in enumerate((0.01, 0.1, 1.0)):
            for seed in range(1, seeds + 1):
                value = 0.6 - 0.1 * index - 0.1 * (arm == "forward") + 0.01 * seed
                row = {"step": 1, "kl_ref/k1_response": 3.0 - index, "train/accuracy": value}
                kl = {"placement": "loss", "estimator": "k2", "follows": "reverse", "beta": beta}
                write_run(folder, arm, [row], seed=seed, grid=(f"kl.beta={beta:g}",), kl=kl)
    return folder


def test_a_grid_over_beta_gives_frontiers_with_bands(tmp_path):
    paths = report.write_report(write_grid(tmp_path))
    assert "frontier_accuracy" in {path.stem for path in paths.figures}
    assert "Accuracy at the same KL" in paths.html.read_text()
    assert "the band its pointwise 95 % t interval" in paths.html.read_text()


def test_one_beta_an_arm_is_no_frontier(html):
    assert "at the same KL</text>" not in html and "95 % t interval" not in html


# ---------------------------------------------------------------------------------------------------- broken folders


def test_torn_samples_and_metrics_are_named_and_the_rest_is_shown(tmp_path):
    write_study(tmp_path, arms=("none", "reverse"), steps=12)
    folder = tmp_path / "none" / "palindrome" / "seed1"
    (folder / "samples" / "step_000012.parquet").write_bytes(b"PAR1 torn")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train/acc')
    text = report.write_report(tmp_path).markdown.read_text()
    assert "samples/step_000012.parquet is torn; it is left out" in text
    assert "metrics.jsonl: the last line is torn; it is left out" in text
    assert "- Something is wrong with the files of none/palindrome/seed1.\n" in text
