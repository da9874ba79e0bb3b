"""Small skills beside palindromes: what the tiny model can do and a run does not train, so that it can be forgotten.

Each skill is a task of reasoning-gym with a compact prompt that no palindrome's letters can be confused with:

    spell_backward    <planet      tenalp         words of 3 to 6 letters
    number_sorting    +4171        1147           3 to 6 digits, + upwards, - downwards

test.parquet has data_source `skill/<name>`; a run that validates on it logs `retention/<name>`. A hash of the prompt
decides whether an item is for tests or for demonstrations: whatever the seeds, no demonstration is ever tested.

    python -m data_prep.skills --out FOLDER --skill spell_backward
"""

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
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

Style = Literal["compact", "question", "r1_boxed", "r1_answer"]
TEST_SHARE = 5
"""One item of so many is for tests."""


@dataclass(frozen=True, kw_only=True)
class Skill:
    """A task of reasoning-gym, cut to items that a tiny model can learn."""

    name: str
    """Also reasoning-gym's name of it."""
    config: Mapping[str, Any]
    """reasoning-gym's options."""
    compact: Callable[[Mapping[str, Any]], tuple[str, str]]
    """The compact prompt of an item and its answer, from reasoning-gym's metadata."""
    form: re.Pattern[str]
    """What a compact prompt must look like; other items are left out."""
    answer_length: int
    """Characters of the longest answer."""

    @property
    def data_source(self) -> str:
        return f"skill/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question and its only right answer, compact and in reasoning-gym's words."""

    prompt: str
    answer: str
    question: str
    full_answer: str
    index: int
    """reasoning-gym's."""


def _backward(metadata: Mapping[str, Any]) -> tuple[str, str]:
    return "<" + metadata["word"], metadata["word"][::-1]


def _sorting(metadata: Mapping[str, Any]) -> tuple[str, str]:
    given, found = (
        "".join(str(int(float(number))) for number in metadata[key]) for key in ("original_numbers", "sorted_numbers")
    )
    return ("+" if metadata["direction"] == "ascending" else "-") + given, found


