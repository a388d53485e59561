"""`finetune-lab lint`: the budgets and the frame that every lesson keeps.

What is measured: cells, words and exercises in the learner's notebook; code cells as the solution shows them (blank
lines and the marks of solution regions do not count). `budget:` in the lesson's header names its budget: `lesson`
(the default), or `start` for lesson 00, which has only a limit of cells and the common rules.

The frame, in this order: the first cell has `# NN · title`, a bold promise, "Minutes:", "You need:" and "You will be
able to:"; then second-level headings whose text holds these words: problem, library, myths, breaks in practice,
summary. The summary or what follows it names references with arXiv ids, "Where next" and "Drills".
"""

import argparse
import ast
import re
from pathlib import Path
from statistics import median

import nbformat

from finetune_lab.course import build
from finetune_lab.course.lessons import Lesson, course_root, select

BUDGETS = {
    "lesson": {"cells": (45, 65), "words": (1500, 2800), "exercises": (5, 7), "predictions": (3, 99)},
    "start": {"cells": (1, 35), "words": (1, 1500), "exercises": (0, 3), "predictions": (1, 99)},
}
MEDIAN_LINES, MAX_LINES = 10, 40
FRAME = ["problem", "library", "myths", "breaks in practice", "summary"]
FIRST_CELL = {"a bold promise": r"\*\*.+?\*\*", "Minutes:": r"Minutes:", "You need:": r"You need:",
              "You will be able to:": r"You will be able to:"}  # fmt: skip
LAST_CELLS = {"an arXiv id": r"\b\d{4}\.\d{4,5}\b", "Where next": r"(?i)where next", "Drills": r"(?i)drills"}
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "requests", "socket", "urllib", "urllib3"}


