"""What lesson 07 promises is what its executed solution shows: read from the outputs that readers see."""

import re

import pytest

from finetune_lab.course.merge_paired import CHOSEN, PAIRS, SKILLS
from finetune_lab.course.merge_plots import difference, found

SKILL = re.compile(r"(extract|answer|math) +(\d+) %")


@pytest.fixture(scope="module")
def line(printed):
    """Percent right of each skill in the first line that begins with a name."""

    def read(name):
        text = re.search(rf"^{re.escape(name)} +(extract .*)$", printed, re.MULTILINE)[1]
        return {skill: int(value) for skill, value in SKILL.findall(text)}

    return read


def number(printed, pattern):
    return float(re.search(pattern, printed)[1])


def test_each_specialist_knows_its_skill_and_no_other(line):
    for skill in SKILLS:
        scores = line(f"specialist {skill}")
        assert scores.pop(skill) >= 80
        assert all(value <= 10 for value in scores.values())


def test_the_average_keeps_a_part_of_every_skill_and_a_larger_scale_more(line):
    average, larger = line("average of the three"), line("task arithmetic, lam = 0.5")
    assert all(10 <= average[skill] for skill in SKILLS)
    assert sum(larger.values()) > sum(average.values()) + 30


def test_the_twin_is_the_same_function_and_the_average_with_it_is_useless(printed, line):
    assert number(printed, r"largest difference of their logits: (\S+)") < 1e-3
    assert line("the twin")["answer"] == line("specialist answer")["answer"]
    assert max(line("average of the two").values()) <= 5


def test_slerp_of_models_is_their_average_and_of_task_vectors_a_larger_scale(printed):
    cosines = dict(re.findall(r"^(two specialists|their task vectors): cosine (\S+),", printed, re.MULTILINE))
    assert float(cosines["two specialists"]) > 0.998 and abs(float(cosines["their task vectors"])) < 0.1
    weights = dict(re.findall(r"^(two specialists|their task vectors): .* weights (\S+) and", printed, re.MULTILINE))
    assert float(weights["two specialists"]) == pytest.approx(0.5, abs=0.001)
    assert float(weights["their task vectors"]) == pytest.approx(0.7, abs=0.02)


def test_the_notes_slerp_divides_by_zero_and_ours_does_not(printed):
    assert "the note: [nan, nan, nan] ours: [0.5, 0.5, 0.5]" in printed


def test_half_the_signs_disagree(printed):
    assert 45 <= number(printed, r"07-p3: you said .*?, it is (\S+) %") <= 55


def test_large_entries_conflict_as_often_where_they_meet(printed):
    for pair, low, high in (("extract and answer", 40, 60), ("extract and math", 40, 60), ("answer and math", 15, 40)):
        of_both = re.findall(rf"{pair} \d+ \(large in both: (\d+)\)", printed)
        assert len(of_both) == 5 and all(low <= int(share) <= high for share in of_both)


def test_sums_elect_other_signs_than_votes(printed):
    assert "by sum +1.00, by votes -0.30, plain mean +0.13" in printed
    shares = dict(re.findall(r"^(\d) random vectors: votes elect another sign in (\d+) %", printed, re.MULTILINE))
    assert shares == {"2": "25", "3": "16", "5": "18"}


def test_three_algorithms_are_called_ties(printed):
    gaps = dict(re.findall(r"weights 0.7 and 0.3, (\w+ against \w+): (\S+) apart", printed))
    assert float(gaps["peft against mergekit"]) > 0.4 and float(gaps["mergekit against paper"]) > 0.1


def test_dare_keeps_the_mean_and_not_the_size(printed):
    assert re.search(r"p = 0.9: mean (0\.99\d|1\.00\d), root mean square 3\.1\d", printed)
    assert "10 models at p = 0.9: two or more survive at 26.4 %" in printed


def test_concatenated_adapters_are_exact_and_added_factors_are_not(printed):
    errors = dict(re.findall(r"^(concatenate|svd|factors).*error of an update (\S+)", printed, re.MULTILINE))
    assert float(errors["concatenate"]) < 1e-5 < float(errors["svd"]) < 0.3 < float(errors["factors"])
    peft = dict(re.findall(r"^peft (\w+) +error against the sum of the updates (\S+)", printed, re.MULTILINE))
    assert float(peft["cat"]) < 1e-5 and all(float(peft[kind]) > 0.3 for kind in ("linear", "ties", "dare_linear"))
    assert number(printed, r"peft's linear against our sum of factors: (\S+) apart") < 1e-5


