"""`finetune-lab build`: one lesson source -> the learner's notebook and the solution notebook.

`solutions/NN_name.py` (jupytext percent format) is the only file that people edit. Its header declares the lesson:

    # ---
    # jupyter:
    #   finetune_lab:
    #     title: Loss masking          # same words as the first heading
    #     minutes: 75                  # for a learner
    #     needs: lesson 00             # one line
    #     budget: lesson               # or `start`: lint.py holds the two budgets
    # ---

What the builder changes:
- `# BEGIN SOLUTION ... # END SOLUTION` inside a function or class becomes `# YOUR CODE HERE` and
  `raise NotImplementedError` at the same indentation;
- the same marks at the left margin hold assignments (a number, a guess): each `name = value` becomes `name = ...`,
  so that the cell still runs;
- a cell tagged `solution` is only in the solution notebook;
- cell ids are `NN-003`: the position in the source, so a cell has one id in both notebooks.

Every run gives the same bytes. `--execute` runs the solution on the tiny model and keeps its outputs, without
stderr and references to live widgets. The notebook's metadata then say where they came from:
`source_sha256` covers the text of the lesson's `.py` file (not the package, the model or the libraries);
`outputs_sha256` covers the outputs as they were kept. `--check` compares both and rebuilds the rest in memory.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat

from finetune_lab.course import execute
from finetune_lab.course.lessons import Lesson, course_root, keep_mine, select, write_atomic
from finetune_lab.errors import UserError

_REGION = re.compile(r"^([ \t]*)# BEGIN SOLUTION[^\n]*\n(.*?)^\1# END SOLUTION[^\n]*$", re.DOTALL | re.MULTILINE)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_source(lesson: Lesson) -> str:
    return lesson.source.read_text(encoding="utf-8").replace("\r\n", "\n")


def blank(source: str, where: str) -> str:
    """The code of a cell with its solution regions taken out.

    Raises:
        UserError: marks without a partner, or a region at the left margin that holds anything but assignments.
    """

    def stub(match: re.Match) -> str:
        indent, body = match.groups()
        if indent:
            return f"{indent}# YOUR CODE HERE\n{indent}raise NotImplementedError"
        lines = ["# YOUR ANSWER HERE"]
        for node in ast.parse(body).body:
            if not (isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)):
                raise UserError(
                    f"{where}: a solution region at the left margin may only hold `name = value` lines; "
                    "put the marks inside the function or class, or tag the whole cell `solution`."
                )
            lines += [f"{target.id} = ..." for target in node.targets]
        return "\n".join(lines)

    result = _REGION.sub(stub, source)
    if "BEGIN SOLUTION" in result or "END SOLUTION" in result:
        raise UserError(f"{where}: BEGIN SOLUTION and END SOLUTION must pair up at the same indentation.")
    return result


def parse(lesson: Lesson) -> nbformat.NotebookNode:
    """The complete lesson as a notebook without outputs, with deterministic ids and only the metadata we mean."""
    notebook = jupytext.reads(read_source(lesson), fmt="py:percent")
    about = dict(notebook.metadata.get("finetune_lab", {}))
    missing = [key for key in ("title", "minutes", "needs") if key not in about]
    if missing:
        raise UserError(
            f"{lesson.source.name}: the header lacks {', '.join(missing)} under jupyter: finetune_lab: "
            "(the docstring of finetune_lab/course/build.py shows one)."
        )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{lesson.number}-{index:03d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key != "lines_to_next_cell"}
    notebook.metadata = {
        "finetune_lab": {**about, "lesson": lesson.number},
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
    }
    return nbformat.from_dict(notebook)


def to_text(notebook: nbformat.NotebookNode) -> str:
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def sources_sha256(notebook: nbformat.NotebookNode) -> str:
    return sha256(json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells]))


def learner_notebook(lesson: Lesson) -> str:
    """The text of notebooks/NN_name.ipynb: exercises blank, nothing executed.

    `sources_sha256` in its metadata tells a notebook that somebody wrote in from one that nobody touched.
    """
    notebook = parse(lesson)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = blank(cell.source, f"{lesson.source.name}, cell {cell.id}")
    notebook.metadata["finetune_lab"]["sources_sha256"] = sources_sha256(notebook)
    return to_text(notebook)


def _outputs(notebook: nbformat.NotebookNode) -> list:
    return [[c.id, c.execution_count, c.outputs] for c in notebook.cells if c.cell_type == "code"]


def _stamp(notebook: nbformat.NotebookNode, lesson: Lesson) -> None:
    notebook.metadata["finetune_lab"]["executed"] = {
        "covers": f"the text of {lesson.source.name}",
        "model": "tiny",
        "outputs_sha256": sha256(json.dumps(_outputs(notebook), sort_keys=True)),
        "source_sha256": sha256(read_source(lesson)),
    }


def solution_notebook(lesson: Lesson) -> tuple[str, str | None]:
    """The text of solutions/NN_name.ipynb, and what is wrong with its outputs on disk (None: nothing).

    Outputs on disk are kept when they were made from this very source and nobody edited them.
    """
    notebook = parse(lesson)
    if not lesson.solution.exists():
        return to_text(notebook), "is missing"
    try:
        old = nbformat.read(lesson.solution, as_version=4)
        executed = old.metadata["finetune_lab"]["executed"]
        outputs = _outputs(old)
    except KeyError:
        return to_text(notebook), "was never executed"
    except Exception as error:  # noqa: BLE001 (nbformat raises many kinds for a damaged file)
        return to_text(notebook), f"cannot be read ({type(error).__name__})"
    if executed.get("source_sha256") != sha256(read_source(lesson)):
        return to_text(notebook), "has outputs of another source"
    if executed.get("outputs_sha256") != sha256(json.dumps(outputs, sort_keys=True)):
        return to_text(notebook), "has outputs that were edited by hand"
    by_id = {cell_id: (count, outs) for cell_id, count, outs in outputs}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = by_id.get(cell.id, (None, []))
    _stamp(notebook, lesson)
    return to_text(notebook), None


def executed(lesson: Lesson, timeout: float = 300) -> tuple[str, float]:
    """Run the solution once on the tiny model, in an empty folder that is also its home; (text with outputs, seconds).

    Raises:
        UserError: a cell failed, or its outputs may not be published.
    """
    notebook = parse(lesson)
    settings = {"FINETUNE_LAB_CHECK": "solved", "FINETUNE_LAB_MODEL": "tiny", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="finetune-lab-") as folder:
        settings |= {"FINETUNE_LAB_HOME": folder, "OMP_NUM_THREADS": "1"}
        seconds, broke = execute.run(notebook, Path(folder), settings, timeout, stop_at_error=True)
    failures = [f"cell {cell}: {error}" for cell, error in execute.failures(notebook)]
    if broke or failures:
        raise UserError(f"{lesson.source.name} fails: {broke or failures[0]}")
    for line in execute.tidy(notebook):
        print(f"{lesson.name}: dropped stderr of {line}", file=sys.stderr)
    notebook.metadata["language_info"] = parse(lesson).metadata["language_info"]
    if why := execute.publishable(notebook):
        raise UserError(f"{lesson.source.name}: outputs not kept: {'; '.join(why)}.")
    _stamp(notebook, lesson)
    return to_text(notebook), seconds


def untouched(path: Path) -> bool:
    """Whether a learner's notebook is as the builder wrote it: no cell changed, nothing executed."""
    try:
        notebook = nbformat.read(path, as_version=4)
        return notebook.metadata["finetune_lab"]["sources_sha256"] == sources_sha256(notebook) and not any(
            cell.get("outputs") for cell in notebook.cells
        )
    except Exception:  # noqa: BLE001 (not readable, or not ours: it is treated as somebody's work)
        return False


