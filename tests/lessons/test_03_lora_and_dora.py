"""What lesson 03 promises is what its executed solution shows: read from the outputs that readers see."""

import re

import pytest

from finetune_lab.course import bench


@pytest.fixture(scope="module")
def apart():
    """Whether the first setting's recorded measure lies above the second's by more than both standard deviations."""
    rows = {row["name"]: row["value"] for row in bench.recorded("lora_effects")["rows"]}

    def larger(measure, first, second):
        a, b = rows[f"{first}: {measure}"], rows[f"{second}: {measure}"]
        spread = sum(rows[f"{setting}: {measure}, standard deviation"] for setting in (first, second))
        return a - b > spread

    return larger


def test_the_number_that_hurts_is_healed_by_a_fraction_of_the_numbers(printed):
    hurt = int(re.search(r"base: (\d+) % right", printed)[1])
    full, all_numbers = re.search(r"full fine-tuning: (\d+) % right; ([\d,]+) numbers", printed).groups()
    lora, few = re.search(r"^LoRA: (\d+) % right; ([\d,]+) numbers", printed, re.MULTILINE).groups()
    assert hurt <= 5 and int(full) >= 90 and int(lora) >= 90
    assert int(few.replace(",", "")) < 0.2 * int(all_numbers.replace(",", ""))


def test_alpha_does_not_move_the_start(printed):
    assert re.findall(r"alpha (\S+): largest change of the output at the start (\S+)", printed) == [
        ("1", "0.0"), ("8", "0.0"), ("1e+06", "0.0"),
    ]  # fmt: skip


def test_two_zeros_are_locked_and_one_zero_is_not(printed):
    steps = dict(re.findall(r"^(.+?) +step 1: (.*)$", printed, re.MULTILINE))
    assert re.findall(r"[\d.]+", steps["both zero"].replace("step 2", "")) == ["0.000"] * 4
    for start, still in {"A random, B zero": "A", "A zero, B random": "B"}.items():
        first, second = steps[start].split("step 2")
        assert f"{still} 0.000" in first and "0.000" not in second


def test_adam_grows_with_the_scale_and_sgd_with_its_square(printed):
    assert "Adam: relative size of the update [1.0, 2.0, 4.0]" in printed
    assert re.search(r"SGD +: relative size of the update \[1\.0, (3\.9|4\.0)\d*, (15\.9|16\.0)\d*\]", printed)


def test_counts_are_those_of_the_real_shapes(printed):
    for number in ("24,313,856", "41,943,040", "16,777,216", "16,781,312", "1,376,256", "256 times fewer", "1.6%"):
        assert number in printed, number


def test_ours_and_pefts_are_one_function_with_one_gradient(printed):
    assert float(re.search(r"largest difference of the logits: (\S+)", printed)[1]) <= 1e-5
    assert float(re.search(r"largest relative difference of a gradient of B, \d+ matrices: (\S+)", printed)[1]) <= 1e-5
    assert "their file in our model, same logits: True" in printed


def test_merging_costs_rounding_and_unmerging_nothing(printed):
    gaps = dict(re.findall(r"^(float32|bfloat16|float16) +largest difference (\S+),", printed, re.MULTILINE))
    assert float(gaps["float32"]) < 1e-3 < float(gaps["float16"]) < float(gaps["bfloat16"])
    assert printed.count("unmerged bit for bit: True") == 3


def test_each_adapter_does_its_own_task_on_the_same_base(printed):
    for name, task, other in (("answers", "answer", "extract"), ("tickets", "extract", "answer")):
        line = re.search(rf"adapter '{name}': (.*)", printed)[1]
        scores = {key: int(value) for key, value in re.findall(r"(\w+) (\d+) % right", line)}
        assert scores[task] >= 90 and scores[other] <= 10
    assert "disabled: the base again, bit for bit: True" in printed


def test_what_breaks_is_refused_by_us_and_accepted_by_peft(printed):
    assert printed.count("refused: ") == 4 and printed.count("accepted without a word") == 1


