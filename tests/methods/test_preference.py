"""Claims about DPO, its relatives, and the log-probabilities that they compare."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods.preference import (
    IGNORE_INDEX,
    bradley_terry,
    cdpo_loss,
    dpo_loss,
    hidden_logps,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    kl_objective,
    kl_optimum,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    reward_accuracy,
    reward_margins,
    robust_dpo_loss,
    sequence_logps,
    shared_rows,
    simpo_loss,
    target_logps,
    total_variation,
)

WITH_REFERENCE = {
    "dpo": partial(dpo_loss, beta=0.1),
    "cdpo": partial(cdpo_loss, beta=0.1, epsilon=0.1),
    "robust": partial(robust_dpo_loss, beta=0.1, epsilon=0.1),
    "ipo": partial(ipo_loss, tau=0.1),
    "hinge": partial(hinge_loss, beta=0.1),
}


# ---- log-probabilities ----


def test_logps_are_those_of_the_labelled_tokens_alone():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 1, -100], [-100, 4, 4, 0, 2]])
    logp = logits.log_softmax(-1)
    first = logp[0, 1, 3] + logp[0, 2, 1]
    second = sum(logp[1, t, labels[1, t + 1]] for t in range(4))
    assert torch.allclose(sequence_logps(logits, labels), torch.stack([first, second]), atol=1e-6)


def test_an_average_divides_by_the_tokens_that_were_predicted():
    logits, labels = (
        torch.randn(1, 6, 7),
        torch.tensor([[2, -100, 3, 1, 5, -100]]),
    )  # the first label is never predicted
    torch.testing.assert_close(sequence_logps(logits, labels, average=True), sequence_logps(logits, labels) / 3)


def states(seed, rows, seq, vocab, width, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, seq, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows, seq), generator=g)
    labels[torch.rand(rows, seq, generator=g) < 0.5] = IGNORE_INDEX
    labels[:, -1] = 1
    return hidden, weight, labels


@given(
    seed=st.integers(0, 99), rows=st.integers(1, 4), seq=st.integers(2, 12), vocab=st.integers(2, 60),
    width=st.integers(1, 20), average=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_hidden_logps_are_sequence_logps_at_any_shape_with_the_same_gradients(seed, rows, seq, vocab, width, average):
    hidden, weight, labels = states(seed, rows, seq, vocab, width, torch.float64)
    scale = torch.linspace(-1, 2, rows)
    full = sequence_logps(hidden @ weight.T, labels, average)
    ours = hidden_logps(hidden, weight, labels, average)
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad((scale * full).sum(), (hidden, weight))
    for a, b in zip(torch.autograd.grad((scale * ours).sum(), (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_target_logps_do_not_depend_on_the_tile(tile):
    hidden, weight, _ = states(0, 1, 9, 50, 16)
    targets = torch.arange(9) * 5
    plain = (hidden[0] @ weight.T).log_softmax(-1)[torch.arange(9), targets]
    ours = target_logps(hidden[0], weight, targets, tile)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    scale = torch.randn(9)
    theirs = torch.autograd.grad((scale * plain).sum(), (hidden, weight))
    for a, b in zip(torch.autograd.grad((scale * ours).sum(), (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_states_give_fp32_log_probabilities_and_bf16_gradients():
    hidden, weight, labels = states(1, 2, 9, 50, 16, torch.bfloat16)
    logps = hidden_logps(hidden, weight, labels)
    exact = sequence_logps(hidden.detach().double() @ weight.detach().double().T, labels)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.detach().double(), exact, rtol=0.02, atol=0.05, check_dtype=False)
    grads = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(grad.dtype == torch.bfloat16 for grad in grads)


def test_hidden_logps_hold_a_tenth_of_the_memory_of_full_logits():
    hidden, weight, labels = states(0, 2, 256, 4096, 16)
    weight = weight.detach()
    labels[:, :192] = IGNORE_INDEX

    def step(logps):
        return lambda: logps().sum().backward()

    full = peak_bytes(step(lambda: sequence_logps(hidden @ weight.T, labels)))
    ours = peak_bytes(step(lambda: hidden_logps(hidden, weight, labels)))
    assert full > 2 * 2 * 255 * 4096 * 4  # logits and their gradient, at least
    assert ours < full / 10


# ---- the loss at its start, and its gradient ----


def test_loss_is_log_two_while_the_policy_is_the_reference():
    c, r = torch.randn(5), torch.randn(5)
    assert dpo_loss(c, r, c, r, 0.1)[0].item() == pytest.approx(math.log(2))


def test_accuracy_is_one_half_while_the_policy_is_the_reference():
    c, r = torch.randn(5), torch.randn(5)
    _, chosen, rejected = dpo_loss(c, r, c, r, 0.1)
    assert reward_accuracy(chosen, rejected) == 0.5


def test_rounding_of_the_reference_makes_ties_random_unless_a_tie_is_said():
    chosen, rejected = torch.tensor([1e-6, -1e-6, -1e-6, -1e-6]), torch.zeros(4)
    assert reward_accuracy(chosen, rejected) == 0.25
    assert reward_accuracy(chosen, rejected, tie=1e-4) == 0.5


def test_loss_can_fall_while_the_chosen_answer_becomes_less_likely():
    zero = torch.zeros(1)
    loss, chosen, rejected = dpo_loss(torch.tensor([-5.0]), torch.tensor([-20.0]), zero, zero, 0.1)
    assert loss.item() == pytest.approx(0.2014, abs=1e-4) and loss < math.log(2)
    assert (chosen.item(), rejected.item()) == (pytest.approx(-0.5), pytest.approx(-2.0))


def test_gradient_pushes_the_pair_apart_by_how_wrong_the_reward_is():
    """Paper, section 4: beta * sigmoid(rejected reward - chosen reward), up for chosen and down for rejected."""
    c, r = torch.tensor([-3.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    loss, chosen, rejected = dpo_loss(c, r, torch.tensor([-2.0]), torch.tensor([-2.0]), 0.5)
    loss.backward()
    weight = 0.5 * torch.sigmoid(rejected - chosen)
    assert torch.allclose(c.grad, -weight) and torch.allclose(r.grad, weight)
    assert not chosen.requires_grad


def test_gradient_of_a_model_is_chosen_minus_rejected_weighted_by_sigmoid_of_minus_the_margin():
    hidden, weight, labels = states(3, 4, 9, 30, 8)
    past = sequence_logps((hidden + 0.3) @ weight.T, labels).detach().view(2, -1)
    logps = hidden_logps(hidden, weight, labels).view(2, -1)
    loss, chosen, rejected = dpo_loss(*logps, *past, 0.1)
    got = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    each = 0.1 * torch.sigmoid(-reward_margins(chosen, rejected)) / 2  # two pairs in the mean
    wanted = torch.autograd.grad((each * (logps[1] - logps[0])).sum(), hidden)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_a_shared_prompt_cancels_in_the_difference_of_sums():
    """Counting the prompt is invisible in the loss of summed log-probabilities; the logged rewards do see it."""
    prompt = torch.randn(4, 1).squeeze(1)
    args = [torch.randn(4) for _ in range(4)]
    shifted = [args[0] + prompt, args[1] + prompt, args[2], args[3]]
    plain, dirty = dpo_loss(*args, 0.1), dpo_loss(*shifted, 0.1)
    assert torch.allclose(plain[0], dirty[0], atol=1e-6) and not torch.allclose(plain[1], dirty[1])


@pytest.mark.parametrize("name", WITH_REFERENCE)
@given(shift=st.floats(-20, 20), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_only_the_margin_counts_where_there_is_a_reference(name, shift, seed):
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = values.clone()
    moved[:2] += shift  # both answers more likely by the same factor
    a, b = WITH_REFERENCE[name](*values)[0], WITH_REFERENCE[name](*moved)[0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_swapping_the_pair_swaps_the_rewards(name):
    pc, pr, rc, rr = torch.randn(4, 6)
    _, chosen, rejected = WITH_REFERENCE[name](pc, pr, rc, rr)
    _, second, first = WITH_REFERENCE[name](pr, pc, rr, rc)
    assert torch.equal(chosen, first) and torch.equal(rejected, second)


# ---- the relatives ----


def margins(values):
    """Arguments of a pair loss whose margin h is `values`."""
    h, zero = torch.tensor(values), torch.zeros(len(values))
    return h, zero, zero, zero


def slope(loss, h):
    h = torch.tensor([float(h)], requires_grad=True)
    zero = torch.zeros(1)
    return torch.autograd.grad(loss(h, zero, zero, zero)[0], h)[0].item()


def test_cdpo_is_dpo_without_smoothing_and_stops_where_the_preference_is_as_sure_as_the_labels():
    assert cdpo_loss(*margins([1.0, -2.0]), 0.5, 0.0)[0] == dpo_loss(*margins([1.0, -2.0]), 0.5)[0]
    best = math.log(0.8 / 0.2) / 0.5  # sigmoid(beta h) = 1 - epsilon
    assert slope(partial(cdpo_loss, beta=0.5, epsilon=0.2), best) == pytest.approx(0, abs=1e-7)


def test_robust_dpo_on_flipped_labels_is_dpo_on_clean_ones_in_the_mean():
    epsilon, args = 0.3, [torch.randn(5) for _ in range(4)]
    pc, pr, rc, rr = args
    right = robust_dpo_loss(pc, pr, rc, rr, 0.1, epsilon)[0]
    flipped = robust_dpo_loss(pr, pc, rr, rc, 0.1, epsilon)[0]
    torch.testing.assert_close((1 - epsilon) * right + epsilon * flipped, dpo_loss(*args, 0.1)[0])


def test_robust_dpo_refuses_labels_that_say_nothing():
    with pytest.raises(ValueError, match="epsilon is 0.5, expected 0 <= epsilon < 0.5"):
        robust_dpo_loss(*margins([0.0]), 0.1, 0.5)


def test_ipo_starts_at_a_quarter_over_tau_squared_and_wants_a_margin_of_half_over_tau():
    assert ipo_loss(*margins([0.0, 0.0]), 0.1)[0].item() == pytest.approx(25.0)
    assert ipo_loss(*margins([5.0]), 0.1)[0].item() == pytest.approx(0.0, abs=1e-9)


def test_ipo_pulls_back_a_margin_that_is_too_wide_and_dpo_never_does():
    assert slope(partial(ipo_loss, tau=0.1), 6.0) > 0
    assert all(slope(partial(dpo_loss, beta=0.1), h) < 0 for h in (6.0, 60.0, 200.0))


def test_hinge_has_no_gradient_beyond_its_margin():
    hinge = partial(hinge_loss, beta=0.1)
    assert slope(hinge, 9.0) == pytest.approx(-0.1) and slope(hinge, 11.0) == 0.0


def test_simpo_wants_the_margin_gamma_and_has_no_reference():
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([-1.5])
    loss, *rewards = simpo_loss(chosen, rejected, beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(math.log(2))  # beta * 0.5 - gamma = 0
    assert [reward.item() for reward in rewards] == [-2.0, -3.0]


def test_simpo_forgets_length_and_a_sum_does_not():
    """Two answers, each token as likely as the other's: the sum prefers the short one by 10 nats."""
    short, long = torch.full((1,), -1.0 * 10), torch.full((1,), -1.0 * 20)
    assert simpo_loss(short / 10, long / 20, 2.0, 0.0)[0].item() == pytest.approx(math.log(2))
    assert dpo_loss(short, long, torch.zeros(1), torch.zeros(1), 0.1)[0].item() == pytest.approx(0.3133, abs=1e-4)


