"""What lesson 07 promises is what its executed solution shows: read from the outputs that readers see."""

import re

import pytest

from finetune_lab.course.merge_plots import SKILLS, found

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
    after_trimming = re.findall(r"extract and answer \d+ \((\d+)\)", printed)
    assert len(after_trimming) == 5 and all(int(share) <= 10 for share in after_trimming)


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


def test_two_skills_of_a_real_model_keep_nearly_all(printed):
    rows = dict(re.findall(r"^SmolLM2-135M, (.+): (extract \d+ %, math \d+ %)$", printed, re.MULTILINE))
    scores = {way: {skill: int(value) for skill, value in SKILL.findall(text)} for way, text in rows.items()}
    for way in ("linear", "task_arithmetic"):
        for skill in ("extract", "math"):
            assert scores[way][skill] >= 0.85 * scores[f"specialist in {skill}"][skill] > scores["base"][skill]


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


# ---- what the text says about the recorded runs is what was recorded: apart, or no claim ----


def apart(larger, smaller, measure="kept"):
    """Whether the first row's recorded measure lies above the second's by more than both standard deviations."""
    a, b = found(larger, measure), found(smaller, measure)
    return a[0] - b[0] > a[1] + b[1]


def full(way):
    return f"full, {way}"


def test_skills_break_at_different_scales():
    assert apart(full("task arithmetic lam=0.5"), full("task arithmetic lam=1"), "extract")
    assert apart(full("task arithmetic lam=1"), full("task arithmetic lam=0.5"), "answer")
    for skill in SKILLS:
        assert found(full("task arithmetic lam=0.5"), skill)[0] > found(full("task arithmetic lam=0.33"), skill)[0]


def test_there_is_no_barrier_between_two_runs_and_one_to_the_twin():
    def loss(end, t):
        return found(f"answer to {end}, t={t}", "loss")[0]

    assert all(loss("another run", f"{i / 10:g}") < 1.1 * loss("another run", "0") for i in range(11))
    assert loss("its permuted twin", "0.5") > 20 * loss("its permuted twin", "1")
    line = [loss("extract", f"{i / 10:g}") for i in range(11)]
    assert line == sorted(line)


def test_slerp_answers_what_the_average_answers_and_slerp_of_task_vectors_more():
    for pair in ("extract and answer", "extract and math", "answer and math"):
        linear, arc, vectors = (full(f"{pair}, {way}") for way in ("linear", "SLERP", "SLERP of task vectors"))
        assert found(linear, "exact match") == found(arc, "exact match")
        assert found(arc, "distance from linear over the update")[0] < 0.01
        assert apart(vectors, linear, "exact match")


def test_twenty_percent_is_not_the_best_density_at_scale_one_and_half_is_not_apart_from_all():
    assert apart(full("TIES density=0.5"), full("TIES density=0.2"))
    assert not apart(full("TIES density=0.5"), full("TIES density=1.0"))
    peaks = [full("task arithmetic lam=0.5"), full("TIES 0.2 lam=1"), full("TIES 0.5 lam=1")]
    assert not apart(peaks[2], peaks[0]) and not apart(peaks[0], peaks[1])


def test_nine_tenths_of_a_change_can_go_and_a_lora_breaks_earlier():
    for skill in SKILLS:
        assert found(full("alone, DARE p=0.9"), skill)[0] >= 0.96 * found(full(f"specialist {skill}"), skill)[0]
        assert apart(full(f"specialist {skill}"), full("alone, DARE p=0.99"), skill)
    assert apart(full("alone, DARE p=0.98"), "LoRA, alone, DARE p=0.98", "extract")
    assert not apart(full("DARE p=0.9 lam=0.5"), full("task arithmetic lam=0.5"))


def test_taking_out_one_skill_takes_its_relative_along_and_leaves_the_stranger():
    for skill, left in (("math", 0.0), ("answer", 0.0), ("extract", 1.0)):
        assert found("joint - 1 math", skill)[0] == left
    assert apart("base", "base - 1 math", "sums") and found("base - 1 math", "facts")[0] == 1


def test_adapters_concatenated_are_the_sum_and_their_added_factors_are_not():
    exact, cat, svd, linear, by_ties = (f"LoRA, {way} lam=0.5" for way in (
        "task arithmetic", "adapters cat", "adapters svd", "adapters linear", "adapters factors by TIES"))  # fmt: skip
    assert found(cat, "kept") == pytest.approx(found(exact, "kept"))
    assert not apart(cat, svd) and apart(svd, linear) and apart(linear, by_ties)


def test_rounding_once_costs_nothing_measurable_and_onto_the_old_grid_everything():
    exact, once, twice = ("LoRA, task arithmetic lam=0.5", "LoRA, merged, then NF4", "LoRA, on the NF4 base, then NF4")
    assert not apart(exact, once) and apart(once, twice) and found(twice, "kept")[0] < 0.1


def test_no_method_is_apart_from_a_scaled_sum_and_joint_training_from_all():
    ways = ["TIES 0.2", "TIES 0.5", "DARE 0.9", "DARE-TIES 0.9"]
    total, average = full("task arithmetic chosen"), full("task arithmetic lam=0.33")
    for way in ways:
        chosen = full(f"{way} chosen")
        assert not apart(chosen, total) and not apart(total, chosen)
        assert apart(full("joint"), chosen)
        assert apart(chosen, average) == (way != "DARE 0.9")
        assert apart(full("joint"), chosen, "story perplexity") == (way != "TIES 0.5")
    assert apart(total, average) and apart(full("joint"), total) and apart(full("joint"), total, "story perplexity")
    for way in ("task arithmetic", "TIES 0.5", "DARE-TIES 0.9"):
        assert apart(full(f"{way} chosen"), f"LoRA, {way} chosen")


def test_two_models_of_exact_facts_do_not_merge():
    for way in ("task arithmetic", "TIES 0.2", "DARE 0.9"):
        assert apart(f"1 models, {way}", f"2 models, {way}", "codes known")
        assert found(f"2 models, {way}", "codes known")[0] < 0.1
