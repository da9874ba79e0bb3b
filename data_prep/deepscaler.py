r"""DeepScaleR's mathematics as train.parquet, test.parquet, one file per evaluation set, and card.json.

From the Hugging Face Hub at pinned revisions, or from local JSON, JSONL or parquet files: the 40,315 problems as they
were released, or their component files (train/aime.json, train/math.json; test/ with AIME 2024, AMC, MATH-500, Minerva
and OlympiadBench). Rows have a problem and an answer; other fields are kept in `meta` where they say something.

What is left out, and counted with its reason in card.json:

    no problem, no answer        nothing to ask, or nothing to grade by
    the same problem again       by fingerprint (overlap.py); the first is kept
    several answers              the same problem with different answers: at least one is wrong, so none is kept
    of an evaluation set         a training problem that an evaluation set has too: the same fingerprint, or most of
                                 its words and the same answer
    longer than the limit        prompts over max_prompt_tokens of the tokenizer, in training and evaluation files

Evaluation sets stay as published, but for rows without an answer or over the limit; their duplicates and overlaps are
reported only, since numbers on them are compared with others' numbers.

    python -m data_prep.deepscaler --out FOLDER --source FILE_OR_FOLDER
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data_prep import golden, lengths, overlap, rewards, sources, styles
from data_prep.cache import (
    Progress,
    cached_folder,
    option,
    planned_folder,
    print_progress,
    run_builder,
    sha256_of,
)
from data_prep.schema import make_row, write_parquet
from klreg_verl.experiment.strict import FieldError

DATA_SOURCE = "deepscaler"
Style = Literal["deepscaler", "r1", "question"]
SUFFIXES: dict[str, str] = {
    "deepscaler": r"Let's think step by step and output the final answer within \boxed{}.",
    "r1": styles.INSTRUCTIONS["boxed"],
    "question": "",
}
"""What each style appends to the problem; "deepscaler" is what the published run trained with."""
PROBLEM_FIELDS = ("problem", "question")
ANSWER_FIELDS = ("answer", "final_answer", "ground_truth")
DETAILS = ("difficulty", "type", "subject", "subfield", "level", "year", "unique_id", "unit")
"""Fields of a source that `meta` keeps."""
EXAMPLES = 20
"""Dropped rows that the card names, per reason."""
IN_SET = "of an evaluation set"
STAGES = 6
LICENCES = {
    DATA_SOURCE: "MIT (agentica-org/DeepScaleR-Preview-Dataset); texts of AIME and AMC problems: Mathematical "
    "Association of America; MATH: MIT",
    "aime24": "texts: Mathematical Association of America",
    "amc": "texts: Mathematical Association of America",
    "math500": "MIT (MATH)",
    "minerva": "from MIT OpenCourseWare: see its terms",
    "olympiad_bench": "see OlympiadBench",
}


@dataclass(frozen=True, kw_only=True)
class DeepScaleROptions:
    """What decides the bytes of the files, together with the bytes of what they are made from."""

    source: str = option(sources.HUB, "`hub`, or a JSON, JSONL or parquet file, or a folder of them")
    evaluation: str = option("", "file or folder of evaluation sets; empty: those that come with the source")
    test_sets: tuple[str, ...] = option((), "evaluation sets that test.parquet joins; none: all there are")
    test_size: int = option(256, "rows of train held out as test.parquet where there is no evaluation set")
    train_size: int = option(0, "rows in train.parquet, drawn at random; 0: all")
    style: Style = option("deepscaler", "what follows the problem: the published run's words, DeepSeek's, or nothing")
    contaminated: Literal["drop", "keep"] = option("drop", "training problems that an evaluation set has too")
    overlap: float = option(0.5, f"share of {overlap.WORDS}-word runs from which two problems are compared")
    tokenizer: str = option("", "model folder, Hugging Face id[@revision] or `tiny`; empty: lengths are not limited")
    max_prompt_tokens: int = option(1024, "longer prompts are dropped, as `tokenizer` renders them")
    seed: int = option(1, "of what is held out and of a train_size")

    def __post_init__(self) -> None:
        for name, least in (("test_size", 1), ("train_size", 0), ("max_prompt_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise FieldError(name, f"{getattr(self, name)} is below {least}, the smallest possible.")
        for name, choices in (("style", get_args(Style)), ("contaminated", ("drop", "keep"))):
            if getattr(self, name) not in choices:
                raise FieldError(name, f"{getattr(self, name)!r} is not one of {', '.join(choices)}.")
        if not 0 < self.overlap <= 1:
            raise FieldError("overlap", f"{self.overlap} is no share. Give more than 0, at most 1.")
        if not self.source:
            raise FieldError("source", f"is empty. Give `{sources.HUB}`, a file or a folder.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem with an answer."""

    origin: str
    """Stem of its file."""
    place: int
    """Its row there."""
    text: str
    answer: str
    """As golden.golden_text writes it."""
    key: str
    """overlap.fingerprint of the text."""
    details: Mapping[str, Any]


