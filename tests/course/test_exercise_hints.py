"""Answers as learners wrote them, not as the course imagines them: refused on every seed, with a hint by name."""

import pytest

from finetune_lab.course import check, checks

EXERCISES = check.load_all()


def not_stripped(predictions, references):
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(predictions)


def only_the_prediction_stripped(predictions, references):
    return sum(p.strip() == r for p, r in zip(predictions, references, strict=True)) / max(len(predictions), 1)


def gap_inside(messages, fmt, encode, add_generation_prompt=False):
    return joined(messages, fmt, encode, add_generation_prompt, list, True)


def gap_inside_without_the_refusal(messages, fmt, encode, add_generation_prompt=False):
    return joined(messages, fmt, encode, add_generation_prompt, list, False)


def tuple_row(messages, fmt, encode, add_generation_prompt=False):
    return joined(messages, fmt, encode, add_generation_prompt, lambda row: row, True)


def joined(messages, fmt, encode, add_generation_prompt, begin, refuse):
    """The course's own first lines, in its own words, then a learner's."""
    unknown = {message["role"] for message in messages} - set(fmt.before)
    if unknown and refuse:
        raise ValueError(f"unknown role {min(unknown)!r}: this format knows {sorted(fmt.before)}")
    ids, spans = begin(fmt.begin if messages[0]["role"] == "system" else fmt.begin_default), []
    for message in messages:
        ids += fmt.before[message["role"]]
        start = len(ids)
        ids += encode(message["content"])
        ids += fmt.end + fmt.gap
        spans.append((message["role"], start, len(ids)))
    if add_generation_prompt:
        ids += fmt.before["assistant"]
    return ids, spans


def masked_wherever_they_agree(prompt_ids, ids):
    return [-100 if a == b else a for a, b in zip(ids, prompt_ids)] + ids[len(prompt_ids) :]  # noqa: B905


def masked_wherever_the_prompt_has_it(prompt_ids, ids):
    return [-100 if token in set(prompt_ids) else token for token in ids]


@pytest.mark.parametrize(
    "name, answer, hint",
    [
        ("exact_match", not_stripped, "white space around both is ignored: strip both"),
        ("exact_match", only_the_prediction_stripped, "strip the reference as well"),
        ("render_chat", gap_inside, "it belongs to no span"),
        ("render_chat", gap_inside_without_the_refusal, "it belongs to no span"),
        ("render_chat", tuple_row, "the fields of fmt are tuples"),
        ("completion_labels", masked_wherever_they_agree, "also where the two agree again"),
        ("completion_labels", masked_wherever_the_prompt_has_it, "compare place by place"),
    ],
)
def test_a_learners_mistake_is_refused_and_named(name, answer, hint):
    for seed in range(20):
        verdict = checks.judge(EXERCISES[name], answer, seed)
        assert verdict.status == "wrong" and hint in verdict.text, f"seed {seed}: {verdict.text}"


def test_a_shown_case_of_render_chat_shows_every_field_of_the_format():
    text = checks.judge(EXERCISES["render_chat"], lambda messages, *rest: ([], []), 0).text
    assert all(f"{field}=(" in text for field in ("begin", "begin_default", "end", "gap")) and "'assistant': (" in text
