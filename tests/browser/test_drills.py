"""The drills of lesson 16 in JupyterLab, by keyboard alone: an answer is judged, giving up is stored, the next one comes."""

import pytest

HERE = (
    "e => e.contains(document.activeElement) ? document.activeElement.tagName + document.activeElement.innerText : ''"
)


@pytest.fixture(scope="module")
def shown(explorers):
    """What the drill says after each step of a learner who has no mouse."""
    page, cell = explorers.page, explorers.cell(-1)
    drill = cell.locator(".widget-vbox").first

    def tab_to(what):
        for _ in range(20):
            page.keyboard.press("Tab")
            if drill.evaluate(HERE) == what:
                return
        pytest.fail(f"twenty times Tab do not lead to {what}")

    def after(key, wanted):
        page.keyboard.press(key)
        page.wait_for_function(
            "([e, text]) => e.innerText.includes(text)", arg=[drill.element_handle(), wanted], timeout=30_000
        )
        return drill.inner_text()

    cell.focus()
    said = {"start": drill.inner_text()}
    tab_to("INPUT")
    unit = drill.locator("input:focus").get_attribute("placeholder").partition("(")[2].rstrip(")")
    page.keyboard.type("no idea")
    said["nonsense"] = after("Enter", "is not a number")
    page.keyboard.press("Control+A")
    page.keyboard.type(f"0.001 {unit}")
    said["wrong"] = after("Enter", "[x]")
    tab_to("BUTTONGive up")
    said["given up"] = after("Enter", "stored:")
    explorers.keep("drill", cell.locator(".jp-Cell-outputWrapper"))
    said["focus"] = drill.evaluate(HERE)
    said["next"] = after("Enter", "2 of ")
    return said


def test_the_first_question_is_there(shown):
    assert shown["start"].startswith("1 of ")


def test_what_is_no_answer_is_not_judged(shown):
    assert "'no idea' is not a number" in shown["nonsense"] and "[x]" not in shown["nonsense"]


def test_a_wrong_answer_is_called_wrong_and_may_be_tried_again(shown):
    assert "[x]" in shown["wrong"] and "stored" not in shown["wrong"]


def test_giving_up_shows_the_answer_and_where_it_is_taught(shown):
    assert "stored: again" in shown["given up"] and "Answer." in shown["given up"] and "Sources:" in shown["given up"]


def test_enter_alone_leads_to_the_next_question(shown):
    assert shown["focus"] == "BUTTONNext question" and shown["next"].startswith("2 of ")


def test_the_drill_raised_no_error(explorers, shown):
    assert explorers.errors() == [] and explorers.complaints == []
