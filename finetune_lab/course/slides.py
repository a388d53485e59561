"""`finetune-lab slides NN`: an executed lesson as slides, made from its own cells by nbconvert (reveal.js).

One file of HTML that works from a disk and without a network: reveal.js and its style (from the package pyreveal, which
carries them) are written into the page, formulas are MathML, pictures are inside. nbconvert alone would load reveal.js,
MathJax and three more scripts from other sites.

A second-level heading begins a slide (to the right), a third-level one or a full slide the next one below it. What
a learner has to write is first shown blank, and its solution with the outputs on the slide below: stop there.

What it leaves out: sliders do not move (their picture stands there), and there are no speaker's notes: the run sheet
of `finetune-lab guide` has the questions and the minutes.
"""

import argparse
import base64
import math
import re
import struct
from importlib import resources
from pathlib import Path

import nbformat
from nbconvert.exporters import SlidesExporter
from pygments.formatters import HtmlFormatter

from finetune_lab.course import book, build
from finetune_lab.course.lessons import Lesson, course_root, select, write_atomic
from finetune_lab.errors import UserError

ASSETS = Path(__file__).parent / "assets"
WIDTH, HEIGHT = 1280, 720  # of a slide, in CSS pixels; reveal.js scales it to the screen
ROOM = HEIGHT - 60
# Heights as style.css makes them, in pixels; columns that fit in a line
PROSE, CODE, ROW, PARAGRAPH = 34, 25, 40, 14
PROSE_COLUMNS, CODE_COLUMNS = 98, 108


class Exporter(SlidesExporter):
    """nbconvert's slides with this project's template, formulas as in the reading edition, and nothing remote."""

    markdown2html = book.Exporter.markdown2html

    def __init__(self, **settings):
        super().__init__(extra_template_basedirs=[str(ASSETS)], template_name="slides", **settings)


def blocks(markdown: str) -> list[str]:
    """A text cut at headings and blank lines, not inside code: the pieces that a slide may end between."""
    found, fenced = [""], False
    for line in markdown.splitlines():
        fence = line.lstrip().startswith("```")
        if not fenced and not fence and (not line.strip() or re.match(r"#+ ", line)):
            found.append("")
        fenced ^= fence
        if line.strip() or fenced:
            found[-1] += line + "\n"
        if not fenced and re.match(r"#+ ", line):
            found.append("")
    return [part for block in found if block.strip() for part in _rows(block.rstrip("\n"))]


def _rows(block: str) -> list[str]:
    """A table too tall for one slide as several with the same head; any other block as it is."""
    if not block.startswith("|") or height(block) <= ROOM:
        return [block]
    head, rows = block.splitlines()[:2], block.splitlines()[2:]
    parts = [[]]
    for row in rows:
        if height("\n".join([*head, *parts[-1], row])) > ROOM:
            parts.append([])
        parts[-1].append(row)
    return ["\n".join([*head, *part]) for part in parts]


def _wrapped(text: str, columns: int) -> int:
    return sum(max(1, math.ceil(len(line) / columns)) for line in text.splitlines())


def height(block: str) -> int:
    """About how many pixels a block of markdown takes."""
    if block.startswith("#"):
        return 190 if block.startswith("# ") else 65
    if "```" in block:
        return CODE * _wrapped(block, CODE_COLUMNS) + PARAGRAPH
    if block.startswith("|"):
        return sum(ROW * max(1, math.ceil(len(row) / 110)) for row in block.splitlines()) + PARAGRAPH
    if re.match(r"([-*]|\d+\.) ", block):  # a list: its lines are items or go on with one
        items = re.split(r"\n(?=(?:[-*]|\d+\.) )", block)
        return sum(PROSE * math.ceil(len(item) / PROSE_COLUMNS) for item in items) + PARAGRAPH
    return PROSE * math.ceil(len(block) / PROSE_COLUMNS) + PARAGRAPH


