"""The game of recomputation: rules, and records that no search beats."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_lab.methods.memory.schedule import best_schedule, fewest_forwards, keep_all, keep_every, play


def searched(layers: int, slots: int) -> int:
    """The fewest forwards, by Dijkstra over all states (held activations, layer that goes back next)."""
    start = (frozenset(), layers)
    best, queue, tie = {start: 0}, [(0, 0, start)], 0
    while queue:
        cost, _, (held, back) = heapq.heappop(queue)
        if back == 0:
            return cost
        moves = [(0, (held - {i}, back)) for i in held] + [(0, (held - {back}, back - 1))] * (back in held)
        moves += [
            (1, (held | {i}, back)) for i in range(1, back + 1) if i - 1 in held | {0} and len(held | {i}) <= slots
        ]
        for price, state in moves:
            if cost + price < best.get(state, 1e9):
                best[state], tie = cost + price, tie + 1
                heapq.heappush(queue, (cost + price, tie, state))
    raise AssertionError("no schedule")


@given(st.integers(1, 30), st.integers(1, 35))
def test_keep_every_goes_back_through_all_layers_within_its_slots(layers, step):
    done = play(keep_every(layers, step), layers)
    assert done.held[-1] == 0
    assert done.peak <= (layers - 1) // step + step + (step > 1 and layers > step)
    assert layers <= done.forwards < 2 * layers


def test_keeping_everything_runs_each_layer_once():
    done = play(keep_all(12), 12)
    assert (done.peak, done.forwards) == (12, 12)


@pytest.mark.parametrize("layers", range(1, 8))
@pytest.mark.parametrize("slots", range(2, 6))
def test_the_record_is_what_a_search_over_all_schedules_finds(layers, slots):
    assert fewest_forwards(layers, slots) == searched(layers, slots)
    done = play(best_schedule(layers, slots), layers)
    assert done.forwards == fewest_forwards(layers, slots) and done.peak <= slots


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([("forward", 2)], "activation 1 is not held"),
        ([("forward", 1), ("forward", 2), ("backward", 1)], "layer 2 must go back first"),
        ([("forward", 1), ("drop", 1), ("forward", 2)], "activation 1 is not held"),
        ([("forward", 1), ("drop", 2)], "never made, or dropped"),
        ([("forward", 1), ("forward", 2), ("backward", 2)], "ends before layer 1 went back"),
        ([("forwards", 1)], "forward | drop | backward"),
        ([("forward", 3)], "a layer from 1 to 2"),
    ],
)
def test_a_broken_rule_is_named_with_its_action(actions, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        play(actions, 2)


def test_two_layers_do_not_fit_into_one_slot():
    with pytest.raises(ValueError, match="1 slot"):
        fewest_forwards(2, 1)
