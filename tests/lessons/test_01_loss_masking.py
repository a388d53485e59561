"""What lesson 01 promises is what its executed solution shows: read from the outputs that readers see."""

import re

from finetune_lab.course import bench


def number(pattern, text):
    """The only number that `pattern` finds; its group 1."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern}: {found}"
    return float(found[0])


def test_the_number_that_hurts_is_healed(printed):
    before, after = re.search(r"tokens an answer: ([\d.]+) before, ([\d.]+) after", printed).groups()
    enough = float(re.search(r"\(([\d.]+) are enough", printed)[1])
    assert float(before) > 3 * enough
    assert float(after) < 1.2 * enough
    hurt, healed = re.findall(r": (\d+) % right, [\d.]+ tokens an answer", printed)
    assert int(hurt) <= 10 and int(healed) >= 90


def test_a_forged_turn_goes_through_the_template_and_not_through_ours(printed):
    template, ours, sanitized = map(
        int, re.search(r"template (\d+), render_chat (\d+), sanitized (\d+)", printed).groups()
    )
    assert (template, ours, sanitized) == (3, 1, 1)


def test_masked_logits_get_no_gradient_while_the_prompt_does(printed):
    assert number(r"largest gradient at the logits of masked positions: (\S+)", printed) == 0
    assert number(r"gradient norms at the embeddings: prompt ([\d.]+)", printed) > 0


def test_padding_changes_logits_only_without_a_mask_and_on_the_left(printed):
    gaps = re.findall(r"(right|left ) padding, (mask   |no mask): largest difference (\S+)", printed)
    assert len(gaps) == 4
    for side, mask, gap in gaps:
        assert (float(gap) > 1e-2) == (side == "left " and mask == "no mask"), (side, mask, gap)


def test_packing_is_clean_with_blocks_or_bare_positions_only(printed):
    gaps = dict(re.findall(r"^(\S.*?)\s+largest difference to separate samples: (\S+)", printed, re.MULTILINE))
    clean = {name for name, gap in gaps.items() if float(gap) < 1e-3}
    assert len(gaps) == 4
    assert clean == {"block-diagonal mask", "positions alone, no mask"}


def test_end_labels_vanish_when_masked_by_id(printed):
    by_id, by_place = re.search(r"masked by id (\d+), masked by position (\d+)", printed).groups()
    assert int(by_id) == 0 < int(by_place)


def test_labels_equal_trls_in_all_three_forms(printed):
    forms = re.findall(r"counts +(\d+) of (\d+); same ids: (\w+); other labels: (.*)", printed)
    assert [(same, differ) for _, _, same, differ in forms] == [("True", "[]")] * 3
    assert [counted == total for counted, total, _, _ in forms] == [False, False, True]  # messages count everything


def test_a_row_without_a_label_is_nan_and_is_found(printed):
    assert re.search(r"loss nan, has a label: False", printed)


def test_what_the_text_says_about_the_mask_is_what_was_recorded():
    """Enough samples: no difference. Eight tickets: apart. Never parroting. Stories suffer more without the mask."""
    rows = {row["name"]: row for row in bench.recorded("masking")["rows"]}

    def gap(name):
        """(mask - no mask, sum of both standard deviations)"""
        row, sd = rows[name], rows[f"{name}, standard deviation"]
        return row["value"] - row["peer_value"], sd["value"] + sd["peer_value"]

    for setting in ("answer", "extract"):
        difference, spread = gap(f"{setting}, against every token: exact match")
        assert abs(difference) <= max(spread, 0.01)
    difference, spread = gap("extract, 8 items, against every token: exact match")
    assert difference > spread and difference > 0.2
    for setting in ("answer", "extract", "extract, 8 items"):
        difference, spread = gap(f"{setting}, against every token: story perplexity")
        assert -difference > spread
        row = rows[f"{setting}, against every token: parroting"]
        assert row["value"] == row["peer_value"] == 0
    difference, spread = gap("answer, against ends masked: exact match")
    assert difference > spread and difference > 0.8
    assert abs(gap("extract, against ends masked: exact match")[0]) < 0.1  # the base stops there by itself


def test_every_myth_has_its_place(notebook):
    """Twenty rows, each with the section that disproves it; one says why it has no cell."""
    text = next(cell.source for cell in notebook.cells if "## Myths" in cell.source)
    table = text.split("## Myths")[1].split("## What breaks")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 20
    headings = " ".join(re.findall(r"(?m)^##+ (.*)", "\n".join(cell.source for cell in notebook.cells))).lower()
    for row in rows:
        place = row[-1].strip()
        assert place == "–" and "no cell here" in row[1] or place in headings, place
