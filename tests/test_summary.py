"""Groups, the final table and the generated sentences, on runs whose numbers can be worked out by hand."""

import math

import pytest
from run_folders import KL_BLOCKS, write_run

from klreg_verl.analysis import cards, summary
from klreg_verl.analysis.runs import load


def rows(accuracy, kl=0.0):
    """One row a value of ``accuracy``, all with the same KL."""
    return [{"step": step, "train/accuracy": each, "kl_ref/k1_response": kl} for step, each in enumerate(accuracy, 1)]


def groups_of(folder, arms=()):
    return summary.group_runs(load(folder), arms)


def test_groups_follow_the_recipes_order_and_colours_stay_with_labels(tmp_path):
    for arm, task in (("none", "a"), ("forward", "a"), ("forward", "b")):
        write_run(tmp_path, arm, rows([0.5]), task=task)
    groups = groups_of(tmp_path, ["forward", "none"])
    assert [(group.task, group.label, group.index) for group in groups] == [
        ("a", "forward", 0),
        ("a", "none", 1),
        ("b", "forward", 0),
    ]


@pytest.mark.parametrize(
    ("kl", "words"),
    [
        ({}, "not recorded"),
        ({"placement": "none"}, "no KL term"),
        (KL_BLOCKS["reverse"], "reverse KL: k1 in the reward, beta 0.1"),
        ({**KL_BLOCKS["forward"], "beta": 1e-3}, "forward KL: k3 in the loss, beta 0.001"),
        ({"placement": "loss", "estimator": "k1", "follows": "none"}, "no divergence: k1 in the loss"),
    ],
)
def test_what_an_arm_follows_in_a_few_words(kl, words):
    assert summary.follows(kl) == words


def test_the_final_value_of_one_run_has_its_error_over_steps(tmp_path):
    # last ten of twelve: five times 0.4 and 0.6: mean 0.5, sd sqrt(10 * 0.01 / 9), error that / sqrt(10) = 1/30
    write_run(tmp_path, "none", rows([9.0, 9.0] + [0.4, 0.6] * 5))
    (group,) = groups_of(tmp_path)
    found = summary.final_value(group, "train/accuracy")
    assert found.mean == pytest.approx(0.5) and found.standard_error == pytest.approx(1 / 30)
    assert summary.error_over(group) == "10 steps" and summary.steps_text(group) == "12 of 12"


def test_the_final_value_of_several_runs_has_its_error_over_seeds(tmp_path):
    # run means 0.4 and 0.6: mean 0.5, sd sqrt(0.02), error sqrt(0.02) / sqrt(2) = 0.1
    write_run(tmp_path, "none", rows([0.4] * 10), seed=1)
    write_run(tmp_path, "none", rows([0.6] * 10), seed=2)
    (group,) = groups_of(tmp_path)
    found = summary.final_value(group, "train/accuracy")
    assert found.mean == pytest.approx(0.5) and found.standard_error == pytest.approx(0.1)
    assert summary.error_over(group) == "2 seeds"


def test_an_unfinished_run_does_not_enter_the_final_value_of_a_finished_arm(tmp_path):
    write_run(tmp_path, "none", rows([0.5] * 10), seed=1)
    write_run(tmp_path, "none", rows([0.1] * 3), seed=2, steps=10, status="failed")
    (group,) = groups_of(tmp_path)
    assert summary.final_value(group, "train/accuracy").mean == 0.5
    assert not group.is_interim


def test_an_arm_without_a_finished_run_is_interim(tmp_path):
    write_run(tmp_path, "none", rows([0.1] * 3), steps=10, status="running")
    (group,) = groups_of(tmp_path)
    assert group.is_interim
    assert summary.final_value(group, "train/accuracy").mean == pytest.approx(0.1)
    assert summary.steps_text(group) == "3 of 10"


def test_a_contrast_is_paired_over_the_shared_seeds(tmp_path):
    # seeds 1 and 2: differences 0.1 and 0.3: mean 0.2, error 0.1; seed 3 has no partner and is in neither mean
    for seed, accuracy in ((1, 0.5), (2, 0.2), (3, 0.9)):
        write_run(tmp_path, "none", rows([accuracy] * 4), seed=seed)
    for seed, accuracy in ((1, 0.6), (2, 0.5)):
        write_run(tmp_path, "reverse", rows([accuracy] * 4), seed=seed)
    none, reverse = groups_of(tmp_path)
    found = summary.contrast(reverse, none, "train/accuracy")
    assert found.num_pairs == 2
    assert (found.group, found.baseline) == (pytest.approx(0.55), pytest.approx(0.35))
    assert found.difference.mean == pytest.approx(0.2) and found.difference.standard_error == pytest.approx(0.1)


def test_sentences_say_how_accuracy_moved_and_where_arms_ended(tmp_path):
    # none: 0.5 +- 0.1 alternating, then 0.9 +- 0.1: difference 0.4, error sqrt(2) / 30 = 0.047
    write_run(tmp_path, "none", rows([0.4, 0.6] * 5 + [0.8, 1.0] * 5, kl=2.0))
    write_run(tmp_path, "reverse", rows([0.4, 0.6] * 10, kl=0.5))
    assert summary.sentences(groups_of(tmp_path)) == [
        "none: accuracy rose from 0.500 to 0.900; first 10 against last 10 steps (difference +0.400 ± 0.047).",
        "reverse: accuracy went from 0.500 to 0.500, zero inside the 95 % t interval; first 10 against last 10 steps "
        "(difference +0.000 ± 0.047).",
        "reverse against none: accuracy ended at 0.500 against 0.900 (difference −0.400 ± 0.047 over steps).",
        "reverse against none: KL to the reference (k1, nats per response) ended at 0.500 against 2.000 "
        "(difference −1.500 ± 0.000 over steps).",
    ]


