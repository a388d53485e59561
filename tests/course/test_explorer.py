import matplotlib
import matplotlib.pyplot as plt
import pytest
from ipywidgets import Dropdown, IntSlider, SelectionSlider, ToggleButtons

from finetune_lab.course import execute, plots
from finetune_lab.course.explorer import Explorer
from finetune_lab.errors import UserError

matplotlib.use("Agg")


def line(rank):
    return plots.line([0, 1], [0, rank], title="t", x="x", y="y"), f"rank {rank} <tag>"


def table(word):
    if word == "bad":
        raise ValueError("no <such> word")
    return f"<table><tr><td>{word}</td></tr></table>", f"word: {word}"


def test_one_output_is_a_widget_a_picture_with_alt_and_text():
    data, metadata = Explorer(line, alt="A line.", rank=IntSlider(8, 1, 64))._repr_mimebundle_()
    assert {execute.WIDGET, "image/png", "text/html", "text/plain"} == set(data)
    assert 'alt="A line. rank 8' in data["text/html"] and "<pre>rank 8 &lt;tag&gt;</pre>" in data["text/html"]
    assert metadata["image/png"]["alt"].startswith("A line. rank 8")
    assert data["text/plain"] == "A line.\nrank 8 <tag>"
    assert plt.get_fignums() == []


def test_a_slider_redraws_once_released_and_says_so_to_screen_readers():
    slider = IntSlider(8, 1, 64)
    explorer = Explorer(line, alt="A line.", rank=slider)
    view, status = explorer.children[-2:]
    before = view.value
    slider.value = 16
    assert view.value != before and 'alt="A line. rank 16' in view.value
    assert status.value.startswith('<pre role="status" aria-live="polite"')
    assert status.value.endswith(">rank 16 &lt;tag&gt;</pre>")
    assert slider.continuous_update is False and slider.description == "rank"
    assert plt.get_fignums() == []


def test_a_table_has_a_static_fallback_without_a_picture():
    data, _ = Explorer(table, alt="Tokens.", word=Dropdown(options=["a", "b"]))._repr_mimebundle_()
    assert "image/png" not in data and "<td>a</td>" in data["text/html"] and "word: a" in data["text/html"]


def test_an_error_in_the_plot_is_shown_and_not_swallowed():
    menu = Dropdown(options=["a", "bad"])
    explorer = Explorer(table, alt="Tokens.", word=menu)
    with pytest.raises(ValueError, match="no <such> word"):
        menu.value = "bad"
    assert "ValueError: no &lt;such&gt; word" in explorer.children[-1].value


def test_an_explorer_without_alt_is_refused():
    with pytest.raises(UserError, match="alt"):
        Explorer(line, alt=" ", rank=IntSlider(8, 1, 64))


@pytest.mark.parametrize("options, twin", [(["a", "b"], ToggleButtons), (list("abcdefg"), SelectionSlider)])
def test_a_menu_is_shown_as_something_that_keeps_its_arrow_keys(options, twin):
    menu = Dropdown(options=options)
    explorer = Explorer(table, alt="Tokens.", word=menu)
    assert type(explorer.children[0]) is twin and explorer.children[0].description == "word"
    explorer.children[0].value = "b"
    assert menu.value == "b" and "<td>b</td>" in explorer.children[1].value
    menu.value = "a"
    assert explorer.children[0].value == "a"
