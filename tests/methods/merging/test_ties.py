"""TIES: trim, elect, disjoint mean; and the three things that are called TIES."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods.merging import disjoint_mean, elect_sign, sign_conflicts, ties, ties_merge, trim
from finetune_lab.methods.merging.ties import CONVENTIONS, keep_largest

each_convention = pytest.mark.parametrize("convention", CONVENTIONS)


def vectors(models, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for _ in range(models)]


def by_hand(task_vectors, density, weights, convention):
    """Algorithm 1 of the paper, one entry at a time, with the weights where peft and mergekit put them."""
    flat = [tau.double().flatten().tolist() for tau in task_vectors]
    n = len(flat[0])
    kept = []
    for tau in flat:
        largest = sorted(range(n), key=lambda i: (-abs(tau[i]), i))[: int(density * n)]
        kept.append([tau[i] if i in largest else 0.0 for i in range(n)])
    merged = []
    for entries in zip(*kept, strict=True):
        voices = [w * x for w, x in zip(weights, entries, strict=True)] if convention == "mergekit" else entries
        plus = sum(voices) >= 0
        winners = [
            (w, x) for w, x, voice in zip(weights, entries, voices, strict=True) if (voice > 0 if plus else voice < 0)
        ]
        if not winners:
            merged.append(0.0)
        elif convention == "paper":
            merged.append(sum(x for _, x in winners) / len(winners))
        elif convention == "peft":
            merged.append(sum(w * x for w, x in winners) / len(winners))
        else:
            merged.append(sum(w * x for w, x in winners) / sum(w for w, _ in winners))
    return torch.tensor(merged, dtype=torch.float64).view(task_vectors[0].shape)


@each_convention
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_each_convention_is_its_formula_entry_by_entry(convention, density, models):
    weights = None if convention == "paper" else [0.7, 0.3, 1.4, 0.2, 0.5][:models]
    tau = vectors(models, 11, 7, seed=models)
    merged = ties(tau, density, weights, convention)
    oracle = by_hand(tau, density, weights or [1.0] * models, convention)
    torch.testing.assert_close(merged.double(), oracle, rtol=0, atol=1e-6)


def test_the_two_line_form_is_the_papers_convention():
    tau = vectors(3, 8, 9)
    assert torch.equal(ties_merge(tau, 0.3), ties(tau, 0.3))


def test_for_weights_of_one_all_conventions_are_equal():
    tau = vectors(3, 40, 30)
    paper = ties(tau, 0.2)
    for convention in ("peft", "mergekit"):
        assert (ties(tau, 0.2, [1.0, 1.0, 1.0], convention) - paper).abs().max() <= 1e-6


def test_for_unequal_weights_ties_is_three_algorithms():
    """Relative distance between any two at weights 0.7 and 0.3, density 0.5: 0.50 to 0.57 on random task vectors."""
    tau = vectors(2, 200, 200)
    results = {"paper": ties(tau, 0.5)}
    results |= {name: ties(tau, 0.5, [0.7, 0.3], name) for name in ("peft", "mergekit")}
    for one, other in itertools.combinations(results, 2):
        distance = (results[one] - results[other]).norm() / results["paper"].norm()
        assert distance > 0.48, (one, other)


def test_the_sign_is_elected_by_total_not_by_count():
    tau = torch.tensor([[1.0], [-0.3], [-0.3]])
    assert elect_sign(tau).item() == 1 and ties_merge(list(tau), 1.0).item() == 1.0


def test_two_models_that_cancel_exactly_elect_plus():
    assert ties_merge([torch.tensor([2.0]), torch.tensor([-2.0])], 1.0).item() == 2.0


def test_only_entries_that_agree_are_averaged():
    tau = torch.tensor([[4.0], [2.0], [-1.0]])
    assert disjoint_mean(tau, torch.tensor([1])).item() == 3.0
    assert disjoint_mean(tau, torch.tensor([-1])).item() == -1.0


def test_a_trimmed_entry_is_not_counted_in_the_mean():
    assert disjoint_mean(torch.tensor([[4.0], [0.0]]), torch.tensor([1])).item() == 4.0


def test_trim_keeps_signs_and_the_largest_share():
    assert trim(torch.tensor([-1.0, 0.2, 0.1, 0.05]), 0.5).tolist() == [-1.0, pytest.approx(0.2), 0.0, 0.0]


def test_of_equal_magnitudes_trim_keeps_the_first():
    assert trim(torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0]), 0.6).tolist() == [1.0, -1.0, 2.0, 0.0, 0.0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=40), st.floats(0.01, 1))
def test_trim_keeps_exactly_its_share_of_the_largest(values, density):
    x = torch.tensor(values)
    k = int(density * len(x))
    trimmed = trim(x, density)
    assert torch.equal(trimmed.abs().sort(descending=True).values[:k], x.abs().sort(descending=True).values[:k])
    assert (trimmed != 0).sum() <= k and torch.equal(trimmed[trimmed != 0], x[trimmed != 0])
    assert torch.equal(keep_largest(x, k), trimmed)  # the faster form, equal magnitudes included


@each_convention
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), models=st.integers(2, 4), density=st.floats(0.1, 1))
def test_the_order_of_the_models_does_not_matter(convention, seed, models, density):
    tau = vectors(models, 6, 5, seed=seed)
    weights = None if convention == "paper" else [0.2 + 0.3 * i for i in range(models)]
    merged = ties(tau, density, weights, convention)
    turned = ties(tau[::-1], density, weights and weights[::-1], convention)
    torch.testing.assert_close(merged, turned, rtol=1e-5, atol=1e-6)


def test_identical_models_merge_into_their_trimmed_selves():
    x = torch.randn(6, 5)
    assert torch.allclose(ties_merge([x, x, x], 0.2), trim(x, 0.2))


@each_convention
def test_models_that_are_the_base_leave_it_as_it_is(convention):
    assert torch.equal(ties([torch.zeros(4, 3)] * 2, 0.5, convention=convention), torch.zeros(4, 3))


def test_the_paper_has_no_weights():
    with pytest.raises(ValueError, match="no weights per model"):
        ties([torch.ones(3)] * 2, 0.2, [0.7, 0.3])


def test_an_unknown_convention_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'yadav': choose one of paper, peft, mergekit"):
        ties([torch.ones(3)], 0.2, convention="yadav")


@pytest.mark.parametrize("density", [0, -0.1, 1.5, 20])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match=r"20 % is 0\.2"):
        ties_merge([torch.ones(3)], density)
    with pytest.raises(ValueError, match=r"20 % is 0\.2"):
        ties([torch.ones(3)], density)


def test_sign_conflicts_are_counted_among_the_entries_that_somebody_changed():
    tau = [torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([-1.0, -1.0, 0.0, 2.0])]
    assert sign_conflicts(tau) == pytest.approx(1 / 3)


def test_unrelated_task_vectors_conflict_in_half_of_the_entries():
    assert sign_conflicts(vectors(2, 300, 300)) == pytest.approx(0.5, abs=0.01)
