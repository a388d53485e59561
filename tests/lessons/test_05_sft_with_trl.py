"""What lesson 05 promises is what its executed solution shows: read from the outputs that readers see."""

import re

import pytest

from finetune_lab.course import bench


@pytest.fixture(scope="module")
def recorded():
    return {row["name"]: row["value"] for row in bench.recorded("sft_effects")["rows"]}


@pytest.fixture(scope="module")
def apart(recorded):
    """The lesson's criterion: mean ± standard deviation of the first lies above that of the second, without overlap."""

    def larger(measure, first, second):
        spread = sum(recorded[f"{setting}: {measure}, standard deviation"] for setting in (first, second))
        return recorded[f"{first}: {measure}"] - recorded[f"{second}: {measure}"] > spread

    return larger


def test_two_of_the_twelve_lines_picked_from_the_notes_run(printed):
    assert re.search(r"05-p1: .*it is 2 lines", printed)
    assert printed.count("TypeError: ") >= 4 and printed.count("ImportError: ") == 3


def test_the_number_that_hurts_is_healed_by_the_libraries_trainer(printed):
    before, after = map(int, re.search(r"tickets right: (\d+) % before, (\d+) % after", printed).groups())
    assert before <= 5 and after >= 90


def test_messages_with_default_settings_count_every_token(printed):
    shares = re.findall(r"^(.+?) +(\d+) of (\d+) tokens count$", printed, re.MULTILINE)
    answer, assistant, everything = ((int(a), int(b)) for _, a, b in shares)
    assert answer == assistant and answer[0] < answer[1] and everything[0] == everything[1]


def test_our_loop_draws_trls_curve(printed):
    gaps = re.findall(r"difference of loss (\S+), of gradient norm (\S+)", printed)
    assert len(gaps) == 4 and all(float(gap) <= 1e-5 for pair in gaps for gap in pair)


def test_a_longer_maximum_length_keeps_every_label(printed):
    assert re.search(r"max_length \d+: \{'whole': 40, 'cut': 0, 'empty': 0\}; TRL keeps 40", printed)
    empty, left = re.search(r"'empty': ([1-9]\d*)\}; TRL keeps (\d+) of 40", printed).groups()
    assert int(empty) + int(left) == 40  # dropped without a word


def test_trl_packs_with_positions_and_without_a_mask(printed):
    assert len(re.findall(r"samples by position: \d+, attention mask: False", printed)) == 2
    assert "samples by position: -, attention mask: True" in printed


def test_checkpointing_takes_a_third_of_the_memory_for_a_third_more_time(printed):
    off, on = (int(x) for x in re.findall(r"checkpointing \w+ +peak (\d+) MiB", printed))
    assert 0.25 * off < on < 0.4 * off
    assert 1.15 < float(re.search(r"time of a step: (\S+) times", printed)[1]) < 1.6


def test_a_scale_saves_gradients_until_it_is_too_large(printed):
    rows = re.findall(r"'zero': '(\S+) %', 'subnormal': '\S+ %', 'infinite': '(\S+) %'", printed)
    zero, infinite = ([float(row[i]) for row in rows] for i in (0, 1))
    assert zero == sorted(zero, reverse=True) and zero[0] > 1 and zero[2] < 0.01 and infinite[-1] > 1 > infinite[0]


def test_neftune_is_uniform_and_the_notes_are_off(printed):
    assert "bound 0.00345, std 0.00199; the notes' code 0.00345, the notes' formula 0.131" in printed
    assert re.search(r"norm of the whole noise 2\.8[78]\d, alpha / sqrt\(3\) = 2\.887", printed)
    assert printed.count("wrapped, ") == 3
    assert "our hook equals transformers', bit for bit: True" in printed


def test_a_resumed_run_is_the_same_run(printed):
    assert "resumed run ends with the same weights, bit for bit: True" in printed


def test_template_and_base_must_be_those_of_training(printed):
    good, bare = (int(re.search(rf"{name}: +(\d+) % right", printed)[1])
                  for name in ("right template and base", "bare text, no template"))  # fmt: skip
    assert good >= 90 and bare <= good - 10


def test_the_sister_of_the_base_is_sound_by_itself_and_no_base_for_the_adapter(printed):
    questions, sums, perplexity = map(float, re.search(
        r"by itself: (\d+) % of the questions, (\d+) % of the sums, story perplexity (\S+)", printed).groups())  # fmt: skip
    assert questions >= 90 and sums >= 90 and perplexity < 3
    assert int(re.search(r"sister and adapter, no error: +(\d+) % of the tickets", printed)[1]) <= 70