@dataclass(kw_only=True)
class Ledger:
    """What was dropped: how many for each reason, and the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def drop(self, reason: str, origin: str, place: int, **why: Any) -> None:
        """Counts one row; `why` goes beside its place into the examples."""
        self.counts[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES:
            kept.append({"file": origin, "row": place, **why})

    def lines(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items())) or "nothing"


@dataclass(kw_only=True)
class Split:
    """The problems of one file to write, and what was left out on the way."""

    problems: list[Problem]
    read: int
    ledger: Ledger
    notes: dict[str, Any] = field(default_factory=dict)
    """Findings that dropped nothing."""


def build(options: DeepScaleROptions, folder: Path, progress: Progress = print_progress) -> None:
    """Writes the parquet files and card.json into an existing folder.

    Raises ValueError that says what is wrong with the options or the source; OSError where the Hub cannot be reached.
    """
    files = _files(options)
    train, sets = _load(files.train), {name: _load([path]) for name, path in sorted(files.sets.items())}
    progress(1, STAGES, f"{train.read} training rows and {sum(s.read for s in sets.values())} evaluation rows read")
    _drop_repeated(train)
    progress(2, STAGES, f"duplicates: {train.ledger.lines()} dropped so far")
    _compare(train, sets, options)
    progress(3, STAGES, _overlap_text(train))
    for split in (train, *sets.values()):
        _drop_long(split, options)
    progress(4, STAGES, f"{_over(train, sets)} prompts over the token limit")
    outputs = _outputs(train, sets, options)
    for name, rows in outputs.items():
        write_parquet(rows, folder / f"{name}.parquet")
    progress(5, STAGES, ", ".join(f"{len(rows)} rows in {name}" for name, rows in outputs.items()))
    card = _card(options, files, folder, {DATA_SOURCE: train, **sets}, outputs)
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    progress(STAGES, STAGES, f"card.json written; of the training rows {train.ledger.lines()} dropped")


def _overlap_text(train: Split) -> str:
    found = [entry["same_problem"] for entry in train.notes["overlaps"]]
    return f"{sum(found)} training problems are in evaluation sets, {len(found) - sum(found)} are much like one there"


def planned(options: DeepScaleROptions, data_root: Path) -> Path:
    """The folder of these options and of the bytes of their source; nothing is fetched or built.

    Raises ValueError if the source is local and not there.
    """
    here = Path(__file__)
    modules = [here.with_name(f"{name}.py") for name in ("golden", "lengths", "overlap", "schema", "sources", "styles")]
    made_of = (here, *modules, *_local(options), *_tokenizer_files(options))
    return planned_folder(DATA_SOURCE, options, made_of, data_root)


def cache(options: DeepScaleROptions, data_root: Path, progress: Progress = print_progress) -> Path:
    """The folder under `data_root` with the files of these options, built if it is not there."""
    return cached_folder(planned(options, data_root), lambda out: build(options, out, progress))


def _files(options: DeepScaleROptions) -> sources.Files:
    if options.source == sources.HUB:
        return sources.hub_files(options.evaluation)
    return sources.local_files(options.source, options.evaluation)


def _local(options: DeepScaleROptions) -> tuple[Path, ...]:
    """The local files that are read."""
    if options.source != sources.HUB:
        return sources.local_files(options.source, options.evaluation).all
    return tuple(sources.evaluation_sets(options.evaluation).values()) if options.evaluation else ()


def _tokenizer_files(options: DeepScaleROptions) -> list[Path]:
    if options.tokenizer == lengths.TINY:
        return [Path(__file__).with_name("tiny_model.py")]
    folder = Path(options.tokenizer or "-").expanduser()
    names = (*lengths.TOKENIZER_FILES, "tokenizer_config.json", "chat_template.jinja")
    return [folder / name for name in names if (folder / name).is_file()]


# ---------------------------------------------------------------------------------------------------- reading


def _load(paths: Iterable[Path]) -> Split:
    """The problems of some files; rows without problem or answer are dropped."""
    split = Split(problems=[], read=0, ledger=Ledger())
    for path in paths:
        rows = sources.read_rows(path)
        _require_fields(path, rows)
        split.read += len(rows)
        found = (_problem(path.stem, place, row, split.ledger) for place, row in enumerate(rows))
        split.problems += [problem for problem in found if problem is not None]
    return split


def _require_fields(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The first row tells whether the file is one of problems at all."""
    if not rows:
        raise ValueError(f"{path} has no rows. Name a file with problems, or leave it out of the folder.")
    for wanted in (PROBLEM_FIELDS, ANSWER_FIELDS):
        if not any(name in row for name in wanted for row in rows):
            raise ValueError(
                f"{path}: no row has a field {' or '.join(map(repr, wanted))}; found: "
                f"{', '.join(map(str, rows[0])) or 'no fields'}. Rename the field that holds it."
            )


