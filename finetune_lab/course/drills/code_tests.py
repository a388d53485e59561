"""The hidden tests of the code drills: cases, known-wrong answers, and the hint for each of them.

`exercises.py` keeps them, apart from the lessons' registry; those of lessons 01, 03, 06 and 07 are those lessons' own.
Leaves out: time and memory limits and the process of its own (`sandbox.py`).
"""

import torch
import torch.nn.functional as F

from finetune_lab.course import checks
from finetune_lab.course.checks import Wrong, case
from finetune_lab.course.drills.exercises import drill, reuse
from finetune_lab.course.exercises import l01, l03, l06, l07  # noqa: F401 (they define the exercises of their lessons)
from finetune_lab.methods import forgetting, merging, metrics, packing, preference

for _name in ("render_chat", "completion_labels", "assistant_labels", "sft_loss", "labelled_only_loss",
              "positions_from_mask", "block_diagonal_mask", "LoRALinear", "dora_weight", "loraplus_groups",
              "sequence_logps", "kto_loss", "dare", "concatenate"):  # fmt: skip
    reuse(_name, checks.REGISTRY[_name])


# pad_rows


def row_cases(draw):
    for side, (rows, longest) in zip(("right", "left", "right", "left"), draw.sizes(4, 3, 8), strict=True):
        value = draw.randint(0, 9)
        lengths = [draw.randint(1, longest - 1) for _ in range(rows - 1)] + [longest]
        batch = [[draw.randint(0, 9) for _ in range(n)] for n in lengths]
        batch[0][-1] = value  # a real token with the padding's id
        yield case(batch, value, side)
    yield case([[3, 1], [5]], 0, "top")


def padded(mask_by_value=False, always=None, swap=False, cut=False, lists=False, boolean=False):
    """`pad_rows` with one mistake."""

    def pad_rows(rows, value, side="right"):
        if cut:
            shortest = min(map(len, rows))
            rows = [row[:shortest] for row in rows]
        if swap and side in ("left", "right"):
            side = "left" if side == "right" else "right"
        ids, mask = packing.pad_rows(rows, value, always or side)
        if mask_by_value:
            mask = (ids != value).long()
        if boolean:
            mask = mask.bool()
        return (ids.tolist(), mask.tolist()) if lists else (ids, mask)

    return pad_rows


drill(
    "pad_rows", "pad rows", packing.pad_rows, row_cases,
    wrong=[
        Wrong(padded(mask_by_value=True), "the mask compares ids with the padding's id: a real token may have the same id "
              "(pad = eos); make the mask from the lengths"),
        Wrong(padded(always="right"), "side is ignored: 'left' puts the padding in front (and any other word is a "
              "ValueError)"),
        Wrong(padded(swap=True), "left and right are mixed up: side says where the PADDING goes"),
        Wrong(padded(cut=True), "rows are cut to the shortest: pad to the longest, no token may be lost"),
        Wrong(padded(lists=True), "return two tensors, (batch, seq), not lists"),
        Wrong(padded(boolean=True), "the mask holds whole numbers, 1 for a real token and 0 for padding"),
    ],
)  # fmt: skip


# exact_match


def text_cases(draw):
    words = ["lamp", "no order", "42", "Ost"]
    for n in (5, 6, 8):
        right = [draw.choice(words) for _ in range(n)]
        said = [*right[:-3], f" {right[-3]}\n", right[-2].upper() + "!", "xx" + right[-1]]
        yield case(said, right)
    yield case(["The lamp", "LAMP", "lamp"], ["lamp", "lamp", "lamp"])
    yield case([], [])
    yield case(["a"], ["a", "b"])


def matched(same=lambda p, r: p.strip() == r.strip(), share=True, empty=0.0, check=True):
    """`exact_match` with one mistake."""

    def exact_match(predictions, references):
        if check and len(predictions) != len(references):
            raise ValueError("lengths differ")
        if not predictions:
            return empty
        right = sum(same(p, r) for p, r in zip(predictions, references, strict=False))
        return right / len(predictions) if share else right

    return exact_match


drill(
    "exact_match", "exact match", metrics.exact_match, text_cases,
    wrong=[
        Wrong(matched(same=lambda p, r: p == r), "white space around both is ignored: strip() the two"),
        Wrong(matched(same=lambda p, r: p.strip().lower() == r.strip().lower()), "case counts: exact match is exact"),
        Wrong(matched(same=lambda p, r: r.strip() in p), "that is 'contains': a chatty answer would count as right"),
        Wrong(matched(share=False), "return the share, 0 to 1, not the number of right answers"),
        Wrong(matched(check=False), "different lengths are a ValueError: zip would drop the rest in silence"),
        Wrong(matched(empty=float("nan")), "no items: the score is 0.0"),
    ],
)  # fmt: skip


# ewc_penalty


