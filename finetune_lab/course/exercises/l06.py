"""The exercises of lesson 06, DPO and its family: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (KTO with its names swapped, beta outside the sigmoid, one beta for all
losses) and from bug reports (the prompt counted, the reference forgotten, ties counted as right).
"""

import torch
import torch.nn.functional as F

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.methods import preference

# 06.1 kl_optimum


def bandit_cases(draw):
    for beta, n in zip((0.2, 0.7, 3.0), (4, 6, 5), strict=True):
        yield case(draw.normal(n).softmax(0), draw.normal(n), beta)


def times_beta(reference, reward, beta):
    return torch.softmax(reference.log() + reward * beta, dim=-1)


def without_reference(reference, reward, beta):
    return torch.softmax(reward / beta, dim=-1)


def no_logarithm(reference, reward, beta):
    return torch.softmax(reference + reward / beta, dim=-1)


def no_normaliser(reference, reward, beta):
    return reference * torch.exp(reward / beta)


def greedy(reference, reward, beta):
    return F.one_hot(reward.argmax(), len(reward)).float()


def additive(reference, reward, beta):
    return (reference + torch.softmax(reward / beta, dim=-1)) / 2


def only_logits(reference, reward, beta):
    return reference.log() + reward / beta


def logarithm(reference, reward, beta):
    return torch.log_softmax(reference.log() + reward / beta, dim=-1)


exercise(
    "06.1", "the best policy on a leash", preference.kl_optimum, bandit_cases,
    wrong=[
        Wrong(times_beta, "divide the reward by beta: a larger beta, a shorter leash, less of the reward"),
        Wrong(without_reference, "the reference is missing: it multiplies exp(reward / beta)"),
        Wrong(no_logarithm, "inside a softmax the reference stands as its logarithm: reference.log()"),
        Wrong(no_normaliser, "not a distribution yet: divide by the sum, Z"),
        Wrong(only_logits, "these are logarithms, and Z is missing: a softmax turns them into the policy"),
        Wrong(logarithm, "these are log-probabilities: softmax instead of log_softmax"),
        Wrong(greedy, "this is the limit for beta -> 0: no leash at all"),
        Wrong(additive, "the reference multiplies, it is not mixed in"),
    ],
)  # fmt: skip


# 06.2 sequence_logps


def row_cases(draw):
    for average, (batch, seq, vocab) in zip((False, True, False, True), draw.sizes(4, 4, 9, dims=3), strict=True):
        labels = draw.ints(0, vocab, batch, seq)
        for row in range(batch):
            start = draw.randint(1, seq - 2)
            labels[row, :start] = -100
            labels[row, draw.randint(start + 1, seq) :] = -100
        yield case(2 * draw.normal(batch, seq, vocab), labels, average)


def scored(shift=1, keep=lambda targets: targets != -100, count=None, logs=lambda s: s.log_softmax(-1), sign=1):
    """`sequence_logps` with one mistake."""

    def sequence_logps(logits, labels, average=False):
        scores = logits[:, :-shift] if shift else logits
        targets = labels[:, shift:]
        kept = keep(targets)
        each = logs(scores.float()).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        total = sign * (each * kept).sum(1)
        return total / (count or (lambda t: (t != -100).sum(1)))(targets) if average else total

    return sequence_logps


def always_average(logits, labels, average=False):
    return preference.sequence_logps(logits, labels, average=True)


def never_average(logits, labels, average=False):
    return preference.sequence_logps(logits, labels)


def one_number(logits, labels, average=False):
    return preference.sequence_logps(logits, labels, average).sum()


def reduced(logits, labels, average=False):
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def gathered_at_ignored(logits, labels, average=False):
    return logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None])[..., 0].sum(1)


