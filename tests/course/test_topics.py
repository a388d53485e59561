"""The topic list is whole, and it says the truth about the lessons that exist."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from finetune_lab import cli
from finetune_lab.course import topics
from finetune_lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ALL_ROWS = [f"S{number:03d}" for number in range(1, 256)]
ENTRY = {
    "id": "label-shift",
    "en": "The shift",
    "zh": "标签移位",
    "line": "Logits at t predict token t+1.",
    "lesson": "01",
    "section": "Labels and the shift",
    "status": "written",
    "rows": ["S018"],
}


@pytest.fixture(scope="module")
def every():
    return topics.load()


def write(folder, *entries):
    path = folder / "topics.yml"
    document = {"lessons": {"01": "Loss masking"}, "topics": list(entries)}
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


def run(capsys, *words):
    code = cli.main(["topics", *words])
    return code, capsys.readouterr().out


# ---- the list ----


def test_every_row_of_the_source_notes_stands_exactly_once(every):
    rows = sorted(row for topic in every for row in (*topic.rows, *topic.drills))
    assert rows == ALL_ROWS


def test_interview_questions_are_drills_and_nothing_else_is(every):
    assert sorted(row for topic in every for row in topic.drills) == ALL_ROWS[230:]


def test_lessons_00_and_01_cover_sections_1a_and_1b_of_the_notes(every):
    assert sorted(row for topic in every if topic.lesson in ("00", "01") for row in topic.rows) == ALL_ROWS[:34]


def test_ids_are_unique(every):
    assert len({topic.id for topic in every}) == len(every)


def test_english_names_are_unique_so_that_the_glossary_has_one_row_each(every):
    assert len({topic.en.casefold() for topic in every}) == len(every)


def test_chinese_names_have_chinese_in_them(every):
    assert [topic.id for topic in every if not any("一" <= char <= "鿿" for char in topic.zh)] == []


def test_english_fits_every_terminal_and_160_characters(every):
    assert [topic.id for topic in every if not (topic.en + topic.line).isascii() or len(topic.line) > 160] == []


def test_topics_stand_in_the_order_of_their_lessons(every):
    assert [topic.lesson for topic in every] == sorted(topic.lesson for topic in every)


# ---- the list against the lesson sources ----


def test_every_section_that_the_list_names_exists(every):
    assert topics.section_problems(every, ROOT / "solutions") == []


def test_a_missing_heading_is_found(tmp_path, every):
    (tmp_path / "01_loss_masking.py").write_text("# %% [markdown]\n# ## The shift\n", encoding="utf-8")
    topic = topics.load(write(tmp_path, ENTRY))[0]
    assert topics.section_problems([topic], tmp_path) == [
        "label-shift: no heading 'Labels and the shift' in 01_loss_masking.py"
    ]


@pytest.mark.parametrize(
    "heading",
    ["# # Labels and the shift", "# ## 3. Labels and the *shift*", "# ### 1.3 labels and the `shift`"],
)
def test_a_heading_is_found_whatever_its_number_and_emphasis(tmp_path, heading):
    (tmp_path / "01_loss_masking.py").write_text(f"# %% [markdown]\n# Text.\n#\n{heading}\n", encoding="utf-8")
    assert topics.section_problems(topics.load(write(tmp_path, ENTRY)), tmp_path) == []


@pytest.mark.parametrize(
    "source",
    [
        "# %%\n# ## Labels and the shift\n",
        "# %% [markdown]\n# ```\n# ## Labels and the shift\n# ```\n",
        "# %% [markdown]\n# Labels and the shift\n",
        "# %% [markdown]\n# ## Labels and the shift, again\n",
    ],
    ids=["code cell", "fenced code", "plain text", "another heading"],
)
def test_what_only_looks_like_the_heading_does_not_count(tmp_path, source):
    (tmp_path / "01_loss_masking.py").write_text(source, encoding="utf-8")
    assert len(topics.section_problems(topics.load(write(tmp_path, ENTRY)), tmp_path)) == 1


def test_a_topic_cannot_stay_planned_once_its_lesson_has_a_source(tmp_path):
    (tmp_path / "01_loss_masking.py").write_text("# %% [markdown]\n# ## Labels and the shift\n", encoding="utf-8")
    [topic] = topics.load(write(tmp_path, ENTRY | {"status": "planned"}))
    assert "planned, but 01_loss_masking.py exists" in topics.section_problems([topic], tmp_path)[0]
    assert topics.section_problems([replace(topic, status="later", reason="needs a GPU")], tmp_path) == []


@pytest.mark.parametrize("status", ["written", "later"])
def test_a_topic_cannot_be_written_or_later_before_its_lesson_has_a_source(tmp_path, status):
    [topic] = topics.load(write(tmp_path, ENTRY | {"status": status, "reason": "x"}))
    assert "lesson 01 has no source" in topics.section_problems([topic], tmp_path)[0]


# ---- bad lists ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "Label shift"}, "id: 'Label shift', expected kebab-case"),
        ({"en": None}, "label-shift: en: None, expected text"),
        ({"zh": ""}, "label-shift: zh: '', expected text"),
        ({"zh": False}, "label-shift: zh: False, expected text"),
        ({"line": "x" * 161}, "label-shift: line: 161 characters"),
        ({"line": "two\nlines"}, "label-shift: line: 9 characters, expected one line"),
        ({"lesson": 1}, "label-shift: lesson: 1, expected text"),
        ({"lesson": "99"}, "label-shift: lesson: '99', expected one of 01"),
        ({"status": "done"}, "label-shift: status: 'done', expected one of planned, written, later"),
        ({"section": None}, "label-shift: section: None, expected text"),
        ({"status": "later"}, "label-shift: reason: missing"),
        ({"rows": "S018"}, "label-shift: rows: 'S018', expected a list"),
        ({"rows": ["S18"]}, "label-shift: rows: 'S18', expected S and three digits"),
        ({"drills": [231]}, "label-shift: drills: [231], expected a list of texts"),
        ({"drills": ["S018"]}, "S018: rows or drills: stands 2 times"),
        ({"sectoin": "x"}, "label-shift: sectoin: no such field"),
    ],
)
def test_a_bad_field_is_named_with_its_topic(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        topics.load(write(tmp_path, ENTRY | change))
    assert message in str(caught.value)


def test_a_written_topic_needs_a_section(tmp_path):
    with pytest.raises(UserError, match="label-shift: section: missing"):
        topics.load(write(tmp_path, {key: value for key, value in ENTRY.items() if key != "section"}))


@pytest.mark.parametrize("number", ["1:", "'1':", "01:", "8:"])
def test_a_lesson_number_without_its_quotes_is_refused(tmp_path, number):
    path = tmp_path / "topics.yml"
    path.write_text(f"lessons: {{{number} Loss masking}}\ntopics: []\n", encoding="utf-8")
    with pytest.raises(UserError, match="expected two digits in quotes and a title"):
        topics.load(path)


def test_all_problems_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        topics.load(write(tmp_path, ENTRY | {"en": 1}, "a word", ENTRY | {"status": "done"}))
    for part in ("3 to mend", "en: 1", "topic number 2: expected fields", "status: 'done'"):
        assert part in str(caught.value)


def test_an_id_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="label-shift: id: stands 2 times"):
        topics.load(write(tmp_path, ENTRY, ENTRY | {"rows": []}))


@pytest.mark.parametrize("text", ["topics: [", "- a list", "lessons: []\ntopics: {}\n", ""])
def test_a_file_of_another_shape_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "topics.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="topics.yml"):
        topics.load(path)


# ---- search, glossary, command ----


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("padding", "padding-side"),
        ("PADDING side", "padding-side"),
        ("灾难性遗忘", "catastrophic-forgetting"),
        ("掩码", "response-only-loss"),
        ("-100", "response-only-loss"),
        ("learning rate", "learning-rate"),
        ("ＬｏＲＡ", "lora"),
    ],
)
def test_search_finds_english_chinese_and_other_names(every, search, expected):
    assert expected in [topic.id for topic in topics.find(every, search)]


def test_search_wants_every_word(every):
    assert topics.find(every, "padding 灾难性遗忘") == []


def test_glossary_has_a_row_for_every_topic_sorted_by_its_english_name(every):
    rows = topics.glossary()
    assert len(rows) == len(every)
    assert [row[0].casefold() for row in rows] == sorted(row[0].casefold() for row in rows)


def test_glossary_says_which_lessons_are_not_written(every):
    [topic] = [topic for topic in every if topic.id == "lora"]
    [planned] = topics.glossary([replace(topic, status="planned")])
    [written] = topics.glossary([replace(topic, status="written", section="LoRA")])
    assert (planned[3], written[3]) == ("03 (planned)", "03")


def test_a_glossary_cell_cannot_break_its_table(every):
    [row] = topics.glossary([replace(every[0], line="|x| and 2*d*r, but `a|b` stays")])
    assert row[2] == r"\|x\| and 2\*d\*r, but `a|b` stays"


def test_the_command_says_of_every_planned_topic_that_it_is_planned(capsys, every):
    code, out = run(capsys)
    assert code == 0
    for topic in every:
        assert f"  {topic.en}  [{topic.place}]\n      {topic.line}\n" in out
    assert out.count("[planned]\n") == sum(topic.status == "planned" for topic in every) > 0


def test_the_command_shows_chinese_names_on_request(capsys):
    assert "灾难性遗忘" not in run(capsys, "--lesson", "11")[1]
    assert "Catastrophic forgetting (灾难性遗忘)" in run(capsys, "--lesson", "11", "--zh")[1]


def test_the_command_takes_a_lesson_with_or_without_its_zero(capsys, every):
    code, out = run(capsys, "--lesson", "1", "--json")
    expected = [topic.id for topic in every if topic.lesson == "01"]
    assert code == 0 and [topic["id"] for topic in json.loads(out)["topics"]] == expected


def test_the_command_gives_json_with_every_field(capsys, every):
    found = json.loads(run(capsys, "--search", "灾难性遗忘", "--json")[1])
    assert found["count"] == 1
    assert found["topics"][0]["rows"] == ["S152"] and found["topics"][0]["zh"] == "灾难性遗忘"


def test_nothing_found_is_said_and_ends_with_1(capsys):
    code, out = run(capsys, "--search", "zebra")
    assert code == 1 and "no topic matches 'zebra'" in out


@pytest.mark.parametrize("lesson", ["99", "x", ""])
def test_an_unknown_lesson_ends_with_2_and_one_sentence(capsys, lesson):
    assert cli.main(["topics", "--lesson", lesson]) == 2
    assert "expected a number from 00 to 16" in capsys.readouterr().err
