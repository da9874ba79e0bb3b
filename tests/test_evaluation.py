"""What an evaluation keeps, how it grades, what its numbers say; the real vLLM is in tests/e2e/test_eval.py."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from verl_stack import spec

from data_prep.functions import OURS
from data_prep.schema import SCHEMA, write_parquet
from klreg_verl.evaluation import evaluate, printing, store, subjects, summary, tasks
from klreg_verl.evaluation.store import Store
from klreg_verl.evaluation.subjects import Subject
from klreg_verl.experiment.settings import RetentionSpec, SkillSpec, TaskSpec
from klreg_verl.experiment.store import RunFolder, write_json

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
ROW = {
    "data_source": "palindrome",
    "prompt": [{"role": "user", "content": "aab"}],
    "ability": "palindrome",
    "reward_model": {"style": "rule", "ground_truth": "aab"},
    "extra_info": {"split": "test", "index": 0, "num_valid": "1", "meta": "{}"},
}
"""A row of a task's file."""


def test_a_palindrome_is_graded_by_the_projects_reward():
    reward = tasks.reward_function(tasks.Task(name="palindrome", file=Path("x")))
    right, wrong = tasks.with_right([tasks.graded(sample(0, 0, text), ASKED, reward) for text in ("aba", "aab")])
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
    return tasks.with_right([tasks.graded(sample(0, 0, response), ASKED, tasks.reward_function(task))])[0]


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


def test_what_is_no_grade_is_counted_too(own_reward: types.ModuleType):
    cases = {"None": None, "no score": {"acc": 1.0}, "acc": {"score": 1.0, "acc": "right"}, "nan": math.nan}
    errors = {
        name: grade_with(own_reward, lambda value=value, **_: value, "x")["error"] for name, value in cases.items()
    }
    assert errors["None"].startswith("TypeError") and errors["no score"] == "KeyError: 'score'"
    assert errors["acc"].startswith("ValueError: could not convert") and errors["nan"] == "ValueError: score nan"


def test_an_asynchronous_reward_is_awaited(own_reward: types.ModuleType):
    async def score(**_: Any) -> float:
        return 0.5

    found = grade_with(own_reward, score, "x")
    assert (found["score"], found["valid"], found["error"]) == (0.5, None, "")  # neither right nor wrong: it grades


def test_the_options_of_a_task_reach_its_reward():
    """A response that was cut inside its reasoning, with a box: wrong where the prompt opened the reasoning."""
    asked = {**ASKED, "data_source": "math500", "ground_truth": "7"}
    task = tasks.Task(name="t", file=Path("x"))
    thinking = replace(task, options={"thinks": True})
    response = sample(0, 0, r"so far \boxed{7}, but")
    scores = [tasks.graded(response, asked, tasks.reward_function(one))["score"] for one in (task, thinking)]
    assert scores == [1.0, 0.0]


