"""klreg_verl.core.metrics: numbers by hand, masks, and agreement of the functions with the table of keys."""

import math

import pytest
import torch

from klreg_verl.core import metrics

LENGTH_TWO = torch.tensor([[True, True, False], [True, False, False]])
D = torch.tensor([[1.0, -1.0, float("nan")], [math.log(2.0), float("inf"), 3.0]])
OLD = D
REFERENCE = torch.zeros(2, 3)
K3 = (math.exp(-1) - 1 + 1, math.exp(1) - 1 - 1, 0.5 - 1 + math.log(2.0))  # r - 1 + d of the three tokens


def test_kl_by_hand_per_token_and_per_response():
    found = metrics.kl_metrics(OLD, REFERENCE, LENGTH_TWO, torch.tensor([True, False]))
    # d of the three tokens: 1, -1 | log 2
    assert found["kl_ref/k1_token"] == pytest.approx(math.log(2) / 3)
    assert found["kl_ref/k1_response"] == pytest.approx(math.log(2) / 2)
    # per response 0 and log 2: their standard deviation is log 2 / sqrt 2, that of their mean log 2 / 2
    assert found["kl_ref/k1_response_se"] == pytest.approx(math.log(2) / 2)
    # r log r - r + 1 at r = 1/e, e, 1/2
    forward = (-math.exp(-1) - math.exp(-1) + 1, math.e - math.e + 1, -math.log(2) / 2 + 0.5)
    assert found["kl_ref/forward_token"] == pytest.approx(sum(forward) / 3)
    assert found["kl_ref/k3_token"] == pytest.approx(sum(K3) / 3)
    assert found["kl_ref/k3_response"] == pytest.approx(sum(K3) / 2)
    assert found["kl_ref/valid"] == pytest.approx(0.0)
    assert found["kl_ref/invalid"] == pytest.approx(math.log(2))
    assert found["kl_ref/max"] == 1.0
    # sorted d: -1, log 2, 1; the 99th percentile lies at index 0.99 * 2 = 1.98
    assert found["kl_ref/p99"] == pytest.approx(0.02 * math.log(2) + 0.98)
    # 1 % of three tokens is at least one: the d = -1 token
    assert found["kl_ref/top1pct_share"] == pytest.approx(K3[1] / sum(K3))


def test_top_share_takes_one_token_of_a_hundred():
    d = torch.full((1, 200), 0.1)
    d[0, :2] = 5.0
    found = metrics.kl_metrics(d, torch.zeros_like(d), torch.ones_like(d, dtype=torch.bool), torch.tensor([True]))
    large, small = math.exp(-5) - 1 + 5, math.exp(-0.1) - 1 + 0.1
    assert found["kl_ref/top1pct_share"] == pytest.approx(2 * large / (2 * large + 198 * small), rel=1e-5)


@pytest.mark.parametrize(("valid", "absent"), [(True, "kl_ref/invalid"), (False, "kl_ref/valid")])
def test_a_kind_of_response_that_does_not_occur_has_no_key(valid, absent):
    assert absent not in metrics.kl_metrics(OLD, REFERENCE, LENGTH_TWO, torch.tensor([valid, valid]))


def test_a_policy_equal_to_its_reference_has_zero_kl_and_no_share_to_speak_of():
    old = -torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    found = metrics.kl_metrics(old, old, torch.ones_like(LENGTH_TWO), torch.tensor([True, False]))
    assert math.isnan(found.pop("kl_ref/top1pct_share"))
    assert set(found.values()) == {0.0}


def test_entropy_by_hand():
    # unmasked 0, 1, 4: mean 5/3; percentiles at indices 0.2, 1, 1.8 of the sorted three
    entropy = torch.tensor([[1.0, 0.0, float("nan")], [4.0, 9.0, 9.0]])
    found = metrics.entropy_metrics(entropy, LENGTH_TWO)
    expected = {"entropy/token": 5 / 3, "entropy/p10": 0.2, "entropy/p50": 1.0, "entropy/p90": 1 + 0.8 * 3}
    assert found == pytest.approx(expected)


def test_mismatch_is_of_the_sampler_against_the_trainer():
    # rollout - old: 0.3, -0.5 | 0.5
    difference = torch.tensor([[0.3, -0.5, float("nan")], [0.5, 7.0, 7.0]])
    found = metrics.mismatch_metrics(torch.zeros(2, 3), difference, LENGTH_TWO)
    assert found == pytest.approx({"kl_rollout/k1_token": 0.1, "kl_rollout/max": 0.5})


def test_masked_equals_sliced():
    generator = torch.Generator().manual_seed(3)
    old, reference, valid = -torch.rand(4, 6, generator=generator), -torch.rand(4, 6, generator=generator), [True] * 4
    mask = torch.arange(6).expand(4, 6) < 4
    found = metrics.kl_metrics(old, reference, mask, torch.tensor(valid))
    sliced = metrics.kl_metrics(old[:, :4], reference[:, :4], mask[:, :4], torch.tensor(valid))
    assert found == pytest.approx(sliced)


def test_without_any_token_means_are_nan_and_nothing_fails():
    nothing = torch.zeros_like(LENGTH_TWO)
    found = metrics.kl_metrics(OLD, REFERENCE, nothing, torch.tensor([True, False]))
    assert math.isnan(found["kl_ref/k1_token"]) and math.isnan(found["kl_ref/p99"]) and math.isnan(found["kl_ref/max"])
    assert math.isnan(metrics.entropy_metrics(OLD, nothing)["entropy/p50"])


def test_more_values_than_torch_quantile_accepts():
    entropy = torch.zeros(1, 2**24 + 1)
    entropy[0, -1] = 1.0
    assert metrics.entropy_metrics(entropy, torch.ones_like(entropy, dtype=torch.bool))["entropy/p90"] == 0.0


def test_every_measured_key_is_in_the_table():
    measured = metrics.kl_metrics(OLD, REFERENCE, LENGTH_TWO, torch.tensor([True, False]))
    measured |= metrics.entropy_metrics(OLD, LENGTH_TWO) | metrics.mismatch_metrics(OLD, REFERENCE, LENGTH_TWO)
    assert measured.keys() <= metrics.METRICS.keys()
    in_the_table = {key for key in metrics.METRICS if key.startswith(("kl_ref/", "kl_rollout/", "entropy/"))}
    of_workers = {"kl_ref/exact_token", "kl_ref/forward_sampled"}  # from logits, and from responses of the reference
    assert in_the_table - of_workers == measured.keys()


def test_groups_of_one_score_and_the_spread_of_the_others():
    # groups 7, 3, 9: scores (1, 1), (0, 1), a single one
    scores, groups = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5]), torch.tensor([7, 3, 7, 3, 9])
    assert metrics.group_metrics(scores, groups) == {"kl/zero_variance_groups": pytest.approx(2 / 3)}
    assert metrics.group_std(scores, groups).tolist() == pytest.approx([math.sqrt(0.5), 0.0, 0.0])  # of 3, 7, 9


def test_equal_scores_are_equal_whatever_their_mean_rounds_to():
    scores = torch.full((3,), 0.1)
    assert metrics.group_metrics(scores, torch.zeros(3, dtype=torch.int64)) == {"kl/zero_variance_groups": 1.0}


def test_the_markdown_table_has_one_row_per_key():
    lines = metrics.markdown_table().splitlines()
    assert len(lines) == 2 + len(metrics.METRICS)
    assert lines[2].startswith("| `step` | updates | ")
    assert all(line.count("|") == 4 for line in lines)