exercise(
    "06.2", "log-probability of an answer", preference.sequence_logps, row_cases, rtol=1e-4, atol=1e-4,
    wrong=[
        Wrong(scored(shift=0), "off by one: the logits at t predict the token at t+1; shift as in lesson 01"),
        Wrong(scored(keep=torch.ones_like), "positions labelled -100 (prompt, padding) must not count"),
        Wrong(scored(logs=lambda s: s.softmax(-1)), "these are probabilities: take log_softmax"),
        Wrong(scored(logs=lambda s: s), "these are logits: they become log-probabilities by log_softmax"),
        Wrong(scored(logs=lambda s: s.log_softmax(1)), "log_softmax over the vocabulary, the last axis: dim=-1"),
        Wrong(reduced, "cross_entropy averages over the batch by itself: reduction=\"none\", then sum each row"),
        Wrong(gathered_at_ignored, "-100 is no token: gather at targets.clamp(min=0), then leave these positions out"),
        Wrong(scored(sign=-1), "the sign: a log-probability is negative, cross-entropy is its negative"),
        Wrong(scored(count=lambda t: t.shape[1]), "the average runs over the labelled tokens, not over the width of the batch"),
        Wrong(always_average, "without average=True it is a sum: DPO needs sums"),
        Wrong(never_average, "average=True divides by the number of labelled tokens: IPO, SimPO and ORPO need that"),
        Wrong(one_number, "one number a row, (batch,): do not add up the batch"),
    ],
)  # fmt: skip


# 06.3 dpo_loss


def pair_cases(draw):
    for beta, n in zip((0.1, 2.0, 0.5), (3, 5, 4), strict=True):
        policy = [(-20 * draw.normal(n).abs()).requires_grad_() for _ in range(2)]
        yield case(*policy, *(-20 * draw.normal(n).abs() for _ in range(2)), beta)
    far = torch.tensor([-450.0, -3.0], requires_grad=True), torch.tensor([-20.0, -9.0], requires_grad=True)
    yield case(*far, torch.tensor([-30.0, -8.0]), torch.tensor([-28.0, -7.0]), 0.5)  # a margin of -214: exp underflows


def with_gradients(fn, *args):
    """The result, whether the rewards hang on the graph, and the gradients of the loss at the policy (None: no graph)."""
    result = fn(*args)
    if not isinstance(result, tuple) or not all(isinstance(part, torch.Tensor) for part in result):
        return result
    hang = [reward.requires_grad for reward in result[1:]]
    if not result[0].requires_grad:
        return *result, hang, None
    wanted = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    gradients = torch.autograd.grad(result[0].sum(), wanted, allow_unused=True, retain_graph=True)
    return *(part.detach() for part in result), hang, gradients


def gradient_problem(one, expected, got):
    """The hint for a right loss with a wrong graph, whatever else is wrong."""
    if not isinstance(got, tuple) or len(got) != len(expected):
        return None
    if got[-1] is None:
        return (
            "the loss has no gradient to the policy: detach the rewards that you return, not what the loss is made of"
        )
    return "detach the rewards that you return: they are for the log" if any(got[-2]) else None


def preferred(gap=lambda c, r, pc, pr, beta: c - r, loss=lambda m, beta: -F.logsigmoid(m), mean=torch.mean, unit=True,
              detach=True):  # fmt: skip
    """`dpo_loss` with one mistake."""

    def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
        chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
        margin = gap(chosen, rejected, policy_chosen, policy_rejected, beta)
        scale = 1 if unit else 1 / beta
        rewards = [scale * reward for reward in (chosen, rejected)]
        return mean(loss(margin, beta)), *(r.detach() if detach else r for r in rewards)

    return dpo_loss


def loss_alone(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    return preference.dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)[0]


