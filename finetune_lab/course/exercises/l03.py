"""The exercises of lesson 03, LoRA and DoRA: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (a new random layer called frozen, dead dropout and scaling, a normalised V,
square matrices everywhere) and from bug reports of peft and of hand-written adapters.
"""

import math

import torch
from torch import nn

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.methods import plain, spectrum
from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.lora import LoRALinear, rslora_scaling
from finetune_lab.methods.trainable import loraplus_groups

# 03.1 LoRALinear


def layer_cases(draw):
    for bias, (fan_in, fan_out) in zip((True, False, True), draw.sizes(3, 20, 40), strict=True):
        base = nn.Linear(fan_in, fan_out, bias=bias)
        for parameter in base.parameters():
            parameter.data = draw.normal(*parameter.shape)
        r = draw.randint(5, 8)
        A, B = draw.normal(r, fan_in), draw.normal(fan_out, r)
        yield case(base, r, draw.choice([3.0, 24.0]), draw.normal(2, 3, fan_in), A, B)


def use_layer(cls, base, r, alpha, x, A, B):
    """What a layer of the learner's class does: at the start, with given A and B, and with dropout."""
    layer = cls(base, r, alpha, dropout=0.5)
    trained = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    seen = {"trained parameters": trained, "B is zero": not layer.B.any().item()}
    spread = layer.A.std().item() * math.sqrt(3 * base.in_features)  # 1 for U(-1/sqrt(in), 1/sqrt(in))
    seen["size of A"] = "zero" if spread == 0 else "as in peft" if 0.75 < spread < 1.25 else "another"
    seen["output at the start"] = layer.eval()(x)
    with torch.no_grad():
        layer.A.copy_(A)
        layer.B.copy_(B)
    seen["output with A and B"] = layer(x)
    torch.manual_seed(0)
    seen["output in training"] = layer.train()(x)
    return seen


def variant(start=None, forward=None, scaling=None, own_base=False, frozen=True):
    """`LoRALinear` with one mistake."""

    class Variant(plain.LoRALinear):
        def __init__(self, base, r, alpha, dropout=0.0):
            if own_base:
                base = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            super().__init__(base, r, alpha, dropout)
            if scaling:
                self.scaling = scaling(alpha, r)
            if start:
                with torch.no_grad():
                    start(self)
            self.base.requires_grad_(not frozen)

        def forward(self, x):
            return forward(self, x) if forward else super().forward(x)

    return Variant


FROZEN = "the base must be frozen: base.requires_grad_(False)"


def trains_the_base(one, expected, got):
    """The hint for a base that is not frozen, whatever else is wrong."""
    return FROZEN if set(got["trained parameters"]) > set(expected["trained parameters"]) else None


def update(layer, x):
    return layer.scaling * (x @ layer.A.T @ layer.B.T)


exercise(
    "03.1", "LoRALinear", plain.LoRALinear, layer_cases, call=use_layer, rtol=1e-4, atol=1e-4,
    diagnose=trains_the_base,
    wrong=[
        Wrong(variant(scaling=lambda alpha, r: 1.0), "the scale alpha / r is missing"),
        Wrong(variant(scaling=lambda alpha, r: alpha), "the update is scaled by alpha / r, not by alpha"),
        Wrong(variant(scaling=lambda alpha, r: alpha / math.sqrt(r)), "this is rsLoRA's scale; LoRA's is alpha / r"),
        Wrong(variant(own_base=True), "use the layer you were given: a new nn.Linear is random, the pre-trained weight "
              "would be lost"),
        Wrong(variant(frozen=False), FROZEN),
        Wrong(variant(start=lambda self: self.A.zero_()), "A and B are both zero: no gradient reaches either, ever; "
              "draw A at random"),
        Wrong(variant(start=lambda self: nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))), "B must start at zero: the "
              "layer has to begin as the frozen one"),
        Wrong(variant(start=lambda self: self.A.normal_()), "A is too large: nn.init.kaiming_uniform_(A, a=sqrt(5)) "
              "gives peft's U(-1/sqrt(in), 1/sqrt(in))"),
        Wrong(variant(forward=lambda self, x: self.base(x) + update(self, x)), "dropout is made but never used: it "
              "belongs in front of A"),
        Wrong(variant(forward=lambda self, x: plain.LoRALinear.forward(self, self.dropout(x))), "dropout must not touch "
              "the frozen layer's input, only A's"),
        Wrong(variant(forward=lambda self, x: self.base(x) + self.dropout(update(self, x))), "dropout belongs on the "
              "input of A, not on the update"),
        Wrong(variant(forward=lambda self, x: x @ self.base.weight.T + update(self, self.dropout(x))), "the base's bias "
              "is lost: call the base itself"),
        Wrong(variant(forward=lambda self, x: update(self, self.dropout(x))), "the frozen layer's own output is missing"),
    ],
)  # fmt: skip


