"""DeepScaleR's files: what is dropped and why, one schema and the same bytes, and the real files where they are."""

import dataclasses
import json
from pathlib import Path

import pytest
from real_data import agentica

from data_prep.cache import make_folder, options_from
from data_prep.deepscaler import EXAMPLES, DeepScaleROptions, build, cache, main, planned
from data_prep.golden import alternatives
from data_prep.lengths import named_tokenizer, num_tokens
from data_prep.rewards import compute_score
from data_prep.schema import SCHEMA, check_file

PUBLISHED = r"Let's think step by step and output the final answer within \boxed{}."
TALE = "A farmer has a field with a fence around it and walks along that fence from the gate to the well and back"


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


def problem(text: str, answer: object, **more: object) -> dict[str, object]:
    return {"problem": text, "answer": answer, **more}


def write(folder: Path, **files: list[dict[str, object]]) -> Path:
    """`train_x` becomes train/x.json."""
    for name, rows in files.items():
        path = folder / (name.replace("_", "/", 1) + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
    return folder


def made(folder: Path, source: Path, **options: object) -> tuple[dict[str, list[dict]], dict]:
    """The rows of each parquet file by stem, and the card."""
    folder.mkdir()
    build(DeepScaleROptions(source=str(source), **options), folder, quiet)
    rows = {path.stem: check_file(path).to_pylist() for path in folder.glob("*.parquet")}
    return rows, json.loads((folder / "card.json").read_text())


TRAIN = [
    problem("What is $1+1$?", 2.0, difficulty=1.5, solution="long"),
    problem("What is 1 + 1?", "2"),  # the same problem, the same answer
    problem("What is 1+2?", None),
    problem("", "5"),
    problem("What is 2+2?", ["4", "four"]),
    problem("What is 3+3?", "6"),
    problem("What is $3 + 3$?", "7"),  # another answer: both go
    problem("What is 4+4?", {"value": 8}),
    problem("What is 5+5?", "010"),
    problem("What is  5+5 ?", "10"),  # written otherwise, the same answer
    problem("In the test?", "1"),
    problem(TALE, "12"),
]
TEST = [problem("In the test?", "9"), problem(TALE + ". How far?", 12), problem("Not graded", ""), problem("Mine", "3")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small"), train_a=TRAIN, test_aime=TEST)


def test_every_dropped_row_is_counted_with_its_reason(small, tmp_path):
    rows, card = made(tmp_path / "x", small)
    found = card["read"]["deepscaler"]
    assert found["dropped"] == {
        "no problem": 1,
        "no answer": 1,
        "no usable answer": 1,
        "of a problem seen before": 2,
        "of a problem with several answers": 2,
        "of an evaluation set": 2,
    }
    # 12 rows = 1 + 1 + 1 + 2 + 2 + 2 dropped + 3 kept
    assert (found["read"], found["kept"], len(rows["train"])) == (12, 3, 3)
    assert [row["reward_model"]["ground_truth"] for row in rows["train"]] == ["2", '["4", "four"]', "010"]
    assert found["examples"]["no usable answer"][0]["why"].startswith("a dict is no answer")
    assert found["examples"]["of a problem with several answers"][1] == {
        "file": "a",
        "row": 6,
        "answer": "7",
        "first": "a:5",
    }


def test_overlaps_are_reported_with_their_share_and_dropped_only_if_asked_to(small, tmp_path):
    _, card = made(tmp_path / "x", small)
    reported = card["read"]["deepscaler"]["overlaps"]
    # the test's own text is the same; the tale's 22 words are 15 runs, all of them in the longer text
    assert [(one["row"], one["set"], one["set_row"], one["share"], one["same_answer"]) for one in reported] == [
        (10, "aime24", 0, 1.0, False),
        (11, "aime24", 1, 1.0, True),
    ]
    rows, card = made(tmp_path / "y", small, contaminated="keep")
    assert len(rows["train"]) == 5 and card["read"]["deepscaler"]["overlaps"] == reported


def test_a_template_with_another_answer_is_reported_and_kept(tmp_path):
    source = write(tmp_path / "s", train_a=[problem(TALE + " 7 times", "1")], test_b=[problem(TALE + " 8 times", "2")])
    rows, card = made(tmp_path / "x", source)
    (found,) = card["read"]["deepscaler"]["overlaps"]
    assert len(rows["train"]) == 1 and not found["same_problem"] and found["share"] > 0.8


def test_rows_have_the_published_prompt_the_source_and_where_they_come_from(small, tmp_path):
    rows, _ = made(tmp_path / "x", small)
    first = rows["train"][0]
    assert first["prompt"] == [{"role": "user", "content": f"What is $1+1$? {PUBLISHED}"}]
    assert (first["data_source"], first["ability"], first["reward_model"]["ground_truth"]) == (
        "deepscaler",
        "math",
        "2",
    )
    info = first["extra_info"]
    assert (info["split"], info["index"], info["num_valid"]) == ("train", 0, None)
    meta = json.loads(info["meta"])
    assert (meta["file"], meta["row"], meta["difficulty"], meta["answer_format"]) == ("a", 0, 1.5, "boxed")
    assert "solution" not in meta and len(meta["id"]) == 16
    assert {row["data_source"] for row in rows["aime24"]} == {"aime24"} and rows["test"] == rows["aime24"]


@pytest.mark.parametrize(
    ("style", "suffix"),
    [("r1", r" Please reason step by step, and put your final answer within \boxed{}."), ("question", "")],
)
def test_styles_end_the_prompt_as_they_say(small, tmp_path, style, suffix):
    rows, _ = made(tmp_path / "x", small, style=style)
    assert rows["train"][0]["prompt"][0]["content"] == "What is $1+1$?" + suffix


def test_the_same_options_and_files_give_the_same_bytes(small, tmp_path):
    made(tmp_path / "x", small)
    made(tmp_path / "y", small)
    for path in (tmp_path / "x").iterdir():
        assert path.read_bytes() == (tmp_path / "y" / path.name).read_bytes(), path.name


def test_without_evaluation_sets_rows_are_held_out_and_disjoint(tmp_path):
    source = write(tmp_path / "s", train_a=[problem(f"What is {n}+0?", n) for n in range(30)])
    rows, _ = made(tmp_path / "x", source, test_size=10)
    texts = [[row["prompt"][0]["content"] for row in rows[name]] for name in ("train", "test")]
    assert (len(texts[0]), len(texts[1])) == (20, 10) and not set(texts[0]) & set(texts[1])
    assert {row["extra_info"]["split"] for row in rows["test"]} == {"test"}
    other, _ = made(tmp_path / "y", source, test_size=10, seed=2)
    assert other["test"] != rows["test"]


def test_a_train_size_draws_rows_and_keeps_their_order(tmp_path):
    rows = [problem(f"What is {n}+0?", n) for n in range(30)]
    source = write(tmp_path / "s", train_a=rows, test_b=[problem("Mine", "3")])
    found, _ = made(tmp_path / "x", source, train_size=7)
    answers = [int(row["reward_model"]["ground_truth"]) for row in found["train"]]
    assert len(answers) == 7 and answers == sorted(answers) and answers != list(range(7))


def test_test_sets_choose_what_test_parquet_joins(tmp_path):
    sets = {f"test_{name}": [problem(f"{name}?", "1")] for name in ("amc", "math", "minerva")}
    source = write(tmp_path / "s", train_a=[problem("x?", "1")], **sets)
    rows, _ = made(tmp_path / "x", source, test_sets=("minerva", "amc"))
    assert [row["data_source"] for row in rows["test"]] == ["minerva", "amc"]
    assert set(rows) == {"train", "test", "amc", "math500", "minerva"}


def test_prompts_over_the_limit_are_dropped_and_counted_in_every_file(tmp_path):
    source = write(
        tmp_path / "s",
        train_a=[problem("short?", "1"), problem("x" * 50, "2")],
        test_b=[problem("\u00e9" * 30, "3"), problem("fine", "4")],
    )
    # the tiny tokenizer has a token per byte: the suffix is 70 of them, a space 1, the template 3
    limit = len("x" * 49) + 1 + len(PUBLISHED) + 3
    rows, card = made(tmp_path / "x", source, tokenizer="tiny", max_prompt_tokens=limit)
    assert [len(rows[name]) for name in ("train", "b")] == [1, 1]
    for name in ("deepscaler", "b"):
        assert card["read"][name]["dropped"] == {f"over {limit} tokens": 1}
    (found,) = card["read"]["deepscaler"]["examples"][f"over {limit} tokens"]
    assert found["why"] == f"{limit + 1} tokens"


def test_the_card_has_hashes_counts_and_licences(small, tmp_path):
    (small / "LICENSE").write_text("\nMIT License\n")
    _, card = made(tmp_path / "x", small)
    (small / "LICENSE").unlink()
    assert set(card["sources"]) == {"train/a.json", "test/aime.json"}
    assert card["files"]["train.parquet"]["rows"] == 3
    assert "MIT" in card["licence"]["deepscaler"] and "Mathematical Association" in card["licence"]["aime24"]
    assert card["licence_file"]["first_line"] == "MIT License"


def test_no_more_examples_are_kept_than_the_card_shows(tmp_path):
    source = write(tmp_path / "s", train_a=[problem("x?", "1")] + [problem(f"{n}?", "") for n in range(50)])
    write(source, test_b=[problem("y?", "1")])
    _, card = made(tmp_path / "x", source)
    found = card["read"]["deepscaler"]
    assert found["dropped"]["no answer"] == 50 and len(found["examples"]["no answer"]) == EXAMPLES


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([], {}, "has no rows"),
        ([{"text": "x", "answer": "1"}], {}, "no row has a field 'problem' or 'question'; found: text, answer"),
        ([{"problem": "x"}], {}, "no row has a field 'answer' or 'final_answer' or 'ground_truth'; found: problem"),
        ([problem("x", "1")], {}, "test_size: 256 rows cannot be held out of 1. Give fewer"),
        ([problem("x", "1")], {"test_sets": ("amc",)}, "test_sets: this source has no evaluation sets"),
        ([problem("x", ""), problem("y", "")], {"test_size": 1}, "test_size: 1 rows cannot be held out of 0"),
        (
            [problem("x", "1"), problem("y", "1")],
            {"test_size": 1, "train_size": 9},
            "train_size: 9 rows are more than the 1",
        ),
    ],
)
def test_sources_that_cannot_work_are_refused(tmp_path, rows, options, text):
    with pytest.raises(ValueError, match=text):
        made(tmp_path / "x", write(tmp_path / "s", train_a=rows), **options)


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path):
    source = write(tmp_path / "s", train_a=[problem("x", "1")], test_b=[problem("x", "1")])
    with pytest.raises(ValueError, match=r"No rows are left for train.parquet; dropped: 1 of an evaluation set"):
        made(tmp_path / "x", source)


