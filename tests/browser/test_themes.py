"""Explorers can be read in JupyterLab's light and dark theme."""

import pytest
from explorer_cells import CELLS, cell_of

ENOUGH = 4.5  # contrast of text, WCAG 2.1 level AA
# The texts whose colour is too near to what is behind them: [text, contrast].
PALE = """(e, enough) => {
    const rgba = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = part => {
        while (part && rgba(getComputedStyle(part).backgroundColor)[3] < 0.99) part = part.parentElement;
        return part ? getComputedStyle(part).backgroundColor : 'rgb(255, 255, 255)';
    };
    const pale = [], walker = document.createTreeWalker(e, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const part = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        if (!text || !part.checkVisibility()) continue;
        const [a, b] = [getComputedStyle(part).color, behind(part)].map(c => light(rgba(c))).sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < enough) pale.push([text, contrast]);
    }
    return pale;
}"""


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_texts_of_the_explorers_have_contrast(explorers, theme):
    explorers.menu("Settings", "Theme", theme)
    explorers.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
    pale = {}
    for lesson in [*CELLS, "drill"]:
        output = explorers.cell(-1 if lesson == "drill" else cell_of(lesson)).locator(".jp-Cell-outputWrapper")
        explorers.keep(f"{theme.split()[1].lower()}-{lesson}", output)
        shown = output.locator(".jp-OutputArea-output").all()  # without the prompt: its colours are JupyterLab's
        pale[lesson] = [text for part in shown for text in part.evaluate(PALE, ENOUGH)]
    assert {lesson: texts for lesson, texts in pale.items() if texts} == {}