# 03.2 rslora_scaling


def scaling_cases(draw):
    for alpha, r in draw.sizes(4, 3, 90):
        yield case(float(alpha), r)


def plain_scaling(alpha, r):
    return alpha / r


def root_of_alpha(alpha, r):
    return math.sqrt(alpha) / r


def root_of_all(alpha, r):
    return math.sqrt(alpha / r)


def times_root(alpha, r):
    return alpha * math.sqrt(r)


exercise(
    "03.2", "the scale of rsLoRA", rslora_scaling, scaling_cases,
    wrong=[
        Wrong(plain_scaling, "this is LoRA's scale: with it the update shrinks as the rank grows; divide by the root of r"),
        Wrong(root_of_alpha, "the root belongs to r, not to alpha"),
        Wrong(root_of_all, "only r stands under the root"),
        Wrong(times_root, "divide by the root of r: a sum of r random terms grows like it"),
    ],
)  # fmt: skip


# 03.3 the parameters of an adapter

exercise(
    "03.3", "parameters of an adapter", 24_313_856, name="adapter_parameters",
    wrong=[
        Wrong(20_971_520, "the notes' figure does not follow from the shapes: add in + out of each of the seven matrices"),
        Wrong(9_175_040, "q, k, v and o alone: the three feed-forward matrices are adapted too"),
        Wrong(868_352, "one layer only: there are 28"),
        Wrong(1_519_616, "this is r = 1: multiply by the rank"),
        Wrong(26_148_864, "k and v are narrower: 8 heads of 128, so out is 1,024"),
        Wrong(19_267_584, "2 r d for each of the seven treats every matrix as square: gate, up and down are not"),
    ],
)  # fmt: skip


# 03.4 intruder_dimensions


def spectra(draw):
    for n, (fan_in, fan_out) in enumerate(draw.sizes(6, 14, 24)):
        size = min(fan_in, fan_out)
        U = torch.linalg.qr(draw.normal(fan_out, size))[0]
        V = torch.linalg.qr(draw.normal(fan_in, size))[0]
        S = torch.linspace(10, 1, size)
        before = U * S @ V.T
        order = torch.tensor(draw.sample(range(size), size))  # the same directions in another order of importance
        flips = draw.ints(0, 2, size) * 2.0 - 1  # a direction may turn round: the product keeps its strength
        after = (U[:, order] * flips) * S @ V.T
        for strength in (30.0, 25.0)[: n % 3]:
            after = after + strength * torch.outer(unit(draw, fan_out), unit(draw, fan_in))
        yield case(before, after, draw.randint(3, 6), draw.choice([0.7, 0.8]))
    turned = torch.linalg.qr(draw.normal(fan_out, size))[0] * S @ V.T  # other outputs, the same inputs
    yield case(before, turned, 4, 0.9)


def unit(draw, n):
    x = draw.normal(n)
    return x / x.norm()


def counted(side="U", of=lambda before, after: after, same_place=False, only_k=False, absolute=True, below=True,
            everything=False):  # fmt: skip
    """`intruder_dimensions` with one mistake."""

    def vectors(matrix):
        U, _, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
        return U if side == "U" else Vh.T

    def intruder_dimensions(before, after, k=10, threshold=0.5):
        old, new = vectors(before), vectors(of(before, after))
        old, new = old[:, :k] if only_k else old, new if everything else new[:, :k]
        likeness = new.T @ old
        likeness = likeness.abs() if absolute else likeness
        best = likeness.diagonal() if same_place else likeness.amax(dim=1)
        return int((best < threshold if below else best >= threshold).sum())

    return intruder_dimensions


