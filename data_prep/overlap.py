"""Which problems are the same, and which are nearly the same: duplicates, and contamination of evaluation sets.

Two measures. `fingerprint` is a problem's text without what does not change it (white space, dollar signs, case,
LaTeX spacing): equal fingerprints are one problem. `shared` finds texts that have many of their runs of WORDS words in
common, which is what remains when a problem was reformatted, or a figure or a whole story was used again.

The share is taken of the shorter text. A phrase that half of all competition problems end with ("where m and n are
relatively prime positive integers. Find m + n.") is thus a small share of both. A large share alone does not make two
problems the same, though: MATH is full of templates with other numbers, and other answers.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

WORDS = 8
"""Words in a run."""
MIN_RUNS = 6
"""Texts with fewer runs are compared by fingerprint only: a short phrase in common says nothing."""

_SAME = ((re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"), (re.compile(r"\\(?:left|right)(?![a-z])"), ""))
_SPACE = re.compile(r"\\(?:quad|qquad|displaystyle)(?![a-z])|\\[,;:! \\]")
_UNSEEN = str.maketrans("", "", "$~{} \t\n\r\f\v\u00a0")
_WORD = re.compile(r"[a-z]+|\d+")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Text `left` of one list shares this much with text `right` of another."""

    left: int
    right: int
    share: float
    """Runs in common over the runs of the shorter text."""


def fingerprint(text: str) -> str:
    """What two writings of one problem have in common."""
    text = unicodedata.normalize("NFKC", text).lower()
    if "\\" in text:
        for pattern, replacement in (*_SAME, (_SPACE, "")):
            text = pattern.sub(replacement, text)
    return text.translate(_UNSEEN).rstrip(".?:")


def short_hash(text: str) -> str:
    """16 hexadecimal digits that name a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def equal(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Every pair of places with equal fingerprints."""
    places: dict[str, list[int]] = {}
    for number, key in enumerate(right):
        places.setdefault(key, []).append(number)
    return [(one, two) for one, key in enumerate(left) for two in places.get(key, ())]


def shared(left: Sequence[str], right: Sequence[str], minimum: float) -> list[Overlap]:
    """Every pair of texts that share at least `minimum` of the shorter one's runs; ordered by pair.

    Runs are compared by 64-bit hashes; with a million of them a false match has probability 1e-8 or so.
    """
    vocabulary: dict[str, int] = {}
    runs = [_runs(texts, vocabulary) for texts in (left, right)]
    found = sorted((pair, share) for pair, share in _shares(*runs) if share >= minimum)
    return [Overlap(left=one, right=two, share=share) for (one, two), share in found]


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The different runs of a list of texts: hashes (R,) uint64 with their texts (R,) int64, and each text's number."""

    hashes: np.ndarray
    owners: np.ndarray
    counts: np.ndarray


def _runs(texts: Sequence[str], vocabulary: dict[str, int]) -> _Runs:
    words = [[vocabulary.setdefault(word, len(vocabulary)) for word in _WORD.findall(text.lower())] for text in texts]
    lengths = np.array([len(row) for row in words], dtype=np.int64)
    flat = _mixed(np.fromiter(chain.from_iterable(words), dtype=np.uint64, count=int(lengths.sum())))
    hashes = np.zeros(max(len(flat) - WORDS + 1, 0), dtype=np.uint64)
    for place in range(WORDS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + flat[place : place + len(hashes)]
    owners = np.repeat(np.arange(len(texts)), lengths)
    inside = owners[: len(hashes)] == owners[WORDS - 1 :]
    hashes, owners = _distinct(hashes[inside], owners[: len(hashes)][inside])
    return _Runs(hashes=hashes, owners=owners, counts=np.bincount(owners, minlength=len(texts)))


def _distinct(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each run of a text once, (R,), (R,) -> (D,), (D,)."""
    order = np.lexsort((hashes, owners))
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    return hashes[new], owners[new]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Scattered 64-bit values for small numbers (splitmix64, Steele et al. 2014), so that runs do not collide."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _shares(left: _Runs, right: _Runs) -> list[tuple[tuple[int, int], float]]:
    """Of every pair that has a run in common, the share of the shorter text."""
    order = np.argsort(right.hashes, kind="stable")
    hashes, owners = right.hashes[order], right.owners[order]
    first, last = (np.searchsorted(hashes, left.hashes, side=side) for side in ("left", "right"))
    times = last - first
    lefts = np.repeat(left.owners, times)
    places = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times) + np.repeat(first, times)
    pairs, common = np.unique(np.stack([lefts, owners[places]], axis=1), axis=0, return_counts=True)
    shorter = np.minimum(left.counts[pairs[:, 0]], right.counts[pairs[:, 1]])
    shares = np.where(shorter >= MIN_RUNS, common / np.maximum(shorter, 1), 0.0)
    return [((int(one), int(two)), float(share)) for (one, two), share in zip(pairs, shares, strict=True)]
