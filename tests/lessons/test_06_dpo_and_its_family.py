"""What lesson 06 promises is what its executed solution shows: read from the outputs that readers see."""

import math
import re

import pytest

from finetune_lab.course import bench

RIGHT = "dpo beta=1 lr=0.0001"
TOO_FAR = "dpo beta=0.1 lr=0.0003"
FAMILY = (RIGHT, "ipo beta=1 lr=0.0001", "simpo beta=2 lr=0.0001", "orpo beta=1 lr=0.0001", "kto beta=1 lr=0.0001")


@pytest.fixture(scope="module")
def apart():
    """Whether the first setting's recorded measure lies above the second's by more than both standard deviations."""
    rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}

    def larger(measure, first, second):
        a, b = rows[f"{first}: {measure}"], rows[f"{second}: {measure}"]
        spread = sum(rows[f"{setting}: {measure}, standard deviation"] for setting in (first, second))
        return a - b > spread

    return larger


def test_greedy_letters_hide_what_samples_show(printed):
    assert int(re.search(r"greedy: (\d+)%", printed)[1]) >= 95
    assert float(re.search(r"06-p1: .* it is ([\d.]+) %", printed)[1]) <= 75


def test_the_number_that_hurts_is_healed(printed):
    before, after = map(int, re.search(r"good letters: (\d+)% -> (\d+)%", printed).groups())
    assert after - before >= 15


def test_the_derivation_holds_number_by_number(printed):
    optimum, log_z, others = map(
        float, re.search(r"optimum ([\d.]+) = beta log Z ([\d.]+);.* ([\d.]+)", printed).groups()
    )
    assert optimum == log_z > others
    reward, policies = re.search(r"by reward ([\d.]+), by policies ([\d.]+)", printed).groups()
    assert reward == policies
    assert float(re.search(r"total variation (\S+)", printed)[1]) <= 0.02


def test_the_loss_starts_at_log_two_for_every_beta(printed):
    assert re.findall(r"loss while policy = reference ([\d.]+)", printed) == [f"{math.log(2):.4f}"] * 3


def test_dpo_runs_away_from_a_sure_preference_and_ipo_stops(notebook):
    texts = [o["data"].get("text/plain", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs
             if "data" in o]  # fmt: skip
    dpo, ipo = map(float, re.search(r"DPO's margin is (\d+) and rising, IPO's ([\d.]+)\.", " ".join(texts)).groups())
    assert dpo > 20 and ipo == 5.0


def test_three_steps_of_trl_are_three_steps_of_ours(printed):
    assert "adapter off is the start, bit for bit: True" in printed
    steps = re.findall(r"step \d: loss ours ([\d.]+), TRL ([\d.]+)", printed)
    assert len(steps) == 3 and all(ours == theirs for ours, theirs in steps) and steps[-1] < steps[0]
    assert float(re.search(r"largest difference of a log-probability: (\S+)", printed)[1]) <= 1e-3


def test_each_mistake_has_the_symptom_that_the_table_names(printed):
    logs = {name.strip(): [float(x) for x in losses.split(", ")] for name, losses in
            re.findall(r"^(.+?) +loss \[([\d., ]+)\]", printed, re.MULTILINE)}  # fmt: skip
    assert logs["reference is the policy itself"] == [0.693] * 3
    assert abs(logs["reference forgotten"][0] - 0.693) > 0.05
    assert logs["prompt counted"] == logs["right"]
    assert logs["chosen and rejected swapped"][-1] < 0.6


# ---- what the text says about the recorded runs is what was recorded: apart, or no claim ----


def test_the_betas_are_apart_in_kl_and_not_in_good_letters(apart):
    tight, loose = "dpo beta=10 lr=0.0001", "dpo beta=0.1 lr=0.0001"
    assert apart("KL", loose, tight) and not apart("good", tight, loose) and not apart("good", RIGHT, loose)
    assert all(apart("good", setting, "start") for setting in (tight, RIGHT, loose))


def test_too_far_is_worse_than_the_start_at_a_perfect_accuracy(apart):
    assert apart("good", "start", TOO_FAR) and apart("win rate", "start", TOO_FAR)
    rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
    assert rows[f"{TOO_FAR}: accuracy"] == 1 == rows[f"{RIGHT}: accuracy"] and rows[f"{TOO_FAR}: no answer"] > 0.5


def test_both_log_probabilities_fall_in_the_run_that_goes_too_far_only(apart):
    rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
    assert rows[f"{TOO_FAR}: chosen change"] + rows[f"{TOO_FAR}: chosen change, standard deviation"] < 0
    assert rows[f"{RIGHT}: chosen change"] - rows[f"{RIGHT}: chosen change, standard deviation"] > 0
    assert apart("chosen change", "dpo beta=0.1 lr=0.0001", TOO_FAR)


def test_the_tax_is_paid_in_stories_and_not_in_facts_or_sums(apart):
    for setting in ("dpo beta=10 lr=0.0001", RIGHT, TOO_FAR):
        assert apart("story perplexity", setting, "start")
        assert not apart("facts kept", "start", setting) and not apart("sums kept", "start", setting)
    assert apart("story perplexity", "dpo beta=0.1 lr=0.0001", "dpo beta=10 lr=0.0001")


def test_fewer_letters_are_distinct_and_openings_are_not_more_alike(apart):
    assert apart("distinct", "start", "dpo beta=10 lr=0.0001") and apart("distinct", RIGHT, TOO_FAR)
    assert not any(apart("most common opening", f"dpo beta={beta} lr=0.0001", "start") for beta in (0.1, 1, 10))


def test_length_follows_the_pairs_and_overshoots(apart):
    shorter, longer = f"{RIGHT}, only shorter chosen", f"{RIGHT}, only longer chosen"
    assert apart("words", longer, shorter) and apart("no answer", shorter, RIGHT)
    simpo = "simpo beta=2 lr=0.0001, only shorter chosen"
    assert (
        not apart("words", simpo, shorter)
        and not apart("no answer", shorter, simpo)
        and not apart("good", simpo, shorter)
    )


def test_noise_holds_dpo_back_and_cdpo_twice(apart):
    noisy, smooth, ipo = (f"{name} beta=1 lr=0.0001, flipped 0.3" for name in ("dpo", "cdpo", "ipo"))
    assert apart("KL", RIGHT, noisy) and apart("KL", noisy, smooth)
    assert not apart("good", RIGHT, noisy) and not apart("good", "ipo beta=1 lr=0.0001", ipo)
    assert apart("good", RIGHT, smooth)


def test_no_two_methods_are_apart_in_good_letters_and_all_are_above_the_start(apart):
    assert all(apart("good", method, "start") for method in FAMILY)
    assert not any(apart("good", a, b) for a in FAMILY for b in FAMILY)


def test_what_breaks_breaks_as_the_text_says(apart):
    assert apart("good", "start", f"{RIGHT}, swapped") and apart("good", "start", f"{RIGHT}, no SFT")
    assert not apart("good", RIGHT, f"{RIGHT}, identical")
    assert apart("KL", "simpo beta=2 lr=0.0001", "simpo beta=2 lr=0.0001, prompt counted")
    rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
    assert rows[f"{RIGHT}, no SFT: accuracy"] == 1 and rows[f"{RIGHT}, no SFT: good"] < 0.1
    assert rows[f"{RIGHT}, swapped: good"] == 0 == rows[f"{RIGHT}, swapped: accuracy"]
    assert rows[f"{RIGHT}, identical: training loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_every_myth_has_its_place(notebook):
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 9
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        place = row[-1].strip().lower()
        assert place == "no cell here" or place in headings, place
