"""Our losses and padding against transformers: same numbers, to 1e-6."""

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from finetune_lab.methods.loss import IGNORE_INDEX, chunked_loss, labelled_only_loss, sft_loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def data(seed, rows=3, seq=13, vocab=97):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (rows, seq), generator=g)
    labels = ids.masked_fill(torch.rand(rows, seq, generator=g) < 0.5, IGNORE_INDEX)
    labels[:, -2] = ids[:, -2]
    return ids, labels


@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)], ids=["own count", "int", "tensor"])
@pytest.mark.parametrize("seed", range(4))
def test_sft_loss_equals_llamas_own_loss(model, seed, num_items):
    ids, labels = data(seed)
    out = model(input_ids=ids, labels=labels, num_items_in_batch=num_items)
    torch.testing.assert_close(sft_loss(out.logits, labels, num_items), out.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_sft_loss_and_its_gradient_equal_transformers_function(dtype, seed):
    _, labels = data(seed)
    logits = torch.randn(3, 13, 97, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    ours, theirs = sft_loss(logits, labels), ForCausalLMLoss(logits, labels, 97)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    a, b = torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_nothing_labelled_is_nan_in_both(model):
    ids, labels = data(0)
    labels = torch.full_like(labels, IGNORE_INDEX)
    out = model(input_ids=ids, labels=labels)
    assert out.loss.isnan() and sft_loss(out.logits, labels).isnan()


@pytest.mark.parametrize("loss_fn", [labelled_only_loss, chunked_loss])
def test_labelled_only_losses_give_every_weight_llamas_own_gradient(model, loss_fn):
    ids, labels = data(7)
    weights = list(model.parameters())
    theirs = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, weights)
    hidden = model.model(input_ids=ids).last_hidden_state
    ours = torch.autograd.grad(loss_fn(hidden, model.lm_head.weight, labels), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_transformers_collator_drops_every_end_label_when_pad_is_the_end_token(tiny_tokenizer):
    """The trap behind 'my model never stops': labels equal to the padding id are ignored, wherever they stand."""
    end = tiny_tokenizer.convert_tokens_to_ids("<|end|>")
    rows = [{"input_ids": [5, 300, end, 6, 301, 302, end]}, {"input_ids": [5, 300, end]}]
    kept = {}
    for pad in ("<|end|>", "<|pad|>"):
        tiny_tokenizer.pad_token = pad
        labels = DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False)(rows)["labels"]
        kept[pad] = int((labels == end).sum())
    assert kept == {"<|end|>": 0, "<|pad|>": 3}