def test_a_lora_moves_the_weights_more_than_full_fine_tuning(printed):
    ratios = re.findall(r"^(?:answer|math): updates (\S+) times as large", printed, re.MULTILINE)
    assert len(ratios) == 2 and all(float(ratio) > 1.2 for ratio in ratios)


def test_rounding_twice_loses_every_skill_and_rounding_once_does_not(line):
    once, twice = line("merged, then NF4"), line("on the NF4 base, then NF4")
    assert sum(twice.values()) < 0.5 * sum(once.values())


def test_the_command_and_the_learner_merge_the_same_model(printed, line):
    assert number(printed, r"largest difference from yours: (\S+)") <= 1e-6
    assert "merge_method: ties" in printed


def test_two_skills_of_a_real_model_keep_nearly_all_by_sum_and_average_and_dare_loses_math(printed):
    rows = dict(re.findall(r"^SmolLM2-135M, (.+): (extract \d+ %, math \d+ %)$", printed, re.MULTILINE))
    scores = {way: {skill: int(value) for skill, value in SKILL.findall(text)} for way, text in rows.items()}
    for way in ("linear", "task_arithmetic"):
        for skill in ("extract", "math"):
            assert scores[way][skill] >= 0.85 * scores[f"specialist in {skill}"][skill] > scores["base"][skill]
    for way in ("dare_linear", "dare_ties"):
        assert scores[way]["math"] < 0.6 * scores["specialist in math"]["math"]


def test_what_cannot_be_merged_is_refused(printed):
    assert "accepted without a word" not in printed
    for name in ("other shapes", "unknown method", "no base", "density in percent"):
        assert re.search(rf"^{name}: \S", printed, re.MULTILINE)


def test_every_myth_has_its_place(notebook):
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        assert row[-1].strip().lower() in headings, row[-1]


# ---- what the text says about the recorded runs is what was recorded: apart seed by seed, or no claim ----


def apart(larger, smaller, measure="kept"):
    """Whether the recorded 95 % interval of the paired difference lies above 0."""
    gap, half = difference(larger, smaller, measure)
    return gap > half


def undecided(one, other, measure="kept"):
    gap, half = difference(one, other, measure)
    return abs(gap) <= half


def full(way):
    return f"full, {way}"


def test_every_pair_was_recorded():
    for pair in PAIRS:
        gap, half = difference(*pair)
        assert half >= 0 and abs(gap) <= 1


def test_skills_break_at_different_scales():
    average, half, larger, one = (full(f"task arithmetic lam={lam}") for lam in ("0.33", "0.5", "0.7", "1"))
    assert apart(half, average, "extract") and apart(half, average, "answer") and undecided(half, average, "math")
    assert apart(larger, half, "answer") and apart(larger, half, "math") and apart(one, half, "answer")
    gap, spread = difference(larger, half, "extract")
    assert gap + spread < 0 and found(one, "extract")[0] == 0


def test_there_is_no_barrier_between_two_runs_and_one_to_the_twin(printed):
    barriers = dict(re.findall(r"^to (.*): barrier (\S+) nats", printed, re.MULTILINE))
    assert float(barriers["another run"]) < 0.01 and float(barriers["extract"]) < 0.01
    assert float(barriers["its permuted twin"]) > 1
    line = [found(f"answer to extract, t={i / 10:g}", "loss")[0] for i in range(11)]
    assert line == sorted(line)


def test_slerp_answers_what_the_average_answers_and_slerp_of_task_vectors_more():
    for pair in ("extract and answer", "extract and math", "answer and math"):
        linear, arc, vectors = (full(f"{pair}, {way}") for way in ("linear", "SLERP", "SLERP of task vectors"))
        assert found(linear, "exact match") == found(arc, "exact match")
        assert found(arc, "distance from linear over the update")[0] < 0.01
        assert apart(vectors, linear, "exact match")


def test_half_the_entries_beat_a_fifth_and_the_peak_of_the_sum():
    assert apart(full("TIES density=0.5"), full("TIES density=0.2"))
    assert undecided(full("TIES density=0.5"), full("TIES density=1.0"))
    half, fifth = (difference(full(f"TIES {d} lam=1"), full("task arithmetic lam=0.5"), "kept") for d in ("0.5", "0.2"))
    assert half[0] > half[1] and round(100 * half[0]) == 3
    assert -fifth[0] > fifth[1] and round(100 * fifth[0]) == -7


