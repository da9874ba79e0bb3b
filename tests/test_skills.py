"""Skills beside palindromes: reasoning-gym's own items, compact prompts, tests apart from demonstrations."""

import dataclasses
import json
import re

import pytest
import reasoning_gym

from data_prep.cache import options_from
from data_prep.rewards import compute_score
from data_prep.schema import check_file
from data_prep.skills import (
    SKILLS,
    SkillOptions,
    build,
    cache,
    demonstrations,
    held_out,
    is_for_tests,
    main,
)

SMALL = SkillOptions(skill="spell_backward", size=20)


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


def rows(options: SkillOptions, folder) -> list[dict]:
    folder.mkdir()
    build(options, folder, quiet)
    return check_file(folder / "test.parquet").to_pylist()


def by_hand(prompt: str) -> str:
    """The answer of a compact prompt, from the prompt alone."""
    if prompt[0] == "<":
        return prompt[1:][::-1]
    return "".join(sorted(prompt[1:], reverse=prompt[0] == "-"))


def test_there_are_two_skills_or_more_named_as_in_reasoning_gym():
    assert len(SKILLS) >= 2
    for name, skill in SKILLS.items():
        assert skill.name == name
        assert reasoning_gym.create_dataset(name, size=1, seed=1, **skill.config)[0]["answer"]


@pytest.mark.parametrize("name", SKILLS)
def test_compact_prompts_are_short_and_no_palindromes_letters(name):
    for item in held_out(SKILLS[name], 100, 1):  # 13 characters are 16 tokens with the tiny model's template
        assert len(item.prompt) <= 13 and not re.fullmatch("[a-z]+", item.prompt)
        assert 1 <= len(item.answer) <= SKILLS[name].answer_length
        assert item.answer == by_hand(item.prompt)


@pytest.mark.parametrize("name", SKILLS)
def test_no_demonstration_is_ever_tested_whatever_the_seeds(name):
    tested = {item.prompt for seed in (1, 2, 500) for item in held_out(SKILLS[name], 60, seed)}
    learned = {item.prompt for seed in (1, 2, 3) for item in demonstrations(SKILLS[name], 500, seed)}
    assert not tested & learned
    assert all(map(is_for_tests, tested)) and not any(map(is_for_tests, learned))


def test_a_fifth_of_all_prompts_is_for_tests():
    # 5,000 prompts: 1,000 expected of a fair split, sd sqrt(5000 * 0.2 * 0.8) = 28; the byte gives 52/256 = 0.203
    assert 900 < sum(is_for_tests(f"prompt {number}") for number in range(5000)) < 1130


def test_the_file_has_the_schema_the_source_and_answers_that_grade_as_right(tmp_path):
    found = rows(SMALL, tmp_path / "x")
    assert len(found) == len({row["prompt"][0]["content"] for row in found}) == 20
    for index, row in enumerate(found):
        prompt, answer = row["prompt"][0]["content"], row["reward_model"]["ground_truth"]
        assert (row["data_source"], row["ability"]) == ("skill/spell_backward", "spell_backward")
        assert row["extra_info"]["index"] == index and row["extra_info"]["split"] == "test"
        graded = compute_score(row["data_source"], answer, answer, row["extra_info"])
        assert (graded["score"], graded["acc"]) == (1.0, 1.0)
        assert compute_score(row["data_source"], prompt, answer, row["extra_info"])["score"] == 0.0


@pytest.mark.parametrize("name", SKILLS)
def test_items_are_reasoning_gyms_own(name, tmp_path):
    row = rows(SkillOptions(skill=name, size=5, style="question"), tmp_path / "x")[4]
    index = json.loads(row["extra_info"]["meta"])["source_index"]
    entry = reasoning_gym.create_dataset(name, seed=1, size=index + 1, **SKILLS[name].config)[index]
    assert row["prompt"][0]["content"] == entry["question"]
    assert row["reward_model"]["ground_truth"] == entry["answer"]


@pytest.mark.parametrize(
    ("style", "form"), [("r1_boxed", r"within \boxed{}."), ("r1_answer", "<answer> and </answer>.")]
)
def test_styles_for_reasoning_models_ask_for_a_form_and_say_so(style, form, tmp_path):
    row = rows(SkillOptions(skill="spell_backward", size=1, style=style), tmp_path / "x")[0]
    assert row["prompt"][0]["content"].endswith(form) and [message["role"] for message in row["prompt"]] == ["user"]
    assert json.loads(row["extra_info"]["meta"])["answer_format"] == style.removeprefix("r1_")
    answer = row["reward_model"]["ground_truth"]
    response = rf"so \boxed{{{answer}}}" if style == "r1_boxed" else f"so <answer>{answer}</answer>"
    assert compute_score(row["data_source"], response, answer, row["extra_info"])["score"] == 1.0


def test_the_same_options_give_the_same_bytes(tmp_path):
    rows(SMALL, tmp_path / "a")
    rows(SMALL, tmp_path / "b")
    for name in ("test.parquet", "card.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_cache_builds_once_and_separates_options(tmp_path):
    folder = cache(SMALL, tmp_path, quiet)
    assert folder.name.startswith("skill-spell_backward-") and (folder / "test.parquet").is_file()
    assert cache(SMALL, tmp_path, lambda done, total, text: pytest.fail("built again")) == folder
    assert cache(SkillOptions(skill="spell_backward", size=21), tmp_path, quiet) != folder


def test_more_items_than_there_are_is_refused():
    few = dataclasses.replace(SKILLS["number_sorting"], form=re.compile(r"\+1\d\d"))  # 100 prompts, a fifth for tests
    with pytest.raises(ValueError, match="50 different test items .* 15000 draws gave .* Ask for fewer"):
        held_out(few, 50, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"skill": "flying"}, "skill: 'flying' is no built-in skill. Known: spell_backward"),
        ({"size": 0}, "size: 0 is below 1"),
        ({"seed": -1}, "seed: Python draws the same numbers for -1 and 1"),
        ({"style": "loud"}, "'loud' is not one of compact, question, r1_boxed, r1_answer"),
    ],
)
def test_bad_options_are_refused_with_their_place(options, text):
    with pytest.raises(ValueError, match=text):
        options_from(SkillOptions, options, "retention.skills.x")


def test_the_command_line_makes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["skill", "--out", str(tmp_path / "x"), "--skill", "number_sorting", "--size", "3"])
    main()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "x")
    assert check_file(tmp_path / "x" / "test.parquet").num_rows == 3
