"""Reasoning-gym's palindrome task as train.parquet, test.parquet and card.json.

The letters of an item can be arranged into one or several palindromes; every one of them is right. The number N of
right answers is known exactly, which is what makes the task good for a study of diversity. It is kept as text: 42
letters can have more of them than an int64 can count.

Two traps are avoided. Reasoning-gym draws item i with seed + i, so train and test with neighbouring seeds share
nearly all items: here both come from one sequence, first the test items, then, after a gap, the train items. And
different items can have the same letters: no two items of the files do, within a file or across them.

    python -m data_prep.palindrome --out FOLDER
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from data_prep import schema, styles
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

DATA_SOURCE = "palindrome"
Style = Literal["letters", "question", "r1_boxed", "r1_answer"]
SEED_GAP = 10_000
"""Items left unused between the last test item and the first train item."""
MOST_LETTERS = 2000
"""Beyond this a count of right answers has more digits than Python turns into text."""


@dataclass(frozen=True, kw_only=True)
class PalindromeOptions:
    """What decides the bytes of the files."""

    train_size: int = option(2000, "items in train.parquet")
    test_size: int = option(64, "items in test.parquet; they depend on no other size")
    min_length: int = option(6, "smallest number of letters")
    max_length: int = option(8, "largest number of letters")
    min_valid: int = option(2, "items with fewer right answers than this are dropped")
    style: Style = option(
        "letters", "prompt: `letters` alone (for the tiny model), reasoning-gym's `question`, `r1_boxed` or `r1_answer`"
    )
    seed: int = option(1, "reasoning-gym's seed of the first item")

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size", "min_length", "min_valid"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"{getattr(self, name)} is below 1, the smallest possible.")
        if self.max_length < self.min_length:
            raise FieldError(
                "max_length", f"{self.max_length} is below min_length={self.min_length}. Raise max_length."
            )
        if self.max_length > MOST_LETTERS:
            raise FieldError("max_length", f"{self.max_length} is above {MOST_LETTERS}, the largest possible.")
        if self.seed < 0:
            raise FieldError("seed", f"Python draws the same numbers for {self.seed} and {-self.seed}. Use 0 or more.")
        if self.style not in get_args(Style):
            raise FieldError("style", f"{self.style!r} is not one of {', '.join(get_args(Style))}.")


@dataclass(kw_only=True)
class Split:
    """The rows of one file, and how many items were drawn and dropped on the way."""

    first: int
    """Reasoning-gym index of the first item drawn."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    drawn: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def num_palindromes(letters: str) -> int:
    """The number of different palindromes that use all of `letters`.

    N = floor(n/2)! / prod_c floor(n_c/2)! if at most one letter count n_c is odd (it gives the middle), otherwise 0.
    """
    counts = Counter(letters).values()
    if sum(count % 2 for count in counts) > 1:
        return 0
    return math.factorial(len(letters) // 2) // math.prod(math.factorial(count // 2) for count in counts)


def build(options: PalindromeOptions, folder: Path, progress: Progress = print_progress) -> None:
    """Writes train.parquet, test.parquet and card.json into an existing folder.

    Raises ValueError if the options allow fewer different items than asked for.
    """
    seen: set[str] = set()
    total = options.test_size + options.train_size
    test = _draw("test", options.test_size, 0, seen, options)
    progress(options.test_size, total, f"{len(test.rows)} test items of {test.drawn} drawn")

    def told(done: int, drawn: int) -> None:
        progress(options.test_size + done, total, f"{done} train items of {drawn} drawn")

    train = _draw("train", options.train_size, test.drawn + SEED_GAP, seen, options, told)
    for name, split in (("test", test), ("train", train)):
        write_parquet(split.rows, folder / f"{name}.parquet")
    (folder / "card.json").write_text(json.dumps(_card(options, folder, test, train), indent=2) + "\n")
    progress(total, total, "train.parquet, test.parquet and card.json written")


def planned(options: PalindromeOptions, data_root: Path) -> Path:
    """The folder of these options; nothing is built."""
    made_by = (Path(__file__), Path(styles.__file__), Path(schema.__file__))
    return planned_folder("palindrome", options, made_by, data_root, packages=("reasoning-gym",))


def cache(options: PalindromeOptions, data_root: Path, progress: Progress = print_progress) -> Path:
    """The folder under `data_root` with the files of these options, built if it is not there."""
    return cached_folder(planned(options, data_root), lambda out: build(options, out, progress))


def _draw(
    split: str,
    size: int,
    first: int,
    seen: set[str],
    options: PalindromeOptions,
    told: Callable[[int, int], None] = lambda done, drawn: None,
) -> Split:
    """Takes items from index `first` on until `size` are accepted; adds their letters to `seen`.

    `told` is called with the items accepted and drawn, after each tenth of them.
    """
    result = Split(first=first)
    limit = 10_000 + 100 * size
    for item in _items(first, limit, options):
        result.drawn += 1
        reason = _objection(item, seen, options)
        if reason:
            result.dropped[reason] += 1
            continue
        result.rows.append(_row(item, split, len(result.rows), options.style))
        if len(result.rows) % math.ceil(size / 10) == 0:
            told(len(result.rows), result.drawn)
        if len(result.rows) == size:
            return result
    raise ValueError(
        f"{size} different {split} items of {options.min_length} to {options.max_length} letters with at least "
        f"{options.min_valid} right answers were asked for, but {limit} draws gave {len(result.rows)}. "
        "Ask for fewer, raise max_length, or lower min_valid."
    )


def _objection(item: Mapping[str, Any], seen: set[str], options: PalindromeOptions) -> str:
    """Why the item is dropped, or "" and its letters are in `seen`."""
    letters = "".join(sorted(item["metadata"]["letters"]))
    if num_palindromes(letters) < options.min_valid:
        return f"fewer than {options.min_valid} right answers"
    if letters in seen:
        return "same letters as an earlier item"
    seen.add(letters)
    return ""


def _items(first: int, limit: int, options: PalindromeOptions) -> Iterator[dict[str, Any]]:
    """Reasoning-gym's own items, drawn with the seeds seed + first, seed + first + 1, ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports, at its first compilation
        import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "palindrome_generation",
        seed=options.seed,
        size=first + limit,
        min_length=options.min_length,
        max_length=options.max_length,
    )
    return (dataset[index] for index in range(first, first + limit))


def _row(item: Mapping[str, Any], split: str, index: int, style: str) -> dict[str, Any]:
    letters = "".join(item["metadata"]["letters"])
    meta = {"letters": letters, "length": len(letters), "source_index": item["metadata"]["source_index"]}
    return make_row(
        data_source=DATA_SOURCE,
        prompt=styles.prompt_text(letters, item["question"], style),
        ability="palindrome",
        ground_truth=item["answer"],
        split=split,
        index=index,
        num_valid=str(num_palindromes(letters)),
        meta=meta | styles.form_of(style),
    )


def _card(options: PalindromeOptions, folder: Path, test: Split, train: Split) -> dict[str, Any]:
    return {
        "task": "palindrome_generation of reasoning-gym",
        "generator": f"reasoning-gym {version('reasoning-gym')}",
        "licence": "Apache-2.0 (reasoning-gym)",
        "options": asdict(options),
        "files": {
            f"{name}.parquet": _file_card(folder / f"{name}.parquet", split, options.seed)
            for name, split in (("train", train), ("test", test))
        },
    }


def _file_card(path: Path, split: Split, seed: int) -> dict[str, Any]:
    answers = [int(row["extra_info"]["num_valid"]) for row in split.rows]
    lengths = Counter(len(row["reward_model"]["ground_truth"]) for row in split.rows)
    return {
        "sha256": sha256_of(path),
        "rows": len(split.rows),
        "drawn": split.drawn,
        "dropped": dict(split.dropped),
        "item_seeds": [seed + split.first, seed + split.first + split.drawn - 1],
        "rows_by_length": {str(length): lengths[length] for length in sorted(lengths)},
        "right_answers": {
            name: _count(value)
            for name, value in (
                ("min", min(answers)),
                ("median", sorted(answers)[len(answers) // 2]),
                ("max", max(answers)),
            )
        },
    }


def _count(value: int) -> int | str:
    """A number that JSON readers keep exactly, as text beyond 2^53."""
    return value if value <= 2**53 else str(value)


def main() -> None:
    """The command line."""
    print(run_builder(PalindromeOptions, "Reasoning-gym's palindrome task as parquet files for verl.", build))


if __name__ == "__main__":
    main()
