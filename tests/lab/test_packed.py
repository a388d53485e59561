"""Document attention on a real Llama: each sample of a packed row gets the logits and the gradient it gets alone."""

import pytest
import torch

from finetune_lab.errors import UserError
from finetune_lab.lab import models, packed, tasks, train
from finetune_lab.methods.packing import best_fit


@pytest.fixture(scope="module")
def ground():
    model, tokenizer = models.load("tiny")
    rows = train.encode(tokenizer, tasks.load_task("extract", "train", 5))
    return packed.use_document_attention(model), rows


def batch_of(rows):
    groups = best_fit([len(ids) for ids, _ in rows], 1024)
    (batch,) = packed.packed_batches(rows, groups)
    return batch, groups[0]


@torch.no_grad()
def test_packed_samples_have_the_logits_they_have_alone(ground):
    model, rows = ground
    batch, order = batch_of(rows)
    together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    model.set_attn_implementation("sdpa")
    alone = torch.cat([model(input_ids=torch.tensor([rows[i][0]])).logits[0] for i in order])
    packed.use_document_attention(model)
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)


def test_the_gradient_is_that_of_transformers_dense_mask(ground):
    model, rows = ground
    batch, _ = batch_of(rows)
    found = []
    for use in (packed.use_document_attention, lambda m: m.set_attn_implementation("sdpa")):
        use(model)
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    packed.use_document_attention(model)
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-5


def test_labels_of_the_first_token_of_each_sample_do_not_count(ground):
    batch, order = batch_of(ground[1])
    assert (batch["position_ids"] == 0).sum() == len(order) == 5
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
    assert batch["input_ids"].shape == (1, sum(len(ids) for ids, _ in ground[1]))


def test_a_cache_is_refused_in_one_sentence(ground):
    model, rows = ground
    model.set_attn_implementation(packed.NAME)
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(torch.tensor([rows[0][0]]), max_new_tokens=2)