def _problem(origin: str, place: int, row: Mapping[str, Any], ledger: Ledger) -> Problem | None:
    text = next((row[name] for name in PROBLEM_FIELDS if row.get(name)), "")
    if not isinstance(text, str) or not text.strip():
        ledger.drop("no problem", origin, place)
        return None
    if text != text.encode(errors="replace").decode():
        ledger.drop("no Unicode text", origin, place, why="half of a character (a lone surrogate)")
        return None
    given = next((row[name] for name in ANSWER_FIELDS if row.get(name) is not None), None)
    try:
        answer = golden.golden_text(given)
    except ValueError as error:
        ledger.drop("no usable answer", origin, place, why=str(error))
        return None
    if not answer:
        ledger.drop("no answer", origin, place, given=str(given))
        return None
    details = {name: row[name] for name in DETAILS if isinstance(row.get(name), str | int | float)}
    text, key = text.strip(), overlap.fingerprint(text)
    return Problem(origin=origin, place=place, text=text, answer=answer, key=key, details=details)


# ---------------------------------------------------------------------------------------------------- dropping


def _drop_repeated(split: Split) -> None:
    """Keeps the first of each problem, and none where its copies disagree about the answer."""
    copies: dict[str, list[Problem]] = {}
    for problem in split.problems:
        copies.setdefault(problem.key, []).append(problem)
    split.problems = []
    for same in copies.values():
        answers = sorted({_canonical(problem.answer) for problem in same})
        if len(answers) == 1:
            split.problems.append(same[0])
        reason = "of a problem with several answers" if len(answers) > 1 else "of a problem seen before"
        for problem in same if len(answers) > 1 else same[1:]:
            first = f"{same[0].origin}:{same[0].place}"
            split.ledger.drop(reason, problem.origin, problem.place, answer=problem.answer, first=first)


