"""Where no kernel runs, each explorer is a still: on a web page made by nbconvert, and in a solution that was only opened."""

import nbformat
import pytest
from explorer_cells import CELLS, DRILL
from jupyterlab_page import SCREENSHOTS
from nbconvert import HTMLExporter

STILLS = {**CELLS, "drill": DRILL}


@pytest.fixture(scope="module")
def web_page(browser, tmp_path_factory):
    """The explorer cells of the solutions with their outputs, as nbconvert shows them."""
    notebook = nbformat.v4.new_notebook(cells=list(STILLS.values()))
    file = tmp_path_factory.mktemp("page") / "stills.html"
    file.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    page = browser.new_page(viewport={"width": 900, "height": 1200})
    page.goto(file.as_uri(), wait_until="domcontentloaded")
    page.locator("img").last.wait_for()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "stills.png", full_page=True)
    yield page
    page.close()


@pytest.mark.parametrize("lesson", STILLS)
def test_a_web_page_shows_the_picture_or_table_and_the_text(web_page, lesson):
    output = web_page.locator(".jp-CodeCell").nth(list(STILLS).index(lesson)).locator(".jp-OutputArea")
    assert "Error displaying widget" not in output.inner_text() and output.locator(".jupyter-widgets").count() == 0
    if lesson == "drill":
        assert output.locator("summary", has_text="Show the answer").is_visible()
        return
    assert output.locator("pre").last.inner_text().strip()
    pictures = output.locator("img")
    if pictures.count():
        assert pictures.last.evaluate("e => e.naturalWidth > 300 && e.alt.length > 40")
    else:
        assert "●" in output.inner_text()  # the table of tokens


def test_a_solution_that_was_only_opened_shows_its_still(lab):
    notebook = lab.open("solutions/03_lora_and_dora.ipynb")
    picture = notebook.page.locator(".jp-OutputArea img[alt*='Singular values of the full update']")
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("e => e.naturalWidth > 300")
    assert notebook.page.get_by_text("rank 8 can hold").last.is_visible()
    notebook.keep("still-in-jupyterlab")
    assert notebook.complaints == [] and notebook.page.get_by_text("Error displaying widget").count() == 0
