"""klreg_verl.doctor: its enumeration against closed forms, its verdicts, claims and words."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from klreg_verl import doctor
from klreg_verl.core import kl, objective, penalties
from klreg_verl.core.objective import Objective
from klreg_verl.doctor import enumeration, gradients
from klreg_verl.doctor.policies import LENGTHS, Problem, lengthening, panel, problem, repeated
from klreg_verl.doctor.rules import AGGREGATIONS, Rule
from klreg_verl.doctor.subjects import BETA, OURS

BANDIT = problem("bandit", {(): (0.6, 0.3, 0.1)}, {(): (0.2, 0.5, 0.3)})
# Token 0 leads to (0.9, 0.1) or (0.5, 0.5) of the reference, token 1 ends the response.
TREE = problem("tree", {(): (0.7, 0.3), (0,): (0.9, 0.1)}, {(): (0.4, 0.6), (0,): (0.5, 0.5)})
CREDITS, CORRECTIONS = penalties.CREDITS, penalties.CORRECTIONS


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A KL block as the doctor sees it, without any field that it can do without."""

    placement: str
    estimator: str | None = None
    follows: str | None = None
    beta: float | None = 0.1
    allow_biased: bool = False


@dataclass(frozen=True, kw_only=True)
class Shaping:
    kind: str
    threshold: float | None = None
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Whole(Setting):
    """With all that it reads; None as a recipe has it where nothing was said."""

    credit: str | None = None
    baseline: str | None = None
    correction: str | None = None
    aggregation: str | None = None
    normalize_with_reward: bool = False
    shaping: Shaping = Shaping(kind="none")
    cap: float | None = None


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def kl_of(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    p, q = tensor(*one), tensor(*other)
    return float((p * (p / q).log()).sum())


def on_policy(placement: str, estimator: str, listed: Problem, **rest: Any) -> torch.Tensor:
    rule = Rule(placement=placement, estimator=estimator, **{"aggregation": "seq-mean-token-sum"} | rest)
    return enumeration.gradient(OURS, rule, listed, "policy")


def off_policy(placement: str, estimator: str, listed: Problem, **rest: Any) -> torch.Tensor:
    rule = Rule(placement=placement, estimator=estimator, **{"aggregation": "seq-mean-token-sum"} | rest)
    return enumeration.gradient(OURS, rule, listed, "older")


# ------------------------------------------------------------------------------------------- problems and divergences


def test_all_responses_are_listed_once_and_their_probabilities_sum_to_one():
    # (0, 0), (0, 1), (1): three responses, the last one a token shorter
    assert TREE.tokens.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert TREE.response_mask.tolist() == [[True, True], [True, True], [True, False]]
    for listed in (*panel(), *lengthening()):
        for sampler in ("policy", "older"):
            assert float(gradients.chances(listed, sampler).sum()) == pytest.approx(1.0, abs=1e-14)


def test_the_mean_length_of_the_tree_is_known():
    # two tokens with probability 0.7, one with 0.3
    assert gradients.mean_tokens(TREE) == pytest.approx(1.7)


def test_the_older_policy_is_one_update_away():
    # logits of three tokens moved by (+0.25, 0, -0.25): mu is proportional to 0.6 e^-0.25, 0.3, 0.1 e^0.25
    mu = tensor(0.6, 0.3, 0.1) * tensor(-0.25, 0.0, 0.25).exp()
    torch.testing.assert_close(gradients.chances(BANDIT, "older"), mu / mu.sum())


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


def test_the_other_divergences_of_a_bandit():
    policy, reference = (0.6, 0.3, 0.1), (0.2, 0.5, 0.3)
    mixture = (0.4, 0.4, 0.2)
    expected = {
        "js": (kl_of(policy, mixture) + kl_of(reference, mixture)) / 2,
        "chi2": 0.4**2 / 0.6 + 0.2**2 / 0.3 + 0.2**2 / 0.1,
        "tv": (0.4 + 0.2 + 0.2) / 2,
    }
    for name, number in expected.items():
        assert gradients.divergence(BANDIT, name, "sequence").item() == pytest.approx(number), name


def test_with_one_token_kept_apart_the_bandit_has_two_outcomes():
    # reverse keeps the policy's likeliest token, the first; forward the reference's, the second
    reverse, forward = kl_of((0.6, 0.4), (0.2, 0.8)), kl_of((0.5, 0.5), (0.3, 0.7))
    assert gradients.divergence(BANDIT, "reverse", "coarse").item() == pytest.approx(reverse)
    assert gradients.divergence(BANDIT, "forward", "coarse").item() == pytest.approx(forward)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gradients_on_a_bandit_are_the_closed_forms(level):
    policy, reference = BANDIT.logits[0].exp(), BANDIT.ref_logits[0].exp()
    reverse = policy * ((policy / reference).log() - kl_of((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)))
    torch.testing.assert_close(gradients.divergence_gradient(BANDIT, "reverse", level), reverse)
    torch.testing.assert_close(gradients.divergence_gradient(BANDIT, "forward", level), policy - reference)
    # TV: half of the sum of |pi - ref|, whose derivative by pi is the sign (+, -, -) / 2
    sign = tensor(0.5, -0.5, -0.5)
    torch.testing.assert_close(gradients.divergence_gradient(BANDIT, "tv", level), policy * (sign - policy @ sign))


def test_the_reverse_gradient_of_the_tree_is_the_finite_difference():
    exact = gradients.divergence_gradient(TREE, "reverse", "sequence")
    step = 1e-6
    for index in range(4):
        nudge = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor([index]), step).reshape(2, 2)
        up, down = (replace(TREE, logits=TREE.logits.log_softmax(-1) + sign * nudge) for sign in (1.0, -1.0))
        difference = gradients.divergence(up, "reverse", "sequence") - gradients.divergence(down, "reverse", "sequence")
        assert float(difference) / (2 * step) == pytest.approx(float(exact[index]), abs=1e-8)


