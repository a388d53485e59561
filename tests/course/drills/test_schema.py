"""The bank is refused with file, id and field of every problem; what is right is read into dataclasses."""

import copy

import pytest
import yaml

from finetune_lab.course.drills import links, schema
from finetune_lab.errors import UserError

COMMON = {
    "level": "basic", "minutes": 2, "topic": "base-to-chat", "lesson": "00", "tags": ["sft"], "rows": ["S231"],
    "sources": [{"title": "LoRA", "arxiv": "2106.09685"}], "question": "What?",
}  # fmt: skip
GOOD = {
    "card": {
        "id": "a-card", "kind": "card", "answer": "This.", "follow_ups": [{"question": "And?", "answer": "So."}],
        "wrong": {"says": "That.", "because": "It is not."},
    },
    "number": {
        "id": "a-number", "kind": "number", "draw": {"n": [1, 2], "m": {"low": 1, "high": 4, "step": 1}},
        "compute": "finetune_lab.methods.counts:lora_parameters",
        "arguments": {"in_features": "n", "out_features": "m", "rank": 3}, "unit": "parameters", "tolerance": 0,
        "solution": "{n} + {m} = {answer}", "wrong": [{"factor": 2, "hint": "twice"}],
    },
    "bug": {
        "id": "a-bug", "kind": "bug", "snippet": "a = 1\nb = 2\n", "line": 2, "fix": "b = 3", "explain": "Three.",
        "detector": "some_detector",
        "wrong_fixes": [{"line_text": "b = 4", "hint": "not four"}, {"line_text": "b = 5", "hint": "not five"}],
    },
    "code": {
        "id": "a-code", "kind": "code", "starter": "def f(): ...", "limit_minutes": 5, "exercise": "sft_loss",
        "reference": "finetune_lab.methods.loss:sft_loss",
    },
    "case": {
        "id": "a-case", "kind": "case", "answer": "So.",
        "rubric": [{"point": f"p{i}", "weight": 1 + i % 3, "why": "because"} for i in range(5)],
    },
}  # fmt: skip


GOOD = {kind: {**COMMON, **entry} for kind, entry in GOOD.items()}


def written(tmp_path, *entries):
    (tmp_path / "some.yml").write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return tmp_path


def changed(kind, path, value):
    """The good item of a kind with one field changed; `path` like `rubric.0.weight`."""
    entry = copy.deepcopy(GOOD[kind])
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    at = entry
    for step in way:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return entry


def test_a_good_item_of_each_kind_is_read(tmp_path):
    items = schema.load(written(tmp_path, *GOOD.values()))
    assert [item.kind for item in items] == list(schema.KINDS)
    assert items[0].follow_ups[0].answer == "So." and items[0].wrong.because == "It is not."
    assert items[1].wrong[0].factor == 2 and items[1].scale == 1
    assert items[4].rubric[1].weight == 2 and items[4].file == "some.yml"


@pytest.mark.parametrize(
    ("kind", "path", "value", "field"),
    [
        ("card", "id", "Not Kebab", "id:"),
        ("card", "kind", "quiz", "kind:"),
        ("card", "level", "hard", "level:"),
        ("card", "minutes", 46, "minutes:"),
        ("card", "minutes", "3", "minutes:"),
        ("card", "minutes", True, "minutes:"),
        ("card", "lesson", 1, "lesson:"),
        ("card", "lesson", "1", "lesson:"),
        ("card", "topic", None, "topic: missing"),
        ("card", "question", " ", "question:"),
        ("card", "answer", "", "answer: empty"),
        ("card", "tags", "sft", "tags:"),
        ("card", "tags", [True], "tags:"),
        ("card", "rows", ["231"], "rows:"),
        ("card", "sources", [], "sources:"),
        ("card", "sources.0.arxiv", 2106.09685, "arxiv:"),
        ("card", "sources.0.arxiv", None, "sources:"),
        ("card", "sources.0.url", "https://example.org", "sources:"),
        ("card", "sources", [{"title": "x", "url": "example.org"}], "sources:"),
        ("card", "follow_ups", [], "follow_ups:"),
        ("card", "follow_ups.0.answer", None, "follow_ups 1: answer: missing"),
        ("card", "wrong.because", None, "wrong 1: because: missing"),
        ("card", "colour", "red", "colour: no such field"),
        ("number", "draw.n", [], "draw:"),
        ("number", "draw.m", {"low": 5, "high": 4, "step": 1}, "draw:"),
        ("number", "draw.m.step", 0, "draw:"),
        ("number", "draw.answer", [1], "draw:"),
        ("number", "compute", "counts.lora", "compute:"),
        ("number", "scale", "1e9", "scale: '1e9', expected a number (write 1.0e+9"),
        ("number", "scale", 0, "scale:"),
        ("number", "tolerance", 2, "tolerance:"),
        ("number", "solution", "{n}", "solution:"),
        ("number", "wrong.0.factor", 1, "changes nothing"),
        ("number", "unit_mistakes", [{"factor": 1, "hint": "h"}], "unit_mistakes:"),
        ("number", "wrong.0.factor", None, "changes nothing"),
        ("number", "wrong.0.hint", None, "wrong 1: hint: missing"),
        ("bug", "snippet", "x\n" * 15, "snippet:"),
        ("bug", "line", 3, "line:"),
        ("bug", "detector", "a.b", "detector:"),
        ("bug", "wrong_fixes", [{"line_text": "x", "hint": "y"}], "wrong_fixes:"),
        ("code", "reference", "finetune_lab.methods.loss.sft_loss", "reference:"),
        ("code", "limit_minutes", 0, "limit_minutes:"),
        ("case", "rubric.0.weight", 4, "rubric:"),
        ("case", "rubric", [{"point": "p", "weight": 1, "why": "w"}] * 4, "rubric:"),
    ],
)
def test_a_bad_field_is_named_with_file_and_id(tmp_path, kind, path, value, field):
    entry = changed(kind, path, value)
    with pytest.raises(UserError) as error:
        schema.load(written(tmp_path, entry))
    start = f"some.yml: {entry['id']}: "
    assert any(start in line and field in line.split(start)[1] for line in str(error.value).split("\n")), error.value