def test_a_reward_finds_what_it_imports_when_it_is_called(tmp_path: Path):
    (tmp_path / "reward_that_imports_late.py").write_text(
        "def score(**_):\n    import beside_it\n    return beside_it.ONE\n"
    )
    (tmp_path / "beside_it.py").write_text("ONE = 1.0\n")
    task = tasks.Task(name="t", file=Path("x"), reward="reward_that_imports_late:score", root=str(tmp_path))
    found = tasks.graded(sample(0, 0), ASKED, tasks.reward_function(task))
    assert (found["score"], found["error"]) == (1.0, "")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_colon", "cannot import 'no_colon' .* Give pkg.module:function"),
        ("nix_nix:score", "cannot import 'nix_nix'"),
        ("math:nix", "'math' has no function 'nix'"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(reward: str, message: str):
    with pytest.raises(ValueError, match=message):
        tasks.reward_function(tasks.Task(name="t", file=Path("x"), reward=reward))


def test_a_reward_whose_source_changes_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "reward_whose_source_changes.py"
    path.write_text("def score(**_):\n    return 0.0\n")
    task = tasks.Task(name="t", file=Path("x"), reward=f"{path.stem}:score")
    before = evaluate.reward_hash(task)
    assert before == evaluate.reward_hash(task)
    path.write_text("def score(**_):\n    return 1.0\n")
    assert evaluate.reward_hash(task) != before


def test_a_reward_that_is_no_plain_function_has_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = "import functools\nclass Score:\n    def __call__(self, **_): return 0.0\n"
    text += "made = Score()\nless = functools.partial(made)\n"
    path = tmp_path / "rewards_that_are_objects.py"
    path.write_text(text)
    wanted = [tasks.Task(name="t", file=Path("x"), reward=f"{path.stem}:{name}") for name in ("made", "less")]
    before = [evaluate.reward_hash(task) for task in wanted]
    path.write_text(text.replace("0.0", "1.0"))
    assert all(evaluate.reward_hash(task) != old for task, old in zip(wanted, before, strict=True))


def test_tasks_are_named_by_file_folder_or_skill(tmp_path: Path):
    (tmp_path / "made").mkdir()
    write_parquet([ROW, ROW], tmp_path / "made" / "test.parquet")

    def find(name: str) -> tasks.Task:
        (found,) = tasks.find(name, [], tmp_path / "cache", None, None, lambda text: None)
        return found

    assert find(str(tmp_path / "made")).name == "made"
    assert find(str(tmp_path / "made" / "test.parquet")).file == tmp_path / "made" / "test.parquet"
    assert tasks.read(find(str(tmp_path / "made")), 1) == [
        {"data_source": "palindrome", "text": "aab", "ground_truth": "aab", "extra_info": ROW["extra_info"]}
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


def run_with(folder: Path, val: Path, **changes: Any) -> Subject:
    """A run whose task has this validation file."""
    run_spec = spec(**changes)
    run = RunFolder(folder / run_spec.run_id)
    run.create(run_spec)
    write_json(run.provenance_path, {"data": {"val": {"path": str(val)}}})
    return Subject(name="r", step=1, path=run.path, evals=run.evals_dir, run=run)


def find_of(name: str, *models: Subject) -> list[tasks.Task]:
    return tasks.find(name, list(models), models[0].path / "cache", None, None, lambda text: None)


def test_a_runs_task_is_its_file_its_reward_and_its_options(tmp_path: Path):
    val = tmp_path / "val.parquet"
    val.touch()
    builtin = TaskSpec(builtin="palindrome", reward_options={"partial_credit": True})
    other = TaskSpec(builtin="palindrome")
    one = run_with(tmp_path / "one", val, task=builtin, task_name="a", root="/recipes/one")
    two = run_with(tmp_path / "two", val, task=builtin, task_name="b", root="/recipes/two")
    (task,) = find_of("own", one, two)  # name and folder of the recipe make no other task
    assert (task.name, task.file, dict(task.options), task.root) == ("a", val, {"partial_credit": True}, None)
    with pytest.raises(
        ValueError, match=r"different tasks \(.*val.parquet, .*, \{'partial_credit': True\}; .*compute_score\)"
    ):
        find_of("own", one, run_with(tmp_path / "three", val, task=other))


def test_a_retained_skill_has_the_options_of_the_run_where_this_project_grades(tmp_path: Path):
    val = tmp_path / "val.parquet"
    retained = RetentionSpec(skills={"own": SkillSpec(val=str(val))}, prompts=5)
    options = {"thinks": True}
    builtin = TaskSpec(builtin="palindrome", reward_options=options)
    theirs = TaskSpec(train="a.parquet", val="b.parquet", reward="pkg.module:score", reward_options=options)
    (thinking,) = find_of("retention", run_with(tmp_path / "one", val, task=builtin, retention=retained))
    (plain,) = find_of("retention", run_with(tmp_path / "two", val, task=theirs, retention=retained))
    assert (thinking.reward, dict(thinking.options)) == (OURS, options)
    assert (plain.reward, dict(plain.options)) == (OURS, {})  # as data_prep/retention.py grades it in the run


def test_two_files_of_one_skill_are_refused(tmp_path: Path):
    files = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    skills = [RetentionSpec(skills={"own": SkillSpec(val=str(file))}, prompts=5) for file in files]
    runs = [run_with(tmp_path / file.stem, file, retention=one) for file, one in zip(files, skills, strict=True)]
    with pytest.raises(
        ValueError, match="different prompts or reward options of the skill own .*one.parquet.*two.parquet"
    ):
        find_of("retention", *runs)
    assert len(find_of("retention", runs[0], runs[0])) == 1


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


GRADES = [(0, 0, 1.75), (0, 1, -1.0), (1, 0, 0.5), (1, 1, 0.25)]
"""(prompt, sample, score) of a reward that grades."""


def graded(
    prompt: int, number: int, answer: str, valid: bool | None, tokens: int = 3, **changes: Any
) -> dict[str, Any]:
    grade = {
        "score": float(valid or 0),
        "valid": valid,
        "answer": answer,
        "format_ok": 1.0,
        "timeout": 0.0,
        "error": "",
    }
    given = {"data_source": "palindrome", "num_valid": "4"}
    return {**sample(prompt, number, answer, tokens), **given, **grade, **changes}


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


def test_the_keys_are_those_of_a_run_for_each_data_source():
    rows = [row | {"data_source": ("math500", "aime24")[row["prompt"]]} for row in ROWS]
    assert summary.metrics(rows, "test") == {
        "eval/math500/accuracy": 3 / 4,
        "eval/math500/score": 3 / 4,
        "eval/math500/pass@1": 3 / 4,
        "eval/math500/pass@2": 1.0,
        "eval/math500/pass@4": 1.0,
        "eval/aime24/accuracy": 0.0,
        "eval/aime24/score": 0.0,
        "eval/aime24/pass@1": 0.0,
        "eval/aime24/pass@2": 0.0,
        "eval/aime24/pass@4": 0.0,
    }
    assert summary.metrics(rows, "skill/spell") == {"retention/spell": 3 / 8}
    skilled = [row | {"data_source": "skill/spell"} for row in ROWS]
    assert summary.metrics(skilled, "test") == {"retention/spell": 3 / 8}


GRADED = [graded(prompt, number, "x", None) | {"score": score} for prompt, number, score in GRADES]


def test_of_a_reward_that_grades_the_score_is_told_and_nothing_that_needs_right_and_wrong():
    found = summary.summarize(GRADED)
    # prompt 0: (1.75 - 1) / 2 = 0.375; prompt 1: (0.5 + 0.25) / 2 = 0.375
    assert (found["headline"], found["score"], found["score_interval"]["mean"]) == ("score", 0.375, 0.375)
    assert found["accuracy"]["mean"] is None and found["distinct_right"] is None
    assert summary.metrics(GRADED, "palindrome") == {"eval/palindrome/score": 0.375}
    worse = [row | {"score": row["score"] - 0.5} for row in GRADED]
    assert summary.against(GRADED, worse)["score_gain"]["mean"] == 0.5
    told = printing.lines([record(GRADED, "model", against=summary.against(GRADED, worse) | {"subject": "start"})])
    assert told[2].split()[:2] == ["model", "score"] and "+0.500" in " ".join(told)
    assert not any(word in " ".join(told) for word in ("accuracy", "pass@", "nan"))
    json.dumps(found, allow_nan=False)


def test_more_than_there_are_samples_is_refused():
    with pytest.raises(ValueError, match="k=8 is more than the 4 samples"):
        summary.of_subsets(ROWS, [8])
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
    lines = printing.lines(
        [record(start, "start"), record(ROWS, "step 9", against={"subject": "start", **summary.against(ROWS, start)})]
    )
    text = "\n".join(lines)
    assert lines[0].startswith("t: 2 prompts x 4 samples, temperature 1")
    row = next(line for line in lines if line.startswith("step 9")).split()
    assert row[2] == "0.375" and "+0.375" in row and row[-3:] == ["1", "0", "0.1"]
    assert "step 9: 1 gradings ended without a verdict, 0 failed" in text
    assert "start: " not in text

    def change(name: str) -> dict[str, Any]:
        return {"subject": name, **summary.against(ROWS, start)}

    def gain(*changes: dict[str, Any]) -> list[str]:
        told = printing.legend([record(start, "x"), *(record(ROWS, "y", against=one) for one in changes)])
        return [line for line in told if line.startswith("gain")]

    assert gain(change("start")) == ["gain      of accuracy over start, prompt by prompt, with its 95 % interval"]
    assert gain(change("one"), change("two"))[0].startswith(
        "gain      of accuracy over the start of its own run, prompt"
    )
    assert gain() == []


def test_one_prompt_and_one_sample_make_a_table_too():
    lines = printing.lines([record([graded(0, 0, "a", True, num_valid=None)], "model")])
    assert "1.000" in lines[3] and "nan" not in lines[3] and "coverage" not in lines[2]
    assert math.isclose(record([graded(0, 0, "a", True)], "m")["accuracy"]["low"], 0.0)


# ------------------------------------------------------------------------------------------------------- the whole


MACHINE = evaluate.Machine(platform="cpu")


def model(folder: Path, name: str, evals: str = "evals", **changes: Any) -> Subject:
    """A folder that stands for a model: all of its samples are there, and no engine has to read it."""
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"name": name}))
    return Subject(name=name, step=0, path=path, evals=folder / evals, **changes)


