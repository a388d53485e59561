"""Slides are the lesson's own cells, work without a network, and show a stub before its solution."""

import re

import lesson_fixture as fixture
import nbformat
import pytest

from finetune_lab.cli import main
from finetune_lab.course import build, slides
from finetune_lab.course.lessons import course_root, lessons


@pytest.fixture(scope="module")
def start():
    return slides.page(lessons(course_root())[0])


def test_a_page_asks_no_other_place_for_anything(start):
    text, _ = start
    assert re.findall(r'<(?:script|link|img|source)[^>]+(?:src|href)="(?!data:|")', text) == []
    assert not re.search(r"@import|url\((?!data:)", text.partition("<script>")[0])
    assert "sourceMappingURL" not in text


def test_reveal_gets_as_many_slides_as_are_counted(start):
    text, count = start
    stacks = len(re.findall(r"<section[^>]*>\s*<section", text))
    assert text.count("<section") - stacks == count > 10


def test_the_stub_comes_before_the_solution_and_its_verdict(start):
    text, _ = start
    plain = re.sub(r"<[^>]+>", "", text)
    assert plain.index("raise NotImplementedError") < plain.index("right = sum(p.strip()") < plain.index("[ok] 0.1")
    assert "BEGIN SOLUTION" not in text


def test_every_word_of_the_lesson_is_on_a_slide():
    lesson = lessons(course_root())[0]
    notebook = build.parse(lesson)
    arranged = slides.arrange(notebook, "here")
    wanted = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").split()
    assert " ".join(cell.source for cell in arranged.cells if cell.cell_type == "markdown").split() == wanted


def test_a_heading_begins_a_slide_and_never_stands_alone_at_its_foot():
    text = "\n\n".join(["# T", *["word " * 100] * 4, "## A", "### A1", "word " * 30, "word " * 150, "### A2", "end"])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    told = [(c.source[:5], c.metadata["slideshow"]["slide_type"]) for c in slides.arrange(notebook, "").cells]
    kinds = dict(told)
    assert kinds["# T"] == kinds["## A"] == "slide"
    assert kinds["### A"] == "subslide"  # the second of them; the first stays under its heading
    assert [kind for source, kind in told if source.startswith("### A")] == ["-", "subslide"]


def test_outputs_that_do_not_fit_under_their_code_get_a_slide_without_it():
    output = nbformat.v4.new_output("stream", text="line\n" * 15)
    cell = nbformat.v4.new_code_cell("x = 1\n" * 20, outputs=[output])
    (code, _, _), (rest, _, _) = slides.pieces(cell, "")
    assert not code.outputs and rest.outputs == [output]
    text, _ = slides.Exporter().from_notebook_node(
        nbformat.v4.new_notebook(cells=[rest]),
        {"slides": {"title": "", "style": "", "script": "", "width": 1, "height": 1}},
    )
    assert "line" in text and "jp-InputArea" not in text


def test_a_table_too_tall_for_a_slide_goes_on_with_its_head():
    table = "| a | b |\n|---|---|\n" + "\n".join(f"| {i} | x |" for i in range(30))
    parts = slides.blocks(table)
    assert len(parts) > 1 and all(part.startswith("| a | b |\n|---|---|\n") for part in parts)
    assert sum(part.count("| x |") for part in parts) == 30


def test_formulas_are_drawn_without_a_script():
    lesson = next(one for one in lessons(course_root()) if one.number == "03")
    cells = [cell for cell in build.parse(lesson).cells if "$$" in cell.source][:1]
    text, _ = slides.Exporter().from_notebook_node(
        slides.arrange(nbformat.v4.new_notebook(cells=cells), ""),
        {"slides": {"title": "", "style": "", "script": "", "width": 1, "height": 1}},
    )
    assert "<math" in text and "$" not in re.sub(r"<[^>]+>", "", text)


def test_a_lesson_that_was_not_executed_and_a_file_as_folder_are_refused_in_one_sentence(tmp_path, capsys):
    root = fixture.source_file(tmp_path / "course")
    build.build(lessons(root)[0])
    assert main(["slides", "99", "--root", str(root), "--out", str(tmp_path / "out")]) == 2
    assert "finetune-lab build 99 --execute" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["slides", "99", "--root", str(root), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "is a file" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