exercise(
    "03.4", "count the intruders", spectrum.intruder_dimensions, spectra,
    wrong=[
        Wrong(counted(same_place=True), "compare each new vector with ALL old ones: a direction that only changed its "
              "rank is no intruder"),
        Wrong(counted(only_k=True), "compare with every vector of `before`, not with its first k"),
        Wrong(counted(absolute=False), "the sign of a singular vector means nothing: take the absolute value"),
        Wrong(counted(below=False), "you count the familiar ones: an intruder is like none, below the threshold"),
        Wrong(counted(of=lambda before, after: after - before), "take the SVD of `after`, not of the update alone"),
        Wrong(counted(side="V"), "these are right singular vectors: the paper and peft compare the left ones, U"),
        Wrong(counted(everything=True), "only the k strongest vectors of `after` are asked"),
    ],
)  # fmt: skip


# 03.5 loraplus_groups


def adapted_models(draw):
    for kind, ratio, decay in ((LoRALinear, 16, 0.0), (DoRALinear, 4, 0.1), (LoRALinear, 2, 0.01)):
        (fan_in, fan_out), r = draw.sizes(1, 4, 9)[0], draw.randint(1, 3)
        layers = [kind(nn.Linear(fan_in, fan_out), r, 8), nn.LayerNorm(fan_out), kind(nn.Linear(fan_out, 3), r, 8)]
        model = nn.Sequential(*layers)
        model[1].requires_grad_(False)
        yield case(model, draw.choice([1e-3, 2e-4]), ratio, decay)


