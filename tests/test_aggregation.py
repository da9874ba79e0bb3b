"""klreg_verl.core.aggregation: closed forms, masked equals sliced, NaN under the mask."""

import math

import pytest
import torch

from klreg_verl.core.aggregation import (
    AGGREGATIONS,
    group_sum,
    leave_one_out_mean,
    leave_one_out_mean_per_position,
    masked_mean,
    masked_sum,
    response_sum,
    token_weights,
)

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_reductions_count_only_what_is_unmasked():
    # rows: 1 + 2 = 3 and 8; sum 11; mean 11 / 3
    assert masked_sum(VALUES, MASK).item() == 11.0
    assert masked_mean(VALUES, MASK).item() == pytest.approx(11.0 / 3.0)
    assert response_sum(VALUES, MASK).tolist() == [3.0, 8.0]


def test_masked_equals_sliced():
    values = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7).expand(4, 7) < 5
    torch.testing.assert_close(masked_mean(values, mask), values[:, :5].mean())
    torch.testing.assert_close(response_sum(values, mask), values[:, :5].sum(dim=1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_under_the_mask_changes_neither_value_nor_gradient(poison):
    values = VALUES.clone()
    values[~MASK] = poison
    values.requires_grad_()
    mean = masked_mean(values, MASK)
    mean.backward()
    assert mean.item() == pytest.approx(11.0 / 3.0)
    torch.testing.assert_close(values.grad, MASK.float() / 3.0)


def test_a_fully_masked_row_sums_to_zero():
    assert response_sum(VALUES, torch.zeros_like(MASK)).tolist() == [0.0, 0.0]


def test_the_mean_of_nothing_is_nan():
    assert masked_mean(VALUES, torch.zeros_like(MASK)).isnan()


def test_leave_one_out_mean_is_the_mean_of_the_siblings():
    # group 7: 1, 2, 6 -> (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; group -1 has one row and so no siblings
    values, group_ids = torch.tensor([1.0, 5.0, 2.0, 6.0]), torch.tensor([7, -1, 7, 7])
    assert group_sum(values, group_ids).tolist() == [9.0, 5.0, 9.0, 9.0]
    assert leave_one_out_mean(values, group_ids).tolist() == [4.0, 0.0, 3.5, 1.5]


def test_rows_that_do_not_count_are_nobodys_sibling():
    # without the 6: the siblings of 1 are {2}, of 2 are {1}; the excluded row itself still sees both, (1 + 2) / 2
    values, counts = torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False])
    assert leave_one_out_mean(values, torch.zeros(3, dtype=torch.int64), counts).tolist() == [2.0, 1.0, 1.5]


def test_the_mean_per_position_is_over_the_rows_unmasked_there():
    # position 0: (3 + 5) / 2, (1 + 5) / 2, (1 + 3) / 2; position 1: rows 0 and 2 remain, row 1 sees both, (2 + 6) / 2;
    # position 2: row 0 alone. Row 3 is a group of one: 0, not inf - inf. The NaNs are under the mask.
    nan = float("nan")
    values = torch.tensor([[1.0, 2.0, 7.0], [3.0, nan, nan], [5.0, 6.0, nan], [math.inf] * 3])
    found = leave_one_out_mean_per_position(values, ~values.isnan(), torch.tensor([4, 4, 4, -2]))
    assert found.tolist() == [[4.0, 6.0, 0.0], [3.0, 4.0, 7.0], [2.0, 2.0, 7.0], [0.0, 0.0, 0.0]]


def test_the_mean_per_position_of_one_position_is_the_mean_of_responses():
    values, group_ids = torch.rand(9, generator=torch.Generator().manual_seed(2)), torch.arange(9) % 4
    per_position = leave_one_out_mean_per_position(values[:, None], torch.ones(9, 1, dtype=torch.bool), group_ids)
    assert torch.equal(per_position[:, 0], leave_one_out_mean(values, group_ids))


def test_the_mean_per_position_needs_one_group_id_per_response():
    with pytest.raises(ValueError, match=r"one group id per response are needed.*got \(2,\) and \(3,\)"):
        leave_one_out_mean_per_position(VALUES, MASK, torch.arange(3))


def test_nan_stays_in_its_group():
    means = leave_one_out_mean(torch.tensor([float("nan"), 1.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    assert means[2:].tolist() == [3.0, 2.0]
    assert means[1].isnan()


def test_equal_values_have_exactly_that_leave_one_out_mean():
    values = torch.full((5,), 0.7)
    assert torch.equal(leave_one_out_mean(values, torch.zeros(5, dtype=torch.int64)), values)


def test_token_weights_are_what_each_aggregation_divides_by():
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])  # the third row is padding
    given = {"tokens": 3, "responses": 2, "scale": 4.0}
    rows = {name: token_weights(name, mask, **given).tolist() for name in AGGREGATIONS}
    nothing = [0.0, 0.0, 0.0]
    assert rows["token-mean"] == [[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0], nothing]
    assert rows["seq-mean-token-sum"] == [[1 / 2, 1 / 2, 0.0], [1 / 2, 0.0, 0.0], nothing]
    assert rows["seq-mean-token-mean"] == [[1 / 4, 1 / 4, 0.0], [1 / 2, 0.0, 0.0], nothing]
    assert rows["seq-mean-token-sum-norm"] == [[1 / 8, 1 / 8, 0.0], [1 / 8, 0.0, 0.0], nothing]
    # without a scale verl divides by the width
    assert token_weights("seq-mean-token-sum-norm", mask, tokens=3, responses=2)[1, 0] == 1 / 6


def test_a_mask_that_is_not_bool_is_refused():
    with pytest.raises(ValueError, match=r"dtype torch.int64.*Pass mask.bool\(\)"):
        masked_sum(VALUES, MASK.long())


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and a mask of shape \(2, 2\)"):
        masked_mean(VALUES, MASK[:, :2])


def test_group_ids_must_be_integers_one_per_response():
    with pytest.raises(ValueError, match="Number the prompts with integers"):
        group_sum(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="Sum token values over each response first"):
        group_sum(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