def test_an_unknown_evaluation_set_is_refused_with_those_there_are(small, tmp_path):
    with pytest.raises(ValueError, match="there is no evaluation set 'amc'. Found: aime24"):
        made(tmp_path / "x", small, test_sets=("amc",))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"source": ""}, "source: is empty. Give `hub`, a file or a folder"),
        ({"style": "loud"}, "style: 'loud' is not one of deepscaler, r1, question"),
        ({"overlap": 0}, "overlap: 0.0 is no share"),
        ({"test_size": 0}, "test_size: 0 is below 1"),
        ({"test_sets": "amc"}, "test_sets: expected a list"),
        ({"sorce": "x"}, "unknown key 'sorce'. Did you mean 'source'?"),
    ],
)
def test_bad_options_are_refused_with_their_place(options, text):
    with pytest.raises(ValueError, match=text):
        options_from(DeepScaleROptions, options, "tasks.d.options")


# ---------------------------------------------------------------------------------------------------- cache, command


def test_the_cached_folder_depends_on_the_bytes_of_the_source(tmp_path):
    source = write(tmp_path / "s", train_a=[problem("x?", "1")], test_b=[problem("y?", "1")])
    options = DeepScaleROptions(source=str(source))
    folder = cache(options, tmp_path / "cache", quiet)
    assert folder == planned(options, tmp_path / "cache") and (folder / "train.parquet").is_file()
    assert cache(options, tmp_path / "cache", lambda *_: pytest.fail("built again")) == folder
    write(source, train_a=[problem("x?", "2")])
    assert planned(options, tmp_path / "cache") != folder
    assert planned(dataclasses.replace(options, tokenizer="tiny"), tmp_path) != planned(options, tmp_path)


