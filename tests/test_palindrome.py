"""Palindrome data: the count of right answers, the splits, and the same bytes for the same options."""

import itertools
import json
import random
from collections import Counter

import pytest
import reasoning_gym

from data_prep import skills
from data_prep.cache import options_from
from data_prep.palindrome import DATA_SOURCE, SEED_GAP, PalindromeOptions, build, cache, main, num_palindromes, planned
from data_prep.rewards import GRADERS, compute_score
from data_prep.schema import check_file

SMALL = PalindromeOptions(train_size=60, test_size=20)


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


def brute_force(letters: str) -> int:
    words = {"".join(order) for order in itertools.permutations(letters)}
    return sum(word == word[::-1] for word in words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("palindrome")
    build(SMALL, path, quiet)
    return path


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("a", 1),
        ("ab", 0),  # two odd counts
        ("aabb", 2),  # 2! / (1! 1!): abba, baab
        ("aaaa", 1),  # 2! / 2!
        ("aabbccd", 6),  # 3! / 1, d in the middle
        ("aabbbb", 3),  # 3! / (1! 2!)
        ("aaabbcc", 6),  # halves a, b, c; the odd a is the middle
        ("abcdefghabcdefgh", 40320),  # 8!
    ],
)
def test_num_palindromes_matches_its_formula(letters, expected):
    assert num_palindromes(letters) == expected


def test_num_palindromes_matches_enumeration():
    rng = random.Random(0)
    for _ in range(100):
        letters = "".join(rng.choices("abc", k=rng.randint(1, 7)))
        assert num_palindromes(letters) == brute_force(letters), letters


def test_num_palindromes_is_exact_beyond_int64():
    letters = "".join(chr(ord("a") + i % 26) for i in range(26)) * 2  # 26! / 1 > 2^63
    assert num_palindromes(letters) == 403291461126605635584000000


def test_files_have_the_schema_and_the_sizes_asked_for(folder):
    assert check_file(folder / "train.parquet").num_rows == 60
    assert check_file(folder / "test.parquet").num_rows == 20


def test_no_two_items_share_their_letters_within_or_across_splits(folder):
    rows = [row for name in ("train", "test") for row in check_file(folder / f"{name}.parquet").to_pylist()]
    letters = Counter("".join(sorted(row["prompt"][0]["content"])) for row in rows)
    assert len(letters) == 80


def test_splits_are_disjoint_where_few_letter_sets_exist(tmp_path):
    # of length 4 only C(26, 2) = 325 letter sets have two right answers, and about 200 of 400 draws are of length 4
    build(PalindromeOptions(train_size=300, test_size=100, min_length=4, max_length=5), tmp_path, quiet)
    sets = [
        {"".join(sorted(row["prompt"][0]["content"])) for row in check_file(tmp_path / f"{name}.parquet").to_pylist()}
        for name in ("train", "test")
    ]
    assert len(sets[0]) == 300 and len(sets[1]) == 100 and not sets[0] & sets[1]
    card = json.loads((tmp_path / "card.json").read_text())["files"]["train.parquet"]
    assert card["dropped"]["same letters as an earlier item"] > 0


def test_items_are_reasoning_gyms_own(folder):
    row = check_file(folder / "train.parquet").to_pylist()[0]
    index = json.loads(row["extra_info"]["meta"])["source_index"]
    assert index >= 20 + SEED_GAP
    source = reasoning_gym.create_dataset("palindrome_generation", seed=1, size=index + 1, min_length=6, max_length=8)
    assert "".join(source[index]["metadata"]["letters"]) == row["prompt"][0]["content"]
    assert source[index]["answer"] == row["reward_model"]["ground_truth"]


def test_every_golden_answer_is_right_and_a_changed_one_wrong(folder):
    for row in check_file(folder / "test.parquet").to_pylist():
        answer = row["reward_model"]["ground_truth"]
        assert compute_score(row["data_source"], answer, answer)["score"] == 1.0
        assert compute_score(row["data_source"], answer + answer[-1], answer)["score"] == 0.0
    assert DATA_SOURCE in GRADERS


def test_num_valid_of_every_row_is_the_count_of_its_letters(folder):
    for row in check_file(folder / "test.parquet").to_pylist():
        assert row["extra_info"]["num_valid"] == str(num_palindromes(row["prompt"][0]["content"]))
        assert int(row["extra_info"]["num_valid"]) >= 2


def test_min_valid_drops_and_counts(tmp_path):
    build(PalindromeOptions(train_size=30, test_size=10, min_valid=6), tmp_path, quiet)
    card = json.loads((tmp_path / "card.json").read_text())["files"]
    assert all(file["right_answers"]["min"] >= 6 for file in card.values())
    dropped = sum(file["dropped"].get("fewer than 6 right answers", 0) for file in card.values())
    assert dropped > 0 and sum(file["drawn"] for file in card.values()) >= 40 + dropped


