"""What a guide says about a prediction: the question, what it may be, what stands on the screen, what it came to.

Questions come from the lesson's text, options from the source of `predict.choice`, the rest from the executed solution.
"""

import ast
import re

import nbformat

from finetune_lab.course.lessons import Lesson
from finetune_lab.errors import UserError

_ABOVE = re.compile(r"\bNow\b|\bThe cell\b|\babove tells\b")  # a question that needs what the cell above printed
_SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z`*\"(0-9])")
_ASKS = re.compile(r"\?|\b[Pp]redict\b|\b[Gg]uess which\b")
_THIS = re.compile(r"\bthis one\b")  # a question about what its own cell prints first
SHOWN = 4  # lines of context


def question(text: str) -> str:
    """The last question of a text with what leads to it: two sentences before it, in its paragraph, and one after.

    Where the paragraph begins with a question, the sentence that leads to it ends the paragraph before, in its section.
    """
    text = re.sub(r"(?m)^## .*$", "\n\n##\n\n", re.sub(r"(?s)```.*?```", "", text))
    text = re.sub(r"(?m)^#+ .*$", "\n", text)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    asking = [part for part in paragraphs if _ASKS.search(part)]
    if not asking:
        return ""
    sentences = _SENTENCE.split(asking[-1])
    last = max(i for i, sentence in enumerate(sentences) if _ASKS.search(sentence))
    words = " ".join(sentences[max(0, last - 2) : last + 2])
    words = re.sub(r"\*\*Predict(, then run)?[:.]\*\* ", "", words).strip()
    before = next((part for part in reversed(paragraphs[: paragraphs.index(asking[-1])]) if part), "##")
    if _ASKS.search(sentences[0]) and last <= 2 and before != "##" and not _ASKS.search(before):
        words = f"{_SENTENCE.split(before)[-1]} {words[:1].upper()}{words[1:]}"
    return words[:1].upper() + words[1:]


def spoken(answer: str) -> str:
    """An outcome as people say it: `38.89 %` is 39 %, `0.3143 GB` is 0.31 GB, `'as many'` loses its quotes."""
    found = re.match(r"(-?\d+\.\d+)(?![\d.e])", answer)
    if not found:
        return answer.strip("'")
    value = float(found[1])
    return (f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}") + answer[found.end() :]


def printed(lesson: Lesson) -> dict[str, str]:
    """cell id -> what it printed in the executed solution; empty without outputs."""
    if not lesson.solution.exists():
        return {}
    cells = nbformat.read(lesson.solution, as_version=4).cells
    return {cell.id: "".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in cells}


def answers(texts: dict[str, str]) -> dict[str, str]:
    """prediction id -> what it came to, from what the cells printed."""
    told = re.findall(r"^(\d\d-p\d+): you said .+?, it is (.+?): ", "\n".join(texts.values()), re.MULTILINE)
    return {id: spoken(answer) for id, answer in told}


def choices(source: str, id: str, where: str) -> tuple[str, ...]:
    """The options of a cell's `predict.choice("id", ..., options=...)`, a list of strings or list(NAME) of a dict.

    Raises:
        UserError: the options are written in another way.
    """
    tree = ast.parse(source)
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "predict.choice"
    ]
    call = next((one for one in calls if ast.literal_eval(one.args[0]) == id), None)
    if call is None:
        return ()
    options = next((word.value for word in call.keywords if word.arg == "options"), None)
    if isinstance(options, ast.Call) and ast.unparse(options.func) == "list" and isinstance(options.args[0], ast.Name):
        named = options.args[0].id
        options = next((node.value for node in ast.walk(tree)
                        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == named), None)  # fmt: skip
    items = options.keys if isinstance(options, ast.Dict) else getattr(options, "elts", None)
    if not items or not all(isinstance(item, ast.Constant) for item in items):
        raise UserError(f"{where}: write the options of {id} as a list of strings, like options=['more', 'less'].")
    return tuple(item.value for item in items)


def shown(text: str) -> str:
    """The last lines of what a cell printed, in one; verdicts such as `[ok] 5.3` are no context."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("[")]
    return " / ".join(lines[-SHOWN:])


def context(ask: str, above: str, own: str) -> str:
    """What the room has to see for a question: `above`, the start of its own cell's output, or nothing."""
    if _THIS.search(ask):
        return shown(re.split(r"(?m)^(?:\[ \] )?\d\d-p\d+: ", own)[0])
    return above if _ABOVE.search(ask) else ""
