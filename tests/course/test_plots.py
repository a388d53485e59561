import base64
import io
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from finetune_lab.course import plots
from finetune_lab.errors import UserError

matplotlib.use("Agg")


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: a list of (data, metadata); updates replace."""
    out = []

    class Handle:
        def update(self, data, metadata=None, raw=False):
            out[-1] = (data, metadata)

    def display(data, metadata=None, raw=False, display_id=None):
        out.append((data, metadata))
        return Handle() if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    return out


def luminance(colour):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", plots.COLOURS)
def test_marks_stand_out_on_white(colour):
    ratio = 1.05 / (luminance(colour) + 0.05)
    assert ratio >= 3.0


def test_show_publishes_png_with_alt_and_an_escaped_html_twin_and_closes_the_figure(shown):
    plots.show(plots.line([1, 2], [3, 4], title="t", x="x", y="y"), alt='a "rise" <up>')
    data, metadata = shown[0]
    assert metadata["image/png"]["alt"] == data["text/plain"] == 'a "rise" <up>'
    assert 'alt="a &quot;rise&quot; &lt;up&gt;"' in data["text/html"]
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).format == "PNG"
    assert plt.get_fignums() == []


@pytest.mark.parametrize("alt", ["", "  "])
def test_a_picture_without_alt_is_refused(alt):
    with pytest.raises(UserError, match="alt"):
        plots.show(plots.line([1], [1], title="t", x="x", y="y"), alt=alt)


def test_the_same_figure_gives_the_same_small_bytes():
    def draw():
        return plots.png(plots.line(range(50), {"a": list(range(50)), "b": list(range(0, 100, 2))}, "t", "x", "y"))

    assert draw() == draw() and len(draw()) < 30_000
    plt.close("all")


def test_lines_differ_in_marker_and_carry_their_label():
    ax = plots.line([1, 2], {"a": [1, 2], "b": [2, 1]}, "t", "x", "y").axes[0]
    assert len({line.get_marker() for line in ax.lines}) == 2
    assert [text.get_text() for text in ax.texts] == ["a", "b"]
    plt.close("all")


def test_six_lines_are_refused():
    with pytest.raises(UserError, match="at most 5"):
        plots.line([1], {str(i): [i] for i in range(6)}, "t", "x", "y")


def test_bars_show_their_numbers_and_differ_without_colour():
    ax = plots.bars({"full": 1.5, "lora": 0.25}, "t", "loss (nats)", errors={"full": 0.1}).axes[0]
    assert [text.get_text() for text in ax.texts] == ["1.5", "0.25"]
    assert len({patch.get_hatch() for patch in ax.patches}) == 2
    plt.close("all")


def test_prompts_are_escaped_in_the_table(shown):
    plots.side_by_side([("<|user|>hi", "<script>x</script>", "")])
    data, _ = shown[0]
    assert "<script>" not in data["text/html"] and "&lt;|user|&gt;hi" in data["text/html"]
    assert "(nothing)" in data["text/html"]


@pytest.mark.parametrize("live", ["0", "1"])
def test_a_live_curve_leaves_one_picture_with_first_and_last_value_in_its_alt(live, shown, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAB_LIVE", live)
    with plots.LiveCurve("Loss falls", alt="The loss.", every=0) as curve:
        for step in range(1, 4):
            curve(step, 3.0 / step, "ignored")
        assert len(shown) == int(live)
    assert len(shown) == 1
    assert shown[0][1]["image/png"]["alt"] == "The loss. From 3 to 1 in 3 steps."
    assert plt.get_fignums() == []


@pytest.mark.parametrize(("draw", "pictures"), [(0.02, 10), (0.13, 4), (1.0, 1)])
def test_a_live_curve_waits_ten_times_what_a_picture_takes(draw, pictures, shown, monkeypatch):
    """Steps of 0.1 s for 5 s of training: two pictures a second where drawing is cheap, fewer where it is slow."""
    now, drawn = [100.0], []

    def slow_bundle(figure, alt):
        now[0] += draw
        drawn.append(now[0])
        return {}, {}

    monkeypatch.setenv("FINETUNE_LAB_LIVE", "1")
    monkeypatch.setattr(plots, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(plots, "bundle", slow_bundle)
    curve = plots.LiveCurve("Loss falls")
    for step in range(50):
        now[0] += 0.1
        curve(step, 1.0)
    assert abs(len(drawn) - pictures) <= 1
    plt.close("all")


def test_a_page_made_with_nbconvert_has_the_alternative_text():
    import nbformat
    from nbconvert import HTMLExporter

    data, metadata = plots.bundle(plots.line([1, 2], [1, 2], "t", "step", "y"), "a rising line")
    output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    page = HTMLExporter().from_notebook_node(notebook)[0]
    assert 'alt="a rising line"' in page and "No description has been provided" not in page


def test_steps_are_whole_numbers_on_the_axis():
    ax = plots.line([1, 2, 3], [1, 2, 3], "t", "step", "y").axes[0]
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    plt.close("all")