def _canonical(answer: str) -> str:
    """Answers that differ in writing only become one: 097 and 97, 83^\\circ and 83, \\dfrac and \\frac."""
    if re.fullmatch(r"-?\d+\.\d+", answer):
        answer = answer.rstrip("0").rstrip(".")
    text = overlap.fingerprint(re.sub(r"\^?\\(circ|degree|%)|\\text|,\\!|(?<=\d),(?=\d{3}(?!\d))", "", answer))
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def _compare(train: Split, sets: Mapping[str, Split], options: DeepScaleROptions) -> None:
    """Finds training problems that evaluation sets have, drops them if asked to, and reports what sets have twice."""
    pooled = [(name, problem) for name, split in sets.items() for problem in split.problems]
    evaluated = [problem for _, problem in pooled]
    found = _overlaps(train.problems, evaluated, options.overlap)
    train.notes["overlaps"] = [
        _overlap_card(train.problems[one], *pooled[two], how) for (one, two), how in found.items()
    ]
    if options.contaminated == "drop":
        _drop_places(train, {one: pooled[two][0] for (one, two), how in found.items() if how.same}, IN_SET)
    for (one, two), how in _overlaps(evaluated, evaluated, options.overlap).items():
        if one < two:
            noted = sets[pooled[one][0]].notes.setdefault("overlaps", [])
            noted.append(_overlap_card(evaluated[one], *pooled[two], how))


@dataclass(frozen=True, kw_only=True)
class _How:
    """How two problems overlap."""

    share: float
    same_answer: bool
    same: bool
    """One problem in both: the same fingerprint, or a large share and the same answer."""


def _overlaps(left: Sequence[Problem], right: Sequence[Problem], minimum: float) -> dict[tuple[int, int], _How]:
    """Every pair with equal fingerprints or a share of at least `minimum`, in order."""
    if not left or not right:
        return {}
    texts = ([problem.text for problem in side] for side in (left, right))
    shares = {(found.left, found.right): found.share for found in overlap.shared(*texts, minimum)}
    equal = set(overlap.equal([problem.key for problem in left], [problem.key for problem in right]))
    pairs = sorted(shares.keys() | equal)
    answers = [_canonical(left[one].answer) == _canonical(right[two].answer) for one, two in pairs]
    return {
        pair: _How(share=1.0 if pair in equal else shares[pair], same_answer=answer, same=answer or pair in equal)
        for pair, answer in zip(pairs, answers, strict=True)
    }


def _overlap_card(problem: Problem, name: str, other: Problem, how: _How) -> dict[str, Any]:
    place = {"file": problem.origin, "row": problem.place, "set": name, "set_row": other.place}
    return place | {"share": round(how.share, 3), "same_answer": how.same_answer, "same_problem": how.same}


def _drop_places(split: Split, places: Mapping[int, Any], reason: str) -> None:
    """Drops the problems at these places; the value of each goes into the examples."""
    for place, why in places.items():
        problem = split.problems[place]
        split.ledger.drop(reason, problem.origin, problem.place, why=why)
    split.problems = [problem for place, problem in enumerate(split.problems) if place not in places]


def _drop_long(split: Split, options: DeepScaleROptions) -> None:
    if not options.tokenizer:
        return
    prompts = [[{"role": "user", "content": _prompt(problem, options)}] for problem in split.problems]
    found = lengths.too_long(lengths.named_tokenizer(options.tokenizer), prompts, options.max_prompt_tokens)
    _drop_places(split, {place: f"{length} tokens" for place, length in found.items()}, _too_long(options))


def _too_long(options: DeepScaleROptions) -> str:
    return f"over {options.max_prompt_tokens} tokens"


def _over(train: Split, sets: Mapping[str, Split]) -> int:
    return sum(
        count
        for split in (train, *sets.values())
        for reason, count in split.ledger.counts.items()
        if reason.startswith("over ")
    )


# ---------------------------------------------------------------------------------------------------- writing


def _outputs(train: Split, sets: Mapping[str, Split], options: DeepScaleROptions) -> dict[str, list[dict[str, Any]]]:
    """The rows of each parquet file, by its stem."""
    rng = np.random.default_rng(options.seed)
    problems, rows = train.problems, {}
    if sets:
        _check_test_sets(options.test_sets, sets)
        rows = {name: _rows(split.problems, name, "test", options) for name, split in sets.items()}
        rows["test"] = [row for name in (options.test_sets or sets) for row in rows[name]]
    else:
        held_out, problems = _held_out(problems, options, rng)
        rows["test"] = _rows(held_out, DATA_SOURCE, "test", options)
    rows["train"] = _rows(_some(problems, options.train_size, rng), DATA_SOURCE, "train", options)
    if not rows["train"] or not rows["test"]:
        empty = "train" if not rows["train"] else "test"
        raise ValueError(
            f"No rows are left for {empty}.parquet; dropped: {train.ledger.lines()}. Raise max_prompt_tokens, or give "
            "another source."
        )
    return rows


