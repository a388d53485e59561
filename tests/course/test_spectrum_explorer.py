"""The explorer of lesson 03 says what rank and alpha do, in numbers that can be checked by hand."""

import matplotlib.pyplot as plt
import pytest

from finetune_lab.course.spectrum import spectrum
from finetune_lab.errors import UserError

VALUES = [4.0, 2.0, 2.0, 1.0]  # squares add up to 25


def sentence(rank, alpha, values=VALUES):
    figure, text = spectrum(values, (10, 4), rank, alpha)
    plt.close(figure)
    return text


def test_rank_says_how_much_energy_fits():
    assert "hold 64 % of the energy" in sentence(1, 1)
    assert "hold 80 % of the energy" in sentence(2, 2)


def test_alpha_equal_to_a_full_rank_misses_nothing_and_alpha_zero_everything():
    assert "misses the full one by 0 %" in sentence(4, 4)
    assert "misses the full one by 100 %" in sentence(4, 0)


def test_alpha_twice_the_rank_overshoots_by_the_kept_norm():
    assert "alpha/r = 2" in sentence(4, 8) and "misses the full one by 100 %" in sentence(4, 8)


def test_the_numbers_are_those_of_a_and_b():
    assert "28 numbers, 70.0 % of the matrix" in sentence(2, 2)


def test_the_picture_draws_all_values_and_the_kept_ones_stretched():
    figure, _ = spectrum(VALUES, (10, 4), rank=2, alpha=4)
    full, lora = (line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else list(line.get_ydata())
                  for line in figure.axes[0].lines)  # fmt: skip
    plt.close(figure)
    assert full == VALUES and lora == [8.0, 4.0]


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank):
    with pytest.raises(UserError, match="ranks from 1 to 4"):
        sentence(rank, 1)


@pytest.mark.parametrize(("alpha", "does"), [(4, "stretches"), (2, "keeps the size"), (1, "shrinks")])
def test_the_title_says_what_this_alpha_does(alpha, does):
    figure, _ = spectrum(VALUES, (10, 4), rank=2, alpha=alpha)
    plt.close(figure)
    assert figure.axes[0].get_title(loc="left") == f"Rank 2 cuts, alpha {alpha} {does}"
