"""Bench nf4 measures what it says, and its recorded run keeps what the lesson quotes."""

import pytest
import torch

from finetune_lab.course import bench
from finetune_lab.course.bench import nf4
from finetune_lab.lab import rounding
from finetune_lab.lab.models import load
from finetune_lab.methods.codebooks import nf4_code
from finetune_lab.methods.nf4 import quantize

SIZE = nf4.QUICK | {"rounds": 1}


@pytest.fixture(scope="module")
def rows():
    found = nf4.speed("fp32", (256, 192), SIZE) + nf4.bits() + nf4.adam_rows(20) + nf4.fault_rows()
    found += nf4.error_rows(rounding.weights_by_kind(2**12, real=False)) + nf4.layer_rows(128, 1)
    return found


def test_every_row_has_its_own_name_and_all_columns(rows):
    assert len({r["name"] for r in rows}) == len(rows)
    assert all(set(r) == set(bench.COLUMNS) - {"holds"} for r in rows)


def test_bits_and_bytes_agree_with_bitsandbytes(rows):
    found = {r["name"]: r for r in rows}
    assert found["fp32 256x192: bytes, scales and values unlike bitsandbytes'"]["value"] == 0
    for name in ("scales in fp32", "double quantization"):
        kept = found[f"bits a parameter, {name}"]
        assert kept["value"] == kept["peer_value"]
    assert found["8-bit AdamW: largest difference to bitsandbytes after 20 steps"]["value"] == 0


def test_the_naive_form_finds_the_same_codes():
    w = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    assert (nf4.naive_quantize(w, nf4_code()) != quantize(w).packed).float().mean() < 1e-3


def test_eight_bits_have_less_error_than_four_on_all_weights(rows):
    found = {r["name"]: r["value"] for r in rows}
    for kind in ("Gaussian", "uniform", "heavy-tailed", "tiny"):
        error = {f: found[f"{kind}, {f}, block 64: mean square error / variance"] for f in rounding.FORMATS}
        assert error["INT8"] < 0.02 * min(value for name, value in error.items() if name != "INT8")


def test_larger_blocks_have_more_error(rows):
    found = {r["name"]: r["value"] for r in rows}
    errors = [found[f"Gaussian, NF4, block {block}: mean square error / variance"] for block in nf4.BLOCKS]
    assert errors == sorted(errors)


def test_rounded_changes_the_linear_weights_within_the_block_and_gives_them_back():
    model, _ = load("tiny")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with rounding.rounded(model, rounding.FORMATS["NF4"], 64):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "proj" in name}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_come_back_after_an_error_too():
    model, _ = load("tiny")
    weight = rounding.linear_weights(model)[0].clone()
    with pytest.raises(KeyError), rounding.rounded(model, rounding.FORMATS["FP4"], 64):
        raise KeyError
    assert torch.equal(rounding.linear_weights(model)[0], weight)


def test_errors_are_relative_to_the_spread_of_the_weights():
    w = torch.tensor([-1.0, 1.0])
    found = rounding.errors(w, w + 0.5)
    assert list(found.values()) == [0.25, 0.5]
    assert rounding.errors(10 * w, 10 * w + 5) == found


def test_the_recorded_run_holds_what_issue_and_lesson_promise():
    kept = {r["name"]: r for r in bench.recorded("nf4")["rows"]}
    for size in ("1024x1024", "2048x2048", "4096x4096"):
        assert kept[f"fp32 {size}: bytes, scales and values unlike bitsandbytes'"]["holds"]
        assert kept[f"fp32 {size}: restore into out reused, times faster than naive"]["holds"]
    assert kept["fp32 4096x4096: quantise, times faster than bitsandbytes"]["holds"]
    assert f"{kept['bits a parameter, double quantization']['value']:.3f}" == "4.127"