def test_orpo_is_sft_plus_the_log_odds_ratio():
    p, q = 0.6, 0.2
    loss = orpo_loss(torch.tensor([math.log(p)]), torch.tensor([math.log(q)]), torch.tensor(1.5), 0.1)[0]
    ratio = (p / (1 - p)) / (q / (1 - q))
    assert loss.item() == pytest.approx(1.5 + 0.1 * math.log(1 + 1 / ratio), rel=1e-6)


def test_orpo_survives_answers_that_are_nearly_certain_or_nearly_impossible():
    logps = torch.tensor([-1e-5, -80.0], requires_grad=True)
    loss = orpo_loss(logps, logps.flip(0), torch.tensor(0.0), 0.1)[0]
    assert loss.isfinite() and torch.autograd.grad(loss, logps)[0].isfinite().all()


# ---- KTO ----


def test_kto_starts_at_one_half_and_saturates_for_very_good_and_very_bad_samples():
    """A sigmoid, not its logarithm: an answer that is hopelessly wrong is given up (paper, section 4)."""
    thumbs = torch.tensor([True, False])
    zero = torch.zeros(2)
    assert kto_loss(zero, zero, thumbs, 0.0, 0.1)[0].item() == pytest.approx(0.5)
    slopes = []
    for ratio in (0.0, 200.0, -200.0):
        policy = torch.full((2,), ratio, requires_grad=True)
        slopes.append(torch.autograd.grad(kto_loss(policy, zero, thumbs, 0.0, 0.1)[0], policy)[0].abs().max().item())
    assert slopes[0] == pytest.approx(0.0125) and max(slopes[1:]) < 1e-9