def test_the_token_gradient_leaves_out_steering():
    # at the first token only its own KL counts: pi_j * (log ratio_j - KL of the first token)
    first = tensor(0.7, 0.3)
    expected = first * ((first / tensor(0.4, 0.6)).log() - kl_of((0.7, 0.3), (0.4, 0.6)))
    token = gradients.divergence_gradient(TREE, "reverse", "token")
    torch.testing.assert_close(token[:2], expected)
    # whole responses also pay for the KL that token 0 leads to: + pi_j * ([j = 0] - 0.7) * KL of the second token
    steering = first * (tensor(1.0, 0.0) - 0.7) * kl_of((0.9, 0.1), (0.5, 0.5))
    torch.testing.assert_close(gradients.divergence_gradient(TREE, "reverse", "sequence")[:2], expected + steering)
    torch.testing.assert_close(gradients.divergence_gradient(TREE, "reverse", "sequence")[2:], token[2:])


# ----------------------------------------------------------------------------------------------------- the enumeration


def test_a_bandits_charge_follows_the_mean_of_charge_times_score():
    # E[f s] = pi * (f - E[f]), whatever the charge f; here k3 and k2
    policy = tensor(0.6, 0.3, 0.1)
    d = (policy / tensor(0.2, 0.5, 0.3)).log()
    for estimator, charge in (("k2", d**2 / 2), ("k3", (-d).exp() - 1 + d)):
        expected = policy * (charge - policy @ charge)
        for credit in CREDITS:
            torch.testing.assert_close(on_policy("reward", estimator, BANDIT, credit=credit), expected)