def test_the_same_options_give_the_same_bytes(folder, tmp_path):
    build(SMALL, tmp_path, quiet)
    for name in ("train.parquet", "test.parquet", "card.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_test_items_do_not_depend_on_the_size_of_train(folder, tmp_path):
    build(PalindromeOptions(train_size=5, test_size=20), tmp_path, quiet)
    assert (tmp_path / "test.parquet").read_bytes() == (folder / "test.parquet").read_bytes()


def test_question_style_is_reasoning_gyms_question(tmp_path):
    build(PalindromeOptions(train_size=2, test_size=2, style="question"), tmp_path, quiet)
    row = check_file(tmp_path / "test.parquet").to_pylist()[0]
    letters = json.loads(row["extra_info"]["meta"])["letters"]
    assert row["prompt"][0]["content"].endswith(f"using the following letters: {', '.join(letters)}\n")


@pytest.mark.parametrize(
    ("style", "form"), [("r1_boxed", r"within \boxed{}."), ("r1_answer", "<answer> and </answer>.")]
)
def test_styles_for_reasoning_models_ask_for_a_form_that_the_reward_reads(tmp_path, style, form):
    build(PalindromeOptions(train_size=2, test_size=2, style=style), tmp_path, quiet)
    row = check_file(tmp_path / "test.parquet").to_pylist()[0]
    (message,) = row["prompt"]
    assert message["role"] == "user" and message["content"].endswith(form)
    assert "using the following letters: " in message["content"]
    answer, info = row["reward_model"]["ground_truth"], row["extra_info"]
    given = {
        "r1_boxed": rf"<think>x</think>\boxed{{{answer}}}",
        "r1_answer": f"<think>x</think><answer>{answer}</answer>",
    }
    scores = {name: compute_score("palindrome", text, answer, info)["score"] for name, text in given.items()}
    assert scores == {name: float(name == style) for name in given}


def test_the_compact_rows_say_nothing_of_a_form(folder):
    (meta,) = {
        tuple(sorted(json.loads(row["extra_info"]["meta"]))) for row in check_file(folder / "test.parquet").to_pylist()
    }
    assert meta == ("length", "letters", "source_index")


def test_counts_beyond_int64_are_exact_in_rows_and_card(tmp_path):
    build(PalindromeOptions(train_size=2, test_size=1, min_length=500, max_length=500), tmp_path, quiet)
    row = check_file(tmp_path / "test.parquet").to_pylist()[0]
    assert row["extra_info"]["num_valid"] == str(num_palindromes(row["prompt"][0]["content"]))
    assert len(row["extra_info"]["num_valid"]) > 200  # of the order of 26^250, 353 digits, less what rare letters cost
    card = json.loads((tmp_path / "card.json").read_text())["files"]["test.parquet"]
    assert card["right_answers"]["max"] == row["extra_info"]["num_valid"]


def test_progress_counts_items_up_to_all_of_them(tmp_path):
    told = []
    build(SMALL, tmp_path, lambda done, total, text: told.append((done, total)))
    assert told[0] == (20, 80) and told[-1] == (80, 80)
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) >= 11


def test_too_few_possible_items_are_refused(tmp_path):
    with pytest.raises(ValueError, match="30 different train items of 1 to 1 letters .* Ask for fewer"):
        build(PalindromeOptions(train_size=30, test_size=1, min_length=1, max_length=1, min_valid=1), tmp_path, quiet)


def test_cache_builds_once_and_separates_options(tmp_path):
    calls: list[str] = []
    first = cache(SMALL, tmp_path, lambda done, total, text: calls.append(text))
    built = len(calls)
    assert cache(SMALL, tmp_path, lambda done, total, text: calls.append(text)) == first
    assert built > 0 and len(calls) == built
    assert cache(PalindromeOptions(train_size=61, test_size=20), tmp_path, quiet) != first


def test_another_reasoning_gym_makes_another_folder(tmp_path, monkeypatch):
    """It draws the items; a hash of the files here alone would find what another version drew."""
    before = [planned(SMALL, tmp_path), skills.planned(skills.SkillOptions(), tmp_path)]
    monkeypatch.setattr("data_prep.cache.version", lambda package: "0.0.0")
    after = [planned(SMALL, tmp_path), skills.planned(skills.SkillOptions(), tmp_path)]
    assert not set(before) & set(after)


def test_a_killed_build_leaves_nothing_that_is_taken_for_the_folder(tmp_path):
    def die(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache(SMALL, tmp_path, die)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    folder = cache(SMALL, tmp_path, quiet)
    unfinished = tmp_path / f".{folder.name}.killed"  # what kill -9 would leave
    folder.rename(unfinished)
    assert cache(SMALL, tmp_path, quiet) == folder
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train_sise": 3}, "tasks.p.options.*unknown key 'train_sise'. Did you mean 'train_size'?"),
        ({"train_size": "3"}, "tasks.p.options.train_size: expected a whole number"),
        ({"style": "letter"}, "is not one of letters, question, r1_boxed, r1_answer"),
        ({"min_length": 9}, "max_length: 8 is below min_length=9"),
        ({"test_size": 0}, "test_size: 0 is below 1"),
        ({"max_length": 2001}, "max_length: 2001 is above 2000"),
        ({"seed": -1}, "seed: Python draws the same numbers for -1 and 1"),
    ],
)
def test_bad_options_are_refused_with_their_place(options, text):
    with pytest.raises(ValueError, match=text):
        options_from(PalindromeOptions, options, "tasks.p.options")


def run_main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["palindrome", *arguments])
    main()


def test_the_command_line_makes_the_same_files_as_the_function(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "made"
    run_main(monkeypatch, "--out", str(out), "--train-size", "60", "--test-size", "20")
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert (out / "train.parquet").read_bytes() == (folder / "train.parquet").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--train-size", "0"], "train_size: 0 is below 1"),
        (["--train-size", "many"], "argument --train-size: invalid int value: 'many'"),
        ([], "exists already and would be overwritten"),
    ],
)
def test_the_command_line_refuses_with_a_message_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, text):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--out", str(tmp_path), *arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