exercise(
    "06.3", "the DPO loss", preference.dpo_loss, pair_cases, call=with_gradients, diagnose=gradient_problem,
    wrong=[
        Wrong(preferred(gap=lambda c, r, pc, pr, beta: beta * (pc - pr)), "the reference is missing in the margin: compare "
              "log pi - log ref"),
        Wrong(preferred(gap=lambda c, r, pc, pr, beta: r - c), "chosen and rejected are swapped: this teaches the rejected "
              "answer"),
        Wrong(preferred(loss=lambda m, beta: -beta * F.logsigmoid(m / beta)), "beta belongs inside the sigmoid"),
        Wrong(preferred(loss=lambda m, beta: -torch.sigmoid(m)), "the logarithm is missing: -logsigmoid(margin)"),
        Wrong(preferred(loss=lambda m, beta: F.logsigmoid(m)), "the sign: a loss goes down when the margin grows"),
        Wrong(preferred(mean=torch.sum), "mean over the pairs, not the sum: else the step grows with the batch"),
        Wrong(preferred(loss=lambda m, beta: -torch.log(torch.sigmoid(m))), "log(sigmoid(m)) is minus infinity for a large "
              "negative margin: F.logsigmoid(m)"),
        Wrong(preferred(loss=lambda m, beta: -F.logsigmoid(m / beta), unit=False), "beta is missing: it multiplies both "
              "log-ratios"),
        Wrong(preferred(detach=False), "detach the rewards: they are for the log, and would keep the whole graph alive"),
        Wrong(preferred(unit=False), "the rewards carry beta: beta * (log pi - log ref)"),
        Wrong(loss_alone, "return three things: mean loss, chosen rewards, rejected rewards"),
    ],
)  # fmt: skip


# 06.4 reward_accuracy


def reward_cases(draw):
    for n in (5, 8, 7):
        chosen, rejected = draw.normal(n), draw.normal(n)
        rejected[0], rejected[1] = chosen[0], chosen[1] + 1e-5  # a tie, and one but for rounding
        yield case(chosen, rejected, 0.0)
        yield case(chosen, rejected, 1e-4)


def judged(tie_counts, within=lambda margin, tie: margin.abs() <= tie, right=lambda m: m > 0):
    """`reward_accuracy` with one mistake."""

    def reward_accuracy(chosen, rejected, tie=0.0):
        margin = chosen - rejected
        return torch.where(within(margin, tie), tie_counts, right(margin).float()).mean()

    return reward_accuracy


def positive_rewards(chosen, rejected, tie=0.0):
    return torch.where((chosen - rejected).abs() <= tie, 0.5, (chosen > 0).float()).mean()


def ties_dropped(chosen, rejected, tie=0.0):
    margin = chosen - rejected
    return (margin[margin.abs() > tie] > 0).float().mean()


exercise(
    "06.4", "accuracy of the implicit rewards", preference.reward_accuracy, reward_cases,
    wrong=[
        Wrong(judged(0.0), "a tie counts one half, not zero: else training starts at 0 % and seems to gain 50"),
        Wrong(judged(1.0), "a tie counts one half, not one: a policy that has learnt nothing would be perfect"),
        Wrong(judged(0.5, within=lambda margin, tie: margin == 0), "a margin of at most `tie` in size counts as a tie: rounding "
              "must not decide"),
        Wrong(judged(0.5, within=lambda margin, tie: margin <= tie), "take the size of the margin: abs() before comparing "
              "with `tie`, a negative one is wrong and no tie"),
        Wrong(judged(0.5, right=lambda m: m < 0), "right is a chosen answer with the HIGHER reward"),
        Wrong(ties_dropped, "ties stay in the mean, each as one half: do not leave them out"),
        Wrong(positive_rewards, "compare with the rejected answer: the chosen reward itself may be negative"),
    ],
)  # fmt: skip


# 06.5 simpo_loss


def average_cases(draw):
    for beta, n in zip((2.0, 2.5, 10.0), (3, 5, 4), strict=True):
        policy = [(-2 * draw.normal(n).abs()).requires_grad_() for _ in range(2)]
        yield case(*policy, beta, draw.choice([0.3, 0.8, 1.4]))


