"""The picture of a code book says what the code books do."""

import re

import matplotlib.pyplot as plt
import pytest
import torch

from finetune_lab.course.codebook_plot import DISTRIBUTIONS, codebook_plot, normal_float_code, samples
from finetune_lab.errors import UserError
from finetune_lab.methods.codebooks import nf4_code


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def errors(text):
    return tuple(map(float, re.search(r"NF\d ([\d.]+), INT\d ([\d.]+)", text).groups()))


def test_four_bits_give_nf4():
    torch.testing.assert_close(normal_float_code(4), nf4_code(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_has_all_its_levels_an_exact_zero_and_both_ends(bits):
    code = normal_float_code(bits)
    assert len(code.unique()) == 2**bits
    assert code[0] == -1 and code[-1] == 1 and (code == 0).sum() == 1
    assert (code < 0).sum() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_gives_a_figure_and_a_line_of_text(distribution):
    figure, text = codebook_plot(4, 64, distribution)
    assert distribution in figure.axes[0].get_title(loc="left") and figure.axes[0].get_xlabel()
    assert "\n" not in text and all(error > 0 for error in errors(text))


def test_quantiles_win_on_normal_weights_and_lose_on_uniform_ones():
    nf, integers = errors(codebook_plot(4, 64, "normal")[1])
    assert nf < integers
    nf, integers = errors(codebook_plot(4, 64, "uniform")[1])
    assert nf > integers


def test_an_outlier_spoils_its_own_block_only():
    small, large = (errors(codebook_plot(4, block, "normal, one outlier in 4096")[1])[0] for block in (64, 4096))
    assert large > 2 * small


def test_levels_are_not_equally_full():
    fullest, emptiest, even = re.search(
        r"level ([\d.]+) %, emptiest ([\d.]+) % \(even: ([\d.]+)", codebook_plot(4, 64, "normal")[1]
    ).groups()
    assert float(fullest) > 1.3 * float(even) and float(emptiest) < 0.5 * float(even)


def test_samples_are_the_same_each_time():
    assert all(torch.equal(samples(name), samples(name)) for name in DISTRIBUTIONS)


def test_an_unknown_distribution_is_one_sentence():
    with pytest.raises(UserError, match="unknown distribution 'gamma'"):
        samples("gamma")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_title_names_the_code_that_errs_less_here(bits, distribution):
    figure, text = codebook_plot(bits, 64, distribution)
    nf, integers = errors(text)
    better = "Both err alike" if nf == integers else f"{'NF' if nf < integers else 'INT'}{bits} errs less"
    assert figure.axes[0].get_title(loc="left").startswith(better)
