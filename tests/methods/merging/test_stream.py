"""Merging a tensor chunk by chunk does what the plain forms do to the whole of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods.merging import apply, linear, slerp, stream, task_arithmetic, task_vector, ties
from finetune_lab.methods.merging.dare import BLOCK, random_keep
from finetune_lab.methods.merging.stream import METHODS, merge_tensor
from finetune_lab.methods.merging.ties import consensus

SETTINGS = {"weight": [0.7, 0.3, -0.2], "density": [0.3, 0.5, 0.9], "t": 0.3, "lambda": 1.5}
NEEDS_BASE = [method for method in METHODS if method != "linear"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and an incomplete last one, without large tensors."""
    monkeypatch.setattr(stream, "CHUNK", 256)


def models(*shape, count=4, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    return [base.to(dtype), *((base + 0.3 * torch.randn(shape, generator=g)).to(dtype) for _ in range(count - 1))]


def run(method, base, tensors, parameters=SETTINGS, **settings):
    """`merge_tensor` with as many models and parameters as the method takes."""
    tensors = tensors[:1] if method == "slerp" else tensors
    parameters = {k: v[: len(tensors)] if isinstance(v, list) else v for k, v in parameters.items()}
    return merge_tensor(method, None if method == "linear" else base, tensors, parameters, **settings)


def plain(method, base, tensors):
    """The same with the whole-tensor forms; TIES after mergekit's convention has one density for all models."""
    if method == "linear":
        return linear(tensors, SETTINGS["weight"])
    if method == "slerp":
        return slerp(base, tensors[0], SETTINGS["t"])
    tau = task_arithmetic([task_vector(t, base) for t in tensors], SETTINGS["weight"])
    return apply(base, tau, SETTINGS["lambda"])


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(["linear", "slerp", "task_arithmetic"]),
    shape=st.lists(st.integers(0, 12), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_lines_and_arcs_equal_the_plain_forms_for_every_shape_and_dtype(method, shape, dtype, seed):
    base, *tensors = models(*shape, seed=seed, dtype=dtype)
    merged = run(method, base, tensors)
    assert merged.shape == base.shape and merged.dtype == dtype
    torch.testing.assert_close(merged, plain(method, base, tensors), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_equals_the_plain_form_with_mergekits_convention(density, dtype):
    base, *tensors = models(20, 30, dtype=dtype)
    parameters = SETTINGS | {"density": [density] * 3}
    tau = ties([task_vector(t, base) for t in tensors], density, SETTINGS["weight"], "mergekit")
    merged = run("ties", base, tensors, parameters)
    torch.testing.assert_close(merged, apply(base, tau, 1.5), rtol=torch.finfo(dtype).eps, atol=1e-6)


def drawn(n, density, generator):
    """A mask of `n` entries, whole blocks."""
    return random_keep(torch.empty(n), density, generator, torch.empty(n // 8, dtype=torch.int64))


def masks(tensors, densities, generator):
    """What the streaming form draws for each model, in its order: chunk by chunk, model by model."""
    n, keep = tensors[0].numel(), [[] for _ in tensors]
    for _ in range(0, n, stream.CHUNK):
        for m, density in enumerate(densities):
            keep[m].append(drawn(stream.CHUNK, density, generator))
    return [torch.cat(k)[:n].view_as(tensors[0]) for k in keep]


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_with_the_same_masks_equals_task_arithmetic_and_ties_on_what_survives(rescale):
    base, *tensors = models(20, 30)
    densities, weights = SETTINGS["density"], SETTINGS["weight"]
    keep = masks(tensors, densities, torch.Generator().manual_seed(7))
    taus = [task_vector(t, base) * k / (d if rescale else 1) for t, k, d in zip(tensors, keep, densities, strict=True)]
    wanted = {"dare_linear": task_arithmetic(taus, weights), "dare_ties": consensus(taus, weights, "mergekit")}
    for method, tau in wanted.items():
        parameters = SETTINGS | {"rescale": rescale, "normalize": method == "dare_ties"}
        merged = run(method, base, tensors, parameters, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(merged, apply(base, tau, 1.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.0005, 0.1, 0.3, 0.5, 0.7, 0.9995])
def test_dare_keeps_entries_with_exactly_their_probability_between_the_steps_of_eight_bits_too(density):
    """Of 2^22 entries, within 5 standard errors; 0.0005 is an eighth of a step, so most blocks keep nothing."""
    n = 2**22
    keep = drawn(n, density, torch.Generator().manual_seed(0))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    spread = density * (1 - density) + 0.25 / BLOCK  # of one entry, plus what a block's threshold adds
    assert abs(keep.double().mean().item() - density) < 5 * math.sqrt(spread / n)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("apart", [1, 4, 8, 100, 256])
def test_dare_drops_neighbours_independently(density, apart):
    """Correlation of entries at a distance, inside a block of 256 and across: below 5 standard errors plus the 1e-4
    that sharing a threshold may add."""
    n = 2**21
    keep = drawn(n, density, torch.Generator().manual_seed(1)) - density
    correlation = (keep[apart:] * keep[:-apart]).mean().item() / (density * (1 - density))
    assert abs(correlation) < 5 / math.sqrt(n) + 1e-4


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_seed_decides_what_dare_drops(method):
    base, *tensors = models(20, 30)
    one, same, other = (run(method, base, tensors, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_expectation_of_dare_is_task_arithmetic():
    """The mean of 400 merges, entry by entry, within 6 standard errors (1,000 entries: false alarms below 1e-5)."""
    base, *tensors = models(50, 20, count=3)
    parameters = {"weight": [0.7, 0.3], "density": [0.2, 0.2]}
    g, total = torch.Generator().manual_seed(0), torch.zeros(50, 20)
    for _ in range(400):
        total += merge_tensor("dare_linear", base, tensors, parameters, generator=g)
    wanted = merge_tensor("task_arithmetic", base, tensors, parameters)
    variance = sum((w * (t - base)) ** 2 * 0.8 / 0.2 for w, t in zip((0.7, 0.3), tensors, strict=True))
    assert ((total / 400 - wanted) / (variance / 400).sqrt()).abs().max() < 6


@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_stays_what_it_is(method):
    base = models(20, 30)[0]
    merged = run(method, base, [base] * 3)
    torch.testing.assert_close(merged, base, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(w=st.floats(-1, 2), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_two_models_of_one_dtype_take_a_shorter_way_to_the_same_mean(w, dtype):
    a, b = models(20, 30, count=2, dtype=dtype)
    merged = merge_tensor("linear", None, [a, b], {"weight": [1 - w, w]})
    exact = (1 - w) * a.double() + w * b.double()
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(merge_tensor("linear", None, [a, a], {"weight": [1 - w, w]}), a)


@pytest.mark.parametrize("method", NEEDS_BASE[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_no_model_changed_comes_out_bit_for_bit(method, dtype):
    """Most tensors of a LoRA fine-tune: a sum (1 - w) base + w base would not give back `base` in fp32."""
    base = models(20, 30, dtype=dtype)[0]
    assert torch.equal(run(method, base, [base.clone() for _ in range(3)]), base)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_the_order_of_the_models_does_not_matter(method):
    base, *tensors = models(20, 30)
    merged = run(method, base, tensors)
    turned = {k: v[::-1] if isinstance(v, list) else v for k, v in SETTINGS.items()}
    torch.testing.assert_close(run(method, base, tensors[::-1], turned), merged, rtol=0, atol=1e-6)


def test_subtracting_what_was_added_returns_the_base():
    base, other = models(20, 30, count=2)
    tau = other - base
    added = merge_tensor("task_arithmetic", base, [base + tau], {"weight": [1.0]})
    back = merge_tensor("task_arithmetic", added, [added + tau], {"weight": [-1.0]})
    torch.testing.assert_close(back, base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 1, 2)])
def test_scalars_single_entries_and_empty_tensors_work(method, shape):
    base, *tensors = models(*shape)
    merged = run(method, base, tensors)
    assert merged.shape == shape and merged.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_zeros_give_zeros(method):
    assert not run(method, torch.zeros(150), [torch.zeros(150)] * 3).any()


@pytest.mark.parametrize("method", NEEDS_BASE[1:])
def test_a_density_of_zero_keeps_the_base_except_where_nothing_is_dropped(method):
    base, other = models(150, count=2)
    merged = merge_tensor(method, base, [other], {"density": [0.0]})
    assert torch.equal(merged, base) == (method != "task_arithmetic")


@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_mixed_dtypes_stay_untouched_and_out_is_rounded_once(method):
    base, one, two, three = models(20, 30)
    tensors = [one.bfloat16(), two.half(), three]
    before = [t.clone() for t in (base, *tensors)]
    out = torch.empty(20, 30, dtype=torch.bfloat16)
    seed = torch.Generator().manual_seed
    assert run(method, base, tensors, out=out, generator=seed(0)) is out
    wide = run(method, base, [t.float() for t in tensors], out=torch.empty(20, 30), generator=seed(0))
    assert torch.equal(out, wide.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *tensors), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_weight_is_merged_in_place_of_its_copy(method):
    base, *tensors = models(20, 30)
    seed = torch.Generator().manual_seed
    turned = run(method, base.T, [t.T for t in tensors], generator=seed(0))
    copied = run(method, base.T.contiguous(), [t.T.contiguous() for t in tensors], generator=seed(0))
    assert turned.is_contiguous() and torch.equal(turned, copied)


@pytest.mark.parametrize("method", METHODS)
def test_extra_memory_is_a_few_buffers_whatever_the_size(method, monkeypatch):
    """At most 10 fp32 chunks for three models, and 2 MiB for the counts of TIES; a tensor has 16 chunks."""
    monkeypatch.setattr(stream, "CHUNK", 2**14)
    base, *tensors = models(512, 512, dtype=torch.bfloat16)
    out = torch.empty_like(base)
    assert peak_bytes(lambda: run(method, base, tensors, out=out)) <= 10 * 2**16 + (
        2**21 if method == "ties" else 2**12
    )


WRONG = {
    "method is 'soup'": ("soup", 1, {}),
    "0 tensors: linear needs one": ("linear", 0, {}),
    "2 tensors: slerp needs one and a base": ("slerp", 2, {"t": 0.5}),
    "2 values of weight for 1 tensors": ("linear", 1, {"weight": [1.0, 2.0]}),
    "1 values of density for 2 tensors": ("ties", 2, {"density": [0.5]}),
    r"density is \[20.0\]": ("dare_linear", 1, {"density": 20.0}),
    "add up to 0": ("linear", 2, {"weight": [1.0, -1.0]}),
    "rescale: true is for dare_linear": ("ties", 1, {"rescale": True}),
    "slerp needs a number t": ("slerp", 1, {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_in_one_sentence(message):
    method, count, parameters = WRONG[message]
    with pytest.raises(ValueError, match=message):
        merge_tensor(method, torch.ones(3) if method != "linear" else None, [torch.ones(3)] * count, parameters)


def test_a_missing_base_other_shapes_integers_and_a_wrong_out_are_refused():
    x = torch.ones(4)
    with pytest.raises(ValueError, match="ties needs the base"):
        merge_tensor("ties", None, [x], {})
    with pytest.raises(ValueError, match=r"shapes \(4,\), \(2,\)"):
        merge_tensor("ties", x, [torch.ones(2)], {})
    with pytest.raises(ValueError, match=r"torch\.int64: only floating-point"):
        merge_tensor("ties", x, [torch.ones(4, dtype=torch.int64)], {})
    with pytest.raises(ValueError, match=r"out has shape \(5,\)"):
        merge_tensor("ties", x, [x], {}, out=torch.empty(5))
