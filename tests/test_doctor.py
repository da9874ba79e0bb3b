"""klreg_verl.doctor: its enumeration against closed forms, its verdicts, its words."""

import json
from dataclasses import dataclass

import pytest
import torch

from klreg_verl import doctor
from klreg_verl.core import kl
from klreg_verl.doctor import gradients
from klreg_verl.doctor.policies import Problem, panel, problem

BANDIT = problem("bandit", {(): (0.6, 0.3, 0.1)}, {(): (0.2, 0.5, 0.3)})
# Token 0 leads to (0.9, 0.1) or (0.5, 0.5) of the reference, token 1 ends the response.
TREE = problem("tree", {(): (0.7, 0.3), (0,): (0.9, 0.1)}, {(): (0.4, 0.6), (0,): (0.5, 0.5)})
SETTINGS = [(placement, estimator) for placement in ("reward", "loss") for estimator in ("k1", "k2", "k3")]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A KL block as the doctor sees it."""

    placement: str
    estimator: str | None = None
    follows: str | None = None
    beta: float | None = 0.1
    allow_biased: bool = False


def kl_of(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    p, q = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return float((p * (p / q).log()).sum())


def test_all_responses_are_listed_once_and_their_probabilities_sum_to_one():
    # (0, 0), (0, 1), (1): three responses, the last one a token shorter
    assert TREE.tokens.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert TREE.response_mask.tolist() == [[True, True], [True, True], [True, False]]
    for listed in panel():
        assert gradients.expected_value(listed, lambda logprobs, _: torch.zeros_like(logprobs)) == 0.0
        ones = gradients.expected_value(listed, lambda logprobs, _: torch.ones_like(logprobs))
        assert 1.0 - 1e-12 < ones <= 3.0


def test_the_mean_length_of_the_tree_is_known():
    # two tokens with probability 0.7, one with 0.3
    assert gradients.expected_value(TREE, lambda logprobs, _: torch.ones_like(logprobs)) == pytest.approx(1.7)


def test_trees_of_different_prefixes_are_refused():
    with pytest.raises(ValueError, match=r"x: policy and reference have different prefixes: \{\(0,\)\}"):
        problem("x", {(): (0.5, 0.5)}, {(): (0.5, 0.5), (0,): (0.5, 0.5)})


def test_divergences_of_the_tree_by_the_chain_rule():
    first, second = ((0.7, 0.3), (0.4, 0.6)), ((0.9, 0.1), (0.5, 0.5))
    reverse = kl_of(*first) + 0.7 * kl_of(*second)
    assert gradients.divergence(TREE, "reverse", "sequence").item() == pytest.approx(reverse)
    assert gradients.divergence(TREE, "reverse", "token").item() == pytest.approx(reverse)
    # whole responses: the reference reaches the second token with probability 0.4; on the policy's prefixes it is 0.7
    backward = kl_of(*first[::-1]), kl_of(*second[::-1])
    sequence, token = backward[0] + 0.4 * backward[1], backward[0] + 0.7 * backward[1]
    assert gradients.divergence(TREE, "forward", "sequence").item() == pytest.approx(sequence)
    assert gradients.divergence(TREE, "forward", "token").item() == pytest.approx(token)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gradients_on_a_bandit_are_the_closed_forms(level):
    policy, reference = BANDIT.logits[0].exp(), BANDIT.ref_logits[0].exp()
    reverse = policy * ((policy / reference).log() - kl_of((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)))
    torch.testing.assert_close(gradients.divergence_gradient(BANDIT, "reverse", level), reverse)
    torch.testing.assert_close(gradients.divergence_gradient(BANDIT, "forward", level), policy - reference)


def test_the_reverse_gradient_of_the_tree_is_the_finite_difference():
    exact = gradients.divergence_gradient(TREE, "reverse", "sequence")
    step = 1e-6
    for index in range(4):
        nudge = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor([index]), step).reshape(2, 2)
        up, down = (
            Problem(**{**vars(TREE), "logits": TREE.logits.log_softmax(-1) + sign * nudge}) for sign in (1.0, -1.0)
        )
        difference = gradients.divergence(up, "reverse", "sequence") - gradients.divergence(down, "reverse", "sequence")
        assert float(difference) / (2 * step) == pytest.approx(float(exact[index]), abs=1e-8)


def test_the_token_gradient_leaves_out_steering():
    # at the first token only its own KL counts: pi_j * (log ratio_j - KL of the first token)
    first = torch.tensor([0.7, 0.3], dtype=torch.float64)
    expected = first * ((first / torch.tensor([0.4, 0.6], dtype=torch.float64)).log() - kl_of((0.7, 0.3), (0.4, 0.6)))
    token = gradients.divergence_gradient(TREE, "reverse", "token")
    torch.testing.assert_close(token[:2], expected)
    # whole responses also pay for the KL that token 0 leads to: + pi_j * ([j = 0] - 0.7) * KL of the second token
    steering = first * (torch.tensor([1.0, 0.0], dtype=torch.float64) - 0.7) * kl_of((0.9, 0.1), (0.5, 0.5))
    torch.testing.assert_close(gradients.divergence_gradient(TREE, "reverse", "sequence")[:2], expected + steering)
    torch.testing.assert_close(gradients.divergence_gradient(TREE, "reverse", "sequence")[2:], token[2:])


def test_the_reward_gradient_agrees_with_sampling():
    listed, generator = TREE, torch.Generator().manual_seed(1)
    exact = gradients.reward_gradient(listed, lambda logprobs, *_: logprobs.sum(dim=1))
    # E[f * grad log pi] with f = sum of log-probs as given, 200,000 responses
    logprobs = listed.logits[listed.prefixes, listed.tokens]
    chance = (logprobs * listed.response_mask).sum(dim=1).exp()
    drawn = torch.bincount(torch.multinomial(chance, 200_000, True, generator=generator), minlength=3) / 200_000
    logits = listed.logits.clone().requires_grad_()
    likelihood = (logits.log_softmax(-1)[listed.prefixes, listed.tokens] * listed.response_mask).sum(dim=1)
    (estimate,) = torch.autograd.grad((drawn * logprobs.sum(dim=1) * likelihood).sum(), logits)
    torch.testing.assert_close(exact, estimate.flatten(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("placement", "estimator", "follows", "level", "verdict"),
    [
        ("reward", "k1", "reverse", "sequence", "ok"),
        ("reward", "k2", "none", "sequence", "biased"),
        ("reward", "k3", "none", "sequence", "biased"),
        ("loss", "k1", "none", "token", "void"),
        ("loss", "k2", "reverse", "token", "ok"),
        ("loss", "k3", "forward", "token", "ok"),
    ],
)
def test_verdicts(placement, estimator, follows, level, verdict):
    found = doctor.judge(placement, estimator)
    assert (found.follows, found.level, found.verdict) == (follows, level, verdict)


def test_cosines_are_one_where_followed_and_absent_where_there_is_no_gradient():
    assert doctor.judge("reward", "k1").cosine_reverse == pytest.approx(1.0)
    assert doctor.judge("loss", "k2").cosine_reverse == pytest.approx(1.0)
    assert doctor.judge("loss", "k3").cosine_forward == pytest.approx(1.0)
    assert doctor.judge("loss", "k1").cosine_reverse is None and doctor.judge("loss", "k1").cosine_forward is None


def test_charging_k3_goes_against_both_directions_somewhere():
    found = doctor.judge("reward", "k3")
    assert found.cosine_reverse < 0 and found.cosine_forward < 0


def test_the_logged_value_is_judged_apart_from_the_gradient():
    assert doctor.judge("loss", "k3").value == "KL(pi||ref), unbiased"
    assert doctor.judge("reward", "k1").value == "KL(pi||ref), unbiased"
    assert doctor.judge("loss", "k2").value.startswith("not a KL: -")


def test_a_verdict_is_found_and_not_written_down(monkeypatch):
    # k1 with the coefficient and charge of k3 must be judged as k3 is
    imposter = kl.Estimator(
        value=kl.estimator("k1").value,
        coefficient=kl.estimator("k3").coefficient,
        reward_charge=kl.estimator("k3").reward_charge,
    )
    monkeypatch.setitem(kl._ESTIMATORS, "imposter", imposter)
    assert doctor.judge("loss", "imposter").follows == "forward"
    found = doctor.judge("reward", "imposter")
    assert (found.verdict, found.reason) == ("biased", "Its expected gradient is no divergence's.")


def test_without_a_placement_nothing_is_followed():
    found = doctor.judge("none", None)
    assert (found.follows, found.verdict) == ("none", "ok")


@pytest.mark.parametrize(("placement", "estimator"), [("none", "k1"), ("reward", None)])
def test_half_a_setting_is_refused(placement, estimator):
    with pytest.raises(ValueError, match="is half a setting. Give an estimator with 'reward' or 'loss'"):
        doctor.judge(placement, estimator)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no KL placement 'advantage'. Known placements: none, reward, loss"):
        doctor.judge("advantage", "k1")
    with pytest.raises(ValueError, match="no KL estimator 'k4'. Did you mean"):
        doctor.judge("loss", "k4")


def test_the_table_has_every_setting_once_and_is_json():
    table = doctor.table()
    assert [(row["placement"], row["estimator"]) for row in table] == [("none", None), *SETTINGS]
    keys = {"estimator", "placement", "value", "follows", "cosine_reverse", "cosine_forward", "verdict", "reason"}
    assert all(row.keys() == keys for row in table)
    assert json.loads(json.dumps(table, allow_nan=False)) == table


@pytest.mark.parametrize(
    ("placement", "estimator", "follows"),
    [("reward", "k1", "reverse"), ("loss", "k2", "reverse"), ("loss", "k3", "forward"), ("none", None, None)],
)
def test_a_true_claim_passes(placement, estimator, follows):
    doctor.check_claim(Setting(placement=placement, estimator=estimator, follows=follows))


def test_k1_in_the_loss_is_refused_with_the_reason_and_the_way_out():
    with pytest.raises(ValueError) as refused:
        doctor.check_claim(Setting(placement="loss", estimator="k1", follows="reverse"))
    assert str(refused.value) == (
        "kl.estimator='k1' with kl.placement='loss' is void. Its gradient is grad log pi whatever the reference is, "
        "and over the policy's own samples the mean of that is zero: it adds noise and pulls nowhere. "
        "Use kl.placement='reward' with kl.estimator='k1' or kl.placement='loss' with kl.estimator='k2' to follow the "
        "reverse KL, KL(pi || pi_ref). "
        "To run it all the same, set kl.follows='none' and kl.allow_biased=true."
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_refused_unless_allowed_and_claimed_as_nothing(estimator):
    with pytest.raises(ValueError, match="is biased.*kl.placement='loss' with kl.estimator='k3' to follow the forward"):
        doctor.check_claim(Setting(placement="reward", estimator=estimator, follows="forward"))
    with pytest.raises(ValueError, match=r"kl.follows='forward' is claimed, but .* follows 'none'"):
        doctor.check_claim(Setting(placement="reward", estimator=estimator, follows="forward", allow_biased=True))
    doctor.check_claim(Setting(placement="reward", estimator=estimator, follows="none", allow_biased=True))


def test_a_false_claim_is_refused_with_both_ways_out():
    expected = (
        r"kl.follows='reverse' is claimed, but kl.estimator='k3' with kl.placement='loss' follows 'forward'.*"
        r"Set kl.follows='forward', or use kl.placement='reward' with kl.estimator='k1' or .*'k2' to follow the reverse"
    )
    with pytest.raises(ValueError, match=expected):
        doctor.check_claim(Setting(placement="loss", estimator="k3", follows="reverse"))


def test_a_missing_claim_and_a_claim_about_nothing_are_refused():
    with pytest.raises(ValueError, match=r"kl.follows=None is claimed.*Set kl.follows='reverse'\."):
        doctor.check_claim(Setting(placement="reward", estimator="k1"))
    with pytest.raises(ValueError, match="follows 'none'. No KL term"):
        doctor.check_claim(Setting(placement="none", follows="reverse"))


def test_reverse_in_the_reward_in_words():
    text = doctor.explain(Setting(placement="reward", estimator="k1", follows="reverse"), "rloo", 1)
    assert text == (
        "k1 is charged to the reward with beta 0.1. "
        "It follows the reverse KL, KL(pi || pi_ref), of whole responses: the expected gradient is exactly that one. "
        "Tokens are also charged for the prefixes they lead to, so this is the full gradient. "
        "With one update per batch every update is on-policy and this holds for all of them. "
        "Nothing divides the task's advantage, so beta is in units of reward per nat."
    )


def test_forward_in_the_loss_in_words():
    text = doctor.explain(Setting(placement="loss", estimator="k3", follows="forward"), "rloo", 1)
    assert "follows the forward KL, KL(pi_ref || pi), per token, on the policy's own prefixes" in text
    assert "How a token steers later ones is left out" in text


def test_more_updates_per_batch_change_the_direction():
    in_reward = doctor.explain(Setting(placement="reward", estimator="k1", follows="reverse"), "rloo", 4)
    in_loss = doctor.explain(Setting(placement="loss", estimator="k2", follows="reverse"), "rloo", 4)
    assert "With 4 updates per batch this holds for the first one only; then the direction changes" in in_reward
    assert "KL(pi || pi_ref) - KL(pi || mu)" in in_reward and "PPO's clip also zeroes the KL part" in in_reward
    assert "without an importance weight" in in_loss and "PPO's clip" not in in_loss


def test_beta_under_each_advantage_in_words():
    texts = {
        name: doctor.explain(Setting(placement="reward", estimator="k1", follows="reverse"), name, 1)
        for name in ("rloo", "grpo", "dr_grpo")
    }
    assert "beta is not rescaled by it" in texts["grpo"] and "beta * std in units of reward" in texts["grpo"]
    assert "(n - 1) / n" in texts["dr_grpo"]
    with pytest.raises(ValueError, match="no advantage estimator 'gae'. Known: rloo, grpo, dr_grpo"):
        doctor.explain(Setting(placement="reward", estimator="k1"), "gae", 1)


def test_a_refused_setting_and_no_kl_in_words():
    biased = doctor.explain(Setting(placement="reward", estimator="k3", allow_biased=True), "rloo", 1)
    assert "This is biased and follows no divergence." in biased
    assert doctor.explain(Setting(placement="none", beta=None), "rloo", 1).startswith("No KL term")
