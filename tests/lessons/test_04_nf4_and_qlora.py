"""What lesson 04 promises is what its executed solution shows: read from the outputs that readers see."""

import re

import pytest

from finetune_lab.course import bench


@pytest.fixture(scope="module")
def rows():
    return {row["name"]: row for row in bench.recorded("qlora")["rows"]}


def numbers(pattern, text):
    """The groups of the only place where `pattern` is found, as numbers."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern}: {found}"
    groups = found[0] if isinstance(found[0], tuple) else (found[0],)
    return [float(group.replace(",", "")) for group in groups]


def test_naive_4_bits_erase_the_model_and_nf4_heals_it(printed):
    lines = dict(re.findall(r"^(\S.*?\S)  +facts (.*)$", printed, re.MULTILINE))
    facts = {name: float(line.split("%")[0]) for name, line in lines.items()}
    perplexity = {name: float(line.split()[-1].replace(",", "")) for name, line in lines.items()}
    assert facts["with outliers, fp32"] >= 99 and facts["NF4, blocks of 64"] >= 97
    assert facts["naive 4 bits"] <= 1
    assert perplexity["naive 4 bits"] > 100 * perplexity["NF4, blocks of 64"]
    assert perplexity["NF4, blocks of 64"] < 1.02 * perplexity["with outliers, fp32"]


def test_the_notes_formula_is_another_code(printed):
    difference, smallest = numbers(r"largest difference ([\d.]+); smallest magnitude ([\d.]+) for 0", printed)
    assert difference > 0.04 and smallest > 0.04


def test_bins_are_not_equally_full(printed):
    share = [float(x) for x in re.search(r"share of each level, %: (.*)", printed)[1].split()]
    assert min(share) < 2 and max(share) > 9 and sum(share) == pytest.approx(100, abs=0.5)
    assert numbers(r"entropy ([\d.]+) bits", printed)[0] < 3.9


def test_nf4_is_better_than_int4_and_fp4_on_normal_weights_and_not_the_best(printed):
    table = {name: [float(x) for x in cells.split()] for name, cells in
             re.findall(r"^(NF4|Lloyd-Max|INT4|FP4|INT4, zero point)  +((?:0\.\d{5} *)+)$", printed, re.MULTILINE)}  # fmt: skip
    normal = {name: cells[0] for name, cells in table.items()}
    assert normal["NF4"] < normal["INT4"] < normal["FP4"]
    assert normal["Lloyd-Max"] < normal["NF4"] and normal["INT4, zero point"] < normal["NF4"]
    uniform = {name: cells[1] for name, cells in table.items()}
    assert uniform["INT4"] < uniform["NF4"]


def test_one_outlier_spoils_a_tensor_and_hardly_a_blocked_one(printed):
    one_scale, blocks = numbers(r"one outlier +one scale +([\d.]+) % +blocks of 64 +([\d.]+) %", printed)
    assert one_scale > 99 and blocks < 9.6


def test_bits_are_counted_from_bytes(printed):
    assert numbers(r"bits a weight: ([\d.]+), with double quantization ([\d.]+)", printed) == [4.5, 4.127]


def test_bytes_weights_and_losses_equal_bitsandbytes(printed):
    equal = re.findall(r"^(?:bytes|weights) +(\d+) of (\d+) layers equal to the bit", printed, re.MULTILINE)
    assert len(equal) == 2 and all(same == total for same, total in equal)
    theirs, ours = (re.search(rf"^{name} +([\d. ]+)$", printed, re.MULTILINE)[1].split() for name in
                    ("bitsandbytes", "ours"))  # fmt: skip
    assert len(theirs) == 5
    assert [float(x) for x in ours] == pytest.approx([float(x) for x in theirs], abs=2e-4)


def test_merging_in_4_bits_loses_what_the_restored_base_keeps(printed):
    unmerged, merged = numbers(r"with the adapter (\d+) %\nmerged into the restored weight (\d+) %", printed)
    trap = numbers(r"04-p4: you said .*, it is ([\d.]+) %", printed)[0]
    assert unmerged > 70 and abs(unmerged - merged) <= 1 and trap < unmerged / 4
    lost = numbers(r"restored weight: ([\d.]+) % of the codes stay, (-?\d+) % of the update survives", printed)
    kept = numbers(r"original weight: ([\d.]+) % of the codes stay, (-?\d+) % of the update survives", printed)
    assert lost[0] > 90 > kept[0] and lost[1] < 50 and kept[1] > 90


def test_the_default_4_bits_are_not_nf4(printed):
    assert re.search(r"^default: fp4 False torch.float32$", printed, re.MULTILINE)


def test_what_the_text_says_of_five_seeds_is_what_was_recorded(rows):
    """Apart where the text claims it, within both standard deviations where it does not."""

    def figure(name):
        row, sd = rows[name], rows[f"{name}, standard deviation"]
        return row["value"] - row["peer_value"], sd["value"] + sd["peer_value"]

    assert rows["math, QLoRA: weight bytes"]["peer_value"] > 7.7 * rows["math, QLoRA: weight bytes"]["value"]
    for kept in ("dequantised base", "original base", "original base, then NF4"):
        difference, spread = figure(f"math, merged {kept}: exact match")
        assert abs(difference) <= spread, kept
    difference, spread = figure("math, merged in 4 bit: exact match")
    assert -difference > spread
    for dtype in ("bf16", "fp16"):
        difference, spread = figure(f"math, compute in {dtype}: held-out answer loss")
        assert abs(difference) <= spread, dtype
    one_scale = rows["base with outliers, INT4, one scale a tensor: story perplexity"]
    assert one_scale["value"] > 50 * one_scale["peer_value"]
    for name in ("NF4", "FP4", "INT4"):
        row = rows[f"base with outliers, {name}, block 64: story perplexity"]
        assert row["value"] < 1.05 * row["peer_value"]


def test_every_myth_has_its_place(notebook):
    """Seventeen rows, each with the section that disproves it; one says why it has no cell."""
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 17
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        place = row[-1].strip()
        assert (place == "–" and "no cell" in row[1]) or place.lower() in headings, place
