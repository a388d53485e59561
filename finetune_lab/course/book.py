"""`finetune-lab book DIR`: the reading edition, every lesson with its outputs as a page of HTML.

nbconvert turns the executed `solutions/NN_name.ipynb` into pages; its template is in `assets/book`. A page works from a
disk, without a network and without JavaScript: pictures are inside it, one style sheet lies beside it, and formulas
are MathML (latex2mathml; nbconvert alone would load MathJax from another site). Light or dark is what the reader's
system says. What is added to nbconvert's page: a list of its sections, boxes in which wide tables scroll, links from
"lesson 03" to that lesson and from an arXiv id to the paper.

What it leaves out: sliders do not move (the picture or table of each stands there), and exercises show their solution.
"""

import argparse
import html
import re
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, NavigableString, Tag
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from finetune_lab.course import build
from finetune_lab.course.lessons import Lesson, course_root, lessons, write_atomic
from finetune_lab.errors import UserError

ASSETS = Path(__file__).parent / "assets"
LIGHT, DARK = "default", "github-dark"  # styles of pygments with readable contrast
WIDE = 84  # characters of code that fit beside each other on a page of full width
_OPERATOR = re.compile(r"(<mi>(?:cos|exp|ln|log|max|min|sin|softmax)</mi>)(?=<m(?:i|n|frac|msub|msup|sub|sup)\b)")
# "lesson 03", "lessons 05 to 07", "lessons 03 and 04"; an arXiv id YYMM.NNNNN
_REFERENCE = re.compile(r"[Ll]essons? \d\d(?:(?:, | and | or | to )\d\d)*\b|\b[0-3]\d(?:0[1-9]|1[0-2])\.\d{5}\b")


def mathml(latex: str, display: str = "inline") -> str:
    """A formula as MathML, which browsers draw without a script; `display` is `inline` or `block`.

    Raises:
        UserError: latex2mathml cannot read it, or left a command unread.
    """
    try:
        drawn = convert(latex.strip(), display=display)
    except Exception as error:
        raise UserError(
            f"the formula {latex!r} cannot be drawn ({type(error).__name__}): write it more simply."
        ) from error
    unread = re.search(r"\\\w+", re.sub(r"<[^>]*>", " ", drawn))
    if unread:
        raise UserError(f"the formula {latex!r} cannot be drawn: latex2mathml does not know {unread.group()}.")
    return _OPERATOR.sub(r'\1<mspace width="0.167em" />', drawn)  # TeX's space between log and its argument


class _Renderer(IPythonRenderer):
    """nbconvert's markdown, with formulas drawn."""

    def inline_math(self, body: str) -> str:
        drawn = mathml(body)
        return f'<span class="long">{drawn}</span>' if len(body) > 40 else drawn  # wider than a phone: it scrolls

    def block_math(self, body: str) -> str:
        return f'<div class="wide">{mathml(body, "block")}</div>'


class Exporter(HTMLExporter):
    """nbconvert's HTML with this project's template and without anything remote."""

    def __init__(self, **settings):
        super().__init__(extra_template_basedirs=[str(ASSETS)], template_name="book", **settings)

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        return MarkdownWithMath(renderer=_Renderer(escape=False)).render(source)


def page(notebook: nbformat.NotebookNode, title: str, links: list[tuple[str, str]], every: dict[str, str]) -> str:
    """One page of HTML.

    links: (words, address) at the head and the foot of the page; with none there is no list of sections either.
    every: the number of a lesson -> the file of its page.
    """
    text, _ = Exporter().from_notebook_node(notebook, {"book": {"title": title, "links": links}})
    soup = BeautifulSoup(text, "html.parser")
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    for block in soup.find_all("pre"):
        if max(map(len, block.get_text().splitlines()), default=0) > WIDE:
            block["tabindex"] = "0"  # it scrolls: reachable without a mouse
    for prose in soup.select(".jp-RenderedMarkdown"):
        for string in prose.find_all(string=_REFERENCE):
            if not string.find_parent(["a", "code", "pre", "math", "h1", "h2", "h3", "h4"]):
                string.replace_with(*_linked(soup, str(string), every))
    if links:
        _contents(soup)
    return re.sub(r"[ \t]+\n", "\n", str(soup)).rstrip() + "\n"


def _linked(soup: BeautifulSoup, text: str, every: dict[str, str]) -> list[NavigableString | Tag]:
    """The text, with references to lessons and papers as links."""
    parts, at = [], 0
    for found in _REFERENCE.finditer(text):
        for match in re.finditer(r"\d{4}\.\d{5}|\d\d", found.group()):
            word, start = match.group(), found.start() + match.start()
            target = f"https://arxiv.org/abs/{word}" if "." in word else every.get(word)
            if target:
                link = soup.new_tag("a", href=target)
                link.string = word
                parts += [NavigableString(text[at:start]), link]
                at = start + len(word)
    return [*parts, NavigableString(text[at:])]


