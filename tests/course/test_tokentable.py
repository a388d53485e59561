"""The token table says what is counted, by more than colour, and shows hostile text as text."""

import re

import pytest
from transformers import AutoTokenizer

from finetune_lab.course.tokentable import as_html, as_text, show_tokens, token_rows, token_table
from finetune_lab.lab.models import tiny_folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


@pytest.fixture
def row(tokenizer):
    ids = tokenizer.encode("<|user|>Hi there\n<|end|><|assistant|>ok<|end|>", add_special_tokens=False)
    start = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    return ids, [-100] * start + ids[start:]


def test_a_counted_label_is_predicted_by_the_logits_in_front_of_it(tokenizer, row):
    rows = token_rows(tokenizer, *row)
    assert [r.counted for r in rows] == [label != -100 for label in row[1]]
    assert all(r.predicted_by == r.position - 1 for r in rows if r.counted)


def test_the_first_token_never_counts(tokenizer):
    assert [r.counted for r in token_rows(tokenizer, [5, 6], [5, 6])] == [False, True]


def test_marks_stand_beside_the_colours(tokenizer, row):
    page = as_html(token_rows(tokenizer, *row))
    counted = sum(label != -100 for label in row[1])
    boxes = re.findall(r'<span role="listitem".*?</small></span>', page)
    assert len(boxes) == len(row[0])
    assert sum("●" in box and "solid" in box for box in boxes) == counted
    assert sum("–" in box and "dashed" in box for box in boxes) == len(boxes) - counted


def test_every_colour_has_enough_contrast():
    def luminance(code):
        channels = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast("4d4d4d", "ffffff") > 7 and contrast("000000", "eaf3f9") > 7  # text
    assert contrast("767676", "ffffff") > 3 and contrast("0072b2", "eaf3f9") > 3  # frames


def test_text_is_escaped_and_white_space_is_visible(tokenizer):
    ids = tokenizer.encode("<b>\n", add_special_tokens=False)
    page, line = token_table(tokenizer, ids, ids)
    assert "<b>" not in page and "⏎" in page
    assert line == f"{len(ids)} tokens, {len(ids) - 1} counted, 1 masked"


def test_the_text_twin_names_token_id_label_and_logits(tokenizer, row):
    lines = as_text(token_rows(tokenizer, *row)).splitlines()
    assert len(lines) == len(row[0]) + 2
    last = len(row[0]) - 1
    assert lines[-2].split()[:4] == [str(last), "<|end|>", str(row[0][-1]), str(row[0][-1])]
    assert lines[-2].endswith(f"● by the logits at {last - 1}")


def test_lengths_must_agree(tokenizer):
    with pytest.raises(ValueError, match="3 ids and 2 labels"):
        token_rows(tokenizer, [1, 2, 3], [1, 2])


def test_the_display_carries_html_and_plain_text(tokenizer, row, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.append(data))
    show_tokens(tokenizer, *row)
    assert set(shown[0]) == {"text/html", "text/plain"} and "predicted" not in shown[0]["text/plain"]
