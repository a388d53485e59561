"""Schedules: transformers' own numbers at every step, and what their ends are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from finetune_lab.methods import schedules

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 60), warmup=st.integers(0, 70))
def test_every_step_has_the_rate_that_transformers_gives_it(name, steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(NAMES[name], optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        ours = getattr(schedules, name)(step, steps, warmup)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", NAMES)
def test_with_a_warm_up_the_first_step_of_transformers_changes_nothing(name):
    assert getattr(schedules, name)(0, 100, 10) == 0 < schedules.early_linear(0, 100, 10)


@given(steps=st.integers(1, 60), warmup=st.integers(0, 70))
def test_early_linear_wastes_no_step_and_never_passes_the_peak(steps, warmup):
    shares = [schedules.early_linear(step, steps, warmup) for step in range(steps)]
    assert 0 < min(shares) and max(shares) <= 1


def test_cosine_is_above_linear_in_the_first_half_and_below_in_the_second():
    cosine, linear = ([f(step, 100, 0) for step in range(100)] for f in (schedules.cosine, schedules.linear))
    assert all(c > x for c, x in zip(cosine[1:50], linear[1:50], strict=True))
    assert all(c < x for c, x in zip(cosine[51:], linear[51:], strict=True))


def test_a_warm_up_as_long_as_the_training_never_reaches_the_peak():
    assert max(schedules.linear(step, 40, 40) for step in range(40)) < 1
