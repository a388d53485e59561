"""What stays: quantised weights and optimizer states, to the byte where a library runs on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_lab.methods import counts
from finetune_lab.methods.memory import Recipe
from finetune_lab.methods.memory.states import Tensor, nf4_bytes, state_bytes

SHAPES = [(96, 128), (33, 70), (70,), (5000,)]


def held(optimizer) -> int:
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for s in optimizer.state.values()
             for k, t in s.items() if isinstance(t, torch.Tensor) and not k.startswith("qmap")}  # fmt: skip
    return sum(found.values())


def run(make, shape, dtype):
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = make([weight])
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    return held(optimizer)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw", "adamw-8bit", "paged-adamw", "adafactor"])
def test_optimizer_states_equal_the_real_ones(name, dtype, shape):
    from bitsandbytes.optim import AdamW8bit, PagedAdamW
    from transformers.optimization import Adafactor

    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "adamw-8bit": lambda p: AdamW8bit(p, lr=0.1),
        "paged-adamw": lambda p: PagedAdamW(p, lr=0.1),
        "adafactor": lambda p: Adafactor(p, lr=0.1, relative_step=False, scale_parameter=False),
    }[name]
    size = {"fp32": 4, "bf16": 2}[dtype]
    mine = state_bytes(Tensor("weight", shape, size, trained=True), Recipe(optimizer=name))
    assert mine == run(make, shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128, 512])
def test_nf4_bytes_equal_those_of_bitsandbytes(block, double):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(192, 320)
    packed, state = quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type="nf4")
    constants = [state.absmax, state.code] + ([state.offset, state.state2.absmax, state.state2.code] if double else [])
    assert nf4_bytes(weight.numel(), block, double) == (packed.nbytes, sum(t.nbytes for t in constants))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2**20), st.sampled_from([64, 128]))
def test_nf4_bits_approach_the_published_ones(blocks, block):
    numel = 256 * block * blocks
    packed, constants = nf4_bytes(numel, block)
    tables = 16 * 4 + 256 * 4 + 4
    assert 8 * (packed + constants - tables) / numel == pytest.approx(counts.nf4_bits_per_parameter(block, 256))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 300))
def test_galore_agrees_with_the_counting_function_of_the_drills(rows, columns, rank):
    rank = min(rank, rows, columns)
    tensor = Tensor("q_proj", (rows, columns), 4, trained=True)
    mine = state_bytes(tensor, Recipe(optimizer="galore-adamw", galore_rank=rank))
    assert mine == 4 * counts.galore_moment_elements(rows, columns, rank)
