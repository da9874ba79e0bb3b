"""What an evaluation keeps, how it grades, what its numbers say; the real vLLM is in tests/e2e/test_eval.py."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from verl_stack import spec

from data_prep.schema import SCHEMA, write_parquet
from klreg_verl.evaluation import evaluate, printing, store, summary, tasks
from klreg_verl.evaluation.store import Store
from klreg_verl.evaluation.subjects import Subject
from klreg_verl.experiment.settings import RetentionSpec, SkillSpec
from klreg_verl.experiment.store import RunFolder

# ------------------------------------------------------------------------------------------------------- store


def sample(prompt: int, number: int, response: str = "x", tokens: int = 1, truncated: bool = False) -> dict[str, Any]:
    seed = store.request_seed(1, prompt, number)
    given = {"prompt": prompt, "sample": number, "seed": seed}
    return {**given, "response": response, "tokens": tokens, "truncated": truncated}


def test_what_is_on_the_disk_is_not_missing(tmp_path: Path):
    store.write_part(tmp_path, [sample(1, 0), sample(0, 1)])
    store.write_part(tmp_path, [sample(0, 0)])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["part_000001.parquet", "part_000002.parquet"]
    present = store.read_parts(tmp_path)
    assert [(row["prompt"], row["sample"]) for row in present] == [(0, 0), (0, 1), (1, 0)]
    assert store.missing(present, prompts=2, samples=3) == [(0, 2), (1, 1), (1, 2)]


def test_every_sample_has_a_seed_of_its_own_for_ever():
    seeds = {store.request_seed(1, prompt, number) for prompt in range(100) for number in range(16)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert store.request_seed(1, 3, 2) == 1779199877


def test_a_finished_evaluation_is_one_file_with_its_settings(tmp_path: Path):
    place = Store(folder=tmp_path, stem="step20-palindrome-abc")
    with place.lock():
        store.write_part(place.parts, [sample(0, 0, "\u4f60\n")])
        place.finish(store.read_parts(place.parts), {"seed": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step20-palindrome-abc.parquet"]
    assert place.read() == ([sample(0, 0, "\u4f60\n")], {"seed": 3})


def test_two_processes_cannot_make_one_evaluation(tmp_path: Path):
    place = Store(folder=tmp_path, stem="step1-t-a")
    with place.lock(), pytest.raises(ValueError, match="is being made by another process"), place.lock():
        pass
    with place.lock():  # and it is free again
        pass


def test_a_broken_part_is_named(tmp_path: Path):
    (tmp_path / "part_000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="part_000001.parquet cannot be read: .* it is sampled again"):
        store.read_parts(tmp_path)


def test_names_of_evaluations_are_those_of_the_run_folder():
    settings = {"model": "m", "seed": 1}
    name = store.stem(20, "skill/spell backward", settings)
    assert name == f"step20-skill-spell-backward-{store.content_hash(settings)}"
    assert store.content_hash(settings) != store.content_hash(settings | {"seed": 2})


# ------------------------------------------------------------------------------------------------------- grading

ASKED = {"data_source": "palindrome", "text": "a a b", "ground_truth": "aba", "extra_info": {"num_valid": "1"}}


def test_a_palindrome_is_graded_by_the_projects_reward():
    task = tasks.Task(name="palindrome", file=Path("x"))
    reward = tasks.reward_function(task)
    right, wrong = (tasks.graded(sample(0, 0, text), ASKED, reward) for text in ("aba", "aab"))
    assert (right["score"], right["valid"], right["answer"], right["num_valid"]) == (1.0, True, "aba", "1")
    assert (wrong["score"], wrong["valid"], wrong["error"]) == (0.0, False, "")
    assert list(store.SAMPLE_COLUMNS) == list(right)[: len(store.SAMPLE_COLUMNS)]


@pytest.fixture
def own_reward(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType("rewards_of_test_evaluation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def grade_with(module: types.ModuleType, function: Any, response: str) -> dict[str, Any]:
    module.score = function  # type: ignore[attr-defined]
    task = tasks.Task(name="t", file=Path("x"), reward=f"{module.__name__}:score")
    return tasks.graded(sample(0, 0, response), ASKED, tasks.reward_function(task))


def test_a_users_reward_may_return_a_number(own_reward: types.ModuleType):
    found = grade_with(own_reward, lambda solution_str, **_: len(solution_str) / 4, " ab ")
    assert (found["score"], found["valid"], found["answer"]) == (1.0, True, "ab")


def test_acc_decides_what_is_right_not_the_score(own_reward: types.ModuleType):
    found = grade_with(own_reward, lambda **_: {"score": 0.05, "acc": 0.0, "pred": 7}, "x")
    assert (found["score"], found["valid"], found["answer"]) == (0.05, False, "7")


def test_a_reward_that_raises_is_counted_not_a_silent_zero(own_reward: types.ModuleType):
    def broken(**_: Any) -> float:
        raise KeyError("nope")

    found = grade_with(own_reward, broken, "x")
    assert (found["score"], found["valid"], found["error"]) == (0.0, False, "KeyError: 'nope'")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_colon", "'no_colon' is not of the form pkg.module:function"),
        ("nix_nix:score", "cannot import 'nix_nix'"),
        ("math:nix", "'math' has no function 'nix'"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(reward: str, message: str):
    with pytest.raises(ValueError, match=message):
        tasks.reward_function(tasks.Task(name="t", file=Path("x"), reward=reward))


def test_a_reward_whose_source_changes_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib

    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "reward_whose_source_changes.py"
    path.write_text("def score(**_):\n    return 0.0\n")
    module = importlib.import_module(path.stem)
    before = evaluate.reward_hash(module.score)
    assert before == evaluate.reward_hash(module.score)
    path.write_text("def score(**_):\n    return 1.0\n")
    assert evaluate.reward_hash(module.score) != before


def test_tasks_are_named_by_file_folder_or_skill(tmp_path: Path):
    row = {
        "data_source": "palindrome",
        "prompt": [{"role": "user", "content": "aab"}],
        "ability": "palindrome",
        "reward_model": {"style": "rule", "ground_truth": "aba"},
        "extra_info": {"split": "test", "index": 0, "num_valid": "1", "meta": "{}"},
    }
    (tmp_path / "made").mkdir()
    write_parquet([row, row], tmp_path / "made" / "test.parquet")

    def find(name: str) -> tasks.Task:
        (found,) = tasks.find(name, [], tmp_path / "cache", None, None, lambda text: None)
        return found

    assert find(str(tmp_path / "made")).name == "made"
    assert find(str(tmp_path / "made" / "test.parquet")).file == tmp_path / "made" / "test.parquet"
    assert tasks.read(find(str(tmp_path / "made")), 1) == [
        {"data_source": "palindrome", "text": "aab", "ground_truth": "aba", "extra_info": row["extra_info"]}
    ]
    pytest.importorskip("reasoning_gym")
    skill = find("spell_backward")
    assert (skill.name, pq.read_table(skill.file).schema.equals(SCHEMA)) == ("skill/spell_backward", True)
    with pytest.raises(ValueError, match="'nix' is no task and no file. Give a parquet file, .*spell_backward"):
        find("nix")
    with pytest.raises(ValueError, match="A model folder has no task of its own"):
        find("own")


def test_the_skills_of_a_recipe_are_tasks_of_its_runs(tmp_path: Path):
    pytest.importorskip("reasoning_gym")
    skills = {"spell_backward": SkillSpec(options={"seed": 3}), "own": SkillSpec(val=str(tmp_path / "own.parquet"))}
    run_spec = spec(retention=RetentionSpec(skills=skills, prompts=5))
    run = RunFolder(tmp_path / "run")
    run.create(run_spec)
    subject = Subject(name="r", step=1, path=tmp_path, evals=tmp_path, run=run)
    spell, own = tasks.find("retention", [subject], tmp_path / "cache", None, None, lambda text: None)
    assert (own.name, own.file) == ("skill/own", tmp_path / "own.parquet")
    assert (spell.name, pq.read_table(spell.file).num_rows) == ("skill/spell_backward", 5)
    assert json.loads((spell.file.parent / "card.json").read_text())["options"]["seed"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples=0 cannot work: at least 1"),
        ({"temperature": 0.0}, "16 greedy samples"),
        ({"top_p": 1.5}, "top_p=1.5 is no share"),
        ({"prompts": 0}, "prompts=0 leaves nothing"),
        ({"max_tokens": 0}, "max_tokens=0 cannot work"),
    ],
)
def test_sampling_that_cannot_work_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate.Sampling(**changes)
    evaluate.Sampling(samples=1, temperature=0.0)


# ------------------------------------------------------------------------------------------------------- numbers


def graded(prompt: int, number: int, answer: str, valid: bool, tokens: int = 3, **changes: Any) -> dict[str, Any]:
    grade = {"score": float(valid), "valid": valid, "answer": answer, "format_ok": 1.0, "timeout": 0.0, "error": ""}
    return {**sample(prompt, number, answer, tokens), **grade, "num_valid": "4", **changes}


ROWS = [
    graded(0, 0, "aa", True, tokens=2),
    graded(0, 1, "aa", True, tokens=2),
    graded(0, 2, "bb", True, tokens=2),
    graded(0, 3, "xy", False, tokens=6, truncated=True),
    *(graded(1, number, "no", False, tokens=4, timeout=float(number == 0)) for number in range(4)),
]
"""Two prompts of four samples: three right ones of two kinds, and none."""


def test_the_numbers_of_an_evaluation_by_hand():
    found = summary.summarize(ROWS)
    assert (found["prompts"], found["samples"], found["solved"]) == (2, 4, 1)
    assert found["accuracy"]["mean"] == pytest.approx(3 / 8)
    # k = 2: of the 6 pairs of the first prompt all have a right one; of the second none
    assert [found["pass"][k]["mean"] for k in ("1", "2", "4")] == pytest.approx([3 / 8, 1 / 2, 1 / 2])
    assert found["maj"]["4"]["mean"] == 0.5  # aa leads in the first prompt
    assert found["distinct_right"] == 1.0  # two and none
    assert found["coverage"] == (2 / 4 + 0) / 2
    assert found["distinct"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found["length"] == pytest.approx({"mean": 28 / 8, "right": 2.0, "wrong": 22 / 5})
    assert (found["truncated"], found["timeouts"], found["errors"]) == (1 / 8, 1, 0)
    # two right draws of the first prompt: aa aa, or one of each in two of the three pairs
    assert found["diversity"]["valid_distinct"] == pytest.approx(1 + 2 / 3)
    json.dumps(found, allow_nan=False)


def test_the_keys_of_a_run_belong_to_the_numbers():
    found = summary.summarize(ROWS, ks=[1, 3])
    assert summary.metrics(found, "palindrome").keys() == {
        "eval/palindrome/accuracy",
        "eval/palindrome/pass@1",
        "eval/palindrome/pass@3",
    }
    assert summary.metrics(found, "skill/spell") == {"retention/spell": 3 / 8}


def test_more_than_there_are_samples_is_refused():
    with pytest.raises(ValueError, match="k=8 is more than the 4 samples"):
        summary.summarize(ROWS, ks=[8])
    with pytest.raises(ValueError, match=r"The prompts have \[3, 4\] samples"):
        summary.summarize(ROWS[:-1])


def test_what_changed_against_the_start_is_told_prompt_by_prompt():
    start = [graded(0, number, "xy", False) for number in range(4)] + ROWS[4:]
    change = summary.against(ROWS, start)
    assert change["accuracy_gain"]["mean"] == pytest.approx(3 / 8)
    assert (change["solved_new"], change["solved_lost"]) == ([0], [])
    # three right of eight: C(5, 4) / C(8, 4) = 5/70 that one half has none
    assert change["by_chance"] == pytest.approx(5 / 70)
    assert summary.against(start, ROWS)["solved_lost"] == [0]
    with pytest.raises(ValueError, match="not the same prompts"):
        summary.against(ROWS, ROWS[:4])


def record(rows: list[dict[str, Any]], name: str, **changes: Any) -> dict[str, Any]:
    facts = {"subject": name, "task": "t", "temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "seed": 1, "file": "f"}
    return {**facts, **summary.summarize(rows), **changes}


def test_the_table_has_a_row_a_model_and_says_what_is_no_wrong_answer():
    start = [graded(0, number, "xy", False) for number in range(4)] + [graded(1, n, "no", False) for n in range(4)]
    lines = printing.lines([record(start, "start"), record(ROWS, "step 9", against=summary.against(ROWS, start))])
    text = "\n".join(lines)
    assert lines[0].startswith("t: 2 prompts x 4 samples, temperature 1")
    row = next(line for line in lines if line.startswith("step 9")).split()
    assert row[2] == "0.375" and "+0.375" in row and row[-3:] == ["1", "0", "0.1"]
    assert "step 9: 1 gradings timed out, 0 failed" in text
    assert "start: " not in text
    told = printing.legend([record(start, "start"), record(ROWS, "step 9", against=summary.against(ROWS, start))])
    assert any(line.startswith("gain      of accuracy over start") for line in told)
    assert not any(line.startswith("gain") for line in printing.legend([record(start, "start")]))


def test_one_prompt_and_one_sample_make_a_table_too():
    lines = printing.lines([record([graded(0, 0, "a", True, num_valid=None)], "model")])
    assert "1.000" in lines[3] and "nan" not in lines[3] and "coverage" not in lines[2]
    assert math.isclose(record([graded(0, 0, "a", True)], "m")["accuracy"]["low"], 0.0)