def _contents(soup: BeautifulSoup) -> None:
    """A folded list of the page's sections, below its title."""
    items = []
    for heading in soup.select("main h2[id]"):
        words = heading.get_text().removesuffix("¶").strip()
        items.append(f'<li><a href="#{html.escape(heading["id"])}">{html.escape(words)}</a></li>')
    folded = f'<details class="contents"><summary>On this page</summary><ul>{"".join(items)}</ul></details>'
    soup.find("h1").insert_after(BeautifulSoup(folded, "html.parser"))


def read(lesson: Lesson) -> nbformat.NotebookNode:
    """The executed lesson.

    Raises:
        UserError: it was not executed, or its outputs come from another source.
    """
    _, problem = build.solution_notebook(lesson)
    if problem:
        raise UserError(
            f"{lesson.solution.name} in solutions/ {problem}: run `finetune-lab build {lesson.number} --execute` first."
        )
    return nbformat.read(lesson.solution, as_version=4)


def index(notebooks: dict[str, nbformat.NotebookNode]) -> nbformat.NotebookNode:
    """The first page: each lesson with its promise, its minutes and what it needs, from the lesson's own header."""
    lines = ["# Fine-tuning language models", ""]
    lines += [
        "The lessons of finetune-lab, complete, with their solutions and what they printed on the tiny model.",
        "",
    ]
    minutes = 0
    for name, notebook in notebooks.items():
        about = notebook.metadata["finetune_lab"]
        promise = re.search(r"\*\*(.+?)\*\*", notebook.cells[0].source, re.DOTALL)[1].replace("\n", " ")
        minutes += about["minutes"]
        lines += [f"## [{about['lesson']} · {about['title']}]({name}.html)", ""]
        lines += [promise, "", f"{about['minutes']} minutes. You need: {about['needs']}.", ""]
    lines += ["---", "", f"Together {minutes / 60:.0f} hours for a learner who does the exercises. This edition is for reading: ",
              "sliders stand still here, and what a learner writes is filled in, between `# BEGIN SOLUTION` and",
              "`# END SOLUTION`. To do the lessons, open the notebooks.", "",
              "Text and pictures: CC BY 4.0. Code: Apache-2.0."]  # fmt: skip
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(lines), id="index")])


def style() -> str:
    """The style sheet: ours, then the colours of code for light and for dark."""
    rules = {name: HtmlFormatter(style=name).get_style_defs(".highlight") for name in (LIGHT, DARK)}
    ours = (ASSETS / "book" / "style.css").read_text(encoding="utf-8")
    code = f"\n/* pygments */\n{rules[LIGHT]}\n@media (prefers-color-scheme: dark) {{\n{rules[DARK]}\n}}\n"
    return ours + code + ".highlight { background: none; }\n"


def write(chosen: list[Lesson], folder: Path) -> list[Path]:
    """Write the pages of these lessons, `index.html` and `style.css` into `folder`; nothing else there is touched.

    All lessons are read before the first file is written, and that file, the style sheet, is written before the slow
    part, so that a folder that cannot be written is told at once.

    Raises:
        UserError: a lesson was not executed, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the book needs a folder.")
    notebooks = {lesson.name: read(lesson) for lesson in chosen}
    titles = {
        name: f"{nb.metadata['finetune_lab']['lesson']} · {nb.metadata['finetune_lab']['title']}"
        for name, nb in notebooks.items()
    }
    every = {name[:2]: f"{name}.html" for name in notebooks}
    names = list(notebooks)
    _save(folder / "style.css", style())
    texts = {"index.html": page(index(notebooks), "finetune-lab", [], every)}
    for i, (name, notebook) in enumerate(notebooks.items()):
        links = [("All lessons", "index.html")]
        links += [(f"← {titles[names[i - 1]]}", f"{names[i - 1]}.html")] if i else []
        links += [(f"{titles[names[i + 1]]} →", f"{names[i + 1]}.html")] if i + 1 < len(names) else []
        texts[f"{name}.html"] = page(notebook, f"{titles[name]} · finetune-lab", links, every)
    for name, text in texts.items():
        _save(folder / name, text)
    return [folder / name for name in ("style.css", *texts)]


def _save(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror or error}.") from None


def _command(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    files = write(lessons(course_root(args.root)), folder)
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files) - 2} lessons, {size / 1e6:.1f} MB: open {folder / 'index.html'}")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "book",
        help="the lessons as web pages, for reading without Jupyter",
        description="Write every executed lesson as a page of HTML that works from a disk, without a network.",
        epilog="example: finetune-lab book book",
    )
    parser.add_argument("folder", metavar="DIR", help="where the pages go; it is made when it is not there")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)
