"""The meter: bytes are exact, ratios come from the same round."""

import os

import torch

from finetune_lab.lab.meter import held_over_time, interleaved_seconds, median_ratio, peak_bytes


def test_peak_bytes_is_exact_for_one_tensor():
    assert peak_bytes(lambda: torch.empty(123, 7)) == 123 * 7 * 4


def test_peak_bytes_counts_what_lives_at_the_same_time_only():
    assert peak_bytes(lambda: [torch.ones(1000, 250).sum() for _ in range(3)]) < 1_010_000
    assert peak_bytes(lambda: [torch.ones(1000, 250) for _ in range(3)]) == 3_000_000


def test_peak_bytes_sees_buffers_inside_a_backward_pass():
    x = torch.randn(256, 256, requires_grad=True)
    assert peak_bytes(lambda: torch.autograd.grad((x @ x).exp().sum(), x)) >= 3 * 256 * 256 * 4


def test_held_over_time_follows_what_each_phase_leaves_behind():
    kept = []
    curves = held_over_time({"make": lambda: kept.append(torch.ones(100)), "look": lambda: torch.ones(50).numel(),
                             "free": kept.clear})  # fmt: skip
    assert {name: (max(curve), curve[-1]) for name, curve in curves.items()} == {
        "make": (400, 400), "look": (600, 400), "free": (0, 0)
    }  # fmt: skip


def test_the_profiler_says_nothing_on_stderr(capfd):
    peak_bytes(lambda: torch.empty(10))
    os.write(2, b"still open")
    assert capfd.readouterr().err == "still open"


def test_every_function_runs_once_a_round_in_turn():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4  # one round to warm up
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_is_the_median_over_rounds_and_not_of_medians():
    assert median_ratio({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 4.0]}, "slow", "fast") == 2.0
