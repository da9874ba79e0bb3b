"""The responses that plain verl dumped: which are training's and which validation's, and of which run.

A dump is what lies in one folder, a JSON line a response, a file a step (trainer.rollout_data_dir,
trainer.validation_data_dir). What verl writes into a line tells most:

    uid "pad..."       a row that verl added to fill a training batch: no sample
    uid "x_r_o"        output o of rollout r of prompt x; the last output is the rollout's response
    request_id         only of training dumps (verl's V0 trainer)
    reward             only of validation dumps, beside score
    step 0             validation before training
    prompts            differ between training's steps; validation has the same ones every time

Where the lines do not tell, the names of the folders do, and where they do not either, the user has to.
Files are read line by line and never held whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from klreg_verl.analysis.stock_logs import lines, number, whole

Kind = Literal["training", "validation"]
SESSION = re.compile(r"(.+)_(\d+)_(\d+)")
DIGITS = re.compile(r"\d+")
VALIDATION = re.compile(r"val(s|data|set|dumps?|gens?)?|valid\w*|eval\w*|test\w*|dev|heldout|holdout")
TRAINING = re.compile(r"train\w*|rollouts?|rollout\w+")
PLAIN_WORDS = {"data", "dump", "dumps", "dir", "generation", "generations", "gen", "sample", "samples", "output"}
PLAIN_WORDS |= {"outputs", "log", "logs", "step", "steps", "global", "iter", "results", "responses", "jsonl"}
"""Words of a folder's or a file's name that say neither the kind nor the run."""
STEP_FOLDER = re.compile(r"(global_?)?(step|iter)\w*?_?\d+")
STORED_BYTES = 4 * 2**20
"""Text of one step that a run folder keeps; of a larger dump the first whole prompts that fit."""
FIELDS = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.string()),
        ("sample", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("score", pa.float64()),
        ("valid", pa.bool_()),
        ("answer", pa.string()),
    ]
)


@dataclass(kw_only=True)
class Step:
    """What one step's responses add up to, without their texts."""

    files: dict[Path, None] = field(default_factory=dict)
    prompts: dict[bytes, int] = field(default_factory=dict)
    """Prompt's hash -> bytes of its responses."""
    samples: int = 0
    scored: int = 0
    score: float = 0.0
    judged: int = 0
    right: float = 0.0
    graded: bool = False
    """Whether an "acc" is neither 0 nor 1: then it is a score by another name."""
    padded: int = 0

    @property
    def mean_score(self) -> float | None:
        """Over the responses that have one."""
        return self.score / self.scored if self.scored else None

    @property
    def accuracy(self) -> float | None:
        """The share that the reward called right; None where it did not say so of every response."""
        return self.right / self.judged if self.judged == self.samples and self.judged else None


@dataclass(frozen=True, kw_only=True)
class Dump:
    """The steps of one folder."""

    place: str
    """The folder, and what all its files' names begin with, below the given folder."""
    steps: Mapping[int, Step]
    kind: Kind | None
    """None where neither the lines nor the names tell."""
    words: tuple[str, ...]
    """What the names say beside the kind: the run's name."""


def is_response(line: Mapping[str, Any]) -> bool:
    """Whether verl's dump wrote it."""
    return {"input", "output"} <= line.keys() and bool({"score", "step", "gts"} & line.keys())


def read_dumps(files: Iterable[Path], folder: Path) -> list[Dump]:
    """The dumps that these files make up."""
    places: dict[str, dict[int, Step]] = {}
    marks: dict[str, set[Kind]] = {}
    for path in files:
        place = _place(path, folder)
        _count(path, places.setdefault(place, {}), marks.setdefault(place, set()))
    return [
        Dump(place=place, steps=steps, kind=_of_lines(steps, marks[place]) or of_names(place), words=_words(place))
        for place, steps in places.items()
        if steps
    ]


def _place(path: Path, folder: Path) -> str:
    """The folder, and the words of the file's name beside its number."""
    named = re.split(r"[\W_]+", re.sub(r"\d+$", "", path.stem))
    words = "_".join(word for word in named if word and word.lower() not in PLAIN_WORDS)
    parts = [part for part in path.parent.relative_to(folder).parts if not STEP_FOLDER.fullmatch(part)]
    return Path(*parts, words).as_posix()


