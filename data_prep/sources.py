"""Where mathematics problems come from: JSON, JSONL and parquet files, folders of them, or the Hugging Face Hub.

A folder is read as the DeepScaleR authors lay it out: train/ holds training files, test/ one file per evaluation set.
A folder without them is one of training files. From the Hub come the DeepScaleR set and two evaluation sets, each
file at a pinned revision.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.schema import refuse_pointer

SUFFIXES = (".json", ".jsonl", ".parquet")
HUB = "hub"
"""The source option that stands for the Hub."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a dataset on the Hugging Face Hub, at a revision that no later commit changes."""

    repository: str
    revision: str
    name: str


HUB_TRAIN = HubFile(
    repository="agentica-org/DeepScaleR-Preview-Dataset",
    revision="b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
    name="deepscaler.json",
)
HUB_SETS = {
    "aime24": HubFile(
        repository="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        name="data/train-00000-of-00001.parquet",
    ),
    "math500": HubFile(
        repository="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        name="test.jsonl",
    ),
}
SET_NAMES = {"aime": "aime24", "math": "math500"}
"""Evaluation files of the DeepScaleR repository whose name is not that of their set."""

RESERVED = ("train", "deepscaler")
"""Names of the training set: of its file, and in the card."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a source: training files, and one file per evaluation set."""

    train: tuple[Path, ...]
    sets: Mapping[str, Path] = field(default_factory=dict)
    licence: Path | None = None
    """A LICENSE file that came with them."""

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file that is read, training files first."""
        return (*self.train, *self.sets.values())


def local_files(source: str, evaluation: str = "") -> Files:
    """What `source` (a file or folder) and `evaluation` (the same, "" for what comes with the source) hold.

    Raises ValueError where there is nothing to read.
    """
    root = _root(_existing(source))
    train = _data_files(root / "train") if (root / "train").is_dir() else _data_files(root)
    if evaluation:
        sets = evaluation_sets(evaluation)
    else:
        sets = _by_name(_data_files(root / "test")) if (root / "test").is_dir() else {}
    return Files(train=train, sets=sets, licence=_licence(root))


def evaluation_sets(place: str) -> dict[str, Path]:
    """Evaluation sets by name: the files of a folder, of test/ in it, or one file.

    Raises ValueError where there is nothing to read.
    """
    root = _root(_existing(place))
    return _by_name(_data_files(root / "test" if (root / "test").is_dir() else root))


def hub_files(evaluation: str = "") -> Files:
    """The DeepScaleR set and its evaluation sets, or those of `evaluation` (a file or folder) in their place, fetched
    once into the Hugging Face cache.

    Raises OSError where neither the cache nor the network has them.
    """
    sets = evaluation_sets(evaluation) if evaluation else {name: _fetch(file) for name, file in HUB_SETS.items()}
    return Files(train=(_fetch(HUB_TRAIN),), sets=sets)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one file, as mappings from field to value.

    Raises ValueError that names the file and what is wrong with it.
    """
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}: row {number} is {type(row).__name__}, not an object with a problem and an answer. "
                "Write one object per row."
            )
    return rows


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{path} is not there. Name a JSON, JSONL or parquet file or a folder of them, or `{HUB}` for the Hub."
        )
    return path


def _root(path: Path) -> Path:
    """The folder itself, or the only folder in it where it holds nothing else to read."""
    if not path.is_dir() or (path / "train").is_dir() or any(map(_is_data, path.iterdir())):
        return path
    inside = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return _root(inside[0]) if len(inside) == 1 else path


def _is_data(path: Path) -> bool:
    return path.is_file() and path.suffix in SUFFIXES


def _data_files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    found = tuple(sorted(filter(_is_data, path.iterdir())))
    if not found:
        names = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise ValueError(f"{path} has no {', '.join(SUFFIXES)} file; found: {names}. Name the folder that has them.")
    return found


def _by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Raises ValueError for two sets of one name, or one whose file would be overwritten by another of ours."""
    found: dict[str, Path] = {}
    for path in paths:
        name = SET_NAMES.get(path.stem, path.stem)
        if name in RESERVED:
            raise ValueError(
                f"{path}: no evaluation set can be called {name!r}, as the training set is. Rename the file."
            )
        if name in found:
            raise ValueError(f"{found[name]} and {path} are both the evaluation set {name!r}. Keep one, or rename it.")
        found[name] = path
    return found


def _licence(root: Path) -> Path | None:
    folder = root if root.is_dir() else root.parent
    return next((path for path in sorted(folder.glob("LICENSE*")) if path.is_file()), None)


def _fetch(file: HubFile) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision)
    except (OSError, HfHubHTTPError) as error:
        raise OSError(
            f"{file.repository} ({file.name} at {file.revision[:8]}) is not in the Hugging Face cache and cannot be "
            f"fetched ({type(error).__name__}). Run it once where the Hub can be reached, or give --source a file or "
            "folder that has the problems."
        ) from error
    return Path(found)


def _read_parquet(path: Path) -> list[Any]:
    refuse_pointer(path)
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}. Fetch or write it anew.") from error


def _read_json(path: Path) -> list[Any]:
    """A JSON list, or one JSON object per line (whatever the suffix: both are found under both)."""
    refuse_pointer(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Fetch or write it anew.") from error
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}. Fetch or write it anew.") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a thousand brackets
        raise ValueError(f"{path}: {error}. Mend that value, or write it as text.") from error
    found = _read_lines(text, path) if found is None else found
    if len(found) == 1 and isinstance(found[0], dict) and found[0] and set(map(type, found[0].values())) == {list}:
        raise ValueError(f"{path} is a table by columns, not by rows. Write one object a row: orient='records'.")
    return found


def _read_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 and U+0085, which JSON keeps
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not JSON: {error.msg}. Expected a list of objects, or one object per line."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}. Mend that value, or write it as text.") from error
    return rows