def test_kto_counts_gains_from_the_reference_point():
    policy, zero = torch.tensor([3.0]), torch.zeros(1)
    good = torch.tensor([True])
    assert kto_loss(policy, zero, good, 3.0, 0.1)[0].item() == pytest.approx(0.5)
    assert kto_loss(policy, zero, good, 0.0, 0.1)[0] < kto_loss(policy, zero, good, 3.0, 0.1)[0]


def test_kto_weights_each_kind_of_thumb():
    policy, zero, thumbs = torch.zeros(4), torch.zeros(4), torch.tensor([True, False, True, True])
    assert kto_loss(policy, zero, thumbs, 0.0, 0.1, 1.0, 3.0)[0].item() == pytest.approx((3 * 0.5 + 3 * 0.5) / 4)


def test_the_common_notes_formula_of_kto_is_another_number():
    """`sigmoid(r_ref - beta * KL)` leaves beta off the reference point: 0.940 instead of 0.901 here."""
    ratio, z0, beta = torch.tensor([-21.46]), 0.611, 0.1
    right = kto_loss(ratio, torch.zeros(1), torch.tensor([True]), z0, beta)[0]
    noted = 1 - torch.sigmoid(beta * ratio - z0)
    assert (right.item(), noted.item()) == (pytest.approx(0.9009, abs=2e-4), pytest.approx(0.9403, abs=2e-4))


