"""What lesson 02 promises is what its executed solution shows: read from the outputs that readers see."""

import re


def integer(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_number_that_hurts_is_healed(printed):
    times = float(re.search(r"the step needs (\d+) times the weights", printed)[1])
    before, after = map(float, re.search(r"from (\d+) MB to ([\d.]+) MB", printed).groups())
    assert times >= 10
    assert after < 1.05 * before / 10  # the first page says: a tenth


def test_every_lever_is_predicted_to_the_byte(printed):
    rows = re.findall(r"^(\S.*?) +predicted +([\d,]+), measured +([\d,]+) bytes", printed, re.MULTILINE)
    assert len(rows) == 6
    assert {name: integer(a) - integer(b) for name, a, b in rows} == {name: 0 for name, _, _ in rows}


def test_the_formula_of_a_layer_is_exact(printed):
    formula, measured = re.search(r"keeps ([\d,]+) bytes a token by formula, ([\d,.]+) measured", printed).groups()
    assert integer(formula) == float(measured.replace(",", ""))


def test_each_printed_total_follows_from_its_regime(printed):
    rows = re.findall(r"^ *(\d+) GB = +(\d+) GB", printed, re.MULTILINE)
    assert [said for said, _ in rows] == ["56", "84", "94", "98", "112", "126"]
    assert all(said == counted for said, counted in rows)


def test_checkpointing_saves_nothing_where_the_peak_is_the_optimizer(printed):
    peaks = re.findall(r"tokens +beyond .*?: +([\d.]+) MB in (\w+); checkpointing +([\d.]+) MB in (\w+)", printed)
    (few, where, few_checkpointed, _), (many, _, many_checkpointed, _) = peaks
    assert where == "optimizer" and few == few_checkpointed
    assert float(many_checkpointed) < 0.5 * float(many)


def test_lora_with_fp32_adapters_keeps_more_than_full_fine_tuning(printed):
    ratio = re.search(r"([\d.]+) times; dtype of the adapter: \{torch.float32\}", printed)[1]
    assert float(ratio) > 1.2


def test_the_floor_of_llama_3_8b_is_more_than_half_a_byte_a_parameter(printed):
    half, floor, upcast = map(float, re.search(r"llama-3\.1-8b +([\d.]+) +([\d.]+) +([\d.]+)", printed).groups())
    assert (half, floor, upcast) == (4.02, 5.70, 7.80)


def test_our_count_equals_pytorchs_tracker(printed):
    assert re.search(r"^ours: [\d,]+; difference: (-?\d+) bytes", printed, re.MULTILINE)[1] == "0"


def test_an_overflow_skips_the_step_and_halves_the_scale(printed):
    assert re.search(r"step skipped: True \| new scale: 32768\.0", printed)
