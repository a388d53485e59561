"""The reading edition is whole: every lesson, every picture described, every link leads somewhere, nothing remote."""

import os
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from finetune_lab import cli
from finetune_lab.course import book
from finetune_lab.course.lessons import lessons
from finetune_lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LESSONS = lessons(ROOT)
PAGES = ["index.html", *(f"{lesson.name}.html" for lesson in LESSONS)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    assert cli.main(["book", str(folder), "--root", str(ROOT)]) == 0
    return folder


@pytest.fixture(scope="session")
def soups(folder):
    return {name: BeautifulSoup((folder / name).read_text(encoding="utf-8"), "html.parser") for name in PAGES}


def from_markdown(text, every=None):
    """A page of one markdown cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Title\n\n{text}", id="a")])
    return BeautifulSoup(book.page(notebook, "title", [], every or {}), "html.parser")


def test_it_has_an_index_and_a_page_a_lesson_and_nothing_else(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*PAGES, "style.css"])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_pages_and_places_that_exist(name, soups):
    for link in soups[name].select("a[href]"):
        target, _, place = link["href"].partition("#")
        if target.startswith("https://arxiv.org/abs/"):
            continue
        target = target or name
        assert target in PAGES, link
        assert not place or soups[target].find(id=place), link


@pytest.mark.parametrize("name", PAGES)
def test_no_two_places_of_a_page_have_one_name(name, soups):
    names = [tag["id"] for tag in soups[name].select("[id]")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_is_described(name, soups):
    assert [str(img)[-80:] for img in soups[name].select("img") if len(img.get("alt", "").split()) < 4] == []
    assert "No description has been provided" not in soups[name].get_text()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_no_script_and_nothing_remote(name, soups, folder):
    assert soups[name].find_all(["script", "iframe", "object"]) == []
    fetched = [tag.get("src") or tag.get("href") for tag in soups[name].select("img, link, source, video, audio")]
    assert {address for address in fetched if not address.startswith("data:")} == {"style.css"}
    assert not re.search(r"url\(|@import", (folder / "style.css").read_text())


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.number)
def test_every_formula_is_drawn(lesson, soups):
    prose = [tag for tag in soups[f"{lesson.name}.html"].select(".jp-RenderedMarkdown")]
    text = " ".join(s for tag in prose for s in tag.find_all(string=True) if not s.find_parent(["code", "pre"]))
    assert "$" not in text and not re.search(r"\\[a-zA-Z(\[]", text)
    source = re.sub(r"(?ms)^[^#\n].*?$|```.*?```|`[^`\n]*`", "", lesson.source.read_text(encoding="utf-8"))
    displayed = source.count("$$") // 2  # outputs may show more
    assert sum(len(tag.select("math[display=block]")) for tag in prose) >= displayed


def test_the_index_says_minutes_and_needs_of_every_lesson(soups):
    text = soups["index.html"].get_text()
    for lesson in LESSONS:
        about = book.read(lesson).metadata["finetune_lab"]
        assert about["title"] in text
        assert f"{about['minutes']} minutes. You need: {about['needs']}." in text


def test_a_lesson_links_to_the_one_before_and_the_one_after(soups):
    for before, after in pairwise(LESSONS):
        assert soups[f"{before.name}.html"].select(f'header a[href="{after.name}.html"]')
        assert soups[f"{after.name}.html"].select(f'footer a[href="{before.name}.html"]')


def test_references_to_lessons_and_papers_become_links():
    text = "As lessons 05 to 07 and lesson 12 say (2305.18290), not `lesson 05` or 3.14159."
    found = from_markdown(text, {"05": "five.html", "07": "seven.html"}).select("main p a")
    assert [link["href"] for link in found] == ["five.html", "seven.html", "https://arxiv.org/abs/2305.18290"]


def test_a_log_keeps_its_space():
    assert "<mi>log</mi><mspace" in book.mathml(r"\log p") and "<mspace" not in book.mathml(r"\log(p)")


@pytest.mark.parametrize("formula", [r"\nosuchcommand{x}", r"\frac"])
def test_a_formula_that_cannot_be_drawn_is_named(formula):
    with pytest.raises(UserError, match="cannot be drawn"):
        book.mathml(formula)


def test_a_stale_lesson_is_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / LESSONS[0].source.name).write_text(LESSONS[0].source.read_text() + "\n# %%\n1 + 1\n")
    (tmp_path / "solutions" / LESSONS[0].solution.name).write_text(LESSONS[0].solution.read_text())
    assert cli.main(["book", str(tmp_path / "book"), "--root", str(tmp_path)]) == 2
    assert "has outputs of another source: run `finetune-lab build 00 --execute`" in capsys.readouterr().err
    assert not (tmp_path / "book").exists()


def test_a_file_in_the_folders_place_is_refused(tmp_path, capsys):
    (tmp_path / "book").write_text("")
    assert cli.main(["book", str(tmp_path / "book"), "--root", str(ROOT)]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/book", "file/below/book"])
def test_a_folder_that_cannot_be_written_is_told_before_the_pages_are_drawn(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(book, "page", lambda *_: pytest.fail("drew a page"))
    with pytest.raises(UserError, match=f"cannot write into {re.escape(str(tmp_path / place))}: "):
        book.write([], tmp_path / place)


@pytest.mark.parametrize("scheme, paper", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 24, 27)")])
@pytest.mark.parametrize("width", [390, 1200])
def test_no_page_is_wider_than_the_screen_and_the_colours_are_the_readers(browser, folder, scheme, paper, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, outside = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: outside.append(request.url) if request.url.startswith("http") else None)
    for name in PAGES:
        page.goto((folder / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        if kept := os.environ.get("FINETUNE_LAB_SCREENSHOTS"):
            page.screenshot(path=Path(kept) / f"book-{Path(name).stem}-{scheme}-{width}.png")
    page.close()
    assert (complaints, outside) == ([], [])