def ewc_cases(draw):
    for strength, (rows, columns) in zip((0.4, 1000.0, 3.0), draw.sizes(3, 2, 6), strict=True):
        shapes = {"weight": (rows, columns), "bias": (rows,)}
        parameters = {name: draw.normal(*shape).requires_grad_() for name, shape in shapes.items()}
        parameters["new_head"] = draw.normal(3).requires_grad_()  # not in the anchor: the new task's own
        anchor = {name: draw.normal(*shape) for name, shape in shapes.items()}
        fisher = {name: draw.normal(*shape).abs() for name, shape in shapes.items()}
        yield case(parameters, anchor, fisher, strength)


def penalty_and_gradients(fn, parameters, *rest):
    value = fn(parameters, *rest)
    if not (isinstance(value, torch.Tensor) and value.requires_grad):
        return value, None
    return value, torch.autograd.grad(value, list(parameters.values()), allow_unused=True)


def penalised(term=lambda f, d: f * d**2, half=True, pool=torch.sum, detach=False):
    """`ewc_penalty` with one mistake."""

    def ewc_penalty(parameters, anchor, fisher, strength):
        terms = [pool(term(fisher[name], parameters[name] - anchor[name])) for name in anchor]
        total = strength * sum(terms) / (2 if half else 1)
        return total.detach() if detach else total

    return ewc_penalty


drill(
    "ewc_penalty", "EWC penalty", forgetting.ewc_penalty, ewc_cases,
    wrong=[
        Wrong(penalised(half=False), "the factor one half is missing: the paper has lambda / 2 (lambda is off by 2 without it)"),
        Wrong(penalised(term=lambda f, d: d**2), "the Fisher is missing: this is plain L2 towards the old weights"),
        Wrong(penalised(term=lambda f, d: f * d.abs()), "square the distance, not its absolute value"),
        Wrong(penalised(term=lambda f, d: (f * d) ** 2), "the Fisher stands outside the square"),
        Wrong(penalised(pool=torch.mean), "sum over the entries, do not average: a small tensor would weigh as much as a "
              "large one"),
        Wrong(penalised(detach=True), "the value is right but no gradient reaches the parameters: do not detach them"),
    ],
    call=penalty_and_gradients,
)  # fmt: skip


# slerp


def arc_cases(draw):
    for t, shape in zip((0.3, 0.5, 0.8), draw.sizes(3, 3, 7), strict=True):
        yield case(0.2 * draw.normal(*shape), 0.3 * draw.normal(*shape), t)  # dot products stay inside (-1, 1)
    yield case(draw.normal(5, 4), 5 * draw.normal(5, 4), 0.6)
    base = draw.normal(9, 4)
    yield case(base, 3 * base + 0.001 * draw.normal(9, 4), 0.4)  # almost parallel
    yield case(torch.zeros(3, 2), draw.normal(3, 2), 0.25)


def arc(a, b, t, unit=False, cosine=None, guard=True, line=None):
    x, y = a.float(), b.float()
    norms = x.norm() * y.norm()
    c = (x * y).sum() / norms if cosine is None else cosine(x, y)
    if guard and (norms == 0 or c.abs() > 0.9995):
        return (1 - t) * x + t * y if line is None else line(x, y)
    w = torch.arccos(c)
    if unit:
        x, y = x / x.norm(), y / y.norm()
    return ((torch.sin((1 - t) * w) * x + torch.sin(t * w) * y) / torch.sin(w)).to(a.dtype)


def slerp_reversed(a, b, t):
    return merging.slerp(b, a, t)


def slerp_unit(a, b, t):
    return arc(a, b, t, unit=True)


def slerp_no_guard(a, b, t):
    return arc(a, b, t, guard=False)


def slerp_not_normalised(a, b, t):
    return arc(a, b, t, cosine=lambda x, y: (x * y).sum().clamp(-1, 1))


def slerp_by_row(a, b, t):
    x, y = a.float(), b.float()
    w = torch.arccos(F.cosine_similarity(x, y, dim=-1))[:, None]
    arcs = (torch.sin((1 - t) * w) * x + torch.sin(t * w) * y) / torch.sin(w)
    norms = x.norm() * y.norm()
    straight = norms == 0 or ((x * y).sum() / norms).abs() > 0.9995
    return (1 - t) * x + t * y if straight else arcs


def lerp(a, b, t):
    return (1 - t) * a + t * b


drill(
    "slerp", "SLERP", merging.slerp, arc_cases,
    wrong=[
        Wrong(lerp, "this is the straight line (LERP): weight the two with sines of the angle"),
        Wrong(slerp_reversed, "the ends are mixed up: t = 0 gives a, t = 1 gives b"),
        Wrong(slerp_unit, "only the ANGLE comes from normalised vectors; the sum takes a and b themselves"),
        Wrong(slerp_no_guard, "parallel or zero tensors give sin(w) = 0 or 0/0: fall back to LERP above |cos| 0.9995 and "
              "for a zero norm"),
        Wrong(slerp_not_normalised, "the cosine needs both norms: divide the dot product by them"),
        Wrong(slerp_by_row, "the whole tensor is one vector: one angle, not one a row"),
    ],
)  # fmt: skip


# ties_merge