@pytest.mark.parametrize("estimator", ["k1", "k3", "js"])
@pytest.mark.parametrize("credit", CREDITS)
def test_the_siblings_mean_changes_no_expectation(estimator, credit):
    for listed in panel():
        with_baseline, without = (
            on_policy("reward", estimator, listed, credit=credit, baseline=baseline)
            for baseline in ("siblings", "none")
        )
        torch.testing.assert_close(with_baseline, without, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("credit", CREDITS)
def test_the_reward_gradient_agrees_with_sampling(credit):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(gradients.chances(TREE), 200_000, True, generator=generator)
    logits = TREE.logits.clone().requires_grad_()
    logprobs, mask = gradients.logprobs(TREE, logits)[drawn], TREE.response_mask[drawn]
    group_ids = torch.arange(100_000).repeat_interleave(2)
    ref_logprobs = gradients.logprobs(TREE, TREE.ref_logits)[drawn]
    penalty = penalties.reward_penalty("k1", logprobs.detach(), ref_logprobs, mask, group_ids, credit=credit)
    (estimate,) = torch.autograd.grad((penalty * logprobs * mask).sum() / 200_000, logits)
    torch.testing.assert_close(on_policy("reward", "k1", TREE, credit=credit), estimate.flatten(), atol=0.01, rtol=0)


def test_off_policy_k1_in_the_reward_follows_what_it_should_minus_the_drift():
    # charge log mu / ref, ratio pi / mu: E_pi[(log pi / ref - log pi / mu) s] = grad KL(pi || ref) - grad KL(pi || mu)
    towards_mu = replace(BANDIT, ref_logits=BANDIT.older_logits)
    expected = gradients.divergence_gradient(BANDIT, "reverse", "token") - gradients.divergence_gradient(
        towards_mu, "reverse", "token"
    )
    torch.testing.assert_close(off_policy("reward", "k1", BANDIT), expected)


def test_off_policy_a_loss_without_correction_follows_the_samplers_mean():
    policy, mu = tensor(0.6, 0.3, 0.1), gradients.chances(BANDIT, "older")
    d = (policy / tensor(0.2, 0.5, 0.3)).log()
    torch.testing.assert_close(off_policy("loss", "k2", BANDIT), mu * d - policy * (mu @ d))
    # k1 lowers what was sampled more often than the policy now would, whatever the reference is: E_mu[s] = mu - pi
    torch.testing.assert_close(off_policy("loss", "k1", BANDIT), mu - policy)


def test_the_two_corrections_of_k3_follow_opposite_directions_off_policy():
    reverse, forward = (gradients.divergence_gradient(TREE, name, "token", "older") for name in ("reverse", "forward"))
    torch.testing.assert_close(off_policy("loss", "k3", TREE, correction="importance"), reverse)
    torch.testing.assert_close(off_policy("loss", "k3", TREE, correction="importance_detached"), forward)
    torch.testing.assert_close(off_policy("loss", "k2", TREE, correction="importance_detached"), reverse)


def test_k1_in_the_loss_under_seq_mean_token_mean_lengthens_responses():
    # E[sum_t s_t / |y|] = grad E[1 / |y|]. In the tree |y| is 2 with probability p = 0.7 of token 0, otherwise 1, and
    # grad p = p (1 - p) (1, -1): E[1 / |y|] = 1 - p / 2. In units of the sum over a response: times the mean length.
    found = on_policy("loss", "k1", TREE, aggregation="seq-mean-token-mean")
    torch.testing.assert_close(found, 1.7 * -0.5 * 0.21 * tensor(1.0, -1.0, 0.0, 0.0))
    torch.testing.assert_close(on_policy("loss", "k1", TREE, aggregation="token-mean"), torch.zeros(4).double())


def test_inside_the_std_groups_of_equal_scores_lose_beta():
    # two responses of equal score: the GRPO advantage of the charges alone is -+1 / sqrt(2), over beta
    charge = Rule(placement="reward", estimator="k1", normalization="std").charge
    logprobs, ref_logprobs = tensor(-1.0, -2.0).unsqueeze(1), tensor(-2.0, -1.0).unsqueeze(1)
    mask, groups = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    penalty = OURS.penalty(charge, logprobs, ref_logprobs, mask, groups, torch.zeros(2).double())
    torch.testing.assert_close(penalty[:, 0] * BETA, tensor(0.5**0.5, -(0.5**0.5)), atol=1e-4, rtol=0)
    # and with scores 0 and 1 the sign of the difference, and so the advantage, does not depend on the KL
    penalty = OURS.penalty(charge, logprobs, ref_logprobs, mask, groups, tensor(0.0, 1.0))
    torch.testing.assert_close(penalty[:, 0] * BETA, tensor(0.0, 0.0), atol=1e-5, rtol=0)


def test_noise_of_a_loss_falls_as_one_over_the_root_of_the_length():
    # responses of T equal tokens: the mean gradient grows as T, its standard deviation as sqrt(T)
    pull = Rule(placement="loss", estimator="k2").pull
    noise = enumeration.noise(OURS, None, pull)
    assert noise == pytest.approx([noise[0] / length**0.5 for length in LENGTHS])
    # one token: Var = sum pi |d s|^2 - |grad KL|^2
    listed = lengthening()[0]
    policy, scores = listed.logits[0].exp(), gradients.token_scores(listed)[:, 0]
    d = (listed.logits - listed.ref_logits)[0]
    truth = gradients.divergence_gradient(listed, "reverse", "token")
    variance = float((policy * (d.unsqueeze(1) * scores).square().sum(dim=1)).sum() - truth.square().sum())
    assert noise[0] == pytest.approx(variance**0.5 / float(truth.norm()))


def test_noise_of_whole_responses_grows_and_reward_to_go_has_less():
    whole, later, token = (
        doctor.judge("reward", "k1", credit=credit).noise for credit in ("sequence", "reward_to_go", "token")
    )
    assert whole[0] == pytest.approx(later[0]) == pytest.approx(token[0])
    assert whole[-1] > whole[0] > later[-1] > token[-1]
    assert doctor.judge("loss", "full_reverse").noise == pytest.approx((0.0, 0.0, 0.0, 0.0))


def test_repeated_tokens_share_their_parameters():
    listed = repeated((0.7, 0.3), (0.4, 0.6), 2)
    assert listed.tokens.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and listed.logits.shape == (1, 2)
    assert gradients.divergence(listed, "reverse", "sequence").item() == pytest.approx(
        2 * kl_of((0.7, 0.3), (0.4, 0.6))
    )


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("placement", "estimator", "rest", "follows", "level", "verdict"),
    [
        ("reward", "k1", {}, "reverse", "sequence", "ok"),
        ("reward", "k1", {"credit": "reward_to_go"}, "reverse", "sequence", "ok"),
        ("reward", "k1", {"credit": "token"}, "reverse", "token", "ok"),
        ("reward", "k2", {}, "none", "sequence", "biased"),
        ("reward", "k3", {}, "none", "sequence", "biased"),
        ("reward", "abs", {}, "none", "sequence", "biased"),
        ("reward", "forward", {}, "forward", "token", "ok"),
        ("reward", "js", {}, "none", "sequence", "biased"),
        ("reward", "js", {"credit": "token"}, "js", "token", "ok"),
        ("reward", "chi2", {"credit": "token"}, "chi2", "token", "ok"),
        ("reward", "tv", {"credit": "token"}, "tv", "token", "ok"),
        ("reward", "k1", {"normalization": "std"}, "none", "sequence", "biased"),
        ("reward", "k1", {"correction": "importance"}, "reverse", "sequence", "void"),
        ("reward", "k1", {"aggregation": "seq-mean-token-mean"}, "none", "sequence", "biased"),
        ("loss", "k1", {}, "none", "token", "void"),
        ("loss", "k1", {"correction": "importance"}, "reverse", "token", "ok"),
        ("loss", "k1", {"correction": "importance_detached"}, "none", "token", "void"),
        ("loss", "k1", {"aggregation": "seq-mean-token-mean"}, "none", "token", "biased"),
        ("loss", "k2", {}, "reverse", "token", "ok"),
        ("loss", "k2", {"correction": "importance"}, "none", "token", "biased"),
        ("loss", "k2", {"correction": "importance_detached"}, "reverse", "token", "ok"),
        ("loss", "k3", {}, "forward", "token", "ok"),
        ("loss", "k3", {"correction": "importance"}, "reverse", "token", "ok"),
        ("loss", "k3", {"correction": "importance_detached"}, "forward", "token", "ok"),
        ("loss", "k3_verl", {}, "none", "token", "biased"),
        ("loss", "abs", {}, "none", "token", "biased"),
        ("loss", "forward", {}, "forward", "token", "ok"),
        ("loss", "js", {"correction": "importance"}, "js", "token", "ok"),
        ("loss", "chi2", {}, "chi2", "token", "ok"),
        ("loss", "tv", {}, "tv", "token", "ok"),
        ("loss", "full_reverse", {}, "reverse", "token", "ok"),
        ("loss", "full_forward", {}, "forward", "token", "ok"),
        ("loss", "topk_reverse", {}, "reverse", "coarse", "ok"),
        ("loss", "topk_forward", {}, "forward", "coarse", "ok"),
        ("both", "k3", {}, "reverse", "sequence", "ok"),
        ("both", "k3", {"credit": "reward_to_go"}, "reverse", "sequence", "ok"),
        ("both", "k3", {"credit": "token"}, "reverse", "token", "biased"),
        ("both", "k3", {"policy_aggregation": "seq-mean-token-sum"}, "none", "sequence", "biased"),
        ("both", "k3", {"normalization": "std"}, "none", "sequence", "biased"),
        ("both", "k3", {"correction": "importance"}, "none", "sequence", "biased"),
        ("both", "k3_verl", {}, "none", "sequence", "biased"),
        ("both", "k2", {}, "none", "sequence", "biased"),
        ("both", "k1", {}, "reverse", "sequence", "void"),
        ("both", "forward", {}, "none", "sequence", "biased"),
    ],
)
def test_verdicts(placement, estimator, rest, follows, level, verdict):
    found = doctor.judge(placement, estimator, **rest)
    assert (found.follows, found.level, found.verdict) == (follows, level, verdict)


