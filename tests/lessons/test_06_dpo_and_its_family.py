"""What lesson 06 promises is what its executed solution shows: read from the outputs that readers see."""

import math
import re

import pytest

from finetune_lab.course import bench
from finetune_lab.course.bench import dpo_effects as effects

RIGHT = "dpo beta=1 lr=0.0001"
TOO_FAR = "dpo beta=0.1 lr=0.0003"
FAMILY = (RIGHT, "ipo beta=1 lr=0.0001", "simpo beta=2 lr=0.0001", "orpo beta=1 lr=0.0001", "kto beta=1 lr=0.0001")


def value(setting, measure):
    """The recorded mean over five seeds."""
    return bench.figure("dpo_effects", f"{setting}: {measure}")["value"]


def larger(measure, first, second):
    """Apart, as the lesson defines it: the 95 % t-interval of the difference seed by seed lies above 0."""
    gap, half = effects.paired(first, second, measure)
    return gap > half


def not_apart(measure, first, second):
    return not larger(measure, first, second) and not larger(measure, second, first)


def every_seed(measure, first, second):
    """In each of the five seeds the first setting's value is above the second's."""
    rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
    return all(rows[f"{first}: {measure}, seed {n}"] > rows[f"{second}: {measure}, seed {n}"] for n in range(5))


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


def test_the_betas_are_apart_in_kl_and_not_in_good_letters():
    tight, loose = "dpo beta=10 lr=0.0001", "dpo beta=0.1 lr=0.0001"
    assert larger("KL", loose, RIGHT) and larger("KL", RIGHT, tight)
    assert not_apart("good", tight, loose) and not_apart("good", RIGHT, loose) and not_apart("good", tight, RIGHT)
    assert all(larger("good", setting, "start") for setting in (tight, RIGHT, loose))


def test_too_far_is_worse_than_the_start_at_a_perfect_accuracy_and_a_lower_loss():
    assert larger("good", "start", TOO_FAR) and value(TOO_FAR, "win rate") < 0.5
    assert value(TOO_FAR, "accuracy") == 1 == value(RIGHT, "accuracy") and value(TOO_FAR, "no answer") > 0.5
    assert value(TOO_FAR, "training loss") < value("dpo beta=0.1 lr=0.0001", "training loss") / 2


def test_the_chosen_letter_loses_in_every_seed_of_the_run_that_goes_too_far_only():
    assert every_seed("chosen change", "start", TOO_FAR)
    assert all(every_seed("chosen change", f"dpo beta={beta} lr=0.0001", "start") for beta in (0.1, 1, 10))


def test_the_tax_is_paid_in_stories_by_sft_first_and_not_in_facts_or_sums(printed):
    for setting in ("dpo beta=10 lr=0.0001", RIGHT, TOO_FAR):
        assert larger("story perplexity", setting, "start") and not_apart("sums kept", "start", setting)
        assert value(setting, "facts kept") == 1
    assert larger("story perplexity", "dpo beta=0.1 lr=0.0001", "dpo beta=10 lr=0.0001")
    base = float(re.search(r"stories of the base, seed 0: ([\d.]+)", printed)[1])
    assert value("start", "story perplexity") / base > value(RIGHT, "story perplexity") / value(
        "start", "story perplexity"
    )


def test_fewer_letters_are_distinct():
    betas = [f"dpo beta={beta} lr=0.0001" for beta in (0.1, 1, 10)]
    assert all(larger("distinct", "start", setting) for setting in betas) and larger("distinct", RIGHT, TOO_FAR)


def test_every_run_shortens_and_shorter_chosen_letters_undershoot():
    shorter, longer = f"{RIGHT}, only shorter chosen", f"{RIGHT}, only longer chosen"
    assert larger("words", "start", shorter) and larger("words", "start", longer) and larger("words", longer, shorter)
    assert value(shorter, "words") < 16 < value(longer, "words") < 17.5
    assert larger("no answer", shorter, "start") and larger("no answer", shorter, RIGHT)
    assert not_apart("good", shorter, "start") and not_apart("good", longer, "start")


def test_simpo_shrinks_the_bias_and_does_not_heal_it():
    shorter, simpo = f"{RIGHT}, only shorter chosen", "simpo beta=2 lr=0.0001"
    assert larger("no answer", shorter, f"{simpo}, only shorter chosen")
    assert larger("no answer", f"{simpo}, only shorter chosen", simpo)


def test_ipo_did_not_reach_its_target():
    assert 0.1 < value("ipo beta=1 lr=0.0001", "training loss") < 0.25


def test_wrong_labels_cost_dpo_letters_in_every_seed_and_hold_it_back():
    noisy, smooth, ipo = (f"{name} beta=1 lr=0.0001, flipped 0.3" for name in ("dpo", "cdpo", "ipo"))
    assert larger("good", RIGHT, noisy) and every_seed("good", RIGHT, noisy) and larger("KL", RIGHT, noisy)
    assert larger("good", RIGHT, smooth) and larger("KL", noisy, smooth) and not_apart("good", noisy, smooth)
    assert not_apart("good", "ipo beta=1 lr=0.0001", ipo)


def test_orpo_alone_is_apart_from_dpo_and_all_are_above_the_start():
    assert all(larger("good", method, "start") for method in FAMILY)
    assert [method for method in FAMILY[1:] if not not_apart("good", method, RIGHT)] == ["orpo beta=1 lr=0.0001"]
    assert every_seed("good", "orpo beta=1 lr=0.0001", RIGHT)


def test_the_table_of_methods_quotes_the_record(notebook):
    text = next(cell.source for cell in notebook.cells if "| you have |" in cell.source)
    for method, setting in {"DPO: sweep": RIGHT, "IPO, or": FAMILY[1], "SimPO": FAMILY[2], "ORPO: SFT": FAMILY[3],
                            "KTO": FAMILY[4], "robust DPO": "cdpo beta=1 lr=0.0001, flipped 0.3"}.items():  # fmt: skip
        line = next(line for line in text.splitlines() if line.startswith("|") and method in line)
        assert abs(float(re.search(r"0\.\d\d", line.rsplit("|", 2)[1])[0]) - value(setting, "good")) <= 0.0051, method


def test_what_breaks_breaks_as_the_text_says(printed):
    assert larger("good", "start", f"{RIGHT}, swapped") and larger("good", "start", f"{RIGHT}, no SFT")
    for measure in ("good", "KL"):
        assert not_apart(measure, "dpo beta=0.1 lr=0.0001", f"{RIGHT}, identical")
    assert not_apart("good", RIGHT, f"{RIGHT}, forgotten")
    assert larger("KL", "simpo beta=2 lr=0.0001", "simpo beta=2 lr=0.0001, prompt counted")
    assert value(f"{RIGHT}, no SFT", "accuracy") == 1 and value(f"{RIGHT}, no SFT", "good") < 0.1
    assert int(re.search(r"base before training, seed 0: (\d+)%", printed)[1]) < 10
    assert value(f"{RIGHT}, swapped", "good") == 0 == value(f"{RIGHT}, swapped", "accuracy")
    assert value(f"{RIGHT}, identical", "training loss") == pytest.approx(math.log(2), abs=1e-3)


def test_every_myth_has_its_place(notebook):
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 9
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        place = row[-1].strip().lower()
        assert place == "no cell here" or place in headings, place
