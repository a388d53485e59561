import nbformat
import pytest

from finetune_lab.course import lint
from finetune_lab.course.lessons import lessons

HEADER = """# ---
# jupyter:
#   finetune_lab:
#     title: Masks
#     minutes: 75
#     needs: lesson 00
#     budget: lesson
# ---
"""
FIRST = """# 03 · Masks
# **You will hide the prompt.**
#
# Minutes: 75. You need: lesson 00. You will be able to: mask."""
PARTS = ["The problem in numbers", "Exercises", "The library", "Myths", "What breaks in practice", "Summary"]
END = "References: arXiv 2106.09685. Where next: lesson 04. Drills: mask."


def text(content):
    return f"\n# %% [markdown]\n# {content}\n"


def good():
    """A lesson inside every budget, as a list of cells that tests spoil one at a time."""
    cells = [text(FIRST)] + [text(f"## {part}\n# " + "word " * 300) for part in PARTS] + [text(END)]
    cells += [f"\n# %%\nvalue_{i} = {i}\n" for i in range(36)]
    cells += [f"\n# %%\ndef f(): pass\nf = check.exercise_{i}(f)\n" for i in range(5)]
    cells += [f'\n# %%\npredict.number("03-p{i}", 1, 2)\n' for i in range(3)]
    return cells


def problems(tmp_path, cells, header=HEADER):
    (tmp_path / "solutions").mkdir(exist_ok=True)
    (tmp_path / "solutions" / "03_masks.py").write_text(header + "".join(cells))
    return lint.problems(lessons(tmp_path)[0])


def test_a_lesson_inside_its_budgets_has_no_problems(tmp_path):
    assert problems(tmp_path, good()) == []


def replaced(old, new):
    return lambda cells: [cell.replace(old, new) for cell in cells]


LONG = "".join(f"x{i} = {i}\n" for i in range(41))


@pytest.mark.parametrize("spoil, says", [
    (lambda cells: cells[:8] + cells[20:], "expected 45 to 65"),
    (lambda cells: cells + cells[8:28], "expected 45 to 65"),
    (replaced("word " * 300, "word " * 200), "words, expected 1500 to 2800"),
    (replaced("f = check.exercise_0(f)", "f()"), "4 exercises, expected 5 to 7"),
    (replaced('predict.number("03-p0"', 'print("03-p0"'), "2 predictions"),
    (lambda cells: [*cells, f"\n# %%\n{LONG}"], "41 lines of code"),
    (lambda cells: [c if "value_" not in c else "\n# %%\n" + "x = 1\n" * 11 for c in cells], "median code cell has 11"),
    (replaced("03 · Masks", "03 · Labels"), "the first line is"),
    (replaced("Minutes: 75", "Minutes: 60"), "must say 'Minutes: 75'"),
    (replaced("**", ""), "a bold promise"),
    (replaced("## Myths", "## Legends"), "## ... myths ..."),
    (lambda cells: [cells[0], cells[4], *cells[1:4], *cells[5:]], "## ... myths ..."),
    (replaced("2106.09685", "a paper"), "an arXiv id"),
    (replaced("value_0 = 0", "# ![ ](x.png)\nvalue_0 = 0"), None),
    (replaced("## The library", "![](x.png)\n# ## The library"), "without alternative text"),
    (replaced("## The library", '<img src="x.png">\n# ## The library'), "without alternative text"),
    (replaced("value_0 = 0", "%matplotlib inline"), "magic"),
    (replaced("value_0 = 0", "!pip install x"), "magic"),
    (replaced("value_0 = 0", "import requests"), "no network"),
    (replaced("value_0 = 0", "from urllib.request import urlopen"), "no network"),
    (replaced("value_0 = 0", "import subprocess"), "nothing is installed"),
    (replaced("value_0 = 0", "plt.show()"), "plots.show"),
    (replaced("def f(): pass\nf = check.exercise_1", "f = check.exercise_1"), "must stand in the cell that defines f"),
])  # fmt: skip
def test_each_broken_rule_is_named_alone(spoil, says, tmp_path):
    found = problems(tmp_path, spoil(good()))
    if says is None:
        assert found == []
    else:
        assert len(found) == 1 and says in found[0], found


def test_the_start_lesson_has_its_own_budget(tmp_path):
    header = HEADER.replace("budget: lesson", "budget: start")
    assert any("expected 1 to 35" in problem for problem in problems(tmp_path, good(), header))
    assert problems(tmp_path, [good()[0], good()[-1]], header) == []


def test_an_executed_picture_needs_alternative_text(tmp_path):
    assert problems(tmp_path, good()) == []
    lesson = lessons(tmp_path)[0]
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBO"})
    cell = nbformat.v4.new_code_cell("x", id="03-009", outputs=[picture])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), lesson.solution)
    assert "cell 03-009: a picture without alternative text" in lint.problems(lesson)[0]
    picture.metadata = {"image/png": {"alt": "a curve"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), lesson.solution)
    assert lint.problems(lesson) == []


def test_words_are_counted_as_a_reader_counts_them():
    assert lint.words("Two words, `code here` $x + y$ [a link](https://example.org/a/b)\n\n```\nnot this\n```") == 4
