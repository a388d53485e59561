import json

import lesson_fixture as fixture
import nbformat
import pytest

from finetune_lab.course import build, execute
from finetune_lab.course.lessons import course_root, lessons, select
from finetune_lab.errors import UserError


@pytest.fixture
def lesson(tmp_path):
    return lessons(fixture.source_file(tmp_path / "course"))[0]


@pytest.fixture
def executed(lesson):
    """The lesson built, its outputs made without a kernel (test_execute.py has the real thing)."""
    build.build(lesson)
    notebook = nbformat.read(lesson.solution, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="hide_prompt\n")]
    notebook.cells[-1].execution_count = 4
    build._stamp(notebook, lesson)
    lesson.solution.write_text(build.to_text(notebook))
    assert build.problems(lesson) == []
    return lesson


def sources(path):
    return {cell.id: cell.source for cell in nbformat.read(path, as_version=4).cells}


def test_the_learner_gets_stubs_at_the_right_indentation_and_no_solution_cell(lesson):
    build.build(lesson)
    cells = sources(lesson.notebook)
    assert list(cells) == ["99-000", "99-001", "99-002", "99-003", "99-005"]
    assert cells["99-003"].endswith("    # YOUR CODE HERE\n    raise NotImplementedError")
    assert cells["99-002"] == '# YOUR ANSWER HERE\nguess = ...\npredict.number("99-p1", guess, 2 + 3)'
    assert "BEGIN SOLUTION" not in lesson.notebook.read_text()


def test_the_solution_is_complete_and_ids_agree(lesson):
    build.build(lesson)
    complete, blank = sources(lesson.solution), sources(lesson.notebook)
    assert "labels[:, :start] = -100" in complete["99-003"] and "99-004" in complete
    assert set(blank) < set(complete)


def test_two_builds_give_the_same_bytes(lesson):
    build.build(lesson)
    before = lesson.solution.read_bytes(), lesson.notebook.read_bytes()
    lesson.solution.unlink(), lesson.notebook.unlink()
    build.build(lesson)
    assert before == (lesson.solution.read_bytes(), lesson.notebook.read_bytes())


def test_outputs_are_kept_while_the_source_is_the_same_and_dropped_when_it_changes(executed):
    before = executed.solution.read_bytes()
    build.build(executed)
    assert executed.solution.read_bytes() == before
    executed.source.write_text(executed.source.read_text().replace("Hide the prompt.", "Hide it."))
    assert "add --execute" in build.build(executed)[0]
    assert '"text": [' not in executed.solution.read_text()


@pytest.mark.parametrize(
    "path, change, says",
    [
        ("source", lambda text: text + "\n# %%\n1 + 1\n", "has outputs of another source"),
        ("solution", lambda text: text.replace('"hide_prompt\\n"', '"better\\n"'), "outputs that were edited by hand"),
        (
            "solution",
            lambda text: text.replace("Hide the prompt.", "Hide."),
            "was edited by hand or by an older builder",
        ),
        ("solution", lambda text: text[:-9], "cannot be read"),
        ("notebook", lambda text: text.replace("Hide the prompt.", "Hide."), "was edited by hand or executed"),
        ("notebook", None, "is missing"),
        ("solution", None, "is missing"),
    ],
)
def test_check_finds_what_is_stale_and_says_why(executed, path, change, says):
    file = getattr(executed, path)
    file.write_text(change(file.read_text())) if change else file.unlink()
    assert any(says in problem for problem in build.problems(executed))


def test_a_notebook_that_somebody_worked_in_is_kept_beside_the_new_one(lesson):
    build.build(lesson)
    mine = lesson.notebook.read_text().replace("raise NotImplementedError", "return ids")
    lesson.notebook.write_text(mine)
    told = build.build(lesson)
    copies = list(lesson.notebook.parent.glob("*.mine-*"))
    assert [copy.read_text() for copy in copies] == [mine] and copies[0].name in told[-1]
    build.build(lesson)
    assert len(list(lesson.notebook.parent.glob("*.mine-*"))) == 1


def test_an_untouched_notebook_of_an_older_source_is_replaced_without_a_copy(lesson):
    build.build(lesson)
    lesson.source.write_text(lesson.source.read_text().replace("Hide the prompt.", "Hide it."))
    build.build(lesson)
    assert not list(lesson.notebook.parent.glob("*.mine-*")) and "Hide it." in lesson.notebook.read_text()


@pytest.mark.parametrize(
    "bad, says",
    [
        ("def f():\n    # BEGIN SOLUTION\n    return 1", "pair up"),
        ("def f():\n    # BEGIN SOLUTION\n    return 1\n# END SOLUTION", "pair up"),
        ("# BEGIN SOLUTION\ndef f(): pass\n# END SOLUTION", "left margin"),
    ],
)
def test_broken_marks_are_named_with_their_cell(bad, says):
    with pytest.raises(UserError, match=says):
        build.blank(bad, "01_x.py, cell 01-003")


def test_tidy_keeps_pictures_and_drops_widgets_and_stderr():
    new = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell(
        "x",
        id="a",
        outputs=[
            new("stream", name="stderr", text="UserWarning: careful\n"),
            new(
                "display_data",
                data={"image/png": "iVBO", "text/html": "<img>", execute.WIDGET: {"model_id": "1"}},
                metadata={"image/png": {"alt": "a curve"}},
            ),
            new("display_data", data={"text/html": "<table>", "text/plain": "t"}),
        ],
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert execute.tidy(notebook) == ["a: UserWarning: careful"]
    assert [sorted(output.data) for output in cell.outputs] == [["image/png", "text/html"], ["text/html", "text/plain"]]


@pytest.mark.parametrize("text", ["/home/ada/course", "saved to /tmp/x/model", r"C:\Users\ada"])
def test_paths_of_a_machine_are_not_published(text):
    output = nbformat.v4.new_output("stream", name="stdout", text=text)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", id="a", outputs=[output])])
    assert "path of this machine" in execute.publishable(notebook)[0]


def test_ordinary_slashes_and_addresses_are_no_paths_and_300_kb_is_the_limit():
    def notebook(text):
        output = nbformat.v4.new_output("stream", name="stdout", text=text)
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", id="a", outputs=[output])])

    assert execute.publishable(notebook("and/or 3/4 https://example.org/home/x ./tmp/x")) == []
    assert "limit" in execute.publishable(notebook("x" * 300_000))[0]


def test_lessons_are_found_by_number_name_or_path(lesson):
    for word in ("99", "99_masks", "solutions/99_masks.py"):
        assert select(lesson.root, [word]) == [lesson]
    with pytest.raises(UserError, match="no lesson '7'. The lessons are: 99_masks"):
        select(lesson.root, ["7"])


def test_a_folder_without_lessons_is_refused(tmp_path):
    with pytest.raises(UserError, match="solutions/NN_name.py"):
        course_root(tmp_path)


def test_a_header_without_minutes_is_refused(lesson):
    lesson.source.write_text(lesson.source.read_text().replace("#     minutes: 5\n", ""))
    with pytest.raises(UserError, match="lacks minutes"):
        build.build(lesson)


def test_the_header_is_in_the_notebooks_metadata(lesson):
    build.build(lesson)
    about = json.loads(lesson.notebook.read_text())["metadata"]["finetune_lab"]
    assert (about["title"], about["minutes"], about["lesson"]) == ("Masks", 5, "99")