def output_height(output: dict) -> int:
    """About how many pixels an output takes; a picture at most 570."""
    data = output.get("data", {})
    if "image/png" in data:
        wide, high = struct.unpack(">II", base64.b64decode(data["image/png"])[16:24])
        shown = max(output.metadata.get("image/png", {}).get("width", wide), 0.55 * WIDTH)
        return min(570, round(high * shown / wide)) + PARAGRAPH
    if "<tr" in data.get("text/html", ""):
        rows = [re.sub(r"<[^>]+>", "", row) for row in data["text/html"].split("<tr")[1:]]
        return sum(ROW + PROSE * (len(row) // PROSE_COLUMNS) for row in rows) + PARAGRAPH
    text = output.get("text") or data.get("text/plain", "")
    return CODE * _wrapped(text, CODE_COLUMNS) + PARAGRAPH


def _markdown(source: str) -> tuple[nbformat.NotebookNode, int]:
    return nbformat.v4.new_markdown_cell(source), height(source)


def _code(source: str, outputs: list, shown: bool = True) -> tuple[nbformat.NotebookNode, int]:
    source = source.replace("  # fmt: skip", "")
    fresh = nbformat.v4.new_code_cell(source, outputs=outputs)
    if not shown:
        fresh.metadata["transient"] = {"remove_source": True}  # as nbconvert's own TagRemovePreprocessor marks it
    lines = CODE * _wrapped(source, CODE_COLUMNS) + 32 if shown else 0
    return fresh, lines + sum(output_height(output) for output in outputs)


def pieces(cell, where: str) -> list[tuple[nbformat.NotebookNode, int, str]]:
    """A lesson's cell as (cell, height, break before it): `slide`, `subslide` or "" for a break when it is full."""
    if cell.cell_type == "markdown":
        depth = [re.match(r"#*", block)[0] for block in blocks(cell.source)]
        breaks = {"#": "slide", "##": "slide", "###": "subslide"}
        found = zip(blocks(cell.source), depth, strict=True)
        return [(*_markdown(block), breaks.get(marks, "")) for block, marks in found]
    if cell.cell_type != "code" or not cell.source.strip():
        return []
    outputs = cell.get("outputs", [])
    if "BEGIN SOLUTION" in cell.source:
        told = re.sub(r"^[ \t]*# (?:BEGIN|END) SOLUTION[^\n]*\n?", "", cell.source, flags=re.MULTILINE)
        blank = _code(build.blank(cell.source, where), [])
        if not outputs:  # a guess alone: what it came to stands in a later cell
            return [(*blank, "")]
        return [(*blank, ""), *_fitting(told.rstrip(), outputs, "subslide")]
    return _fitting(cell.source, outputs, "")


def _fitting(source: str, outputs: list, first: str) -> list[tuple[nbformat.NotebookNode, int, str]]:
    """Code with its outputs on one slide where they fit, else the outputs on slides of their own."""
    whole, tall = _code(source, outputs)
    if tall <= ROOM or not outputs:
        return [(whole, tall, first)]
    parts = [(*_code(source, []), first)]
    return parts + [(*_code(source, [output], shown=False), "") for output in outputs]


def arrange(notebook: nbformat.NotebookNode, where: str) -> nbformat.NotebookNode:
    """The lesson with a place on a slide for each piece of its cells (`slideshow` metadata, as nbconvert reads it)."""
    cells, used, open_heading = [], 0, False
    for cell in notebook.cells:
        for piece, tall, wanted in pieces(cell, where):
            heading = piece.cell_type == "markdown" and piece.source.startswith("#")
            # A sub-heading right under a heading stays on its slide; a heading never stands alone at the foot.
            if wanted == "subslide" and open_heading and used < ROOM / 3:
                wanted = ""
            if not wanted and used + tall > ROOM and not (open_heading and used < 200):
                wanted = "subslide"
            if wanted:
                used = 0
            piece.metadata["slideshow"] = {"slide_type": wanted or "-"}
            used, open_heading = used + tall, heading
            cells.append(piece)
    for index, cell in enumerate(cells):
        cell.id = f"slide-{index:04d}"
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def page(lesson: Lesson) -> tuple[str, int]:
    """(the slides as one page of HTML, how many slides).

    Raises:
        UserError: the lesson was not executed, or its outputs are of another source.
    """
    notebook = book.read(lesson)
    about = notebook.metadata["finetune_lab"]
    arranged = arrange(notebook, lesson.source.name)
    count = sum(cell.metadata["slideshow"]["slide_type"] != "-" for cell in arranged.cells)
    reveal = resources.files("pyreveal") / "revealjs" / "dist"
    style = "\n".join(file.read_text(encoding="utf-8") for file in (reveal / "reveal.css", ASSETS / "slides/style.css"))
    script = (reveal / "reveal.js").read_text(encoding="utf-8")
    text, _ = Exporter().from_notebook_node(
        arranged,
        {
            "slides": {
                "title": f"{lesson.number} · {about['title']}",
                "style": f"{style}\n{HtmlFormatter().get_style_defs('.highlight')}",
                "script": script,
                "width": WIDTH,
                "height": HEIGHT,
            }
        },
    )
    return text, count


def _command(args: argparse.Namespace) -> None:
    chosen = select(course_root(args.root), args.lessons)
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder.")
    made = {lesson.name: page(lesson) for lesson in chosen}
    try:
        for name, (text, count) in made.items():
            write_atomic(folder / f"{name}.slides.html", text)
            print(f"{folder / name}.slides.html: {count} slides, {len(text.encode()) / 1e6:.1f} MB")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}.") from None
    print("Open it in a browser: arrows or space go on, Esc shows all slides, F fills the screen.")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "slides",
        help="lessons as slides, from their own executed cells",
        description="Write executed lessons as slides: one file of HTML each, which works without internet. What a "
        "learner has to write is shown blank first, its solution on the slide below.",
        epilog="example: finetune-lab slides 03 --out slides",
    )
    parser.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers; all when none is given")
    parser.add_argument("--out", metavar="DIR", default="slides", help="the folder for the files (default: slides)")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)
