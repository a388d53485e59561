import dataclasses
import io
import json
import os
import sqlite3
import zipfile

import drill_items as bank
import pytest

from finetune_lab.course.drills import export, schema
from finetune_lab.course.drills.render import to_html, to_plain
from finetune_lab.errors import UserError

REAL = schema.load()


def notes(deck, tmp_path):
    """{drill id: (guid, fields, mod, tags)} of an .apkg, read with sqlite alone."""
    path = tmp_path / "collection.anki2"
    path.write_bytes(zipfile.ZipFile(io.BytesIO(deck)).read("collection.anki2"))
    database = sqlite3.connect(path)
    rows = database.execute("SELECT guid, flds, mod, tags FROM notes").fetchall()
    cards = database.execute("SELECT count(*) FROM cards").fetchone()[0]
    models, decks = map(json.loads, database.execute("SELECT models, decks FROM col").fetchone())
    database.close()
    assert cards == len(rows)
    return {row[1].split("\x1f")[3]: (row[0], row[1].split("\x1f"), row[2], row[3]) for row in rows}, models, decks


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return notes(export.anki(REAL), tmp_path_factory.mktemp("deck"))


def test_the_deck_has_one_note_an_item_and_guids_that_differ(real):
    found, models, decks = real
    assert set(found) == {item.id for item in REAL} and len({row[0] for row in found.values()}) == len(REAL)
    assert str(export.MODEL_ID) in models and decks[str(export.DECK_ID)]["name"] == export.DECK


def test_guids_depend_on_the_id_alone_so_that_importing_again_updates(tmp_path):
    items = bank.one_of_each()
    before, _, _ = notes(export.anki(items, timestamp=1_700_000_000), tmp_path)
    changed = [
        dataclasses.replace(item, question=f"New: {item.question}", lesson="03", level="expert", topic="lora")
        for item in reversed(items)
    ]
    after, _, _ = notes(export.anki(changed, timestamp=1_700_000_099), tmp_path)
    assert {id: row[0] for id, row in before.items()} == {id: row[0] for id, row in after.items()}
    assert all(before[id][1][0] != after[id][1][0] for id in before)
    assert all(before[id][2] < after[id][2] for id in before), "Anki keeps the older text unless `mod` is newer"
    assert (export.DECK_ID, export.MODEL_ID) == (1763830001, 1763830002), "decks in the world know these numbers"
    assert before["a-card"][0] == export.guid(bank.card()) == "g;:5wVj^[,", "guids of published decks stay"


def test_the_same_bank_gives_the_same_bytes_at_any_time_of_day(monkeypatch):
    import time

    items = bank.one_of_each()
    first = export.anki(items)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100_000)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(now + 100_000))
    assert export.anki(items) == first
    dates = {info.date_time for info in zipfile.ZipFile(io.BytesIO(first)).infolist()}
    assert dates == {(1980, 1, 1, 0, 0, 0)}


def test_the_deck_is_as_new_as_the_newest_file_it_comes_from(tmp_path, monkeypatch):
    for name, seconds in (("a.yml", 1000), ("b.py", 3000), ("c.txt", 9000)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (seconds, seconds))
    assert export.newest([tmp_path]) == 3000
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    assert export.newest([tmp_path]) == 5
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="whole seconds"):
        export.newest([tmp_path])


def test_every_kind_carries_its_question_and_its_whole_answer(tmp_path):
    found, _, _ = notes(export.anki(bank.one_of_each()), tmp_path)
    front = {id: row[1][0] for id, row in found.items()}
    back = {id: row[1][1] for id, row in found.items()}
    assert r"\(r &lt; d\)" in front["a-card"] and "<code>a &lt; b</code>" in back["a-card"]
    assert "The learning rate." in back["a-card"] and r"A scale: <span" in back["a-card"]
    assert "matrix?" in front["a-number"] and "parameters</strong>" in back["a-number"] and "{" not in front["a-number"]
    assert "3      return total - 1" in front["a-bug"] and "return total + 1" in back["a-bug"]
    assert "positions_from_mask" in front["a-code"] and "def completion_labels" in back["a-code"]
    assert "point 4" in back["a-case"] and "because 4" in back["a-case"]
    assert all("arxiv.org/abs/2106.09685" in text for text in back.values())
    assert found["a-card"][3].split() == ["lesson::01", "kind::card", "level::basic", "topic::completion-labels"]