def rates(fn, model, lr, ratio, weight_decay):
    """name -> (times in the groups, lr, weight decay) of every parameter in the groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple] = {}
    for group in fn(model, lr, ratio, weight_decay):
        for p in group["params"]:
            name = names.get(id(p), "a tensor that is no parameter of the model")
            count = found[name][0] + 1 if name in found else 1
            found[name] = (count, float(group["lr"]), float(group.get("weight_decay", 0.0)))
    return found


def grouped(fast=lambda name, p: name.endswith("B") or p.ndim == 1, low=lambda lr, ratio: lr,
            high=lambda lr, ratio: lr * ratio, frozen=False, decay=True):  # fmt: skip
    """`loraplus_groups` with one mistake."""

    def loraplus_groups(model, lr, ratio, weight_decay=0.0):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad or frozen]
        groups = [
            {"params": [p for name, p in named if fast(name, p) == quick], "lr": rate(lr, ratio)}
            for quick, rate in ((False, low), (True, high))
        ]
        return [group | ({"weight_decay": weight_decay} if decay else {}) for group in groups]

    return loraplus_groups


exercise(
    "03.5", "the groups of LoRA+", loraplus_groups, adapted_models, call=rates, rtol=1e-6,
    wrong=[
        Wrong(grouped(fast=lambda name, p: name.endswith("A")), "the wrong factor: B learns faster, A at lr"),
        Wrong(grouped(fast=lambda name, p: False), "every parameter has the rate lr: B needs lr * ratio"),
        Wrong(grouped(low=lambda lr, ratio: lr / ratio, high=lambda lr, ratio: lr), "lr is A's rate, so B gets lr * ratio: "
              "do not lower A"),
        Wrong(grouped(low=lambda lr, ratio: lr / ratio), "the ratio counts twice: A at lr, B at lr * ratio"),
        Wrong(grouped(fast=lambda name, p: name.endswith("B")), "one-dimensional parameters, DoRA's magnitudes here, go "
              "with B, as in peft"),
        Wrong(grouped(frozen=True), "frozen parameters do not belong in the groups: ask requires_grad"),
        Wrong(grouped(decay=False), "weight_decay does not arrive in the groups"),
    ],
)  # fmt: skip


# 03.6 dora_weight


def dora_cases(draw):
    for fan_in, fan_out in draw.sizes(4, 5, 12):
        weight, update = draw.normal(fan_out, fan_in), draw.normal(fan_out, fan_in).requires_grad_()
        magnitude = (1 + 3 * draw.normal(fan_out).abs()).requires_grad_()
        yield case(weight, update, magnitude, draw.normal(fan_out, fan_in))


def weight_and_gradients(fn, weight, update, magnitude, upstream):
    """The new weight and the gradients of update and magnitude: the norm must not take part in them."""
    value = fn(weight, update, magnitude)
    if not isinstance(value, torch.Tensor) or value.shape != upstream.shape or not value.requires_grad:
        return value
    grads = torch.autograd.grad((value * upstream).sum(), (update, magnitude), allow_unused=True)
    return value, *(torch.zeros(1) if grad is None else grad for grad in grads)


def dora(direction_of=lambda w, d: w + d, norm_of=None, dim=1, detach=True, scale=lambda m: m[:, None]):
    """`dora_weight` with one mistake."""

    def dora_weight(weight, update, magnitude):
        direction = direction_of(weight, update)
        norm = (norm_of(weight, update) if norm_of else direction).norm(dim=dim, keepdim=True)
        return scale(magnitude) * direction / (norm.detach() if detach else norm)

    return dora_weight


def normalised_first(weight, update):
    return weight / weight.norm(dim=1, keepdim=True) + update


def no_division(weight, update, magnitude):
    return magnitude[:, None] * (weight + update)


def one_norm(weight, update, magnitude):
    direction = weight + update
    return magnitude[:, None] * direction / direction.norm().detach()


def detached_direction(weight, update, magnitude):
    return plain.dora_weight(weight, update.detach(), magnitude)


exercise(
    "03.6", "the weight of DoRA", plain.dora_weight, dora_cases, call=weight_and_gradients, rtol=1e-4, atol=1e-4,
    wrong=[
        Wrong(dora(detach=False), "the value is right, the gradient is not: section 4.3 takes the norm as a constant, "
              ".detach() it"),
        Wrong(dora(dim=0), "the norm is over the inputs (dim=1): one magnitude for each output row"),
        Wrong(dora(direction_of=normalised_first), "do not normalise W0 before you add the update: beside a unit row the "
              "update would weigh far more"),
        Wrong(dora(norm_of=lambda w, d: w), "divide by the norm of the sum W0 + dW, not of W0 alone"),
        Wrong(no_division, "divide by the row norms: else the length counts twice"),
        Wrong(one_norm, "each row has its own norm: .norm(dim=1, keepdim=True)"),
        Wrong(dora(scale=lambda m: 1.0), "the magnitude is missing: it gives each row its trained length"),
        Wrong(detached_direction, "no gradient reaches the update: detach the norm only"),
    ],
)  # fmt: skip


# 03.7 merged_weight


def eighths(draw, *shape):
    """Numbers whose products are exact in fp32, so that only the rounding of the answer itself can differ."""
    return draw.ints(-8, 9, *shape).float() / 8


def merge_cases(draw):
    for dtype, (fan_in, fan_out) in zip(
        (torch.float32, torch.bfloat16, torch.float16), draw.sizes(3, 6, 12), strict=True
    ):
        r = draw.randint(2, 4)
        weight = (37 * draw.normal(fan_out, fan_in)).to(dtype)
        A, B = eighths(draw, r, fan_in), eighths(draw, fan_out, r) / 16
        yield case(weight, A.to(dtype), B.to(dtype), draw.choice([0.5, 2.0, 4.0]))
    yield case(draw.normal(64, 48).bfloat16(), eighths(draw, 3, 48), draw.normal(64, 3).bfloat16() / 32, 2.0)


def without_scaling(weight, A, B, scaling):
    return plain.merged_weight(weight, A, B, 1.0)


def scaled_twice(weight, A, B, scaling):
    return plain.merged_weight(weight, A, B, scaling * scaling)


def rounded_twice(weight, A, B, scaling):
    return weight + (scaling * (B.float() @ A.float())).to(weight.dtype)


def left_in_fp32(weight, A, B, scaling):
    return weight.float() + scaling * (B.float() @ A.float())


def in_place(weight, A, B, scaling):
    return weight.copy_(plain.merged_weight(weight, A, B, scaling))


def swapped(weight, A, B, scaling):
    return weight + scaling * (A @ B)


def update_only(weight, A, B, scaling):
    return (scaling * (B.float() @ A.float())).to(weight.dtype)


exercise(
    "03.7", "merge", plain.merged_weight, merge_cases, rtol=0, atol=0,
    wrong=[
        Wrong(without_scaling, "the scale is missing: the merged layer would be another one than the adapted"),
        Wrong(scaled_twice, "scale once, not twice"),
        Wrong(rounded_twice, "you round twice: the update to 16 bits and then the sum; add in fp32 and round once"),
        Wrong(left_in_fp32, "the result must have the dtype of the weight: round once, at the end"),
        Wrong(in_place, "you changed the weight in place: who still holds it, a second adapter say, would be lost"),
        Wrong(swapped, "the order is B A: (out, r) times (r, in)"),
        Wrong(update_only, "add the update to the frozen weight"),
    ],
)  # fmt: skip