def _split(name: str) -> list[str]:
    """Words in lower case, numbers left out: "valDumps_v2" is val, dumps, v."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


# ---------------------------------------------------------------------------------------------------- the kind


def _of_lines(steps: Mapping[int, Step], marks: set[Kind]) -> Kind | None:
    if marks:
        return next(iter(marks)) if len(marks) == 1 else None
    if 0 in steps:
        return "validation"
    seen = [each.prompts.keys() for each in steps.values()]
    return "training" if any(one != seen[0] for one in seen) else None


def of_names(place: str) -> Kind | None:
    """By the words of the folder nearest to the files that has any: "val_rollouts" are validations."""
    for part in reversed(place.split("/")):
        words = _split(part)
        training = [word for word in words if TRAINING.fullmatch(word)]
        if any(VALIDATION.fullmatch(word) for word in words):
            return None if any(word.startswith("train") for word in training) else "validation"
        if training:
            return "training"
    return None


def _words(place: str) -> tuple[str, ...]:
    """The names without the words that say the kind or nothing."""
    parts = [re.split(r"[\W_]+", part) for part in place.split("/")]
    return tuple(word for part in parts for word in part if word and not _says_kind(word.lower()))


def _says_kind(word: str) -> bool:
    return word in PLAIN_WORDS or any(VALIDATION.fullmatch(each) or TRAINING.fullmatch(each) for each in _split(word))


# ---------------------------------------------------------------------------------------------------- lines


def _count(path: Path, steps: dict[int, Step], marks: set[Kind]) -> None:
    named = DIGITS.findall(path.stem)
    for step, line in _finals(path, int(named[-1]) if named else None):
        each = steps.setdefault(step, Step())
        each.files[path] = None
        if is_padding(line):
            each.padded += 1
            marks.add("training")
            continue
        marks |= {"training"} if "request_id" in line else set()
        marks |= {"validation"} if "reward" in line else set()
        _add(each, line)


def _add(each: Step, line: Mapping[str, Any]) -> None:
    each.samples += 1
    score, right = number(line.get("score")), number(line.get("acc"))
    if score is not None:
        each.scored, each.score = each.scored + 1, each.score + score
    if right is not None:
        each.judged, each.right, each.graded = each.judged + 1, each.right + right, each.graded or right not in (0, 1)
    key = _key(prompt_text(line))
    each.prompts[key] = each.prompts.get(key, 0) + len(str(line["output"]))


def _key(text: str) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def _finals(path: Path, named: int | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(step, line) of every response: of the outputs of one rollout the last, which verl writes last."""
    held: tuple[int, Mapping[str, Any]] | None = None
    for line in lines(path):
        step = whole(line.get("step")) if is_response(line) else None
        step = named if step is None and is_response(line) else step
        if step is None:
            continue
        if held is not None and not _same_rollout(held[1], line):
            yield held
        held = step, line
    if held is not None:
        yield held


def _same_rollout(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    one, other = (SESSION.fullmatch(str(line.get("uid", ""))) for line in (first, second))
    return bool(one and other) and one.group(1, 2) == other.group(1, 2)


def is_padding(line: Mapping[str, Any]) -> bool:
    """Whether verl added the row to fill a batch."""
    return str(line.get("uid", "")).startswith("pad")


def prompt_text(line: Mapping[str, Any]) -> str:
    """The prompt; a list of messages as its text."""
    value = line["input"]
    if isinstance(value, list) and all(isinstance(each, Mapping) and "content" in each for each in value):
        return "\n".join(str(each["content"]) for each in value)
    return str(value)


# ---------------------------------------------------------------------------------------------------- samples


def write_samples(step: int, found: Step, path: Path) -> bool:
    """One step's responses as a run folder stores them; whether all of them fitted.

    The reward's "acc" says which are right; without one that is not known. Two responses whose reward names no answer
    ("pred") are one answer where their texts are the same.
    """
    chosen, size = set[bytes](), 0
    for key, length in found.prompts.items():
        if not chosen or size + length <= STORED_BYTES:
            chosen.add(key)
            size += length
    rows = list(_rows(step, found, chosen))
    pq.write_table(pa.Table.from_pylist(rows, schema=FIELDS), path)
    return len(chosen) == len(found.prompts)


def _rows(step: int, found: Step, chosen: set[bytes]) -> Iterator[dict[str, Any]]:
    drawn: dict[str, int] = {}
    for path in found.files:
        named = DIGITS.findall(path.stem)
        for at, line in _finals(path, int(named[-1]) if named else None):
            prompt = prompt_text(line)
            if at != step or is_padding(line) or _key(prompt) not in chosen:
                continue
            uid = SESSION.fullmatch(str(line.get("uid", "")))
            group = uid.group(1) if uid else _key(prompt).hex()
            yield _row(step, group, drawn.get(group, 0), prompt, line)
            drawn[group] = drawn.get(group, 0) + 1


def _row(step: int, group: str, sample: int, prompt: str, line: Mapping[str, Any]) -> dict[str, Any]:
    response, right = str(line["output"]), number(line.get("acc"))
    valid = None if right is None else right > 0
    answer = str(line["pred"]) if line.get("pred") is not None else _key(response).hex()
    texts = {"group": group, "prompt": prompt, "response": response, "answer": answer if valid else ""}
    return {
        "step": step,
        "sample": sample,
        "score": number(line.get("score")),
        "valid": valid,
        **{name: text.encode(errors="replace").decode() for name, text in texts.items()},
    }


def twice(dumps: Sequence[Dump]) -> str | None:
    """Where two files have the same step of one kind; None where none do."""
    seen: dict[tuple[Kind | None, int], Path] = {}
    for dump in dumps:
        for step, path in [(step, path) for step, each in dump.steps.items() for path in each.files]:
            first = seen.setdefault((dump.kind, step), path)
            if first != path:
                return f"{first} and {path} both have step {step} of {dump.kind}"
    return None