def test_no_dollar_math_is_left_in_the_deck_of_the_real_bank(real):
    found, _, _ = real
    for id, (_, fields, _, _) in found.items():
        outside = [part for part in fields[0].split("<code>") + fields[1].split("<code>")]
        text = " ".join(part.split("</code>")[-1] for part in outside)
        assert "$" not in text.replace("\\$", ""), f"{id}: {text[max(0, text.find('$') - 60) : text.find('$') + 60]}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"rank $r=16$", r'<p>rank <span class="math inline">\(r=16\)</span></p>'),
        (r"$$a<b$$", '<div class="math block">\n\\[a&lt;b\\]\n</div>'),
        (r"costs \$5 or $6 a day", "<p>costs $5 or $6 a day</p>"),
        ("<script>x</script>", "<p>&lt;script&gt;x&lt;/script&gt;</p>"),
        ("`$x$`", "<p><code>$x$</code></p>"),
    ],
)
def test_text_becomes_html_with_mathjax_marks_and_nothing_else_live(text, shown):
    assert to_html(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"$W \in \mathbb{R}^{d \times r}$, $\frac{\alpha}{r}$", "W ∈ R^(d × r), α/r"),
        (r"$\frac{a+b}{\sqrt{r}}$", "(a+b)/(√(r))"),
        (r"$\log\sigma(x) \le \text{max}$", "log σ(x) ≤ max"),
        (r"**bold** and `**code** $x$`", "bold and `**code** $x$`"),
        ("```python\na = 2 ** 3  # $x$\n```", "a = 2 ** 3  # $x$"),
        (r"\$5 and $6", "$5 and $6"),
        ("[LoRA](https://arxiv.org/abs/2106.09685)", "LoRA <https://arxiv.org/abs/2106.09685>"),
    ],
)
def test_text_becomes_readable_in_a_terminal(text, shown):
    assert to_plain(text) == shown


def test_markdown_has_the_answers_only_when_asked():
    questions, complete = export.markdown(REAL), export.markdown(REAL, answers=True)
    assert questions.count("\n### ") == complete.count("\n### ") == len(REAL)
    assert questions.count("**Answer**") == 0 and complete.count("\n**Answer**\n") == len(REAL)
    assert all(f"(`{item.id}`)" in questions for item in REAL)
    assert "Sources:" not in questions and "\n## 01 Loss masking\n" in questions


def test_markdown_draws_the_numbers_of_its_seed():
    items = [bank.number()]
    assert export.markdown(items, seed=1) == export.markdown(items, seed=1) != export.markdown(items, seed=2)


def test_what_a_person_wrote_over_an_export_is_kept(tmp_path):
    file = tmp_path / "drills.md"
    items = bank.one_of_each()
    assert export.write_markdown(items, str(file), answers=False) == (file, None)
    assert export.write_markdown(items, str(file), answers=False) == (file, None), "the same again keeps no copy"
    file.write_text("my remarks")
    _, kept = export.write_markdown(items, str(file), answers=False)
    assert kept.read_text() == "my remarks" and "# finetune-lab interview drills" in file.read_text()


def test_a_file_that_is_no_deck_is_not_replaced_by_one(tmp_path):
    file = tmp_path / "thesis.apkg"
    file.write_text("my thesis")
    with pytest.raises(UserError, match="is no Anki deck"):
        export.write_anki([bank.card()], str(file))
    assert file.read_text() == "my thesis"
    deck = tmp_path / "deck.apkg"
    export.write_anki([bank.card()], str(deck))
    export.write_anki([bank.card(), bank.number()], str(deck))
    assert len(notes(deck.read_bytes(), tmp_path)[0]) == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_name_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "a.apkg").mkdir()
    for name, says in (("a.apkg", "is a folder"), ("b.txt", "ends in .apkg"), ("no/b.apkg", "there is no folder")):
        with pytest.raises(UserError, match=says):
            export.target(str(tmp_path / name), ".apkg")