def test_nine_tenths_of_a_change_can_go_and_a_lora_breaks_earlier():
    for skill in SKILLS:
        assert difference(full("alone, DARE p=0.9"), full(f"specialist {skill}"), skill)[0] >= -0.031
        lost, half = difference(full("alone, DARE p=0.99"), full(f"specialist {skill}"), skill)
        assert lost + half < 0
    for skill, verdict in (("extract", apart), ("math", apart), ("answer", undecided)):
        assert verdict(full("alone, DARE p=0.98"), "LoRA, alone, DARE p=0.98", skill)
    gap, half = difference(full("DARE p=0.9 lam=0.5"), full("task arithmetic lam=0.5"), "kept")
    assert abs(gap) <= half and abs(gap) + half < 0.05
    gap, half = difference(full("DARE p=0.98 lam=0.5"), full("task arithmetic lam=0.5"), "kept")
    assert gap + half < 0


def test_a_drop_rate_of_999_in_a_thousand_leaves_nothing(line):
    assert line("answer alone, p = 0.999")["answer"] <= 10 < line("answer alone, p = 0.99")["answer"]


def test_taking_out_one_skill_takes_its_relative_along_and_leaves_the_stranger():
    for skill, left in (("math", 0.0), ("answer", 0.0), ("extract", 1.0)):
        assert found("joint - 1 math", skill)[0] == left
    gap, half = difference("base - 1 math", "base", "sums")
    assert gap + half < 0 and 0.3 < found("base - 1 math", "sums")[0] < 0.4 and found("base - 1 math", "facts")[0] == 1


def test_adapters_concatenated_are_the_sum_and_their_added_factors_are_not():
    exact, cat, svd, linear, by_ties = (f"LoRA, {way} lam=0.5" for way in (
        "task arithmetic", "adapters cat", "adapters svd", "adapters linear", "adapters factors by TIES"))  # fmt: skip
    assert found(cat, "kept") == pytest.approx(found(exact, "kept"))
    gap, half = difference(svd, exact, "kept")
    assert abs(gap) + half < 0.02
    assert 0.4 < found(linear, "kept")[0] / found(exact, "kept")[0] < 0.6 and found(by_ties, "kept")[0] < 0.01
    assert all(sum(difference(worse, exact, "kept")) < 0 for worse in (linear, by_ties))


def test_rounding_once_costs_little_and_onto_the_old_grid_nearly_everything():
    exact, once, beside, twice = ("LoRA, task arithmetic lam=0.5", "LoRA, merged, then NF4", "LoRA, on the NF4 base",
                                  "LoRA, on the NF4 base, then NF4")  # fmt: skip
    gap, half = difference(once, exact, "kept")
    assert abs(gap) <= half and abs(gap) + half < 0.05
    assert sum(difference(beside, exact, "kept")) < 0 and round(100 * difference(beside, exact, "kept")[0]) == -2
    assert sum(difference(twice, exact, "kept")) < 0 and found(twice, "kept")[0] < 0.1


def test_no_method_of_full_fine_tunes_is_apart_from_a_scaled_sum_and_joint_training_from_all():
    for way in CHOSEN:
        if way != CHOSEN[0]:
            assert undecided(full(way), full(CHOSEN[0]))
            assert 0.07 < difference(full(way), full(CHOSEN[0]), "kept")[1] < 0.17
        assert apart(full("joint"), full(way)) and 0.25 <= difference(full("joint"), full(way), "kept")[0] <= 0.345
        assert apart(full("joint"), full(way), "story perplexity")
        assert 0.095 <= difference(full("joint"), full(way), "story perplexity")[0] <= 0.155
        assert apart(full(way), full("task arithmetic lam=0.33")) == (way != "DARE 0.9 chosen")
        assert apart(full(way), f"LoRA, {way}") == (way != "DARE 0.9 chosen")


def test_of_loras_both_dares_are_worse_than_the_sum_which_is_the_average():
    total = "LoRA, task arithmetic chosen"
    assert found(total, "lam") == pytest.approx((1 / 3, 0))
    for way, worse in (("DARE", True), ("DARE-TIES", True)):
        assert (sum(difference(f"LoRA, {way} 0.9 chosen", total, "kept")) < 0) == worse
    for way in ("TIES 0.2", "TIES 0.5"):
        assert undecided(f"LoRA, {way} chosen", total)


def test_two_models_of_exact_facts_do_not_merge(printed):
    for way in ("task arithmetic", "TIES 0.2", "DARE 0.9"):
        one, two = (found(f"{count} models, {way}", "codes known") for count in (1, 2))
        assert one[0] > 0.8 and two[0] < 0.1
    sizes = re.search(r"codes (\S+) (\S+) skills (\S+) (\S+) (\S+)", printed)
    assert min(float(sizes[1]), float(sizes[2])) > 1.5 * max(float(sizes[i]) for i in (3, 4, 5))
    assert number(printed, r"cosine of two codes vectors: (\S+)") > 0.4
