"""Reading problems: files of each kind, folders as their authors lay them out, the Hub's cache, and clear refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import sources
from data_prep.sources import HUB_SETS, HUB_TRAIN, evaluation_sets, local_files, read_rows

ROWS = [{"problem": "1+1?", "answer": 2.0}, {"problem": "1+2?", "answer": "3"}]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_list_and_one_object_a_line_are_read_under_either_suffix(tmp_path, name, mark):
    path = write(tmp_path / name, mark + json.dumps(ROWS, indent=1))
    assert read_rows(path) == ROWS
    write(path, mark + "\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert read_rows(path) == ROWS


def test_parquet_is_read(tmp_path):
    rows = [{"problem": "1+1?", "answer": ["2"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet") == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '[{"a": 1},\n {"a": }]', r"x\.json:2: not JSON"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', r"x\.jsonl:2: not JSON.*a list of objects, or one object per line"),
        ("x.json", "[1, 2]", "row 0 is int, not an object with a problem and an answer"),
        ("x.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS, not the data"),
        ("x.parquet", "no parquet", "cannot be read as parquet"),
        ("x.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}", r"x\.jsonl:2: Exceeds the limit"),
        ("x.json", '{"problem": ["a", "b"], "answer": ["1", "2"]}', "a table by columns, not by rows"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_rows(tmp_path / "x.json")


def test_a_folder_with_train_and_test_gives_training_files_sets_and_the_licence(tmp_path):
    for name in ("train/math.json", "train/aime.json", "test/aime.json", "test/math.json", "test/minerva.json"):
        write(tmp_path / "a" / name, json.dumps(ROWS))
    write(tmp_path / "a" / "LICENSE", "MIT License")
    found = local_files(str(tmp_path))  # the only folder in it
    assert [path.name for path in found.train] == ["aime.json", "math.json"]
    assert {name: path.name for name, path in found.sets.items()} == {
        "aime24": "aime.json",
        "math500": "math.json",
        "minerva": "minerva.json",
    }
    assert found.licence == tmp_path / "a" / "LICENSE"
    assert [path.parent.name for path in found.all] == ["train", "train", "test", "test", "test"]


def test_a_file_is_a_source_and_sets_can_be_named_apart(tmp_path):
    train, other = write(tmp_path / "x.jsonl", "{}"), write(tmp_path / "sets" / "own.json", "[]")
    assert local_files(str(train)).train == (train,) and local_files(str(train)).sets == {}
    assert local_files(str(train), str(tmp_path / "sets")).sets == {"own": other}
    assert evaluation_sets(str(other)) == {"own": other}


def test_sets_that_would_overwrite_one_another_are_refused(tmp_path):
    """math.json is math500, as math500.jsonl is; train.parquet and the card's deepscaler are of the training set."""
    for number, names in enumerate((("math.json", "math.parquet"), ("math.json", "math500.jsonl"))):
        for name in names:
            write(tmp_path / str(number) / name, "[]")
        with pytest.raises(ValueError, match=f"{names[0]} and .*{names[1]} are both the evaluation set 'math500'"):
            evaluation_sets(str(tmp_path / str(number)))
    for name in ("train", "deepscaler"):
        with pytest.raises(ValueError, match=f"no evaluation set can be called '{name}'"):
            evaluation_sets(str(write(tmp_path / f"{name}.json", "[]")))


def test_what_is_not_there_or_holds_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gone is not there. Name a JSON, JSONL or parquet file or a folder of them"):
        local_files(str(tmp_path / "gone"))
    write(tmp_path / "x.csv", "a,b")
    with pytest.raises(ValueError, match=r"has no .json, .jsonl, .parquet file; found: x.csv"):
        local_files(str(tmp_path))


FROM_HUB = """
import sys
from data_prep.sources import hub_files
found = hub_files(*sys.argv[1:])
print(*[path.name for path in found.all], *found.sets)
"""


def hub_process(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real huggingface_hub on its own cache, without network."""
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(cache)}
    root = Path(sources.__file__).parent.parent
    command = [sys.executable, "-c", FROM_HUB, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)


def test_the_hub_is_read_from_its_cache_at_the_pinned_revisions(tmp_path):
    pytest.importorskip("huggingface_hub", reason="not installed: huggingface_hub (make setup)")
    for file in (HUB_TRAIN, *HUB_SETS.values()):
        folder = tmp_path / f"datasets--{file.repository.replace('/', '--')}"
        write(folder / "snapshots" / file.revision / file.name, "[]")
    done = hub_process(tmp_path)
    assert done.stdout.split() == ["deepscaler.json", "train-00000-of-00001.parquet", "test.jsonl", "aime24", "math500"]
    shutil.rmtree(tmp_path / "datasets--HuggingFaceH4--MATH-500")
    done = hub_process(tmp_path)
    assert done.returncode == 1
    assert "HuggingFaceH4/MATH-500 (test.jsonl at 6e4ed1a2) is not in the Hugging Face cache" in done.stderr
    assert "give --source a file or folder that has the problems" in done.stderr
    own = write(tmp_path / "own.json", "[]")  # in the place of the Hub's sets, of which one is not there
    assert hub_process(tmp_path, str(own)).stdout.split() == ["deepscaler.json", "own.json", "own"]


def test_revisions_are_whole_commits():
    assert all(len(file.revision) == 40 for file in (HUB_TRAIN, *HUB_SETS.values()))


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b"])
def test_lines_end_at_newlines_alone(tmp_path, mark):
    rows = [{"problem": f"first line{mark}second line", "answer": "1"}] * 2
    text = "\n".join(json.dumps(row, ensure_ascii=mark == "\x0b") for row in rows)
    assert read_rows(write(tmp_path / "x.jsonl", text)) == rows
