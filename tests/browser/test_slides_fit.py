"""Slides in a browser: each is shown whole, and nothing goes wrong in the page."""

from pathlib import Path

import pytest

from finetune_lab.course import slides
from finetune_lab.course.lessons import select

ROOT = Path(__file__).resolve().parents[2]
BELOW = "() => { const slide = Reveal.getCurrentSlide(); return slide.scrollHeight - slide.clientHeight }"


@pytest.mark.parametrize("number", ["02", "05"])  # those with the longest cells
def test_every_slide_is_shown_whole(browser, tmp_path, number):
    text, _ = slides.page(select(ROOT, [number])[0])
    (tmp_path / "slides.html").write_text(text, encoding="utf-8")
    page, said = browser.new_page(viewport={"width": 1280, "height": 720}), []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "slides.html").as_uri())
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    below = []
    for slide in range(1, page.evaluate("Reveal.getTotalSlides()") + 1):
        below.append((slide, page.evaluate(BELOW)))
        page.evaluate("Reveal.next()")
    page.close()
    assert [found for found in below if found[1] > 1] == []
    assert said == []
