"""Claims about what a fine-tune did to one matrix."""

import pytest
import torch

from finetune_lab.methods.spectrum import (
    energy,
    energy_rank,
    intruder_dimensions,
    magnitude_and_direction_change,
)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_energy_of_a_diagonal_matrix_can_be_counted_by_hand():
    assert energy(torch.diag(torch.tensor([3.0, 1.0, 2.0]))).tolist() == pytest.approx([9 / 14, 13 / 14, 1])


@pytest.mark.parametrize(("share", "rank"), [(0.6, 1), (0.9, 2), (0.95, 3)])
def test_energy_rank_is_the_smallest_that_reaches_the_share(share, rank):
    assert energy_rank(torch.diag(torch.tensor([3.0, 1.0, 2.0])), share) == rank


def test_all_the_energy_of_a_product_of_thin_matrices_is_in_its_rank():
    update = rows(30, 3) @ rows(3, 20, seed=1)
    assert energy(update)[2].item() == pytest.approx(1, abs=1e-5)
    assert energy_rank(update, 0.999) <= 3


def test_a_matrix_has_no_intruders_beside_itself_whatever_its_scale_and_sign():
    weight = rows(24, 16)
    assert intruder_dimensions(weight, -3 * weight) == 0


def test_one_strong_foreign_direction_is_one_intruder_and_a_weak_one_is_none():
    U, S, Vh = torch.linalg.svd(rows(40, 16), full_matrices=False)
    new = torch.linalg.qr(torch.cat([U, rows(40, 1, seed=2)], dim=1)).Q[:, -1]  # orthogonal to every old vector
    before = U * S @ Vh
    assert intruder_dimensions(before, before + 5 * S[0] * torch.outer(new, Vh[3]), k=4) == 1
    assert intruder_dimensions(before, before + 0.01 * S[-1] * torch.outer(new, Vh[3]), k=4) == 0


def test_intruders_are_those_that_peft_counts():
    """The lines of peft.tuners.lora.intruders.reduce_intruder_dimension (0.21.2), with its defaults."""
    before, after = rows(40, 24), rows(40, 24) + 4 * torch.outer(rows(40, seed=3), rows(24, seed=4)) / 5
    U_base, U_merged = (torch.linalg.svd(x, full_matrices=False).U for x in (before, after))
    cos_sim = (U_merged.T @ U_base).abs().max(dim=1).values
    theirs = len(torch.where(cos_sim[:10] < 0.5)[0])
    assert theirs > 0 and intruder_dimensions(before, after) == theirs


def test_longer_rows_change_magnitude_only_and_turned_rows_direction_only():
    before = torch.eye(4) * 3
    moved, turned = magnitude_and_direction_change(before, before * 1.5)
    assert (moved, turned) == pytest.approx((1.5, 0))
    moved, turned = magnitude_and_direction_change(before, before.roll(1, dims=1))
    assert (moved, turned) == pytest.approx((0, 1))


def test_half_precision_is_computed_in_full():
    weight = rows(12, 8).bfloat16()
    assert energy(weight).dtype == torch.float32
    assert intruder_dimensions(weight, weight) == 0