@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name != "seq-mean-token-mean"])
@pytest.mark.parametrize(("placement", "estimator"), [("reward", "k1"), ("loss", "k2"), ("loss", "k3"), ("both", "k3")])
def test_three_aggregations_change_no_direction(placement, estimator, aggregation):
    usual, other = (doctor.judge(placement, estimator, aggregation=name) for name in ("token-mean", aggregation))
    assert (other.follows, other.level, other.verdict) == (usual.follows, usual.level, "ok")


@pytest.mark.parametrize(
    ("placement", "estimator", "rest", "follows"),
    [
        ("reward", "k1", {}, "none"),
        ("reward", "forward", {"credit": "token"}, "none"),
        ("both", "k3", {}, "none"),
        ("loss", "k2", {}, "none"),
        ("loss", "k3", {}, "none"),
        ("loss", "forward", {}, "none"),
        ("loss", "k1", {"correction": "importance"}, "reverse"),
        ("loss", "k2", {"correction": "importance"}, "none"),
        ("loss", "k2", {"correction": "importance_detached"}, "reverse"),
        ("loss", "k3", {"correction": "importance"}, "reverse"),
        ("loss", "k3", {"correction": "importance_detached"}, "forward"),
        ("loss", "tv", {"correction": "importance"}, "tv"),
        ("loss", "full_forward", {}, "forward"),
    ],
)
def test_what_is_followed_off_policy(placement, estimator, rest, follows):
    found = doctor.judge(placement, estimator, **rest)
    assert found.follows_off_policy == follows