def write_notebook(lesson: Lesson, text: str) -> Path | None:
    """Write the learner's notebook. If somebody worked in the one on disk, keep that beside it and return its path."""
    path = lesson.notebook
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return None
    kept = keep_mine(path) if path.exists() and not untouched(path) else None
    write_atomic(path, text)
    return kept


def build(lesson: Lesson, run: bool = False) -> list[str]:
    """Build one lesson; return a line for each thing worth telling."""
    told = []
    fresh = learner_notebook(lesson)
    if run:
        solution, seconds = executed(lesson)
        told.append(f"executed in {seconds:.0f} s, {len(solution.encode()) / 1000:.0f} kB")
    else:
        solution, problem = solution_notebook(lesson)
        if problem:
            told.append(f"no outputs: the solution notebook {problem}; add --execute")
    kept = write_notebook(lesson, fresh)
    if kept:
        told.append(f"kept your copy as {kept.name}")
    if not lesson.solution.exists() or lesson.solution.read_text(encoding="utf-8") != solution:
        write_atomic(lesson.solution, solution)
    return told


def problems(lesson: Lesson) -> list[str]:
    """What `--check` finds: generated files that are not what the source gives."""
    found = []
    solution, problem = solution_notebook(lesson)
    if problem:
        found.append(f"{lesson.solution.name} in solutions/ {problem}")
    elif lesson.solution.read_text(encoding="utf-8") != solution:
        found.append(f"{lesson.solution.name} in solutions/ was edited by hand or by an older builder")
    if not lesson.notebook.exists():
        found.append(f"{lesson.notebook.name} in notebooks/ is missing")
    elif lesson.notebook.read_text(encoding="utf-8") != learner_notebook(lesson):
        why = "is stale" if untouched(lesson.notebook) else "was edited by hand or executed"
        found.append(f"{lesson.notebook.name} in notebooks/ {why}")
    return found


def _command(args: argparse.Namespace) -> int:
    chosen = select(course_root(args.root), args.lessons)
    if args.check:
        found = [problem for lesson in chosen for problem in problems(lesson)]
        for problem in found:
            print(problem)
        numbers = sorted({problem[:2] for problem in found})
        print(
            f"{len(found)} stale: finetune-lab build {' '.join(numbers)} --execute"
            if found
            else f"{len(chosen)} lessons: every generated file is up to date"
        )
        return 1 if found else 0
    for lesson in chosen:
        print(f"{lesson.name}: {'; '.join(['built', *build(lesson, run=args.execute)])}", flush=True)
    return 0


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "build",
        help="make the notebooks from the lesson sources (authors)",
        description="Make notebooks/NN_name.ipynb and solutions/NN_name.ipynb from solutions/NN_name.py.",
        epilog="example: finetune-lab build 01 --execute",
    )
    parser.add_argument("lessons", nargs="*", metavar="NN", help="lesson numbers; all when none is given")
    parser.add_argument("--execute", action="store_true", help="run the solution on the tiny model, keep its outputs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a generated file is stale")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)
