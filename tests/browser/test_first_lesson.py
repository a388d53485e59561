"""The learner's first quarter of an hour: JupyterLab opens lesson 00, Run All, an exercise wrong and then right, status."""

import subprocess
import sys

import pytest

WRONG = "return sum(p.strip() == r.strip() for p, r in zip(predictions, references))"
RIGHT = "return sum(p.strip() == r.strip() for p, r in zip(predictions, references)) / max(1, len(predictions))"
TO_DO = "raise NotImplementedError"


@pytest.fixture(scope="module")
def lesson(lab):
    """What opens when JupyterLab has started, after Run All."""
    lesson = lab.open()
    lesson.address = lesson.page.url
    lesson.keep("lesson-00-opened")
    lesson.run_all()
    lesson.keep("lesson-00-ran")
    return lesson


@pytest.fixture(scope="module")
def answers(lesson):
    """The verdicts of exercise 0.1: as it came, with a wrong line, with a right one."""
    texts = lesson.page.locator(".jp-CodeCell").all_inner_texts()
    cell = lesson.cell(next(n for n, text in enumerate(texts) if TO_DO in text))
    prompt, output = cell.locator(".jp-InputPrompt"), cell.locator(".jp-OutputArea")
    verdicts, here = [output.inner_text()], TO_DO
    for line in (WRONG, RIGHT):
        replace_line(lesson.page, cell, here, line)
        before, here = prompt.inner_text(), line
        lesson.page.keyboard.press("Shift+Enter")
        lesson.page.wait_for_function(
            "([e, before]) => e.innerText !== before && /\\d/.test(e.innerText)", arg=[prompt.element_handle(), before]
        )
        verdicts.append(output.inner_text())
        cell.scroll_into_view_if_needed()
        lesson.keep(f"exercise-{len(verdicts) - 1}")
    return verdicts


def replace_line(page, cell, old: str, new: str) -> None:
    """Type over a line of a cell, from its first letter on."""
    cell.locator(".cm-line", has_text=old).click()
    page.keyboard.press("End")
    page.keyboard.press("Shift+Home")
    page.keyboard.type(new)


def test_jupyterlab_opens_the_first_lesson_and_asks_nothing(lesson):
    assert lesson.address.endswith("/lab/tree/notebooks/00_start_here.ipynb")
    assert lesson.page.locator("h1", has_text="Start here").is_visible()
    assert lesson.page.locator(".jp-Dialog, .Toastify__toast").count() == 0


def test_lesson_00_runs_to_its_end_by_run_all(lesson):
    assert lesson.errors() == []


def test_its_last_picture_is_there(lesson):
    picture = lesson.page.locator(".jp-OutputArea img").last
    assert "From" in picture.get_attribute("alt") and picture.evaluate("e => e.naturalWidth") > 500


def test_an_exercise_that_is_not_written_does_not_stop_the_lesson(answers):
    assert "[ ]" in answers[0]


def test_a_wrong_answer_gets_its_hint(answers):
    assert "[x]" in answers[1] and "divide by the number of predictions" in answers[1]


def test_a_right_answer_gets_its_ok(answers):
    assert "[ok]" in answers[2] and "[x]" not in answers[2]


def test_status_shows_the_exercise_as_done(lab, answers):
    command = [sys.executable, "-m", "finetune_lab", "status"]
    shown = subprocess.run(command, env=lab.environment, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("00_start_here: 1 of 1 exercises\n  [ok] 00.1 exact match")


def test_the_page_had_nothing_to_complain_about(lesson):
    assert lesson.complaints == []


def test_no_page_of_jupyterlab_asked_for_anything_outside_this_machine(lab, lesson):
    assert lab.outside == []