def test_a_fall_is_called_a_fall(tmp_path):
    write_run(tmp_path, "none", rows([0.8, 1.0] * 5 + [0.4, 0.6] * 5))
    assert "accuracy fell from 0.900 to 0.500" in summary.sentences(groups_of(tmp_path))[0]


def test_two_standard_errors_between_arms_are_spoken_of_from_five_seeds_on(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path, "none", rows([0.5] * 4), seed=seed)
        write_run(tmp_path, "reverse", rows([0.6 + 0.01 * seed] * 4), seed=seed)
    told = summary.sentences(groups_of(tmp_path))
    # differences 0.11 ... 0.15: mean 0.13, sd sqrt(0.001 / 4), error sqrt(0.00005) = 0.0071
    assert told[2].endswith("(difference +0.1300 ± 0.0071 over 5 paired seeds, zero outside the 95 % t interval).")


def test_the_scope_depends_on_the_number_of_seeds(tmp_path):
    assert summary.scope([]).startswith("No run has a training step yet")
    for seed in range(1, 6):
        write_run(tmp_path, "none", rows([0.5] * 4), seed=seed)
        words = summary.scope(groups_of(tmp_path))
        assert ("machinery, not evidence" in words) == (seed == 1)
        assert ("Fewer than five seeds" in words) == (1 < seed < 5)


def test_a_running_arm_is_no_evidence_and_its_comparisons_say_so(tmp_path):
    for seed in (1, 2, 3, 4, 5):
        write_run(tmp_path, "none", rows([0.5] * 4, kl=1.0), seed=seed)
        write_run(tmp_path, "reverse", rows([0.6] * 2, kl=1.0), seed=seed, steps=4, status="interrupted")
    groups = groups_of(tmp_path)
    assert summary.scope(groups).startswith("No finished run of reverse: the values there are interim")
    told = [text for text in summary.sentences(groups) if "against none" in text]
    assert told and all("Interim: no finished run of reverse (2 of 4 steps)." in text for text in told)
    assert not any("Interim" in text for text in summary.sentences([groups[0]]))


def test_seeds_that_do_not_match_are_not_called_steps(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "none", rows([0.5] * 4), seed=seed)
        write_run(tmp_path, "reverse", rows([0.6] * 4), seed=seed + 2)
    told = summary.sentences(groups_of(tmp_path))[2]
    assert "not paired: over 2 seeds and 2 seeds)" in told and "over steps" not in told


def test_the_summary_table_has_nan_for_what_was_not_recorded(tmp_path):
    write_run(tmp_path, "none", rows([0.5] * 4, kl=1.0))
    (row,) = summary.summary_table(groups_of(tmp_path)).to_dict("records")
    assert (row["arm"], row["follows"], row["seeds"], row["steps"]) == ("none", "no KL term", 1, "4 of 4")
    assert row["accuracy"] == 0.5 and row["kl_k1_response"] == 1.0
    assert math.isnan(row["coverage"])


def test_evaluations_keep_the_first_and_the_last_step(tmp_path):
    write_run(tmp_path, "none", [{"step": step, "eval/palindrome/accuracy": step / 100} for step in range(0, 101)])
    found = summary.evaluations(groups_of(tmp_path), num_steps=3)["eval/palindrome/accuracy"]
    assert found.steps == (0, 50, 100)
    assert [value.mean for value in found.values[0]] == [0.0, 0.5, 1.0]


def test_checks_find_arms_that_do_not_start_alike(tmp_path):
    write_run(tmp_path, "none", [{"step": 1, "train/accuracy": 0.50, "kl_ref/k1_response": 0.0}])
    write_run(tmp_path, "reverse", [{"step": 1, "train/accuracy": 0.53, "kl_ref/k1_response": -0.02}])
    found = {what: value for what, value, _ in summary.checks(groups_of(tmp_path))}
    assert found["Accuracy at step 1 across arms of one seed"] == "largest difference 0.0300"
    assert found["Largest |KL to the reference, k1| at step 1"] == "0.02 nats per response"
    assert len(found) == 2


def test_facts_are_flat_and_long_texts_are_counted():
    card = {"gradient": "words", "git": {"commit": "abc", "diff": "x" * 1234}}
    assert cards.facts(card) == {"git.commit": "abc", "git.diff": "x" * 1234}
    shown = cards.short(cards.facts(card)["git.diff"])
    assert shown.startswith("(1,234 characters, sha256 ") and shown.endswith(", in provenance.json)")


def test_facts_that_differ_between_runs_are_found(tmp_path):
    write_run(tmp_path, "none", [], seed=1, provenance={"a": 1, "b": 2})
    write_run(tmp_path, "none", [], seed=2, provenance={"a": 1, "b": 3, "c": 4})
    assert cards.differing_facts(load(tmp_path)) == {"b": ["2", "3"], "c": ["–", "4"]}


def test_unfinished_runs_are_listed_failed_first(tmp_path):
    for seed, status in enumerate(("pending", "failed", "done", "interrupted"), 1):
        write_run(tmp_path, "none", rows([0.5]), seed=seed, status=status)
    assert [run.status for run in summary.unfinished(load(tmp_path))] == ["failed", "interrupted", "pending"]
