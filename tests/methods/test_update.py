"""One update of a window is one update of the joined batch: the same weights, however the rows were dealt out."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune_lab.methods.loss import IGNORE_INDEX, sft_loss
from finetune_lab.methods.update import update

VOCAB = 11


def a_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB))


def a_batch(rows, length, kept, seed):
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :-kept] = IGNORE_INDEX
    return ids, labels


def after(window, clip=1e9, model=None):
    """(what update returned, the weights after it), with SGD, which does not hide a factor as Adam does."""
    model = model or a_model()
    told = update(model, torch.optim.SGD(model.parameters(), lr=0.3), window, clip)
    return told, torch.cat([p.detach().flatten() for p in model.parameters()])


@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4))
def test_however_the_rows_are_dealt_out_the_update_is_that_of_the_joined_batch(parts):
    window = [a_batch(rows, 7, kept, seed=i) for i, (rows, kept) in enumerate(parts)]
    joined = [tuple(torch.cat(tensors) for tensors in zip(*window, strict=True))]
    (loss, norm), weights = after(window)
    (whole_loss, whole_norm), whole = after(joined)
    assert loss == pytest.approx(whole_loss, rel=1e-5) and norm == pytest.approx(whole_norm, rel=1e-4)
    assert torch.allclose(weights, whole, atol=1e-6)


def test_the_mean_of_means_would_be_another_update():
    window = [a_batch(2, 7, 1, seed=0), a_batch(2, 7, 6, seed=1)]
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    sum(sft_loss(model(ids), labels) / 2 for ids, labels in window).backward()
    optimizer.step()
    means = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after(window)[1] - means).norm() > 0.01 * means.norm()


def test_the_step_is_as_long_as_the_clipped_gradient_and_the_norm_is_told_unclipped():
    window = [a_batch(3, 7, 4, seed=0)]
    before = torch.cat([p.detach().flatten() for p in a_model().parameters()])
    (_, norm), weights = after(window, clip=0.01)
    assert norm == pytest.approx(after(window)[0][1]) and norm > 0.01
    assert (weights - before).norm().item() == pytest.approx(0.3 * 0.01, rel=1e-3)


def test_gradients_are_gone_after_the_step():
    model = a_model()
    after([a_batch(2, 7, 3, seed=0)], model=model)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_first_label_never_counts():
    ids, labels = a_batch(2, 7, 3, seed=0)
    first = labels.clone()
    first[:, 0] = ids[:, 0]
    model = a_model()
    assert torch.equal(after([(ids, labels)], model=copy.deepcopy(model))[1], after([(ids, first)], model=model)[1])


def test_the_model_may_be_a_plain_function_without_parameters():
    window, model = [a_batch(2, 7, 3, seed=0)], a_model()
    update(lambda ids: model(ids), torch.optim.SGD(model.parameters(), lr=0.3), window, 1.0)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights, after(window, clip=1.0)[1])