def test_an_update_that_fp32_keeps_is_rounded_away_in_bf16(printed):
    rows = re.findall(r"an update of (\S+) moves (\d+)% of them; kept in fp32: (\d+)%", printed)
    assert [float(size) for size, *_ in rows] == [1e-5, 2e-4]
    assert int(rows[0][1]) < 10 and all(int(kept) > 99 for *_, kept in rows)


def test_trls_neftune_argument_reaches_the_loss(printed):
    plain, noisy = re.findall(r"neftune_noise_alpha=\S+: loss of the first step (\S+)", printed)
    assert plain != noisy


def test_smollm2_learns_the_tickets_as_recorded(printed):
    before, after = map(int, re.search(r"SmolLM2-135M, .*: tickets right (\d+)%, tuned (\d+)%", printed).groups())
    assert before == 0 and after >= 95


def test_merging_changes_nothing_but_rounding(printed):
    gap, share = re.search(r"merged: largest difference of a logit (\S+), (\d+) % right", printed).groups()
    assert float(gap) < 1e-3 and int(share) >= 90


def test_labels_masked_by_the_id_of_the_padding_lose_their_end(printed):
    by_position, by_id = re.search(r"labels end by position: '(.*)', masked by id: '(.*)'", printed).groups()
    assert by_position.endswith("<|end|>") and "<|" not in by_id


def test_without_the_templates_stop_the_model_plays_on_alone(printed):
    assert "<|user|>" in re.search(r"eos alone as stop: (.*)", printed)[1]


def test_the_command_heals_the_number_on_a_file(printed):
    before, after = map(float, re.search(r"exact match \| (\S+) % \| (\S+) %", printed).groups())
    assert before <= 5 and after >= 90


def test_every_silent_failure_speaks(printed):
    for words in ("have no token that counts", "lose the end of their answer", "the end-of-turn token", "is also the token",
                  "does not mark the assistant", "two begin-of-text tokens", "is low for lora", "is high for full",
                  "the warm-up takes 53%", "also stand in the training data", "FSDP was asked for"):  # fmt: skip
        assert words in printed, words


def test_one_example_tells_the_sound_from_the_broken(printed):
    rows = re.findall(
        r"^(\S.*?) +([\d.]+|nan) -> +([\d.]+|nan), highest (\S+), below 0.5 .*, first norm (\S+)$",
        printed,
        re.MULTILINE,
    )
    last = {name: float(end) for name, _, end, _, _ in rows}
    norm = {name: float(n) for name, _, _, _, n in rows}
    highest = {name: float(most) for name, _, _, most, _ in rows}
    assert highest["rate * 100"] > 2 * highest["sound"]  # it jumps
    assert last["sound"] < 0.05
    assert min(last["rate / 20"], last["rate * 100"], last["A and B both zero"]) > 0.5
    assert norm["A and B both zero"] == norm["no label"] == 0 and last["no label"] != last["no label"]
    first = {name: float(start) for name, start, *_ in rows}
    assert first["labels shifted twice"] > 7.5  # ln of the vocabulary: worse than blind guessing
    assert last["labels shifted twice"] < 0.2 * first["labels shifted twice"]


def test_every_myth_has_its_place(notebook):
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        place = row[-1].strip().lower()
        assert place == "no cell here" or place in headings, place


# ---- what the text says about the recorded runs is what was recorded: apart, or no claim ----


def test_rates_a_factor_four_away_learn_less_or_forget_everything(apart, recorded):
    assert apart("exact match", "full lr=0.001", "full lr=0.00025") and apart(
        "exact match", "full lr=0.001", "full lr=0.004"
    )
    assert apart("exact match", "LoRA lr=0.002", "LoRA lr=0.0005")
    assert recorded["LoRA lr=0.008: exact match"] > 0.9
    for measure in ("exact match", "held-out loss"):
        for pair in (("LoRA lr=0.002", "LoRA lr=0.008"), ("LoRA lr=0.008", "LoRA lr=0.002")):
            assert not apart(measure, *pair)
    for high, right in (("full lr=0.004", "full lr=0.001"), ("LoRA lr=0.008", "LoRA lr=0.002")):
        assert apart("story perplexity", high, right) and apart("sums kept", right, high)