def test_all_problems_are_named_at_once(tmp_path):
    with pytest.raises(UserError, match="3 to mend"):
        schema.load(written(tmp_path, changed("card", "level", "x"), {**changed("case", "minutes", 0), "lesson": "5"}))


def test_an_id_in_two_files_is_refused(tmp_path):
    written(tmp_path, GOOD["card"])
    (tmp_path / "other.yml").write_text((tmp_path / "some.yml").read_text(), encoding="utf-8")
    with pytest.raises(UserError, match=r"other.yml, some.yml: a-card: id: stands 2 times"):
        schema.load(tmp_path)


@pytest.mark.parametrize("text", ["a: 1", "- [", "- 5", "- {id: x}"])
def test_a_file_that_is_no_list_of_items_is_refused(tmp_path, text):
    (tmp_path / "bad.yml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="bad.yml"):
        schema.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "path", "value", "field"),
    [
        ("card", "topic", "no-such-topic", "topic:"),
        ("card", "lesson", "77", "lesson:"),
        ("card", "section", "A heading that nobody wrote", "section:"),
        ("card", "sources", [{"title": "x", "library": "trl.NoSuchTrainer"}], "sources:"),
        ("card", "sources", [{"title": "x", "library": "nosuchlibrary"}], "sources:"),
        ("card", "sources", [{"title": "x", "library": "math.nothing"}], "sources:"),
        ("number", "compute", "finetune_lab.methods.loss:nothing", "number:"),
        ("number", "compute", "finetune_lab.methods.nothing:f", "number:"),
        ("number", "arguments", {"x": 1}, "arguments:"),
        ("number", "wrong.0.arguments", {"x": 1}, "arguments:"),
        ("bug", "detector", "no_such_detector", "bug:"),
        ("code", "exercise", "no_such_exercise", "code:"),
        ("code", "reference", "finetune_lab.methods.loss:nothing", "code:"),
    ],
)
def test_a_link_to_nothing_is_named(tmp_path, kind, path, value, field):
    (item,) = schema.load(written(tmp_path, changed(kind, path, value)))
    assert any(line.startswith(f"some.yml: {item.id}: {field}") for line in links.problems([item]))


def test_links_to_what_is_there_have_no_problems(tmp_path):
    sources = [
        {"title": "z", "library": "math.log"},
        {"title": "x", "library": "trl.SFTTrainer"},
        {"title": "y", "library": "torch.nn.functional.cross_entropy"},
    ]
    items = schema.load(written(tmp_path, {**GOOD["card"], "sources": sources}, GOOD["code"], GOOD["number"]))
    assert links.problems(items) == []


def test_one_paper_has_one_title(tmp_path):
    other = {**GOOD["case"], "sources": [{"title": "QLoRA", "arxiv": "2106.09685"}]}
    items = schema.load(written(tmp_path, GOOD["card"], other))
    assert links.problems(items) == ["arXiv 2106.09685: has several titles: ['LoRA', 'QLoRA']"]


def test_counts_are_by_kind_level_and_lesson(tmp_path):
    items = schema.load(
        written(tmp_path, *GOOD.values(), {**GOOD["card"], "id": "b", "level": "expert", "lesson": "01"})
    )
    assert schema.counts(items) == {
        "kind": {"card": 2, "number": 1, "bug": 1, "code": 1, "case": 1},
        "level": {"basic": 5, "advanced": 0, "expert": 1},
        "lesson": {"00": 5, "01": 1},
    }
