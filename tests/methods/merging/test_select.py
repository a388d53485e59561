"""The k-th largest magnitude by counting: the same as by sorting, whatever the values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods.merging.select import Cut, kth_largest_magnitude
from finetune_lab.methods.merging.ties import keep_largest


def cut(x, k, chunk):
    """`x` trimmed to its k largest magnitudes, chunk by chunk."""
    trim = Cut(lambda: x.split(chunk), k)
    return torch.cat([trim(piece.clone(), torch.empty_like(piece)) for piece in x.split(chunk)])


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    share=st.floats(0, 1),
    chunk=st.integers(1, 70),
)
def test_counting_finds_what_sorting_finds_for_any_finite_and_infinite_values(values, share, chunk):
    x = torch.tensor(values, dtype=torch.float32)
    k = max(1, int(share * len(x)))
    threshold, wanted, equal = kth_largest_magnitude(lambda: x.split(chunk), k)
    assert threshold == x.abs().sort(descending=True).values[k - 1].item()
    assert equal == (x.abs() == threshold).sum() and wanted == k - (x.abs() > threshold).sum()


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, -1e-40, 0.0, 0.5, 1.0]), min_size=1, max_size=60),
    share=st.floats(0, 1),
    chunk=st.integers(1, 70),
)
def test_the_cut_keeps_the_same_entries_as_the_plain_form_even_among_equals(values, share, chunk):
    x = torch.tensor(values)
    k = max(1, int(share * len(x)))
    assert torch.equal(cut(x, k, chunk), keep_largest(x, k))


@pytest.mark.parametrize("k", [1, 777, 50_000, 99_999, 100_000])
def test_normal_values_are_cut_where_topk_cuts_them(k):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(k))
    assert torch.equal(cut(x, k, 4096), keep_largest(x, k))


def test_differences_of_bf16_weights_share_magnitudes_and_are_cut_all_the_same():
    """A task vector of bf16 weights takes few values: here the threshold alone is shared by hundreds of entries."""
    g = torch.Generator().manual_seed(0)
    base = (torch.randn(100_000, generator=g) * 0.02).bfloat16()
    tau = (base.float() + 0.002 * torch.randn(100_000, generator=g)).bfloat16().float() - base.float()
    _, wanted, equal = kth_largest_magnitude(lambda: [tau], 30_000)
    assert equal > wanted > 100
    assert torch.equal(cut(tau, 30_000, 4096), keep_largest(tau, 30_000))
