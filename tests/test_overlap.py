"""Duplicates and overlaps: what is the same problem, what shares most of its words, and what only sounds alike."""

import random

import pytest

from data_prep.overlap import MIN_RUNS, WORDS, Overlap, equal, fingerprint, shared, short_hash

TALE = "A train leaves the station at noon and travels north at a constant speed until it meets another train"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("Find $x$.", "find x"),
        ("Find  $x$\n", "Find $x$"),
        (r"\left( \dfrac{1}{2} \right)", r"(\frac12)"),
        (r"a\,b\;c\quad d", "abcd"),
        (r"$1{,}000$", "1,000"),
        ("\ufb01nd x", "find x"),  # the ligature fi, in NFKC two letters
    ],
)
def test_two_writings_of_one_problem_have_one_fingerprint(one, two):
    assert fingerprint(one) == fingerprint(two)


@pytest.mark.parametrize(
    ("one", "two"),
    [("2+3", "2+4"), (r"\leftarrow x", r"\rightarrow x"), (r"\lefteqn x", r"\righteqn x"), ("x^2", "x_2")],
)
def test_different_problems_keep_different_fingerprints(one, two):
    assert fingerprint(one) != fingerprint(two)


def test_a_short_hash_is_sixteen_digits_of_any_text():
    # blake2b of 8 bytes; a lone surrogate, which JSON can hold, is no error
    assert len(short_hash("x")) == 16 and short_hash("x") != short_hash("y")
    assert len(short_hash("\ud800")) == 16


def test_equal_gives_every_pair_of_places():
    assert equal(["a", "b", "a"], ["c", "a", "a"]) == [(0, 1), (0, 2), (2, 1), (2, 2)]


def test_the_share_is_of_the_shorter_texts_runs():
    # 19 words have 19 - 8 + 1 = 12 runs; with 4 other words in front all 12 are still there, and the text has 16
    assert len(TALE.split()) == 19
    assert shared([TALE], ["one two three four " + TALE], 0.1) == [Overlap(left=0, right=0, share=1.0)]
    # the last 4 words changed: runs that begin at words 0 to 7 stay, 8 of 12
    other = " ".join(TALE.split()[:-4]) + " five six seven eight"
    assert shared([TALE], [other], 0.1) == [Overlap(left=0, right=0, share=pytest.approx(8 / 12))]
    assert shared([TALE], [other], 0.7) == []


def test_repeated_runs_count_once():
    text = " ".join(["a b c d e f g h"] * 3)  # 17 places but 8 different runs
    assert shared([text], [text], 0.5) == [Overlap(left=0, right=0, share=1.0)]


def test_case_and_punctuation_do_not_matter_but_words_do():
    assert shared([TALE.upper() + "!"], [TALE.replace(" ", " $\\,$ ")], 0.99) == [Overlap(left=0, right=0, share=1.0)]


def test_short_texts_are_never_alike_by_runs():
    words = TALE.split()[: WORDS + MIN_RUNS - 2]  # one run too few
    assert shared([" ".join(words)], [TALE], 0.1) == []
    assert len(shared([" ".join(TALE.split()[: WORDS + MIN_RUNS - 1])], [TALE], 0.1)) == 1


@pytest.mark.parametrize(("left", "right"), [([], []), ([TALE], []), ([], [TALE]), ([""], [""]), (["a b"], ["c"])])
def test_nothing_to_compare_is_no_overlap(left, right):
    assert shared(left, right, 0.1) == []


def test_shares_match_sets_of_runs_counted_one_by_one():
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=rng.randint(5, 60))) for _ in range(60)]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}

    left, right = texts[:30], texts[30:]
    expected = {}
    for one, text in enumerate(left):
        for two, other in enumerate(right):
            shorter = min(len(runs(text)), len(runs(other)))
            share = len(runs(text) & runs(other)) / shorter if shorter >= MIN_RUNS else 0.0
            if share >= 0.01:
                expected[one, two] = pytest.approx(share)
    found = {(each.left, each.right): each.share for each in shared(left, right, 0.01)}
    assert found == expected and len(expected) > 5
