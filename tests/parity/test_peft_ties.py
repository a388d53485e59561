"""Our TIES against peft's on the same task vectors, equal weights (with unequal ones paper, peft and mergekit differ)."""

import pytest
import torch
from peft.utils import merge_utils

from finetune_lab.methods.merging import ties


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("models", "shape"), [(2, (7, 5)), (3, (64, 33)), (5, (11,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_equals_peft_for_equal_weights(models, shape, density, dtype):
    generator = torch.Generator().manual_seed(models)
    vectors = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(models)]
    theirs = merge_utils.ties(vectors, torch.ones(models, dtype=dtype), density, "total")
    assert (ties(vectors, density) - theirs).abs().max().item() <= 1e-6
