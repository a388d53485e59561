"""Our merging against mergekit, tensor by tensor: the plain forms and the streaming one, and where mergekit differs."""

import pytest
import torch
from mergekit import merge_methods
from mergekit.merge_methods import merge_tensors
from mergekit.sparsify import magnitude

from finetune_lab.methods.merging import apply, linear, slerp, stream, task_arithmetic, task_vector, ties
from finetune_lab.methods.merging.stream import METHODS, merge_tensor
from finetune_lab.methods.merging.ties import keep_largest

EXACT = ["linear", "slerp", "task_arithmetic", "ties"]


def models(shape, count=3, seed=0, dtype=torch.float32):
    """Weights of size 1 whose fine-tunes differ from the base, and from each other, by 0.3."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    return [base.to(dtype), *((base + 0.3 * torch.randn(shape, generator=g)).to(dtype) for _ in range(count - 1))]


def theirs(method, base, tensors, parameters):
    """mergekit wants the base among the inputs, except for its linear, which has none here."""
    if method == "linear":
        return merge_tensors(tensors, "linear", parameters=parameters)
    own = {k: dict(enumerate(v, start=1)) if isinstance(v, list) else v for k, v in parameters.items()}
    return merge_tensors([base, *tensors], method, parameters=own, base_index=0)


def worst(a, b):
    return (a.double() - b.double()).abs().max().item()


CASES = {
    "linear": [{"weight": [0.7, 0.3, 0.5]}, {"weight": [2.0, -0.5, 0.1]}, {"weight": [0.7, 0.3, 0.5], "normalize": False}, {"weight": [0.7, 0.3]}],
    "slerp": [{"t": t} for t in (0.0, 0.3, 0.5, 1.0)],
    "task_arithmetic": [
        {"weight": [0.7, 0.3, -0.5]},
        {"weight": [1.0, 1.0, 1.0], "lambda": 0.4},
        {"weight": [0.7, 0.3, 0.5], "normalize": True},
    ],
    "ties": [
        {"weight": [1.0, 1.0, 1.0], "density": [0.2, 0.2, 0.2]},
        {"weight": [0.7, 0.3, 0.5], "density": [0.5, 0.3, 0.9], "lambda": 1.7},
        {"weight": [0.7, 0.3, -0.5], "density": [0.5, 0.3, 1.0], "normalize": False},
        {"weight": [0.7, 0.3, -0.5], "density": [0.5, 0.3, 0.001]},
        {"weight": [1.0, 1.0, 1.0]},
    ],
}  # fmt: skip
EACH = pytest.mark.parametrize(("method", "number"), [(m, i) for m, cases in CASES.items() for i in range(len(cases))])


@EACH
@pytest.mark.parametrize("shape", [(7,), (64, 33), (3, 5, 11)])
def test_the_streaming_form_equals_mergekit(method, number, shape, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 100)
    parameters = CASES[method][number]
    base, *tensors = models(shape, 1 + len(parameters.get("weight", [1.0])))
    ours = merge_tensor(method, None if method == "linear" else base, tensors, parameters)
    assert worst(ours, theirs(method, base, tensors, parameters)) <= 1e-6


def test_the_plain_forms_equal_mergekit():
    base, *tensors = models((64, 33))
    w, taus = [0.7, 0.3], [task_vector(t, base) for t in tensors]
    pairs = {
        "linear": (linear(tensors, w), {"weight": w}),
        "task_arithmetic": (apply(base, task_arithmetic(taus, w), 0.9), {"weight": w, "lambda": 0.9}),
        "ties": (apply(base, ties(taus, 0.3, w, "mergekit")), {"weight": w, "density": [0.3, 0.3]}),
    }
    for method, (ours, parameters) in pairs.items():
        assert worst(ours, theirs(method, base, tensors, parameters)) <= 1e-6, method
    assert worst(slerp(base, tensors[0], 0.3), theirs("slerp", base, tensors[:1], {"t": 0.3})) <= 1e-6


def at_cosine(cosine, n=2000):
    """Two vectors of n normal entries at exactly this cosine."""
    a, noise = torch.randn(2, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    across = noise - (noise @ a) / (a @ a) * a
    across *= a.norm() / across.norm()
    return a.float(), (cosine * a + (1 - cosine**2) ** 0.5 * across).float()


@pytest.mark.parametrize("cosine", [1.0, 0.99952, 0.99948, 0.99, 0.5, 0.0, -0.5, -0.99952, -1.0])
def test_slerp_equals_mergekit_on_both_sides_of_the_nearly_parallel_threshold(cosine):
    a, b = at_cosine(cosine)
    assert worst(merge_tensor("slerp", a, [b], {"t": 0.3}), theirs("slerp", a, [b], {"t": 0.3})) <= 1e-6


@pytest.mark.parametrize("cosine", [-0.96, -0.99, -0.998])
def test_near_opposite_vectors_slerp_is_exact_where_mergekits_fp32_cosine_is_not(cosine):
    """No parity of 1e-6 here: 1/sin(W) magnifies the rounding of mergekit's cosine. Relative to the largest entry ours
    is within 1e-6 of fp64, and nearer to it than mergekit."""
    a, b = at_cosine(cosine)
    exact = slerp(a.double(), b.double(), 0.3)
    ours, kit = merge_tensor("slerp", a, [b], {"t": 0.3}), theirs("slerp", a, [b], {"t": 0.3})
    assert worst(ours, exact) <= 1e-6 * exact.abs().max().item()
    assert worst(ours, exact) < worst(kit, exact)


def test_a_zero_tensor_is_where_slerp_differs_from_mergekits():
    """No arc leads from the origin. Ours: the straight line, t b. mergekit 0.1.5: as if at a right angle."""
    zero, b = torch.zeros(4), torch.ones(4)
    assert torch.allclose(merge_tensor("slerp", zero, [b], {"t": 0.5}), 0.5 * b)
    assert torch.allclose(theirs("slerp", zero, [b], {"t": 0.5}), 0.5**0.5 * b)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.99])
def test_trimming_keeps_the_magnitudes_that_mergekit_keeps(density):
    """Differences of bf16 weights: dozens of entries at the threshold. Which of THEM stay, its unstable sort leaves
    open; with us it is the first ones."""
    base, other = models((200, 100), 2, dtype=torch.bfloat16)
    tau = task_vector(other, base)
    k = max(1, int(density * tau.numel()))
    ours, kept = keep_largest(tau, k), magnitude(tau, density)
    assert torch.equal(ours.abs().flatten().sort().values, kept.abs().flatten().sort().values)
    threshold = tau.abs().flatten().topk(k).values[-1]
    assert torch.equal(ours[tau.abs() > threshold], kept[tau.abs() > threshold])


def test_mergekit_merges_in_the_dtype_of_the_model_and_ours_in_fp32():
    """In bf16 mergekit rounds every step; one rounding at the end is nearer to the exact merge."""
    base, *tensors = models((200, 100), dtype=torch.bfloat16)
    parameters = {"weight": [0.7, 0.3]}
    exact = merge_tensor("task_arithmetic", base, tensors, parameters, out=torch.empty(200, 100))
    ours = (merge_tensor("task_arithmetic", base, tensors, parameters).float() - exact).norm()
    assert ours < 0.95 * (theirs("task_arithmetic", base, tensors, parameters).float() - exact).norm()


def keep_of(seed):
    """A stand-in for torch.bernoulli that draws the same masks again: one after the other, from a seed of its own."""
    g, draw = torch.Generator().manual_seed(seed), torch.bernoulli
    return lambda probability, **_: draw(probability, generator=g)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("normalize", [False, True])
def test_given_mergekits_masks_dare_equals_mergekit(method, normalize, monkeypatch):
    """With rescale off; what rescale does in each is the next test."""
    base, *tensors = models((40, 30), 4)
    w, density, mask = [0.7, 0.3, -0.5], [0.5, 0.3, 0.9], keep_of(1)
    masks = [mask(torch.full((40, 30), d)) for d in density]
    monkeypatch.setattr(torch, "bernoulli", keep_of(1))
    parameters = {"weight": w, "density": density, "rescale": False, "normalize": normalize}
    wanted = theirs(method, base, tensors, parameters)
    pending = iter([m.flatten() for m in masks])
    monkeypatch.setattr(stream, "random_keep", lambda keep, *_: next(pending))
    assert worst(merge_tensor(method, base, tensors, parameters), wanted) <= 1e-6


def test_mergekit_rescales_by_the_l1_norm_and_we_like_the_paper_by_the_density(monkeypatch):
    base, other = models((300, 200), 2)
    tau, mask = other - base, keep_of(1)(torch.full((300, 200), 0.1))
    monkeypatch.setattr(torch, "bernoulli", keep_of(1))
    monkeypatch.setattr(stream, "random_keep", lambda keep, *_: mask.flatten())
    parameters = {"weight": [1.0], "density": [0.1]}
    ratio = tau.abs().sum() / (tau * mask).abs().sum()
    assert worst(theirs("dare_linear", base, [other], parameters), base + tau * mask * ratio) <= 1e-6
    assert worst(merge_tensor("dare_linear", base, [other], parameters), base + tau * mask / 0.1) <= 1e-6
    assert ratio.item() == pytest.approx(10, rel=0.03)


def test_mergekits_rescaling_is_biased_for_a_small_tensor_and_ours_is_not():
    """A tensor of one entry: its L1 ratio is 1, so that mergekit's mean of 2,000 merges is density * tau = 0.3, not 1."""
    base, other, parameters = torch.zeros(1), torch.ones(1), {"weight": [1.0], "density": [0.3]}
    torch.manual_seed(0)
    mean = sum(theirs("dare_linear", base, [other], parameters) for _ in range(2000)).item() / 2000
    ours = sum(merge_tensor("dare_linear", base, [other], parameters) for _ in range(2000)).item() / 2000
    spread = (0.3 * 0.7 / 2000) ** 0.5
    assert abs(mean - 0.3) < 5 * spread and abs(ours - 1) < 5 * spread / 0.3


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dares_own_masks_have_mergekits_mean_spread_and_zeros(method):
    """20 merges of 240,000 entries each. Mean along the undropped merge: within 5 standard errors, 1.5 %.

    The standard error of a ratio of two such means, at densities of 0.1 and 0.3, is 0.0132 / sqrt(20) by the variance
    tau^2 (1 - density) / density of an entry.
    """
    base, *tensors = models((600, 400))
    parameters = {"weight": [0.7, 0.3], "density": [0.1, 0.3]}
    along = task_arithmetic([t - base for t in tensors], [0.7, 0.3])
    torch.manual_seed(0)
    one = torch.stack([merge_tensor(method, base, tensors, parameters) - base for _ in range(20)])
    other = torch.stack([theirs(method, base, tensors, parameters) - base for _ in range(20)])
    assert ((one * along).sum() / (other * along).sum()).item() == pytest.approx(1, abs=5 * 0.0132 / 20**0.5)
    assert (one.std() / other.std()).item() == pytest.approx(1, abs=0.01)
    assert (one == 0).float().mean().item() == pytest.approx((other == 0).float().mean().item(), abs=0.001)


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_mergekits(method):
    """Left out: weight, which mergekit requires, and t."""
    defaults = {p.name: p.default for p in merge_methods.get(method).spec.parameters}
    base, *tensors = models((50, 40), 2 if method == "slerp" else 3)
    given = {"t": 0.3} if method == "slerp" else {"weight": [0.7, 0.3]}
    named = {k: defaults[k] for k in ("normalize", "lambda", "density") if k in defaults}
    named |= {"rescale": defaults["rescale"]} if method.startswith("dare") else {}
    base = None if method == "linear" else base
    assert torch.equal(merge_tensor(method, base, tensors, given), merge_tensor(method, base, tensors, given | named))