def vector_cases(draw):
    for models, density, shape in zip((3, 2, 5), (0.5, 1.0, 0.3), draw.sizes(3, 4, 8), strict=True):
        yield case([draw.normal(*shape) * draw.choice([0.5, 2.0]) for _ in range(models)], density)
    yield case([torch.tensor([x, 1.0]) for x in (1.0, -0.3, -0.3)], 1.0)
    yield case([torch.tensor([3.0, -1.0, 0.5, 0.1]), torch.tensor([0.03, -0.01, -0.02, 0.001])], 0.5)


def ties(trim=merging.trim, elect=lambda x: x.sum(0), by_all=False, jointly=False, keep=None):
    """`ties_merge` with one mistake."""

    def ties_merge(task_vectors, density):
        if jointly:
            trimmed = merging.trim(torch.stack(list(task_vectors)), density)
        else:
            trimmed = torch.stack([trim(vector, density) for vector in task_vectors])
        elected = torch.where(elect(trimmed) >= 0, 1, -1)
        agrees = trimmed.sign() == elected
        if keep is not None:
            agrees = agrees & keep(trimmed)
        count = torch.full_like(trimmed[0], len(task_vectors)) if by_all else agrees.sum(0).clamp(min=1)
        return (trimmed * agrees).sum(0) / count

    return ties_merge


def unsigned(vector, density):
    return merging.trim(vector, density).abs()


def smallest(vector, density):
    cut = merging.trim(vector, 1 - density) if density < 1 else torch.zeros_like(vector)
    return vector - cut


def no_conflicts(trimmed):
    signs = trimmed.sign()
    return ~((signs > 0).any(0) & (signs < 0).any(0))


def plain_mean(task_vectors, density):
    return torch.stack(list(task_vectors)).mean(0)


drill(
    "ties_merge", "TIES", merging.ties_merge, vector_cases,
    wrong=[
        Wrong(ties(elect=lambda x: x.sign().sum(0)), "elect by the SUM of the values, not by counting signs: +1, -0.3, -0.3 "
              "elects plus"),
        Wrong(ties(by_all=True), "average over the models that agree at this entry, not over all models"),
        Wrong(ties(trim=unsigned), "trimming must keep the signs: use |x| to choose, then keep x itself"),
        Wrong(ties(jointly=True), "trim each task vector by itself: a loud model would silence a quiet one"),
        Wrong(ties(trim=smallest), "density is the share that is KEPT, the largest entries"),
        Wrong(ties(keep=no_conflicts), "a conflict is not dropped: it is filled from the side that won the election"),
        Wrong(plain_mean, "this is the plain mean: trim, elect a sign, then average what agrees"),
    ],
)  # fmt: skip


# dpo_loss


def pair_cases(draw):
    for beta, n in zip((0.1, 2.0, 0.5), (3, 5, 4), strict=True):
        policy = [(-20 * draw.normal(n).abs()).requires_grad_() for _ in range(2)]
        yield case(*policy, *(-20 * draw.normal(n).abs() for _ in range(2)), beta)


def dpo_and_gradients(fn, *args):
    result = fn(*args)
    if not isinstance(result, tuple) or not isinstance(result[0], torch.Tensor) or not result[0].requires_grad:
        return result
    loss, *rewards = result
    grads = torch.autograd.grad(loss.sum(), args[:2], allow_unused=True)
    return loss, *(r.detach() if isinstance(r, torch.Tensor) else r for r in rewards), grads


def preferred(gap=None, reduce=torch.mean, scale=True, outside=False):
    """`dpo_loss` with one mistake."""

    def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
        chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
        margin = chosen - rejected
        if gap is not None:
            margin = gap(policy_chosen, policy_rejected, chosen, rejected, beta)
        if outside:
            return -beta * F.logsigmoid(margin / beta).mean(), chosen.detach(), rejected.detach()
        unit = 1 if scale else beta
        return -reduce(F.logsigmoid(margin)), (chosen / unit).detach(), (rejected / unit).detach()

    return dpo_loss


def probability(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    _, chosen, rejected = preference.dpo_loss(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta
    )
    margin = beta * (policy_chosen - reference_chosen - policy_rejected + reference_rejected)
    return -torch.sigmoid(margin).mean(), chosen, rejected


drill(
    "dpo_loss", "DPO loss", preference.dpo_loss, pair_cases,
    wrong=[
        Wrong(preferred(gap=lambda pc, pr, c, r, beta: beta * (pc - pr)), "the reference is missing: compare log-ratios, "
              "log pi - log ref, not log pi"),
        Wrong(preferred(gap=lambda pc, pr, c, r, beta: r - c), "chosen and rejected are swapped: this teaches the rejected answer"),
        Wrong(preferred(outside=True), "beta belongs inside the sigmoid"),
        Wrong(preferred(reduce=torch.sum), "mean over the pairs, not the sum: else the step grows with the batch"),
        Wrong(preferred(scale=False), "the rewards carry beta: beta * (log pi - log ref)"),
        Wrong(probability, "the logarithm is missing: -logsigmoid(margin), not -sigmoid(margin)"),
    ],
    call=dpo_and_gradients,
)  # fmt: skip