def test_cosines_are_one_where_followed_and_absent_where_there_is_no_gradient():
    assert doctor.judge("reward", "k1").cosine_reverse == pytest.approx(1.0)
    assert doctor.judge("loss", "k2").cosine_reverse == pytest.approx(1.0)
    assert doctor.judge("loss", "k3").cosine_forward == pytest.approx(1.0)
    assert doctor.judge("loss", "k1").cosine_reverse is None and doctor.judge("loss", "k1").cosine_forward is None


def test_relative_errors_are_nothing_where_followed_and_one_where_nothing_is():
    assert doctor.judge("reward", "k1").relative_error < 1e-12
    assert doctor.judge("loss", "k1").relative_error == pytest.approx(1.0)
    # abs follows twice another divergence: far from both directions of KL
    assert doctor.judge("loss", "abs").relative_error > 0.5


def test_charging_k3_goes_against_both_directions_somewhere():
    found = doctor.judge("reward", "k3")
    assert found.cosine_reverse < 0 and found.cosine_forward < 0


def test_the_logged_value_is_judged_apart_from_the_gradient():
    values = {name: doctor.judge("loss", name).value for name in (*kl.names(), "full_reverse", "topk_reverse")}
    assert values["k1"] == values["k3"] == doctor.judge("reward", "k1").value == "KL(pi||ref), unbiased"
    assert values["forward"] == "KL(ref||pi) of each token, unbiased"
    assert values["js"] == "JS(pi, ref) of each token, unbiased"
    assert values["k2"].startswith("not a KL: -") and values["abs"].startswith("not a KL: +")
    assert values["k3_verl"].startswith("below KL(pi||ref), by up to ")
    assert values["full_reverse"] == "KL(pi||ref), exact" and values["topk_reverse"].startswith("below KL(pi||ref)")


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


