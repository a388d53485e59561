"""Counting real tensors: what is held, what autograd keeps, what quantisation leaves."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.methods.counts import nf4_bits_per_parameter
from finetune_lab.methods.memory import tensors


def llama(layers=2, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": layers, **settings}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).train()


def stepped(model, optimizer=torch.optim.AdamW):
    optimizer = optimizer(model.parameters())
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None], use_cache=False).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_adamw_states_follow_the_parameters_dtype(dtype, each):
    model = llama(dtype=dtype)
    optimizer = stepped(model)
    held, count = tensors.held_bytes(model, optimizer), sum(p.numel() for p in model.parameters())
    steps = 4 * len(optimizer.state)  # AdamW keeps each parameter's step as an fp32 scalar
    assert held == {"weights": each * count, "gradients": each * count, "optimizer": 2 * each * count + steps}


def test_tied_weights_are_counted_once():
    tied, apart = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    difference = tensors.held_bytes(apart, optimizer)["weights"] - tensors.held_bytes(tied, optimizer)["weights"]
    assert difference == 4 * 96 * 64


def test_nothing_but_weights_before_the_first_step():
    model = llama()
    held = tensors.held_bytes(model, torch.optim.AdamW(model.parameters()))
    assert held["gradients"] == held["optimizer"] == 0


def test_shared_tables_of_8_bit_states_are_counted_once():
    model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False))
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    count = sum(p.numel() for p in model.parameters())
    tables = 2 * 256 * 4  # one code book for each moment, shared by all parameters
    assert tensors.held_bytes(model, optimizer)["optimizer"] == 2 * (count + 4 * count / 256) + tables


@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "intermediate"), [(64, 4, 2, 160), (128, 4, 4, 96), (96, 3, 1, 256)])  # fmt: skip
def test_the_layer_formula_is_exact_to_the_byte(hidden, heads, kv_heads, intermediate):
    batch, seq, size = 2, 24, hidden // heads
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
             "intermediate_size": intermediate}  # fmt: skip
    ids = torch.randint(96, (batch, seq))

    def kept(layers):
        model = llama(layers, torch.bfloat16, **shape)
        return tensors.saved_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, model.parameters())

    expected = tensors.layer_saved_bytes(hidden, intermediate, hidden, kv_heads * size, heads)
    assert kept(3) - kept(2) == kept(2) - kept(1) == batch * seq * expected


def test_parameters_are_not_counted_as_saved():
    x, layer = torch.ones(8, 32), nn.Linear(32, 16)
    assert tensors.saved_bytes(lambda: layer(x).sum(), layer.parameters()) == 8 * 32 * 4


def test_a_storage_saved_twice_is_counted_once():
    x = torch.ones(10, requires_grad=True)
    assert tensors.saved_bytes(lambda: (x * 2).square().square().sum(), [x]) == 2 * 10 * 4


def test_a_graph_that_forward_throws_away_is_not_counted():
    x = torch.ones(100, requires_grad=True)

    def forward():
        (x.exp() * x).sum()  # nobody keeps it
        return x.square().sum()

    assert tensors.saved_bytes(forward, []) == 100 * 4
    assert tensors.saved_bytes(forward, [x]) == 0


def test_the_output_layer_and_embeddings_are_not_quantised():
    model = llama(tie_word_embeddings=False)
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    other = 2 * 96 * 64 + 5 * 64
    assert tensors.nf4_model_bytes(model, 2) == pytest.approx(linears * nf4_bits_per_parameter(64, 256) / 8 + 2 * other)
