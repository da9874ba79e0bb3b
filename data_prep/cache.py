"""Options as frozen dataclasses, and folders cached by a hash of what made them.

A cached folder is `<data_root>/<name>-<hash>`, the hash taken over the options and the builder's own source file,
so that a changed option or a changed builder makes a new folder and never touches an old one. A folder appears by
one rename, after all its files are on disk: a folder that exists is complete.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar

from klreg_verl.experiment import strict

T = TypeVar("T")
Progress = Callable[[int, int, str], None]
"""Called with (steps done, all steps, one short sentence)."""


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and the sentence that --help shows for it."""
    return field(default=default, metadata={"help": text})


def options_from(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Builds `cls` from a mapping such as a recipe's `options` block, which messages name as `where`.

    Raises ValueError for an unknown key, a wrong type, or a combination that `cls` refuses.
    """
    return strict.build(cls, strict.from_plain(mapping, file="recipe", path=where))


def run_builder(
    cls: type[T], description: str, build: Callable[[T, Path], None], argv: Sequence[str] | None = None
) -> Path:
    """The command line of a builder: `--out FOLDER` and one argument per option of `cls`; returns the folder made.

    A folder that exists or options that `cls` refuses end the program with their message and exit code 2.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make; must not exist")
    for item in fields(cls):  # type: ignore[arg-type]
        flag = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default: {item.default})"
        parser.add_argument(flag, type=type(item.default), default=item.default, help=text, metavar=flag[2:].upper())
    given = vars(parser.parse_args(argv))
    folder = given.pop("out")
    try:
        options = cls(**given)
        make_folder(folder, lambda out: build(options, out))
    except ValueError as error:
        parser.error(str(error))
    return folder


def content_hash(options: Any, source: Path) -> str:
    """First 16 hexadecimal digits of the sha256 over the options (canonical JSON) and the bytes of `source`."""
    canonical = json.dumps(asdict(options), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode() + b"\0" + source.read_bytes()).hexdigest()[:16]


def cached_folder(name: str, options: Any, source: Path, data_root: Path, fill: Callable[[Path], None]) -> Path:
    """The folder that `fill` makes from `options`, built at the first call and found at later ones.

    A second process that wants the same folder at the same time waits for the first.
    """
    folder = Path(data_root).resolve() / f"{name}-{content_hash(options, source)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            _remove_unfinished(folder)
            make_folder(folder, fill)
    return folder


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a temporary sibling and renames it to `folder` when all is on disk.

    Raises ValueError if `folder` exists already; whatever interrupts `fill` leaves nothing behind under that name.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already and would be overwritten. Name another folder, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(temporary)
        _finish_files(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_progress(done: int, total: int, text: str) -> None:
    """One line of progress on the terminal."""
    print(f"[{done:>{len(str(total))}}/{total}] {text}", flush=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _finish_files(folder: Path) -> None:
    """Brings every file to the disk and lets others read: temporary folders and safetensors files start private."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove_unfinished(folder: Path) -> None:
    """What a killed builder of the same folder left behind; only for the holder of the folder's lock."""
    for unfinished in folder.parent.glob(f".{folder.name}.*/"):
        shutil.rmtree(unfinished)
