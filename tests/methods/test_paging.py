"""Pages move only when they must, and every move is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_lab.methods.paging import PagedMemory, simulate, spike_traffic

SIZES = {"capacity": 240, "fixed": 120, "state": 80, "bytes_per_token": 1, "page": 10}


def test_steps_that_fit_move_nothing():
    assert all((s.faults, s.evictions, s.moved, s.fits) == (0, 0, 0, True) for s in simulate([40, 20, 40], **SIZES))


def test_a_spike_moves_as_many_pages_out_as_it_lacks_and_the_optimizer_brings_them_back():
    before, spike, after = simulate([40, 75, 40], **SIZES)
    assert (spike.evictions, spike.faults, spike.moved, spike.fits) == (4, 4, 80, False)  # 35 bytes short: 4 pages
    assert (before.moved, after.moved) == (0, 0)
    assert spike_traffic(75, **SIZES) == spike.moved


def test_states_that_never_fit_beside_the_rest_fault_all_of_them_at_every_step():
    """Least recently used is the worst order for a walk over more pages than there is room for."""
    steps = simulate([0, 0, 0], **(SIZES | {"state": 130}))
    assert [s.faults for s in steps] == [13, 13, 13]


def test_paging_does_not_help_against_activations():
    with pytest.raises(MemoryError, match="shorten the sequence"):
        simulate([10, 121], **SIZES)


def test_the_least_recently_used_page_goes_first():
    memory = PagedMemory(30, page=10)
    memory.touch([1, 2, 3])
    memory.touch([1])
    memory.allocate(10)
    assert list(memory.resident) == [3, 1]


@given(st.lists(st.integers(0, 120), max_size=20), st.integers(1, 120))
def test_the_device_is_never_over_full_and_every_page_in_was_new_or_out(lengths, state):
    sizes = SIZES | {"state": state}
    steps = simulate(lengths, **sizes)
    pages = -(-state // 10)
    for step in steps:
        assert 0 <= step.faults <= pages
        assert step.moved == 10 * (step.faults + step.evictions)
        if step.evictions and state <= 120:
            assert not step.fits or state % 10  # a last page that is not full takes a whole one


@given(st.lists(st.tuples(st.sampled_from(["touch", "allocate", "free"]), st.integers(1, 9)), max_size=40))
def test_used_memory_is_what_lies_there(actions):
    memory = PagedMemory(100, page=10)
    for action, n in actions:
        try:
            memory.touch(range(n)) if action == "touch" else getattr(memory, action)(10 * n)
        except (MemoryError, ValueError):
            pass
        assert memory.used == memory.ordinary + 10 * len(memory.resident) <= 100
        assert memory.faults - memory.evictions == len(memory.resident)


@pytest.mark.parametrize("page", [0, 101])
def test_a_page_must_fit(page):
    with pytest.raises(ValueError, match="page that fits"):
        PagedMemory(100, page)


def test_more_than_was_taken_cannot_be_freed():
    with pytest.raises(ValueError, match="only 0 are taken"):
        PagedMemory(100, 10).free(1)