def test_a_training_loss_below_a_fifth_means_three_things(apart, recorded):
    def at(task, epoch, measure):
        return recorded[f"{task}, 32 items, epoch {epoch}: {measure}"]

    assert all(
        at(task, last, "training loss") < 0.2 for task, last in (("tickets", 10), ("answers", 20), ("codes", 20))
    )
    assert at("tickets", 10, "held-out loss") < 0.01 and at("tickets", 10, "exact match") == 1
    assert recorded["tickets, each seen once: held-out loss"] < 0.01
    assert apart("held-out loss", "answers, 32 items, epoch 5", "answers, 32 items, epoch 20")
    assert not apart("exact match", "answers, 32 items, epoch 5", "answers, 32 items, epoch 20")
    assert apart("held-out loss", "codes, 32 items, epoch 20", "codes, 32 items, epoch 5")
    assert at("codes", 20, "held-out loss") > 2 and at("codes", 5, "held-out loss") < 1.3


def test_the_right_average_makes_accumulation_equal_and_the_wrong_one_does_not(recorded):
    assert recorded["4 x 4 against 16 x 1: largest distance"] < 1e-5
    assert recorded["4 x 4, mean of means against 16 x 1: largest distance"] > 1e-3


def test_neftune_helps_full_fine_tuning_a_little_and_keeps_nothing(apart, recorded):
    full, lora = "full lr=0.001", "LoRA lr=0.002"
    assert apart("exact match", f"{full} NEFTune 5", full) and apart("held-out loss", full, f"{full} NEFTune 5")
    assert not apart("exact match", f"{lora} NEFTune 5", lora)
    assert 0.4 < recorded[f"{lora} NEFTune 15: exact match"] / recorded[f"{lora}: exact match"] < 0.6
    for base in (full, lora):
        assert apart("story perplexity", f"{base} NEFTune 15", base)
        assert not any(apart("story perplexity", base, f"{base} NEFTune {alpha}") for alpha in (5, 15))


def test_at_the_right_rate_neither_warm_up_nor_shape_moves_the_score_but_they_move_what_is_kept(apart):
    settings = [
        f"full lr=0.001{more}"
        for more in (" warm-up 0 %", "", " warm-up 50 %", " warm-up 100 %", " cosine", " constant")
    ]
    assert not any(apart("exact match", a, b) for a in settings for b in settings)
    others = [setting for setting in settings if "constant" not in setting]
    assert all(apart("story perplexity", "full lr=0.001 constant", setting) for setting in others)
    without = "full lr=0.001 warm-up 0 %"
    assert all(apart("held-out loss", f"full lr=0.001 {shape}", without) for shape in ("constant", "cosine"))


def test_at_four_times_the_rate_half_a_run_of_warm_up_is_worse_than_a_tenth(apart):
    assert apart("exact match", "full lr=0.004", "full lr=0.004 warm-up 50 %")
    assert apart("story perplexity", "full lr=0.004", "full lr=0.004 warm-up 50 %")
    assert not apart("exact match", "full lr=0.004", "full lr=0.004 warm-up 0 %")


def test_clipping_raises_the_mean_score_at_a_rate_too_high_and_one_is_not_apart_from_a_tenth(apart, recorded):
    none, one, tenth = ("full lr=0.004 no clipping", "full lr=0.004", "full lr=0.004 clip 0.1")
    score = [recorded[f"{setting}: exact match"] for setting in (none, one, tenth)]
    assert [f"{mean:.0%}" for mean in score] == ["59%", "73%", "74%"]
    assert not any(apart("exact match", a, b) for a in (none, one, tenth) for b in (none, one, tenth))
    assert apart("held-out loss", none, tenth) and not apart("held-out loss", none, one)
    assert not any(apart("held-out loss", *pair) for pair in ((one, tenth), (tenth, one)))


def test_decay_pulls_full_fine_tuning_away_from_the_base_and_lora_towards_it(apart, recorded):
    full, lora = "full lr=0.001", "LoRA lr=0.002"
    for measure in ("held-out loss", "exact match", "story perplexity"):
        assert not apart(measure, full, f"{full} decay 0.1") and not apart(measure, f"{full} decay 0.1", full)
    assert apart("story perplexity", f"{full} decay 10", full) and apart("story perplexity", lora, f"{lora} decay 10")
    assert recorded[f"{lora} decay 10: exact match"] > 0.9  # the task is still learnt


def test_at_equal_samples_small_batches_teach_more(apart):
    four, sixteen, sixty_four = ("full lr=0.001 batch 4", "full lr=0.001", "full lr=0.001 batch 64")
    assert apart("held-out loss", sixteen, four) and apart("held-out loss", sixty_four, sixteen)