def margined(m=lambda c, r, gamma, beta: c - r - gamma, unit=lambda beta: beta):
    """`simpo_loss` with one mistake."""

    def simpo_loss(policy_chosen, policy_rejected, beta, gamma):
        chosen, rejected = beta * policy_chosen, beta * policy_rejected
        rewards = unit(beta) * policy_chosen.detach(), unit(beta) * policy_rejected.detach()
        return -F.logsigmoid(m(chosen, rejected, gamma, beta)).mean(), *rewards

    return simpo_loss


def gamma_in_reward(policy_chosen, policy_rejected, beta, gamma):
    loss, chosen, rejected = preference.simpo_loss(policy_chosen, policy_rejected, beta, gamma)
    return loss, chosen - gamma, rejected


exercise(
    "06.5", "the SimPO loss", preference.simpo_loss, average_cases, call=with_gradients, diagnose=gradient_problem,
    wrong=[
        Wrong(margined(lambda c, r, gamma, beta: c - r), "the target margin gamma is missing"),
        Wrong(margined(lambda c, r, gamma, beta: c - r + gamma), "gamma is taken off: the margin must exceed it"),
        Wrong(margined(lambda c, r, gamma, beta: c - r - beta * gamma), "the paper's gamma stands outside beta: "
              "beta * (chosen - rejected) - gamma"),
        Wrong(margined(lambda c, r, gamma, beta: (c - r) / beta - gamma), "beta multiplies both averages"),
        Wrong(margined(lambda c, r, gamma, beta: r - c - gamma), "chosen and rejected are swapped"),
        Wrong(margined(lambda c, r, gamma, beta: (c - r) / beta - gamma, unit=lambda beta: 1), "beta is missing: it multiplies "
              "both averages, in the loss and in the rewards"),
        Wrong(gamma_in_reward, "gamma belongs to the loss: the chosen reward is beta * average alone"),
        Wrong(margined(unit=lambda beta: 1), "the rewards carry beta"),
    ],
)  # fmt: skip


# 06.6 ipo_loss


def ipo_cases(draw):
    for tau, n in zip((0.1, 1.0, 0.4), (3, 5, 4), strict=True):
        policy = [(-2 * draw.normal(n).abs()).requires_grad_() for _ in range(2)]
        yield case(*policy, *(-2 * draw.normal(n).abs() for _ in range(2)), tau)


def squared(target=lambda tau: 1 / (2 * tau), h=lambda c, r: c - r, power=2, unit=lambda tau: tau, mean=torch.mean):
    """`ipo_loss` with one mistake."""

    def ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, tau):
        chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
        loss = (h(chosen, rejected) - target(tau)).abs() ** power
        return mean(loss), unit(tau) * chosen.detach(), unit(tau) * rejected.detach()

    return ipo_loss


def scaled_inside(policy_chosen, policy_rejected, reference_chosen, reference_rejected, tau):
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    loss = (tau * (chosen - rejected) - 1 / (2 * tau)) ** 2
    return loss.mean(), tau * chosen.detach(), tau * rejected.detach()


def no_reference(policy_chosen, policy_rejected, reference_chosen, reference_rejected, tau):
    zero = torch.zeros_like(reference_chosen)
    return preference.ipo_loss(policy_chosen, policy_rejected, zero, zero, tau)


exercise(
    "06.6", "the IPO loss", preference.ipo_loss, ipo_cases, call=with_gradients, diagnose=gradient_problem,
    wrong=[
        Wrong(squared(target=lambda tau: 1 / tau), "the target of the margin is 1 / (2 tau), not 1 / tau"),
        Wrong(squared(target=lambda tau: 1 / 2 * tau), "1 / 2 * tau is tau / 2: put brackets, 1 / (2 * tau)"),
        Wrong(squared(h=lambda c, r: r - c), "chosen and rejected are swapped, or the target is added: margin minus target"),
        Wrong(squared(mean=torch.sum), "mean over the pairs, not the sum"),
        Wrong(no_reference, "the reference is missing: the margin is one of log-ratios, log pi - log ref"),
        Wrong(squared(power=1), "a square, not a distance"),
        Wrong(scaled_inside, "the margin itself carries no tau: only the target does"),
        Wrong(squared(unit=lambda tau: 1), "the rewards carry tau, as DPO's carry beta"),
    ],
)  # fmt: skip