OWN = """
import torch

class Away:
    def value(self, d): return -d
    def coefficient(self, d): return -d

class Rounded:
    def value(self, d): return d.detach()
    def coefficient(self, d): return d

away, rounded = Away(), Rounded()
"""


def test_a_users_own_estimator_is_judged(tmp_path, monkeypatch):
    (tmp_path / "doctors_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    away = doctor.judge("loss", "doctors_own:away")
    assert (away.verdict, away.follows) == ("biased", "none")
    assert away.reason.startswith("It follows -1 times the reverse KL") and "drives the policy away" in away.reason
    # the charge is the coefficient: d follows the reverse KL in both places
    assert doctor.judge("reward", "doctors_own:rounded").follows == "reverse"
    rows = doctor.table(estimators=("doctors_own:rounded",))
    assert {row["correction"] for row in rows} == {"none", "importance_detached"}
    with pytest.raises(ValueError, match="passes no gradient"):
        doctor.judge("loss", "doctors_own:rounded", correction="importance")


def test_without_a_placement_nothing_is_followed():
    found = doctor.judge("none", None)
    assert (found.follows, found.verdict) == ("none", "ok")


@pytest.mark.parametrize(("placement", "estimator"), [("none", "k1"), ("reward", None)])
def test_half_a_setting_is_refused(placement, estimator):
    with pytest.raises(ValueError, match="is half a setting. Give an estimator with 'reward', 'loss' or 'both'"):
        doctor.judge(placement, estimator)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no KL placement 'advantage'. Known placements: none, reward, loss, both"):
        doctor.judge("advantage", "k1")
    with pytest.raises(ValueError, match="no KL estimator 'k4'. Did you mean"):
        doctor.judge("loss", "k4")
    with pytest.raises(ValueError, match="no KL credit 'all'. Known: sequence, reward_to_go, token"):
        doctor.judge("reward", "k1", credit="all")
    with pytest.raises(ValueError, match="no KL aggregation 'mean'. Known: token-mean"):
        doctor.judge("loss", "k2", aggregation="mean")


# --------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("placement", "estimator", "follows"),
    [
        ("reward", "k1", "reverse"),
        ("reward", "forward", "forward"),
        ("loss", "k2", "reverse"),
        ("loss", "k3", "forward"),
        ("loss", "js", "js"),
        ("loss", "js", "none"),
        ("loss", "full_reverse", "reverse"),
        ("both", "k3", "reverse"),
        ("none", None, None),
    ],
)
def test_a_true_claim_passes(placement, estimator, follows):
    doctor.check_claim(Setting(placement=placement, estimator=estimator, follows=follows))


def test_the_whole_block_is_read_and_none_stands_for_the_default():
    doctor.check_claim(Whole(placement="reward", estimator="k1", follows="reverse"))
    doctor.check_claim(Whole(placement="reward", estimator="js", follows="js", credit="token", baseline="none"))
    doctor.check_claim(Whole(placement="loss", estimator="k3", follows="reverse", correction="importance"))
    # the KL's own aggregation, and not the policy loss's, decides in the loss
    sums = "seq-mean-token-sum"
    doctor.check_claim(
        Whole(placement="loss", estimator="k2", follows="reverse", aggregation=sums),
        Objective(loss_aggregation="seq-mean-token-mean"),
    )