def asked_of(folder: Path, name: str = "asked", reward: str = OURS) -> tasks.Task:
    write_parquet([ROW], folder / f"{name}.parquet")
    return tasks.Task(name="palindrome", file=folder / f"{name}.parquet", reward=reward)


def draw(subject: Subject, task: tasks.Task, responses: list[str]) -> evaluate.Evaluation:
    """Puts these samples of the only prompt where an engine would."""
    sampling = evaluate.Sampling(samples=len(responses))
    one = evaluate._evaluation(subject, task, sampling, subject.path, subjects.model_hash(subject.path))
    one.store.parts.mkdir(parents=True)
    store.write_part(one.store.parts, [sample(0, number, text) for number, text in enumerate(responses)])
    return one


def run_all(models: list[Subject], wanted: list[tasks.Task], samples: int, **given: Any) -> list[list[dict[str, Any]]]:
    sampling = evaluate.Sampling(samples=samples)
    return evaluate.evaluate(models, wanted, sampling, MACHINE, note=lambda text: None, **given)


def test_what_is_kept_does_not_depend_on_what_is_shown(tmp_path: Path):
    task, start, end = asked_of(tmp_path), model(tmp_path, "start", is_start=True), model(tmp_path, "end")
    draw(start, task, ["aab"] * 4)
    kept = draw(end, task, ["aba", "aba", "aab", "aab"]).store.numbers
    run_all([start, end], [task], 4)
    before = json.loads(kept.read_text())
    assert (list(before["pass"]), before["against"]["accuracy_gain"]["mean"]) == (["1", "2", "4"], 0.5)
    ((shown,),) = run_all([end], [task], 4, ks=[3])
    # one of the 4 subsets of three would need three wrong ones, of which there are two
    assert ({k: value["mean"] for k, value in shown["pass"].items()}, "against" in shown) == ({"3": 1.0}, False)
    assert json.loads(kept.read_text()) == before