# 06.7 kto_loss


def thumb_cases(draw):
    for weights, n in zip(((1.0, 1.0), (1.3, 0.7), (1.0, 2.0)), (5, 6, 7), strict=True):
        policy = (-9 * draw.normal(n).abs()).requires_grad_()
        desirable = torch.tensor([i % 3 != 1 for i in range(n)])
        z0, beta = torch.tensor(draw.choice([0.4, 1.5])), draw.choice([0.2, 0.6])
        yield case(policy, -9 * draw.normal(n).abs(), desirable, z0, beta, *weights)


def valued(good=lambda r, z0, beta: beta * (r - z0), bad=lambda r, z0, beta: beta * (z0 - r), value=torch.sigmoid,
           weigh=lambda d, w_good, w_bad: torch.where(d, w_good, w_bad), start=1.0, reward=lambda r, beta: beta * r.detach()):  # fmt: skip
    """`kto_loss` with one mistake."""

    def kto_loss(policy, reference, desirable, z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
        ratio = policy - reference
        gain = torch.where(desirable, good(ratio, z0, beta), bad(ratio, z0, beta))
        weight = weigh(desirable, desirable_weight, undesirable_weight)
        return (weight * (start - value(gain))).mean(), reward(ratio, beta)

    return kto_loss


def log_kto(policy, reference, desirable, z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
    ratio = policy - reference
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    loss = -weight * F.logsigmoid(beta * torch.where(desirable, ratio - z0, z0 - ratio))
    return loss.mean(), beta * ratio.detach()


exercise(
    "06.7", "the KTO loss", preference.kto_loss, thumb_cases, call=with_gradients, diagnose=gradient_problem,
    wrong=[
        Wrong(valued(lambda r, z0, beta: r - beta * z0, lambda r, z0, beta: beta * z0 - r), "beta multiplies the whole "
              "difference, r - z0"),
        Wrong(valued(lambda r, z0, beta: beta * r - z0, lambda r, z0, beta: z0 - beta * r), "beta stands before z0 too: "
              "beta * (r - z0)"),
        Wrong(valued(lambda r, z0, beta: beta * (z0 - r), lambda r, z0, beta: beta * (r - z0)), "good and bad are swapped, or "
              "the 1 - is missing before sigma: a good answer's loss falls when r exceeds z0"),
        Wrong(valued(bad=lambda r, z0, beta: beta * (r - z0)), "a bad answer gains by falling below z0: z0 - r"),
        Wrong(valued(lambda r, z0, beta: beta * r, lambda r, z0, beta: -beta * r), "the reference point z0 is missing: a gain "
              "counts from the average drift"),
        Wrong(valued(weigh=lambda d, w_good, w_bad: torch.where(d, w_bad, w_good)), "the two weights are swapped"),
        Wrong(valued(weigh=lambda d, w_good, w_bad: 1.0), "the weights lambda_D and lambda_U are missing"),
        Wrong(valued(reward=lambda r, beta: r.detach()), "the rewards carry beta: beta * log-ratio"),
        Wrong(valued(reward=lambda r, beta: beta * r), "detach the rewards: they are for the log"),
        Wrong(valued(start=0.0), "the loss is the weight minus the value, lambda - v: the gradient is right, the number is not"),
        Wrong(log_kto, "no logarithm here: KTO's value is the sigmoid itself, that is why it saturates"),
    ],
)  # fmt: skip
