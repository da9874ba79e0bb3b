"""Trying a user's reward function: what verl would lose or choke on is told before a run."""

import sys
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.functions import OURS, load
from data_prep.schema import SCHEMA, make_row
from data_prep.trial import TRIED, try_reward


def table(*answers: str, data_source: str = "deepscaler") -> pa.Table:
    rows = [
        make_row(
            data_source=data_source, prompt="x", ability="a", ground_truth=answer, split="train", index=0, meta={"a": 1}
        )
        for answer in answers
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_a_number_and_a_dictionary_are_both_fine():
    def number(data_source, solution_str, ground_truth, extra_info=None):
        return float(solution_str == ground_truth)

    def several(data_source, solution_str, ground_truth, extra_info=None):
        return {"score": float(ground_truth in solution_str), "acc": True, "pred": solution_str}

    assert (try_reward(number, table("4", "5")).keys, try_reward(number, table("4", "5")).right) == (("score",), 2)
    assert try_reward(several, table("4")).keys == ("acc", "pred", "score")


def test_an_async_function_is_awaited():
    async def later(data_source, solution_str, ground_truth, extra_info=None):
        return float(solution_str == ground_truth)

    assert try_reward(later, table("4")).right == 1


def test_our_own_reward_knows_the_answers_of_each_task():
    ours = load(OURS)
    assert try_reward(ours, table("4", "x+1", '["a", "b"]')).right == 3
    assert try_reward(ours, table("abba", data_source="palindrome")).right == 1
    assert try_reward(ours, table("nus", data_source="skill/spell_backward")).right == 1
    keys = ("acc", "echoed", "format_ok", "pred", "score", "timeout", "truncated")
    assert try_reward(ours, table("4")).keys == keys


def test_rows_are_spread_over_the_file_and_extra_info_is_a_copy_for_each_call():
    seen = []

    def note(data_source, solution_str, ground_truth, extra_info=None):
        seen.append(ground_truth)
        extra_info["index"] = "spoiled"
        return 0.0

    tried = try_reward(note, table(*map(str, range(1000))))
    assert (tried.rows, tried.right, len(set(seen))) == (TRIED, 0, TRIED)
    assert {"0", "999"} <= set(seen)


def raising(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str)


def changing(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 1.0, "extra": 0.0} if solution_str else {"score": 0.0}


def no_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": 1.0}


def not_finite(data_source, solution_str, ground_truth, extra_info=None):
    return float("nan")


def listing(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.0, "parts": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (raising, r"raising raises ValueError: could not convert string to float.* verl then loses the response"),
        (changing, r"changing returns different keys from call to call: \('extra', 'score'\) and \('score',\)"),
        (no_score, "no_score returns score None, which cannot be trained on"),
        (not_finite, "not_finite returns score nan"),
        (listing, r"listing returns parts=\[1.0, 2.0\]: verl averages every key"),
        (lambda solution: 0.0, r"lambda>\(solution\) does not take verl's call\. .*extra_info=None, \*\*options"),
    ],
)
def test_what_verl_would_lose_or_choke_on_is_refused(function, text):
    with pytest.raises(ValueError, match=text):
        try_reward(function, table("4"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here' .* looked for in: .*, installed packages"),
        ("data_prep.rewards:skore", "'data_prep.rewards' has no function 'skore'"),
        ("data_prep.rewards", "has no function ''"),
        ("", "cannot import ''"),
    ],
)
def test_a_function_that_is_not_there_is_told(name, text):
    with pytest.raises(ValueError, match=text):
        load(name, Path.cwd())


def test_a_function_beside_the_user_is_found_and_what_it_imports_when_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "beside_the_user.py").write_text(
        "def score(**given):\n    import beside_that\n    return beside_that.ONE\n"
    )
    (tmp_path / "beside_that.py").write_text("ONE = 1.0\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert try_reward(load("beside_the_user:score", Path.cwd()), table("4")).keys == ("score",)
    assert sys.path == path