def words(text: str) -> int:
    """Words of a markdown text as a reader counts them: no code blocks, addresses, formulas or table rules."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]*`|\]\([^)]*\)|<[^>]+>", " ", text, flags=re.DOTALL)
    return len(re.findall(r"[^\W_][\w'’.,%-]*", text))


def code_lines(source: str) -> int:
    lines = [line.strip() for line in source.splitlines()]
    return sum(bool(line) and not line.startswith(("# BEGIN SOLUTION", "# END SOLUTION")) for line in lines)


def problems(lesson: Lesson) -> list[str]:
    """Every broken rule of one lesson, as `01_name: sentence`."""
    complete = build.parse(lesson)
    learner = nbformat.reads(build.learner_notebook(lesson), as_version=4)
    about = complete.metadata["finetune_lab"]
    markdown = [cell for cell in complete.cells if cell.cell_type == "markdown"]
    code = [cell for cell in complete.cells if cell.cell_type == "code"]
    found = _frame(markdown, about, lesson.number) if markdown else ["there is no text"]
    found += _budget(learner, code, about.get("budget", "lesson"))
    for cell in code:
        found += _code(cell)
    for cell in markdown:
        if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"]+\")", cell.source):
            found.append(f"cell {cell.id}: a picture without alternative text")
    if lesson.solution.exists():
        found += _outputs(lesson.solution)
    return [f"{lesson.name}: {problem}" for problem in found]


def _budget(learner: nbformat.NotebookNode, code: list, budget: str) -> list[str]:
    if budget not in BUDGETS:
        return [f"the header says budget: {budget}; it must be one of {', '.join(BUDGETS)}"]
    text = "\n".join(cell.source for cell in learner.cells if cell.cell_type == "code")
    count = {
        "cells": len(learner.cells),
        "words": sum(words(cell.source) for cell in learner.cells if cell.cell_type == "markdown"),
        "exercises": len(re.findall(r"\bcheck\.\w+\(", text)),
        "predictions": len(re.findall(r"\bpredict\.(?:number|choice)\(", text)),
    }
    found = [
        f"{count[what]} {what}, expected {low} to {high}"
        for what, (low, high) in BUDGETS[budget].items()
        if not low <= count[what] <= high
    ]
    lines = [code_lines(cell.source) for cell in code]
    if lines and median(lines) > MEDIAN_LINES:
        found.append(f"the median code cell has {median(lines):g} lines, the limit is {MEDIAN_LINES}")
    for cell, length in zip(code, lines, strict=True):
        if length > MAX_LINES:
            found.append(f"cell {cell.id}: {length} lines of code, the limit is {MAX_LINES}")
    return found


def _frame(markdown: list, about: dict, number: str) -> list[str]:
    found = []
    first = markdown[0].source
    heading = f"# {number} · {about['title']}"
    if first.splitlines()[0] != heading:
        found.append(f"the first line is {first.splitlines()[0]!r}, expected {heading!r} (title of the header)")
    found += [f"the first cell lacks {what}" for what, pattern in FIRST_CELL.items() if not re.search(pattern, first)]
    if f"Minutes: {about['minutes']}" not in first.replace("*", ""):
        found.append(f"the first cell must say 'Minutes: {about['minutes']}', as the header does")
    if about.get("budget", "lesson") == "start":
        return found
    headings = [line[3:].lower() for cell in markdown for line in cell.source.splitlines() if line.startswith("## ")]
    at = 0
    for part in FRAME:
        hits = [i for i, heading in enumerate(headings) if part in heading and i >= at]
        if not hits:
            found.append(f"no heading '## ... {part} ...' in its place; the order is: {', '.join(FRAME)}")
            continue
        at = hits[0] + 1
    ends = [i for i, cell in enumerate(markdown) if re.search(r"(?im)^## .*summary", cell.source)]
    end = "\n".join(cell.source for cell in markdown[ends[-1] :]) if ends else ""
    return found + [f"the end lacks {what}" for what, pattern in LAST_CELLS.items() if not re.search(pattern, end)]


def _code(cell) -> list[str]:
    where = f"cell {cell.id}"
    if re.search(r"(?m)^\s*[%!]", cell.source):
        return [f"{where}: a magic or shell command; plain Python only"]
    try:
        tree = ast.parse(cell.source)
    except SyntaxError as error:
        return [f"{where}: not Python ({error.msg}, line {error.lineno})"]
    found = []
    here = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    here |= {target.id for node in tree.body if isinstance(node, ast.Assign) and "check." not in ast.unparse(node.value)
             for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
    for name in re.findall(r"\bcheck\.\w+\((\w+)", cell.source):
        if name not in here:  # run a second time alone, it would check what it returned the first time
            found.append(f"{where}: check(... {name} ...) must stand in the cell that defines {name}")
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names = {module.split(".")[0] for module in modules}
        if names & NETWORK:
            found.append(f"{where}: imports {', '.join(sorted(names & NETWORK))}; no network in cells")
        if names & {"pip", "subprocess"}:
            found.append(
                f"{where}: imports {', '.join(sorted(names & {'pip', 'subprocess'}))}; nothing is installed here"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("plt.show", "os.system", "get_ipython"):
            instead = "plots.show(figure, alt=...)" if "plt" in ast.unparse(node.func) else "plain Python"
            found.append(f"{where}: {ast.unparse(node.func)}(); use {instead}")
    return found


def _outputs(path: Path) -> list[str]:
    """Pictures without alternative text in the executed solution."""
    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # noqa: BLE001 (nbformat raises many kinds for a damaged file)
        return [f"{path.name} cannot be read ({type(error).__name__})"]
    found = []
    for cell in cells:
        for output in cell.get("outputs", []):
            for kind in output.get("data", {}):
                if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt"):
                    found.append(f"cell {cell.id}: a picture without alternative text; use plots.show(figure, alt=...)")
    return found


def _command(args: argparse.Namespace) -> int:
    chosen = select(course_root(args.root), args.lessons)
    found = [problem for lesson in chosen for problem in problems(lesson)]
    print("\n".join([*found, f"{len(chosen)} lessons: {len(found) or 'no'} broken rules"]))
    return 1 if found else 0


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "lint",
        help="check lessons against their budgets (authors)",
        description="Check the budgets, the frame and the alternative texts of lessons.",
        epilog="example: finetune-lab lint 01",
    )
    parser.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers; all when none is given")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)