SKILLS: Mapping[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill(
            name="spell_backward",
            config={"min_word_len": 3, "max_word_len": 6},
            compact=_backward,
            form=re.compile(r"<[a-z]{3,6}"),
            answer_length=6,
        ),
        Skill(
            name="number_sorting",
            config={"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 9},
            compact=_sorting,
            form=re.compile(r"[-+]\d{3,6}"),
            answer_length=6,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class SkillOptions:
    """What decides the bytes of the files."""

    skill: str = option("spell_backward", f"one of {', '.join(SKILLS)}")
    size: int = option(64, "items in test.parquet, all different")
    style: Style = option(
        "compact", "prompt: `compact` (for the tiny model), reasoning-gym's `question`, `r1_boxed` or `r1_answer`"
    )
    seed: int = option(1, "reasoning-gym's seed of the first item")

    def __post_init__(self) -> None:
        check_skills("skill", (self.skill,))
        if self.size < 1:
            raise FieldError("size", f"{self.size} is below 1, the smallest possible.")
        if self.seed < 0:
            raise FieldError("seed", f"Python draws the same numbers for {self.seed} and {-self.seed}. Use 0 or more.")
        if self.style not in get_args(Style):
            raise FieldError("style", f"{self.style!r} is not one of {', '.join(get_args(Style))}.")


def check_skills(field: str, names: tuple[str, ...]) -> None:
    """Raises FieldError about `field` for a name that is no skill, or is there twice."""
    for name in names:
        if name not in SKILLS:
            raise FieldError(field, f"{name!r} is no built-in skill. Known: {', '.join(SKILLS)}.")
        if names.count(name) > 1:
            raise FieldError(field, f"{name!r} is there twice. Name it once.")


def build(options: SkillOptions, folder: Path, progress: Progress = print_progress) -> None:
    """Writes test.parquet and card.json into an existing folder.

    Raises ValueError if the skill has fewer different test items than asked for.
    """
    skill = SKILLS[options.skill]
    items = held_out(skill, options.size, options.seed)
    progress(1, 2, f"{len(items)} test items of {skill.name}")
    write_parquet(
        [_row(skill, item, index, options.style) for index, item in enumerate(items)], folder / "test.parquet"
    )
    (folder / "card.json").write_text(json.dumps(_card(skill, options, folder, items), indent=2) + "\n")
    progress(2, 2, "test.parquet and card.json written")


def planned(options: SkillOptions, data_root: Path) -> Path:
    """The folder of these options; nothing is built."""
    made_by = (Path(__file__), Path(styles.__file__), Path(schema.__file__))
    return planned_folder(f"skill-{options.skill}", options, made_by, data_root, packages=("reasoning-gym",))


def cache(options: SkillOptions, data_root: Path, progress: Progress = print_progress) -> Path:
    """The folder under `data_root` with the files of these options, built if it is not there."""
    return cached_folder(planned(options, data_root), lambda out: build(options, out, progress))


def held_out(skill: Skill, size: int, seed: int) -> list[Item]:
    """Different items for tests, the first ones of the seed's sequence."""
    limit = 10_000 + 100 * size
    found: dict[str, Item] = {}
    for item in _items(skill, seed, range(limit)):
        if is_for_tests(item.prompt):
            found.setdefault(item.prompt, item)
        if len(found) == size:
            return list(found.values())
    raise ValueError(
        f"{size} different test items of {skill.name} were asked for, but {limit} draws gave {len(found)}. Ask for "
        "fewer."
    )


def demonstrations(skill: Skill, size: int, seed: int) -> list[Item]:
    """Items to learn from, none of which any test has; they may repeat."""
    learned = (item for item in _items(skill, seed, itertools.count()) if not is_for_tests(item.prompt))
    return list(itertools.islice(learned, size))


def is_for_tests(prompt: str) -> bool:
    """Whether the item of this compact prompt is kept for tests."""
    return hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % TEST_SHARE == 0


def _items(skill: Skill, seed: int, indices: Iterable[int]) -> Iterator[Item]:
    """Those of reasoning-gym's items at these places that are in the skill's form; item i has the seed seed + i."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports, at its first compilation
        import reasoning_gym

    dataset = reasoning_gym.create_dataset(skill.name, seed=seed, size=2**31, **skill.config)
    for index in indices:
        entry = dataset[index]
        prompt, answer = skill.compact(entry["metadata"])
        if skill.form.fullmatch(prompt):
            texts = {"question": entry["question"], "full_answer": entry["answer"]}
            yield Item(prompt=prompt, answer=answer, index=index, **texts)


def _row(skill: Skill, item: Item, index: int, style: str) -> dict[str, Any]:
    return make_row(
        data_source=skill.data_source,
        prompt=styles.prompt_text(item.prompt, item.question, style),
        ability=skill.name,
        ground_truth=item.answer if style == "compact" else item.full_answer,
        split="test",
        index=index,
        num_valid="1",
        meta={"item": item.prompt, "source_index": item.index} | styles.form_of(style),
    )


def _card(skill: Skill, options: SkillOptions, folder: Path, items: list[Item]) -> dict[str, Any]:
    return {
        "task": f"{skill.name} of reasoning-gym with {dict(skill.config)}",
        "generator": f"reasoning-gym {version('reasoning-gym')}",
        "licence": "Apache-2.0 (reasoning-gym)",
        "options": asdict(options),
        "files": {"test.parquet": {"sha256": sha256_of(folder / "test.parquet"), "rows": len(items)}},
        "left_out": f"what is not of the form {skill.form.pattern}, repeats, and what demonstrations may use",
    }


def main() -> None:
    """The command line."""
    print(run_builder(SkillOptions, "A skill of reasoning-gym as a parquet file for verl.", build))


if __name__ == "__main__":
    main()