def test_a_change_that_other_grades_gave_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "reward_that_gets_stricter.py"
    path.write_text("def score(**given):\n    return 1.0\n")
    task = asked_of(tmp_path, reward=f"{path.stem}:score")
    start, end = model(tmp_path, "start", is_start=True), model(tmp_path, "end")
    draw(start, task, ["aab"])
    kept = draw(end, task, ["aba"]).store.numbers
    run_all([start, end], [task], 1)
    assert "against" in json.loads(kept.read_text())
    path.write_text("def score(**given):\n    return 0.0  # of all\n")
    monkeypatch.delitem(sys.modules, path.stem)
    run_all([end], [task], 1)
    again = json.loads(kept.read_text())
    assert (again["accuracy"]["mean"], "against" in again) == (0.0, False)


def test_one_model_under_two_runs_is_taken_over(tmp_path: Path):
    task = asked_of(tmp_path)
    one, two = model(tmp_path, "m", "evals_one"), model(tmp_path, "m", "evals_two")
    table = draw(one, task, ["aba", "aab"]).store.table
    run_all([one, two], [task], 2)
    assert (two.evals / table.name).read_bytes() == table.read_bytes()
    assert sorted(path.suffix for folder in (one.evals, two.evals) for path in folder.iterdir()) == [
        ".json",
        ".json",
        ".parquet",
        ".parquet",
    ]


def test_tasks_of_one_name_keep_their_rewards(tmp_path: Path, own_reward: types.ModuleType):
    own_reward.half = lambda **_: 0.5  # type: ignore[attr-defined]
    wanted = [asked_of(tmp_path, "a"), asked_of(tmp_path, "b", f"{own_reward.__name__}:half")]
    for task in wanted:
        draw(model(tmp_path, "m"), task, ["aba"])
    assert [row[0]["score"] for row in run_all([model(tmp_path, "m")], wanted, 1)] == [1.0, 0.5]


def test_options_make_another_evaluation_and_none_the_one_there_was(tmp_path: Path):
    task = asked_of(tmp_path)
    sampling, subject = evaluate.Sampling(), model(tmp_path, "m")
    plain, thinking = (
        evaluate._evaluation(subject, one, sampling, subject.path, "hash")
        for one in (task, replace(task, options={"thinks": True}))
    )
    assert (plain.settings | {"options": {"thinks": True}}, "options" in plain.settings) == (thinking.settings, False)
    assert plain.hash != thinking.hash


@pytest.mark.parametrize(
    ("reward", "ks", "message"), [(OURS, [2], "k=2 with 1 samples"), ("nix_nix:score", None, "cannot import 'nix_nix'")]
)
def test_what_cannot_work_is_told_before_a_checkpoint_is_exported(
    tmp_path: Path, reward: str, ks: list[int] | None, message: str
):
    checkpoint = tmp_path / "global_step_5"
    (checkpoint / "actor").mkdir(parents=True)
    (checkpoint / "actor" / "model_world_size_1_rank_0.pt").touch()  # of which an export would fail
    subject = Subject(name="c", step=5, path=checkpoint, evals=tmp_path / "evals")
    with pytest.raises(ValueError, match=message):
        run_all([subject], [asked_of(tmp_path, reward=reward)], 1, ks=ks)


def test_folders_of_evaluations_are_told_once_each_and_many_are_counted():
    folders = [Path(f"run{number}/evals") for number in (1, 1, 2, 3, 4)]
    assert printing.folders(folders) == [f"files: run{number}/evals" for number in (1, 2, 3, 4)]
    assert printing.folders([*folders, Path("run5/evals")])[-1] == "       and 1 more"