# ---- what the text says about the recorded runs is what was recorded: apart, or no claim ----


def test_ranks_from_four_on_meet_at_their_best_rates_and_rank_one_does_not(apart):
    rates = {1: "0.008", 4: "0.008", 16: "0.004", 64: "0.001"}
    best = {r: f"answers, LoRA r={r} lr={rate}" for r, rate in rates.items()}
    assert apart("loss", best[1], best[4])
    assert not any(apart("loss", best[a], best[b]) for a in (4, 16, 64) for b in (4, 16, 64))
    assert apart("loss", "answers, LoRA r=1 lr=0.001", "answers, LoRA r=64 lr=0.001")


def test_new_facts_need_rank(apart):
    r1, r4, r16, r64 = (f"codes, LoRA r={r} lr=0.002" for r in (1, 4, 16, 64))
    assert apart("exact match", r16, r4) and apart("exact match", r64, r16) and apart("exact match", r16, r1)
    assert apart("exact match", "codes, full lr=0.0005", r16)
    assert not apart("exact match", "codes, full lr=0.0005", r64)


def test_alpha_times_four_reaches_the_loss_of_a_rate_times_four(apart):
    pair = "answers, LoRA r=16 alpha=128 lr=0.001", "answers, LoRA r=16 lr=0.004"
    assert not apart("loss", *pair) and not apart("loss", *reversed(pair))


def test_attention_alone_learns_the_questions_and_feed_forward_alone_does_not(apart):
    places = ("r=16", "r=38 attention", "r=28 feed-forward")
    everything, attention, forward = (f"answers, LoRA {where} lr=0.002" for where in places)
    assert apart("loss", forward, everything) and apart("loss", forward, attention)
    assert not apart("loss", attention, everything) and not apart("loss", everything, attention)
    assert apart("story perplexity", attention, everything)


def test_lora_forgets_less_on_the_questions_and_more_on_the_codes(apart):
    full = "answers, full lr=0.001"
    for lora in ("answers, LoRA r=16 lr=0.002", "answers, LoRA r=64 lr=0.001"):
        assert apart("story perplexity", full, lora) and not apart("loss", lora, full)
    assert apart("story perplexity", "codes, LoRA r=16 lr=0.002", "codes, full lr=0.0005")
    assert apart("story perplexity", "answers, LoRA r=16 lr=0.004", "answers, LoRA r=64 lr=0.001")


def test_lora_has_intruders_where_full_fine_tuning_of_the_same_size_has_next_to_none(apart):
    for setting in ("r=1 lr=0.008", "r=64 lr=0.002", "r=16 lr=0.004"):
        assert apart("intruders", f"answers, LoRA {setting}", "answers, full lr=0.002")
    sizes = [f"answers, {how} lr={rate}" for how, rate in (("full", "0.002"), ("LoRA r=1", "0.008"))]
    assert not apart("relative size", *sizes) and not apart("relative size", *reversed(sizes))
    assert apart("story perplexity", *sizes)  # no intruders, and yet it forgets


def test_lora_plus_is_not_apart_in_the_loss_but_keeps_more_at_the_same_rate_of_b(apart):
    lora, plus = "answers, LoRA r=16 lr=0.004", "answers, LoRA+ r=16 ratio=4 lr=0.001"
    assert not apart("loss", lora, plus) and not apart("loss", plus, lora)
    assert apart("story perplexity", lora, plus)


def test_dora_couples_length_and_turn_like_full_fine_tuning_and_learns_like_lora(apart):
    full, lora, dora = (f"answers, {how}" for how in ("full lr=0.001", "LoRA r=16 lr=0.002", "DoRA r=16 lr=0.002"))
    assert apart("dM-dD correlation", lora, dora) and apart("dM-dD correlation", lora, full)
    assert not apart("dM-dD correlation", dora, full)
    assert not apart("loss", lora, dora) and not apart("loss", dora, lora)


def test_every_myth_has_its_place(notebook):
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 25
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        place = row[-1].strip().lower()
        assert place == "no cell here" or place in headings, place
