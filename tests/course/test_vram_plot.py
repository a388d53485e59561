"""The pictures of lesson 02: what they show is the ledger, and the explorer answers at once."""

import time

import matplotlib.pyplot as plt
import pytest

from finetune_lab.course import vram_plot
from finetune_lab.methods.memory import CATEGORIES, Recipe, estimate, from_config
from finetune_lab.methods.memory.presets import GPUS, PRESETS

LEDGERS = {
    method: estimate(from_config(PRESETS["llama-3.2-1b"]), Recipe(method=method, seq=1024))
    for method in ("full", "qlora")
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_bar_is_as_high_as_the_bytes_on_the_device():
    ax = vram_plot.stack(LEDGERS, "title").axes[0]
    heights = {}
    for patch in ax.patches:
        x = round(patch.get_x() + patch.get_width() / 2)
        heights[x] = heights.get(x, 0) + patch.get_height()
    for x, ledger in enumerate(LEDGERS.values()):
        assert heights[x] == pytest.approx(ledger.total_on_device / 1e9)


def test_the_cards_line_is_drawn_and_named():
    ax = vram_plot.stack(LEDGERS, "title", ("T4", GPUS["T4"])).axes[0]
    assert ax.lines[-1].get_ydata()[0] == GPUS["T4"] / 1e9
    assert any(text.get_text().startswith("T4") for text in ax.texts)


def test_labels_of_a_small_bar_under_a_high_line_keep_apart():
    figure, _ = vram_plot.explore("smollm2-135m", "lora", gpu="RTX-4090")
    ax = figure.axes[0]
    figure.canvas.draw()
    labels = [text.get_window_extent() for text in ax.texts if text.get_fontsize() == 8]
    assert not any(a.overlaps(b) for n, a in enumerate(labels) for b in labels[:n])


def test_every_category_has_a_place_and_a_look_of_its_own():
    assert sorted(vram_plot.LOOK) == sorted(CATEGORIES)
    assert len(set(vram_plot.LOOK.values())) == len(CATEGORIES)


def test_the_timeline_reaches_the_peak_and_names_it():
    ledger = LEDGERS["full"]
    ax = vram_plot.timeline(ledger, "title").axes[0]
    tops = [collection.get_datalim(ax.transData).y1 for collection in ax.collections]
    assert max(tops) == pytest.approx(ledger.peak / 1e9)
    assert ledger.peak_moment in [label.get_text() for label in ax.get_xticklabels()]


def test_the_explorer_says_peak_moment_and_verdict():
    figure, text = vram_plot.explore("llama-3.1-8b", "qlora", 1024, 1, True, "adamw", "RTX-4090")
    ledger = estimate(from_config(PRESETS["llama-3.1-8b"]), Recipe(method="qlora", seq=1024, checkpointing=True))
    assert f"{ledger.peak / 1e9:.2f} GB" in text and ledger.peak_moment in text
    assert "Fits into RTX-4090" in text and "fits on RTX-4090" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_an_estimate_takes_less_than_a_tenth_of_a_second(method):
    architecture = from_config(PRESETS["llama-3.1-70b"])
    seconds = []
    for seq in (2048, 4096, 8192):  # the best of three: the answer is kept, so each asks something new
        start = time.process_time()
        estimate(architecture, Recipe(method=method, seq=seq, checkpointing=True))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