REFUSED = [
    ({"placement": "reward", "estimator": "k1", "normalize_with_reward": True}, "kl.normalize_with_reward=false"),
    ({"placement": "loss", "estimator": "k2", "aggregation": "seq-mean-token-mean"}, "kl.aggregation='token-mean'"),
    ({"placement": "loss", "estimator": "k2", "correction": "importance"}, "kl.correction='importance_detached'"),
    ({"placement": "reward", "estimator": "tv"}, "kl.credit='token'"),
    (
        {"placement": "loss", "estimator": "k2", "shaping": Shaping(kind="clip", threshold=1.0)},
        "kl.shaping.kind='none'",
    ),
    ({"placement": "reward", "estimator": "k1", "shaping": Shaping(kind="sigmoid", target=0.1)}, "kl.shaping.kind"),
    ({"placement": "loss", "estimator": "k3", "shaping": Shaping(kind="length_normalized")}, "kl.shaping.kind='none'"),
    ({"placement": "loss", "estimator": "k3", "cap": 0.5}, "kl.cap=null"),
    ({"placement": "both", "estimator": "k3", "credit": "token"}, "credit sequence or reward_to_go"),
    ({"placement": "both", "estimator": "k3", "aggregation": "seq-mean-token-sum"}, "aggregate differently"),
    ({"placement": "reward", "estimator": "k1", "correction": "importance"}, "PPO's ratio"),
    ({"placement": "loss", "estimator": "abs"}, "It follows 2 times the total variation distance"),
]


@pytest.mark.parametrize(("block", "told"), REFUSED)
def test_what_does_not_follow_is_refused_with_the_change_that_would(block, told):
    with pytest.raises(ValueError, match=r"is (biased|void)\.") as refused:
        doctor.check_claim(Whole(follows="reverse", **block))
    assert told in str(refused.value)
    follows = doctor.judge_setting(Whole(follows="reverse", **block)).follows
    doctor.check_claim(Whole(follows=follows, allow_biased=True, **block))


def test_a_charge_goes_through_the_policy_losss_aggregation():
    setting = Whole(placement="reward", estimator="k1", follows="reverse")
    doctor.check_claim(setting, Objective(loss_aggregation="token-sum"))
    with pytest.raises(ValueError, match="With train.loss_aggregation='token-mean' it follows the reverse KL"):
        doctor.check_claim(setting, Objective(loss_aggregation="seq-mean-token-mean"))


