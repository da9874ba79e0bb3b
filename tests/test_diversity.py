"""klreg_verl.core.diversity: counts by hand, closed forms against brute force, and data that contradicts itself."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from klreg_verl.core import diversity
from klreg_verl.core.diversity import (
    Answers,
    distinct_n,
    mean_cosine,
    rarefied_distinct,
    rarefied_entropy,
    self_bleu,
    solutions,
    uniform_distinct,
    unique_valid,
    vendi,
    with_enough,
)


def test_distinct_valid_answers_are_counted_per_prompt_and_averaged():
    # prompt 3: abba twice and baab, so 2 of 2; prompt 8: one valid of 4, the other answer is wrong
    found = unique_valid(
        answers=["abba", "aca", "abba", "baab", "xyz"],
        valid=[True, True, True, True, False],
        group_ids=[3, 8, 3, 3, 8],
        num_possible=[2, 4, 2, 2, 4],
    )
    assert found == {"diversity/unique_valid": 1.5, "diversity/coverage": (2 / 2 + 1 / 4) / 2}


def test_a_prompt_without_valid_answers_counts_as_zero():
    found = unique_valid(["a", "b"], [True, False], [0, 1], [1, 1])
    assert found == {"diversity/unique_valid": 0.5, "diversity/coverage": 0.5}


def test_coverage_is_over_prompts_whose_number_is_known():
    found = unique_valid(["a", "b"], [True, True], [0, 1], [None, 4])
    assert found == {"diversity/unique_valid": 1.0, "diversity/coverage": 0.25}
    assert unique_valid(["a"], [True], [0], [None]) == {"diversity/unique_valid": 1.0}


def test_nothing_to_average_gives_no_key():
    assert unique_valid([], [], [], []) == {}


def test_tensors_are_taken_as_they_come_from_the_trainer():
    found = unique_valid(["a", "b"], torch.tensor([True, True]), torch.tensor([5, 5]), [4, 4])
    assert found == {"diversity/unique_valid": 2.0, "diversity/coverage": 0.5}


def test_the_same_answer_to_two_prompts_counts_for_both():
    assert unique_valid(["a", "a"], [True, True], [0, 1], [None, None]) == {"diversity/unique_valid": 1.0}


def test_more_answers_than_possible_show_as_a_coverage_above_one():
    assert unique_valid(["a", "A"], [True, True], [7, 7], [1, 1])["diversity/coverage"] == 2.0


def test_less_than_one_possible_answer_is_refused():
    with pytest.raises(ValueError, match=r"Prompt 7 is said to have 0 valid answers. Give at least 1, or None"):
        unique_valid(["a"], [False], [7], [0])


def test_responses_to_one_prompt_must_agree_on_the_number():
    with pytest.raises(ValueError, match=r"prompt 7 state different numbers of valid answers: 1, 2"):
        unique_valid(["a", "a"], [True, True], [7, 7], [1, 2])


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        unique_valid(["a"], [True, False], [0, 0], [1, 1])


# ---------------------------------------------------------------------------------------------------- rarefaction


def drawn_subsets(counts: tuple[int, ...], wrong: int, at: int) -> list[tuple[int | None, ...]]:
    """Every choice of `at` of the draws: answers by number, None for a wrong one."""
    draws = [answer for answer, count in enumerate(counts) for _ in range(count)] + [None] * wrong
    return list(itertools.combinations(draws, at))


@pytest.mark.parametrize(("counts", "wrong"), [((3, 1, 1), 0), ((2, 2), 3), ((5,), 1), ((), 4)])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_rarefied_distinct_is_the_mean_over_all_subsets(counts, wrong, at):
    subsets = drawn_subsets(counts, wrong, at)
    expected = np.mean([len(set(subset) - {None}) for subset in subsets])
    assert rarefied_distinct(counts, sum(counts) + wrong, at) == pytest.approx(expected)


@pytest.mark.parametrize("counts", [(3, 1, 1), (2, 2), (5,), (4, 2, 1)])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_rarefied_entropy_is_the_mean_over_all_subsets(counts, at):
    def entropy(subset):
        shares = [count / at for count in Counter(subset).values()]
        return -sum(share * math.log(share) for share in shares)

    expected = np.mean([entropy(subset) for subset in drawn_subsets(counts, 0, at)])
    assert rarefied_entropy(counts, at) == pytest.approx(expected, abs=1e-12)


def test_rarefaction_removes_the_number_of_draws():
    # a uniform policy over 6 answers: 8 or 64 draws, rarefied to 4, both expect 6 (1 - (5/6)^4) = 3.106
    generator = np.random.default_rng(0)
    for drawn in (8, 64):
        samples = [
            rarefied_distinct(np.bincount(generator.integers(6, size=drawn)).tolist(), drawn, 4) for _ in range(2000)
        ]
        assert np.mean(samples) == pytest.approx(uniform_distinct(6, 4), abs=0.03)
    assert uniform_distinct(6, 4) == pytest.approx(6 * (1 - (5 / 6) ** 4))


def test_more_draws_than_there_were_are_refused():
    with pytest.raises(ValueError, match="5 of 4 draws: rarefaction needs at least 1 and at most as many"):
        rarefied_distinct([2, 2], 4, 5)


def test_uniform_draws_of_very_many_answers_are_all_distinct():
    assert uniform_distinct(math.factorial(200), 16) == 16.0
    assert uniform_distinct(1, 16) == 1.0


def test_solutions_by_hand():
    # prompt a: 4 draws, answers x x y, one wrong, N = 4; prompt b: 4 draws, all the same right one, N = 2
    prompts = [
        Answers(num_samples=4, counts=(2, 1), num_possible=4),
        Answers(num_samples=4, counts=(4,), num_possible=2),
    ]
    found = solutions(prompts, samples=4, valid_samples=2)
    assert found.accuracy == 7 / 8 and found.distinct == (2 + 1) / 2
    assert found.share_of_possible == (2 / 4 + 1 / 2) / 2
    # two right draws: xx 1 of 3, xy 2 of 3: (1 + 2 + 2) / 3; and always 1
    assert found.valid_distinct == pytest.approx((5 / 3 + 1) / 2)
    # uniform: 4 (1 - (3/4)^2) = 1.75 and 2 (1 - 1/4) = 1.5
    assert found.valid_share_of_uniform == pytest.approx((5 / 3 / 1.75 + 1 / 1.5) / 2)
    assert found.valid_entropy == pytest.approx((2 / 3 * math.log(2) + 0) / 2)
    assert (found.prompts, found.valid_prompts) == (2, 2)


def test_accuracy_alone_changes_no_conditional_measure():
    # the same right answers drawn with the same chances, 16 right of 16 and 4 right of 16: only the unconditional falls
    right = solutions([Answers(num_samples=16, counts=(8, 8), num_possible=2)], samples=8, valid_samples=2)
    half = solutions([Answers(num_samples=16, counts=(2, 2), num_possible=2)], samples=8, valid_samples=2)
    assert right.distinct > half.distinct
    # 1 + P(two right draws differ): 8 * 8 / C(16, 2) = 64 / 120; and 4 / C(4, 2) = 4 / 6, the same in expectation
    assert right.valid_distinct == pytest.approx(1 + 64 / 120) and half.valid_distinct == pytest.approx(1 + 4 / 6)


def test_prompts_with_one_right_answer_or_too_few_right_draws_are_left_out_and_counted():
    prompts = [
        Answers(num_samples=4, counts=(4,), num_possible=1),
        Answers(num_samples=4, counts=(1,), num_possible=6),
        Answers(num_samples=4, counts=(1, 1), num_possible=6),
    ]
    found = solutions(prompts, samples=4, valid_samples=2)
    assert (found.prompts, found.valid_prompts, found.valid_distinct) == (3, 1, 2.0)
    assert with_enough(dict(enumerate(prompts)), 2) == {2}


def test_no_prompts_have_no_means():
    found = solutions([], samples=4, valid_samples=2)
    assert math.isnan(found.accuracy) and math.isnan(found.valid_distinct) and found.prompts == 0


# ---------------------------------------------------------------------------------------------------- embeddings


def test_mean_cosine_equals_all_pairs():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 16)).astype(np.float32) * generator.uniform(0.1, 9, size=(40, 1))
    groups = generator.integers(5, size=40)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = mean_cosine(vectors, groups)
    within, across = {}, []
    for i, j in itertools.combinations(range(40), 2):
        cosine = float(units[i] @ units[j])
        if groups[i] == groups[j]:
            within.setdefault(groups[i], []).append(cosine)
        else:
            across.append(cosine)
    assert dict(zip(found.prompts, found.within.tolist(), strict=True)) == pytest.approx(
        {group: np.mean(each) for group, each in within.items()}
    )
    assert found.across == pytest.approx(np.mean(across)) and found.mean == pytest.approx(np.mean(found.within))


def test_groups_that_a_chunk_cuts_are_summed_over_the_cut():
    vectors = np.random.default_rng(0).normal(size=(diversity.CHUNK + 50, 4))
    groups = np.arange(len(vectors)) % 7
    whole = mean_cosine(vectors, groups).within
    apart = [mean_cosine(vectors[groups == group], groups[groups == group]).within[0] for group in range(7)]
    assert whole == pytest.approx(apart)


def test_prompts_are_averaged_not_pooled():
    # prompt a: cosine 1 from one pair; prompt b: cosine 0 from three pairs; mean 1/2, not 1/4
    vectors = np.array([[1.0, 0, 0], [2.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    found = mean_cosine(vectors, ["a", "a", "b", "b", "b"])
    assert found.prompts == ("a", "b") and found.mean == pytest.approx(0.5)


def test_a_prompt_of_one_response_has_no_pairs():
    found = mean_cosine(np.eye(3), ["a", "a", "b"])
    assert found.prompts == ("a",) and found.mean == pytest.approx(0.0)
    assert math.isnan(mean_cosine(np.eye(3), ["a", "a", "a"]).across)


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.full((2, 3), np.nan)])
def test_vectors_without_a_direction_are_refused(bad):
    with pytest.raises(ValueError, match="zero or not finite"):
        mean_cosine(bad, [0, 0])
    with pytest.raises(ValueError, match=r"\(2, 3\) embeddings for 3 responses"):
        mean_cosine(bad, [0, 0, 0])


def test_vendi_is_one_of_equal_vectors_and_n_of_orthogonal_ones():
    assert vendi(np.ones((5, 3))) == pytest.approx(1.0)
    assert vendi(np.eye(6)) == pytest.approx(6.0)
    # eigenvalues 2/3 and 1/3: exp(log 3 - 2/3 log 2)
    assert vendi(np.array([[1.0, 0], [1.0, 0], [0, 1.0]])) == pytest.approx(3 / 2 ** (2 / 3))


def test_vendi_of_many_vectors_goes_over_dimensions_and_is_the_same():
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(units @ units.T / 30)
    positive = eigenvalues[eigenvalues > 1e-12]
    assert vendi(vectors) == pytest.approx(float(np.exp(-(positive * np.log(positive)).sum())))


# ---------------------------------------------------------------------------------------------------- tokens


def test_distinct_n_by_hand():
    # bigrams ab bc ab: 2 of 3
    assert distinct_n([["a", "b", "c"], ["a", "b"]], 2) == pytest.approx(2 / 3)
    assert distinct_n([["a", "b", "c"], ["a", "b"]], 1) == pytest.approx(3 / 5)
    assert math.isnan(distinct_n([["a"], []], 2))


def test_self_bleu_is_one_of_equal_responses_and_low_of_different_ones():
    assert self_bleu([["a", "b", "c", "d"]] * 3) == pytest.approx(1.0)
    # no shared token: (0.1/4 * 0.1/3 * 0.1/2 * 0.1/1)^(1/4)
    expected = (0.1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    assert self_bleu([list("abcd"), list("efgh")]) == pytest.approx(expected)
    assert math.isnan(self_bleu([["a"]]))


def test_self_bleu_clips_at_the_largest_count_in_another_response():
    # first: a a a b against a c: unigrams min(3, 1) + 0 = 1 of 4; brevity 1, as 4 >= 2
    # second: a c against a a a b: 1 of 2; brevity exp(1 - 4/2)
    first, second = 1 / 4, 1 / 2 * math.exp(-1)
    assert self_bleu([list("aaab"), list("ac")], max_n=1) == pytest.approx((first + second) / 2)


def test_self_bleu_equals_counting_against_each_set_of_others():
    generator = np.random.default_rng(0)
    responses = [generator.integers(4, size=length).tolist() for length in (5, 7, 3, 6)]

    def bleu(i):
        others = [r for j, r in enumerate(responses) if j != i]
        logs = []
        for n in range(1, min(4, len(responses[i])) + 1):
            own = Counter(tuple(responses[i][k : k + n]) for k in range(len(responses[i]) - n + 1))
            counted = [Counter(tuple(r[k : k + n]) for k in range(len(r) - n + 1)) for r in others]
            matched = sum(min(count, max(c[gram] for c in counted)) for gram, count in own.items())
            logs.append(math.log((matched or 0.1) / own.total()))
        length = len(responses[i])
        closest = min((len(r) for r in others), key=lambda other: (abs(other - length), other))
        return math.exp(sum(logs) / len(logs)) * (1 if length >= closest else math.exp(1 - closest / length))

    assert self_bleu(responses) == pytest.approx(np.mean([bleu(i) for i in range(4)]))


def test_empty_responses_are_alike_only_among_themselves():
    assert self_bleu([[], []]) == 1.0
    assert self_bleu([[], ["a"]]) < 0.1


def test_a_share_of_more_answers_than_any_float_holds_is_zero():
    (prompt,) = [Answers(num_samples=2, counts=(1, 1), num_possible=10**400)]
    found = solutions([prompt], samples=2, valid_samples=2)
    assert (found.share_of_possible, found.share_of_uniform) == (0.0, 1.0)