def test_the_hubs_folder_is_planned_without_fetching(tmp_path):
    assert planned(DeepScaleROptions(), tmp_path).parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_the_command_line_makes_the_files_and_shows_progress(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    arguments = ["--out", str(out), "--source", str(small), "--test-sets", "aime24", "--train-size", "2"]
    monkeypatch.setattr("sys.argv", ["deepscaler", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out) and lines[0] == "[1/6] 12 training rows and 4 evaluation rows read"
    assert check_file(out / "train.parquet").num_rows == 2


# ---------------------------------------------------------------------------------------------------- the real files


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return made(tmp_path_factory.mktemp("real") / "x", agentica())


def test_the_real_files_give_the_counts_that_are_known_of_them(real):
    rows, card = real
    sizes = {"aime24": 30, "amc": 83, "math500": 500, "minerva": 272, "olympiad_bench": 675}
    assert {name: len(rows[name]) for name in sizes} == sizes
    assert len(rows["test"]) == sum(sizes.values()) == 1560
    found = card["read"]["deepscaler"]
    assert found["read"] == 975 + 7474
    assert found["dropped"]["no answer"] == 4  # math.json: two nulls, two empty
    assert found["read"] == found["kept"] + sum(found["dropped"].values())
    assert len(rows["train"]) == found["kept"] > 8000


def test_the_real_answers_are_text_of_one_schema(real):
    rows, _ = real
    assert {row["reward_model"]["ground_truth"] for row in rows["amc"]} >= {"142", "144", "81"}  # 142.0 in the file
    several = [row for row in rows["minerva"] if len(alternatives(row["reward_model"]["ground_truth"])) > 1]
    assert len(several) == 40  # of 75 rows with more than one answer 35 say the same one again
    for name, found in rows.items():
        answers = [answer for row in found for answer in alternatives(row["reward_model"]["ground_truth"])]
        assert all(answer and answer == answer.strip() for answer in answers), name


def test_the_real_training_files_share_these_problems_with_the_evaluation_sets(real):
    _, card = real
    same = [one for one in card["read"]["deepscaler"]["overlaps"] if one["same_problem"]]
    # by exact text without white space 4 AIME problems are in MATH-500; LaTeX written otherwise hides more of them
    exact = {(one["file"], one["row"]) for one in same if one["share"] == 1.0 and one["file"] == "aime"}
    assert len(exact) >= 4 and {one["set"] for one in same} <= {"math500", "olympiad_bench"}
    assert card["read"]["deepscaler"]["dropped"]["of an evaluation set"] == len({(o["file"], o["row"]) for o in same})


def test_a_sample_of_the_real_rows_grades_its_own_answer_as_right(real):
    rows, _ = real
    for row in rows["train"][::400] + rows["test"][::100]:
        answer = alternatives(row["reward_model"]["ground_truth"])[0]
        response = rf"<think>so</think> It is \boxed{{{answer}}}."
        graded = compute_score(row["data_source"], response, row["reward_model"]["ground_truth"], row["extra_info"])
        assert graded["acc"] == 1.0, (answer, graded)


def test_the_token_limit_of_the_real_files_is_what_counting_each_prompt_gives(real, tmp_path):
    rows, _ = real
    tokenizer, limit = named_tokenizer("tiny"), 900
    expected = sum(num_tokens(tokenizer, row["prompt"]) > limit for row in rows["train"][:2000])
    source = tmp_path / "s.json"
    kept = [(row["prompt"][0]["content"].removesuffix(" " + PUBLISHED), row) for row in rows["train"][:2000]]
    source.write_text(json.dumps([problem(text, row["reward_model"]["ground_truth"]) for text, row in kept]))
    _, card = made(tmp_path / "x", source, tokenizer="tiny", max_prompt_tokens=limit)
    assert card["read"]["deepscaler"]["dropped"] == {f"over {limit} tokens": expected} and expected > 0


def test_every_file_has_the_one_schema(small, tmp_path):
    made(tmp_path / "x", small)
    assert all(check_file(path).schema.equals(SCHEMA) for path in (tmp_path / "x").glob("*.parquet"))


def test_answers_that_differ_in_writing_only_are_no_contradiction(tmp_path):
    texts = [
        "Find the value of x where a is 7",
        "Find the value of x where a is 7 ",
        "FIND THE VALUE OF X WHERE A IS 7",
    ]
    rows = [{"problem": text, "answer": answer} for text, answer in zip(texts, ("5", "5.0", "$5$"), strict=True)]
    rows += [{"problem": f"An altogether other question, number {n}, of many words", "answer": str(n)} for n in (1, 2)]
    rows += [{"problem": "half \ud83d of a character in a problem", "answer": "9"}]
    source = tmp_path / "x.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "out").mkdir()
    make_folder(tmp_path / "out", lambda out: build(DeepScaleROptions(source=str(source), test_size=1), out, quiet))
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["read"]["deepscaler"]["dropped"] == {"of a problem seen before": 2, "no Unicode text": 1}