def test_reference_point_is_a_mean_clamped_at_zero_and_gives_no_gradient():
    policy = torch.tensor([1.0, 2.0], requires_grad=True)
    assert kto_reference_point(policy, torch.zeros(2)).item() == 1.5
    assert kto_reference_point(-policy, torch.zeros(2)).item() == 0.0
    assert not kto_reference_point(policy, torch.zeros(2)).requires_grad


# ---- what to watch, and the optimum ----


@pytest.mark.parametrize(("margin", "loss"), [(0.0, 0.6931), (1.0, 0.3133), (2.0, 0.1269)])
def test_bradley_terry_gives_the_known_losses_of_a_reward_model(margin, loss):
    assert -bradley_terry(torch.tensor(margin), torch.tensor(0.0)).log().item() == pytest.approx(loss, abs=1e-4)


def test_implicit_rewards_are_the_rewards_of_the_dpo_loss():
    pc, pr, rc, rr = torch.randn(4, 3)
    _, chosen, rejected = dpo_loss(pc, pr, rc, rr, 0.3)
    assert torch.equal(implicit_rewards(pc, rc, 0.3), chosen) and torch.equal(implicit_rewards(pr, rr, 0.3), rejected)


@given(seed=st.integers(0, 999), n=st.integers(2, 8), beta=st.floats(0.1, 5))
@settings(max_examples=25, deadline=None)
def test_no_policy_beats_the_closed_form_optimum(seed, n, beta):
    g = torch.Generator().manual_seed(seed)
    reference, other = torch.softmax(torch.randn(2, n, generator=g, dtype=torch.float64), -1)
    reward = torch.randn(n, generator=g, dtype=torch.float64)
    best = kl_objective(kl_optimum(reference, reward, beta), reference, reward, beta)
    assert best >= kl_objective(other, reference, reward, beta) - 1e-12
    log_partition = torch.logsumexp(reference.log() + reward / beta, -1)
    torch.testing.assert_close(best, beta * log_partition)  # the value of the optimum is beta log Z


def test_rewards_read_off_the_optimum_are_the_rewards_up_to_a_constant():
    reference, reward = torch.softmax(torch.randn(5), 0), torch.randn(5)
    implied = implicit_rewards(kl_optimum(reference, reward, 0.3).log(), reference.log(), 0.3)
    torch.testing.assert_close(implied - implied[0], reward - reward[0], rtol=1e-4, atol=1e-5)


def test_total_variation_is_zero_for_equals_and_one_for_strangers():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert total_variation(p, p) == 0 and total_variation(p, q) == 1


# ---- one row for prompt, chosen and rejected ----


def test_the_rejected_answer_sees_the_prompt_and_itself_but_not_the_chosen_one():
    rows = shared_rows([[1, 2]], [[3, 4, 5]], [[6, 7]], pad=0)
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert rows.allowed[0, 0, 6].tolist() == [True, True, False, False, False, True, True]
    assert rows.allowed[0, 0, 4].tolist() == [True] * 5 + [False] * 2


def test_both_answers_begin_from_the_last_token_of_the_prompt():
    rows = shared_rows([[1, 2], [8]], [[3, 4, 5], [9]], [[6, 7], [10]], pad=0)
    assert rows.places.tolist() == [1, 2, 3, 1, 5, 7, 7]
    assert rows.targets.tolist() == [3, 4, 5, 6, 7, 9, 10]
    assert rows.answers.tolist() == [0, 0, 0, 2, 2, 1, 3]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        shared_rows([[1], []], [[2], [3]], [[4], [5]], pad=0)
