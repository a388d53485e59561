"""The builder with a real kernel: one test, because a kernel costs seconds."""

import lesson_fixture as fixture
import nbformat

from finetune_lab.course import build
from finetune_lab.course.lessons import lessons
from finetune_lab.errors import UserError

EXTRA = """
# %%
import sys

print("careful", file=sys.stderr)
plots.show(plots.line([1, 2], [2.0, 1.0], title="Loss falls", x="step", y="loss (nats)"), alt="a falling line")
"""


def test_execution_keeps_clean_outputs_twice_the_same_and_a_failing_cell_is_named(tmp_path):
    lesson = lessons(fixture.source_file(tmp_path))[0]
    lesson.source.write_text(lesson.source.read_text() + EXTRA)
    build.build(lesson, run=True)
    first = lesson.solution.read_bytes()
    assert build.problems(lesson) == []
    outputs = [
        output for cell in nbformat.read(lesson.solution, as_version=4).cells for output in cell.get("outputs", [])
    ]
    assert "you said 4, it is 5: off by 1" in outputs[0].text
    assert outputs[-1].metadata["image/png"]["alt"] == "a falling line"
    assert set(outputs[-1].data) == {"image/png", "text/html", "text/plain"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    build.build(lesson, run=True)
    assert lesson.solution.read_bytes() == first

    lesson.source.write_text(lesson.source.read_text() + "\n# %%\nraise ValueError('no such mask')\n")
    try:
        build.build(lesson, run=True)
        raise AssertionError("built a lesson that fails")
    except UserError as error:
        assert "cell 99-007: ValueError: no such mask" in str(error)
    assert lesson.solution.read_bytes() == first