def _check_test_sets(wanted: Sequence[str], sets: Mapping[str, Split]) -> None:
    for name in wanted:
        if name not in sets:
            raise FieldError("test_sets", f"there is no evaluation set {name!r}. Found: {', '.join(sets)}.")


def _held_out(
    problems: list[Problem], options: DeepScaleROptions, rng: np.random.Generator
) -> tuple[list[Problem], list[Problem]]:
    """Test and training problems, in their order, where there is no evaluation set."""
    if options.test_sets:
        raise FieldError("test_sets", "this source has no evaluation sets. Name them with `evaluation`.")
    if len(problems) <= options.test_size:
        raise FieldError(
            "test_size", f"{options.test_size} rows cannot be held out of {len(problems)}. Give fewer than that."
        )
    chosen = set(rng.permutation(len(problems))[: options.test_size].tolist())
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    for place, problem in enumerate(problems):
        parts[place not in chosen].append(problem)
    return parts


def _some(problems: list[Problem], size: int, rng: np.random.Generator) -> list[Problem]:
    """`size` of the problems in their order, all for 0."""
    if size == 0:
        return problems
    if size > len(problems):
        raise FieldError("train_size", f"{size} rows are more than the {len(problems)} there are. Give fewer, or 0.")
    return [problems[place] for place in sorted(rng.permutation(len(problems))[:size])]


def _prompt(problem: Problem, options: DeepScaleROptions) -> str:
    suffix = SUFFIXES[options.style]
    return f"{problem.text} {suffix}" if suffix else problem.text


def _rows(problems: Iterable[Problem], name: str, split: str, options: DeepScaleROptions) -> list[dict[str, Any]]:
    return [
        make_row(
            data_source=name,
            prompt=_prompt(problem, options),
            ability="math",
            ground_truth=problem.answer,
            split=split,
            index=index,
            meta={
                "id": overlap.short_hash(problem.key),
                "file": problem.origin,
                "row": problem.place,
                "answer_format": "boxed",
                rewards.PROBLEM: problem.text,
                **problem.details,
            },
        )
        for index, problem in enumerate(problems)
    ]


def _card(
    options: DeepScaleROptions,
    files: sources.Files,
    folder: Path,
    splits: Mapping[str, Split],
    outputs: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    return {
        "task": "mathematics: DeepScaleR and evaluation sets",
        "options": asdict(options),
        "made_with": {"pyarrow": version("pyarrow")},
        "sources": {path.parent.name + "/" + path.name: {"sha256": sha256_of(path)} for path in files.all},
        "licence": {name: LICENCES.get(name, "as its source says") for name in splits},
        "licence_file": _licence_card(files.licence),
        "read": {name: _split_card(split) for name, split in splits.items()},
        "files": {
            f"{name}.parquet": {"sha256": sha256_of(folder / f"{name}.parquet"), "rows": len(rows)}
            for name, rows in outputs.items()
        },
    }


def _licence_card(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return {"first_line": next((line.strip() for line in lines if line.strip()), ""), "sha256": sha256_of(path)}


def _split_card(split: Split) -> dict[str, Any]:
    answers = [problem.answer for problem in split.problems]
    return {
        "read": split.read,
        "kept": len(split.problems),
        "dropped": dict(sorted(split.ledger.counts.items())),
        "examples": split.ledger.examples,
        "overlaps": split.notes.get("overlaps", []),
        "answers": {
            "numbers": sum(map(golden.is_number, answers)),
            "with_alternatives": sum(len(golden.alternatives(answer)) > 1 for answer in answers),
            "longest": max(map(len, answers), default=0),
        },
    }


def main() -> None:
    """The command line."""
    print(run_builder(DeepScaleROptions, "DeepScaleR's mathematics as parquet files for verl.", build))


if __name__ == "__main__":
    main()
