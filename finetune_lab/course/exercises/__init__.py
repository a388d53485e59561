"""One module a lesson: `l01.py` defines the exercises of lesson 01 with `finetune_lab.course.checks.exercise`."""

import ast
from pathlib import Path


def titles() -> dict[str, str]:
    """Every exercise's id and title, read in the sources' `exercise("01.2", "completion labels", ...)`.

    Nothing is imported: the modules need torch, which takes seconds to load.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("l[0-9]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exercise":
                id, title = (ast.literal_eval(word) for word in node.args[:2])
                found[id] = title
    return found
