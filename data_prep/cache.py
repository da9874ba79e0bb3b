"""Options as frozen dataclasses, and folders cached by a hash of what made them.

A cached folder is `<data_root>/<name>-<hash>`, the hash taken over the options and what the content is made of: the
builder's own source, the user's files where it reads any, and the versions of packages that draw the data. A changed
option, builder or file thus makes a new folder and never touches an old one. A folder appears by one rename, after all
its files are on disk: a folder that exists is complete.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, asdict, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
    kinds = get_type_hints(cls)
    for item in fields(cls):  # type: ignore[arg-type]
        _add_argument(parser, item, kinds[item.name])
    given = vars(parser.parse_args(argv))
    folder = given.pop("out")
    try:
        options = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
        make_folder(folder, lambda out: build(options, out))
    except ValueError as error:
        parser.error(str(error))
    return folder


def _add_argument(parser: argparse.ArgumentParser, item: Field[Any], kind: Any) -> None:
    """One option: `--name VALUE`, or `--name VALUE ...` for a tuple."""
    flag = "--" + item.name.replace("_", "-")
    several = get_origin(kind) is tuple
    default = item.default if item.default not in ("", ()) else "none"
    parser.add_argument(
        flag,
        type=get_args(kind)[0] if several else type(item.default),
        nargs="*" if several else None,
        default=item.default,
        help=f"{item.metadata['help']} (default: {default})".replace("%", "%%"),
        metavar="|".join(get_args(kind)) if get_origin(kind) is Literal else flag[2:].upper(),
    )


def content_hash(options: Any, *sources: Path, packages: Sequence[str] = ()) -> str:
    """First 16 hexadecimal digits of the sha256 over the options (canonical JSON), the bytes of the files, and the
    versions of the packages."""
    canonical = json.dumps(asdict(options), sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode())
    for content in (*(source.read_bytes() for source in sources), *map(_version, packages)):
        digest.update(b"\0" + str(len(content)).encode() + b"\0" + content)
    return digest.hexdigest()[:16]


def _version(package: str) -> bytes:
    """Empty where it is not installed: then nothing can be made, and what is there is of another version."""
    try:
        return version(package).encode()
    except PackageNotFoundError:
        return b""


def planned_folder(
    name: str, options: Any, sources: Iterable[Path], data_root: Path, packages: Sequence[str] = ()
) -> Path:
    """Where the folder made from `options` and `sources` with `packages` is or will be; makes nothing."""
    return Path(data_root).resolve() / f"{name}-{content_hash(options, *sources, packages=packages)}"


def cached_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The planned folder, made by `fill` at the first call and found at later ones.

    A second process that wants the same folder at the same time waits for the first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            _remove_unfinished(folder)
            make_folder(folder, fill)
    return folder


def make_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a temporary sibling and renames it to `folder` when all is on disk.

    Raises ValueError if `folder` exists already and is not empty; whatever interrupts `fill` leaves nothing behind
    under that name.
    """
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
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
