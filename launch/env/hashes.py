"""The hashes that pip checks at set-up: a file beside each lock, `name==version sha256 file`, a line a wheel.

    python launch/env/hashes.py launch/env/cpu.lock           writes cpu.hashes, by asking pip's index once a package
    python launch/env/hashes.py launch/env/cpu.lock --print   the lock as pip takes it with --require-hashes

So what was not on the index when the lock was made is not installed. A package without a wheel is built here, with the
lock's own setuptools. torch is left out of the CPU's file: its CPU build comes from PyTorch's own index.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

JSON = "application/vnd.pypi.simple.v1+json"
PYTHONS = re.compile(r"-(?:(?:cp|py)31[12]|py3|py2\.py3|cp3\d*-abi3)[-.]")
LEFT_OUT = {"cpu.lock": ("torch",)}
BUILDERS = ("setuptools",)
"""Installed first: packages without a wheel are built with them."""


def requirements(lock_text: str) -> list[str]:
    """The lock's lines without comments and blanks, in order."""
    lines = (line.split("#", 1)[0].strip() for line in lock_text.splitlines())
    return [line for line in lines if line]


def name_of(requirement: str) -> str:
    return requirement.partition("==")[0]


def hashed(lock: Path) -> list[str]:
    """The lock's requirements with their hashes, the builders first. Raises ValueError where the files do not agree."""
    known: dict[str, list[str]] = {}
    for line in lock.with_suffix(".hashes").read_text().splitlines():
        requirement, sha256, _ = line.split()
        known.setdefault(requirement, []).append(sha256)
    wanted = [line for line in requirements(lock.read_text()) if name_of(line) not in LEFT_OUT.get(lock.name, ())]
    if missing := [line for line in wanted if line not in known]:
        raise ValueError(
            f"{lock.with_suffix('.hashes')} has no hash of {', '.join(missing)}. Write it anew: "
            f"python {Path(__file__).name} {lock.name}, in {lock.parent}."
        )
    wanted.sort(key=lambda line: name_of(line) not in BUILDERS)
    return [" ".join([line, *(f"--hash=sha256:{sha256}" for sha256 in known[line])]) for line in wanted]


def fits(file: str) -> bool:
    """Whether a file is a wheel for Linux and the Pythons that the locks are for."""
    platform = file.removesuffix(".whl").rpartition("-")[2]
    ours = platform == "any" or re.search(r"linux.*_(x86_64|aarch64)", platform)
    return file.endswith(".whl") and bool(ours) and "musllinux" not in platform and bool(PYTHONS.search(file))


def files(url: str, requirement: str) -> Iterator[tuple[str, str]]:
    """(file, sha256) of a version's wheels, or where there is none of its source."""
    name, _, version = requirement.partition("==")
    page = re.sub(r"[-_.]+", "-", name).lower()
    request = urllib.request.Request(f"{url.rstrip('/')}/{page}/", headers={"Accept": JSON})
    with urllib.request.urlopen(request, timeout=60) as reply:
        listed = {entry["filename"]: entry["hashes"]["sha256"] for entry in json.load(reply)["files"]}
    start = re.compile(rf"{re.sub(r'[-_.]+', '[-_.]+', name)}-{re.escape(version)}(-|\.tar\.gz$)", re.IGNORECASE)
    mine = [file for file in sorted(listed) if start.match(file)]
    chosen = [file for file in mine if fits(file)] or [file for file in mine if file.endswith(".tar.gz")]
    yield from ((file, listed[file]) for file in chosen)


def write(lock: Path) -> None:
    """Asks the index that pip uses here for every package of the lock."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    url = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "https://pypi.org/simple"
    lines = [
        f"{requirement} {sha256} {file}"
        for requirement in requirements(lock.read_text())
        if name_of(requirement) not in LEFT_OUT.get(lock.name, ())
        for file, sha256 in files(url, requirement)
    ]
    lock.with_suffix(".hashes").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if "--print" in sys.argv:
        print(*hashed(given), sep="\n")
    else:
        write(given)