def test_k1_in_the_loss_is_refused_with_the_reason_and_the_way_out():
    with pytest.raises(ValueError) as refused:
        doctor.check_claim(Setting(placement="loss", estimator="k1", follows="reverse"))
    assert str(refused.value) == (
        "kl.estimator='k1' with kl.placement='loss' is void. Its gradient is grad log pi whatever the reference is, "
        "and over the policy's own samples the mean of that is zero: it adds noise and pulls nowhere. "
        "Use kl.placement='reward' with kl.estimator='k1', or kl.placement='loss' with kl.estimator='k2' or "
        "'full_reverse' to follow the reverse KL, KL(pi || pi_ref). "
        "To run it all the same, set kl.follows='none' and kl.allow_biased=true."
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_refused_unless_allowed_and_claimed_as_nothing(estimator):
    with pytest.raises(ValueError, match="is biased.*kl.placement='loss' with kl.estimator='k3' or 'forward' or .*'"):
        doctor.check_claim(Setting(placement="reward", estimator=estimator, follows="forward"))
    with pytest.raises(ValueError, match=r"kl.follows='forward' is claimed, but .* follows 'none'"):
        doctor.check_claim(Setting(placement="reward", estimator=estimator, follows="forward", allow_biased=True))
    doctor.check_claim(Setting(placement="reward", estimator=estimator, follows="none", allow_biased=True))


def test_a_false_claim_is_refused_with_both_ways_out():
    expected = (
        r"kl.follows='reverse' is claimed, but kl.estimator='k3' with kl.placement='loss' follows 'forward'.*"
        r"Set kl.follows='forward', or use kl.placement='reward' with kl.estimator='k1', or .*'k2' or .* the reverse"
    )
    with pytest.raises(ValueError, match=expected):
        doctor.check_claim(Setting(placement="loss", estimator="k3", follows="reverse"))


def test_a_missing_claim_and_a_claim_about_nothing_are_refused():
    with pytest.raises(ValueError, match=r"kl.follows=None is claimed.*Set kl.follows='reverse'\."):
        doctor.check_claim(Setting(placement="reward", estimator="k1"))
    with pytest.raises(ValueError, match="follows 'none'. No KL term"):
        doctor.check_claim(Setting(placement="none", follows="reverse"))


# ---------------------------------------------------------------------------------------------------------------- words


def explain(setting: Any, advantage: str, updates: int, **beside: Any) -> str:
    settings = {f"{objective.LOSS}.{name}": value for name, value in beside.items()}
    options = {"advantage": advantage, "updates_per_batch": updates, "loss_aggregation": "token-mean"}
    return doctor.explain(setting, objective.objective(settings, **options))


def test_reverse_in_the_reward_in_words():
    text = explain(Setting(placement="reward", estimator="k1", follows="reverse"), "rloo", 1)
    assert text.startswith(
        "k1 is charged to the reward with beta 0.1. "
        "It follows the reverse KL, KL(pi || pi_ref), of whole responses: the expected gradient is exactly that one. "
        "Tokens are also charged for the prefixes they lead to, so this is the full gradient. "
        "With one update per batch every update is on-policy and this holds for all of them. "
        "Nothing divides the task's advantage, so beta is in units of reward per nat. "
        "Noise of one response's gradient, "
    )


def test_forward_in_the_loss_in_words():
    text = explain(Setting(placement="loss", estimator="k3", follows="forward"), "rloo", 1)
    assert "follows the forward KL, KL(pi_ref || pi), per token, on the policy's own prefixes" in text
    assert "How a token steers later ones is left out" in text


def test_credit_correction_and_cap_in_words():
    text = explain(Whole(placement="reward", estimator="k1", credit="token", cap=20.0), "rloo", 1)
    assert text.startswith("k1 is charged to the reward with beta 0.1 (credit token). It follows the reverse KL")
    assert "This holds while no token reaches the cap of 20 nats" in text
    clipped = Whole(placement="loss", estimator="k2", shaping=Shaping(kind="clip", threshold=500.0))
    assert "while no token's value reaches the clip at 500 nats" in explain(clipped, "rloo", 1)


def test_more_updates_per_batch_change_the_direction():
    in_reward = explain(Setting(placement="reward", estimator="k1", follows="reverse"), "rloo", 4)
    in_loss = explain(Setting(placement="loss", estimator="k2", follows="reverse"), "rloo", 4)
    assert "With 4 updates per batch this holds for the first one only; then the direction changes" in in_reward
    assert "KL(pi || pi_ref) - KL(pi || mu)" in in_reward and "PPO's clip also zeroes the KL part" in in_reward
    assert "without an importance weight" in in_loss and "PPO's clip" not in in_loss


def test_a_correction_holds_for_more_updates_per_batch():
    setting = Whole(placement="loss", estimator="k3", correction="importance")
    text = explain(setting, "rloo", 4)
    assert "(correction importance)" in text and "It still holds in the later ones of 4 updates per batch" in text
    assert "this holds for the first one only" not in text


def test_beta_under_each_advantage_in_words():
    texts = {
        name: explain(Setting(placement="reward", estimator="k1", follows="reverse"), name, 1)
        for name in ("rloo", "grpo", "dr_grpo")
    }
    assert "beta is not rescaled by it" in texts["grpo"] and "beta * std in units of reward" in texts["grpo"]
    assert "(n - 1) / n" in texts["dr_grpo"]
    assert "gae puts the task's advantage on a scale of its own" in explain(
        Setting(placement="loss", estimator="k3", follows="forward"), "gae", 1
    )


def test_beta_under_two_aggregations_and_inside_the_std_in_words():
    own = Whole(placement="loss", estimator="k2", aggregation="seq-mean-token-sum")
    assert "the policy loss aggregates by token-mean and the KL by seq-mean-token-sum" in explain(own, "rloo", 1)
    inside = Whole(placement="reward", estimator="k1", normalize_with_reward=True, allow_biased=True)
    text = explain(inside, "grpo", 1)
    assert "beta cancels" in text and "What beta means changes from group to group" in text


def test_a_refused_setting_and_no_kl_in_words():
    biased = explain(Setting(placement="reward", estimator="k3", allow_biased=True), "rloo", 1)
    assert "This is biased and follows no divergence." in biased
    assert explain(Setting(placement="none", beta=None), "rloo", 1).startswith("No KL term")


def test_torchs_threads_are_as_before():
    before = torch.get_num_threads()
    with enumeration.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
