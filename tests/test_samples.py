"""Which stored responses are put side by side, and how they are counted."""

import pyarrow as pa
from run_folders import write_run

from klreg_verl.analysis.runs import load
from klreg_verl.analysis.samples import Response, side_by_side
from klreg_verl.analysis.summary import group_runs


def table(*rows):
    """Rows of (prompt, response, valid, num_valid)."""
    names = ("prompt", "response", "valid", "num_valid")
    others = {"group": "0", "answer": None}
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) | others for row in rows])


def shown(folder, **settings):
    return side_by_side(group_runs(load(folder)), **settings)


def test_equal_responses_are_counted_and_frequent_ones_come_first(tmp_path):
    rows = [("p", "aba", True, "1"), ("p", "aab", False, "1"), ("p", "aba", True, "1")]
    write_run(tmp_path, "none", [], samples={1: table(*rows)})
    (only,) = shown(tmp_path)
    assert only.responses == (
        ("none", (Response(text="aba", valid=True, count=2), Response(text="aab", valid=False, count=1))),
    )


def test_the_first_and_the_last_step_that_all_arms_stored_are_shown(tmp_path):
    write_run(tmp_path, "none", [], samples={step: table(("p", "a", True, "1")) for step in (1, 2, 5, 9)})
    write_run(tmp_path, "reverse", [], samples={step: table(("p", "b", True, "1")) for step in (2, 3, 5)})
    assert [each.step for each in shown(tmp_path)] == [2, 5]


def test_prompts_are_common_to_all_arms_and_those_with_most_answers_come_first(tmp_path):
    write_run(
        tmp_path, "none", [], samples={1: table(*((p, "x", True, n) for p, n in (("p", "2"), ("q", "24"), ("r", "6"))))}
    )
    write_run(tmp_path, "reverse", [], samples={1: table(("r", "y", True, "6"), ("p", "y", False, "2"))})
    assert [(each.prompt, each.num_valid) for each in shown(tmp_path)] == [("r", "6"), ("p", "2")]
    assert [each.prompt for each in shown(tmp_path, num_prompts=1)] == ["r"]


def test_the_same_seed_is_compared_and_an_arm_without_samples_is_left_out(tmp_path):
    for arm, seeds in (("none", (1, 2)), ("reverse", (2, 3))):
        for seed in seeds:
            write_run(tmp_path, arm, [], seed=seed, samples={1: table(("p", f"{arm}{seed}", True, None))})
    write_run(tmp_path, "forward", [])
    (only,) = shown(tmp_path)
    assert [(label, each[0].text) for label, each in only.responses] == [("none", "none2"), ("reverse", "reverse2")]
    assert only.num_valid == ""


def test_without_samples_nothing_is_shown(tmp_path):
    write_run(tmp_path, "none", [])
    assert shown(tmp_path) == []
