"""The losses: what they average over, which logits they touch, and what they cost."""

import pytest
import torch
import torch.nn.functional as F

from finetune_lab.lab.meter import peak_bytes
from finetune_lab.methods.loss import (
    IGNORE_INDEX,
    chunked_loss,
    has_labels,
    labelled_only_loss,
    sequence_mean_loss,
    sft_loss,
    shift,
)


def batch(seed=0, rows=3, seq=11, vocab=29, width=8, dtype=torch.float32):
    """Hidden states, head weight and labels with some positions masked."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, seq, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    labels = torch.randint(vocab, (rows, seq), generator=g)
    labels[torch.rand(rows, seq, generator=g) < 0.6] = IGNORE_INDEX
    labels[:, -1] = 5
    return hidden, weight, labels


def by_hand(logits, labels):
    """The formula, one token at a time."""
    losses = [
        -torch.log_softmax(logits[b, t - 1].double(), -1)[labels[b, t]]
        for b in range(labels.shape[0])
        for t in range(1, labels.shape[1])
        if labels[b, t] != IGNORE_INDEX
    ]
    return torch.stack(losses)


@pytest.mark.parametrize("seed", range(3))
def test_sft_loss_is_the_mean_over_labelled_tokens_of_the_next_tokens_loss(seed):
    hidden, weight, labels = batch(seed)
    logits = (hidden @ weight.T).detach()
    torch.testing.assert_close(sft_loss(logits, labels).double(), by_hand(logits, labels).mean(), rtol=1e-6, atol=0)


def test_shift_pairs_every_score_with_the_next_label():
    scores = torch.arange(6).reshape(1, 6, 1)
    paired, targets = shift(scores, torch.arange(6).reshape(1, 6))
    assert torch.equal(paired[0, :, 0] + 1, targets[0])


def test_micro_batches_with_num_items_add_up_to_the_whole_batch():
    hidden, weight, labels = batch(rows=4)
    logits = (hidden @ weight.T).detach()
    items = (labels[:, 1:] != IGNORE_INDEX).sum()
    parts = sum(sft_loss(logits[i : i + 1], labels[i : i + 1], items) for i in range(4))
    torch.testing.assert_close(parts, sft_loss(logits, labels))


def test_the_mean_of_micro_batch_means_is_another_number():
    hidden, weight, labels = batch(rows=2)
    labels[0, :9] = IGNORE_INDEX  # a short answer beside a long one
    labels[1] = torch.arange(11)
    logits = (hidden @ weight.T).detach()
    means = torch.stack([sft_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(2)])
    assert abs(means.mean() - sft_loss(logits, labels)) > 0.05
    torch.testing.assert_close(means.mean(), sequence_mean_loss(logits, labels))


def test_gradient_at_masked_logits_is_exactly_zero_and_elsewhere_it_is_not():
    hidden, weight, labels = batch()
    logits = (hidden @ weight.T).detach().requires_grad_()
    sft_loss(logits, labels).backward()
    counted = torch.cat([labels[:, 1:] != IGNORE_INDEX, torch.zeros(3, 1, dtype=torch.bool)], 1)
    assert (logits.grad[~counted] == 0).all()
    assert (logits.grad[counted] != 0).any(-1).all()


def test_gradients_flow_through_the_hidden_states_of_the_prompt():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    embeds = model.get_input_embeddings()(torch.randint(29, (1, 10))).detach().requires_grad_()
    labels = torch.tensor([[IGNORE_INDEX] * 7 + [3, 4, 5]])
    sft_loss(model(inputs_embeds=embeds).logits, labels).backward()
    assert (embeds.grad[0, :7].norm(dim=-1) > 0).all()
    assert (embeds.grad[0, 9] == 0).all()  # the last token predicts nothing that counts


def test_no_label_gives_nan_like_the_mean_of_nothing_and_has_labels_finds_the_row():
    logits, labels = torch.randn(2, 5, 7), torch.full((2, 5), IGNORE_INDEX)
    labels[1, 0] = 3  # lost by the shift: nothing predicts the first token
    assert sft_loss(logits, labels).isnan()
    assert has_labels(labels).tolist() == [False, False]
    labels[1, 4] = 3
    assert has_labels(labels).tolist() == [False, True]
    assert sft_loss(logits[:1], labels[:1], num_items=1) == 0


@pytest.mark.parametrize("loss_fn", [labelled_only_loss, chunked_loss, lambda *a: chunked_loss(*a, tile=7)])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("seed", range(2))
def test_labelled_only_losses_equal_full_logits_in_value_and_gradients(loss_fn, trainable, num_items, seed):
    hidden, weight, labels = batch(seed, rows=3, seq=17)
    weight.requires_grad_(trainable)
    inputs = (hidden, weight) if trainable else (hidden,)
    full = sft_loss(hidden @ weight.T, labels, num_items)
    ours = loss_fn(hidden, weight, labels, num_items)
    torch.testing.assert_close(ours, full, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * full, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert weight.grad is None


def relative_error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_chunked_loss_in_bf16_is_as_close_to_the_truth_as_full_logits_in_bf16(trainable):
    hidden, weight, labels = batch(rows=4, seq=65, vocab=211, width=32, dtype=torch.bfloat16)
    weight.requires_grad_(trainable)
    inputs = (hidden, weight) if trainable else (hidden,)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = F.cross_entropy((exact[0] @ exact[1].T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    truths = torch.autograd.grad(truth, exact)
    losses = {"full": sft_loss(hidden @ weight.T, labels), "chunked": chunked_loss(hidden, weight, labels, tile=50)}
    error = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, inputs)
        assert all(g.dtype == torch.bfloat16 for g in grads) and loss.dtype == torch.float32
        error[name] = [relative_error(loss.detach(), truth.detach())] + [
            relative_error(g, t) for g, t in zip(grads, truths, strict=False)
        ]
    assert max(error["chunked"]) < 0.01
    assert all(ours <= 1.2 * full + 1e-4 for ours, full in zip(error["chunked"], error["full"], strict=True))


def test_chunked_loss_survives_logits_of_a_thousand():
    hidden, weight, labels = batch()
    assert chunked_loss(hidden * 1000, weight, labels).isfinite()


@pytest.mark.parametrize("loss_fn", [labelled_only_loss, chunked_loss])
def test_an_unlabelled_micro_batch_of_a_window_contributes_zero(loss_fn):
    hidden, weight, labels = batch()
    loss = loss_fn(hidden, weight, torch.full_like(labels, IGNORE_INDEX), num_items=9)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


def test_a_head_and_a_backbone_may_both_be_frozen():
    hidden, weight, labels = batch()
    assert not chunked_loss(hidden.detach(), weight, labels).requires_grad


def test_chunked_loss_holds_a_tenth_of_the_memory_of_full_logits():
    hidden, weight, labels = batch(rows=1, seq=512, vocab=4096, width=16)
    labels[0, 128:] = IGNORE_INDEX  # about a quarter is labelled, at most 128 positions

    def step(loss_fn):
        return lambda: loss_fn().backward()

    full = peak_bytes(step(lambda: sft_loss(hidden @ weight.T, labels)))
    ours = peak_bytes(step(lambda: chunked_loss(hidden, weight, labels, tile=512)))
    assert full > 2 * 511 * 4096 * 4  # logits and their gradient, at least
    assert ours < full / 10


def test_peak_bytes_counts_what_lives_at_the_same_time():
    assert peak_bytes(lambda: torch.empty(1000, 1000)) == 4_000_000
    held = peak_bytes(lambda: [torch.ones(1000, 250) for _ in range(3)])
    one_by_one = peak_bytes(lambda: [torch.ones(1000, 250).sum() for _ in range(3)])
    assert held == 3_000_000 and one_by_one < 1_010_000
