"""Every explorer of the course in JupyterLab: the keyboard is enough, each control changes what is shown, and at once."""

import time

import pytest
from explorer_cells import BEFORE, CELLS, cell_of

ANSWER = 0.5  # seconds from the key to the new picture and text, on a machine that has nothing else to do
WALKS = 5  # a busy machine may be slow at times: the fastest of five counts
# Wait for a key, then for another picture or text; window.answered: milliseconds from the key to the last change.
# The two come one after the other: nothing has to change for a while, else the second counts as the next answer.
WATCH = """e => {
    const shown = () => [...e.querySelectorAll('.widget-html-content')].map(part => part.innerHTML).join();
    const before = shown();
    window.answered = new Promise((done, late) => document.addEventListener('keydown', () => {
        const pressed = performance.now();
        let quiet;
        const look = () => {
            if (shown() === before) return;
            const now = performance.now();
            clearTimeout(quiet);
            quiet = setTimeout(() => done(now - pressed), 150);
        };
        new MutationObserver(look).observe(e, {subtree: true, childList: true, characterData: true});
        setTimeout(() => late('neither picture nor text changed in 30 seconds'), 30_000);
    }, {capture: true, once: true}));
}"""
# The control that has the focus: its number in the explorer (-1: none), what it is, and whether it can go right.
FOCUS = """e => {
    const here = document.activeElement;
    const kind = here.matches('.noUi-handle') ? 'slider' : here.matches('input[type=checkbox]') ? 'checkbox'
        : here.matches('button:not(.mod-active)') ? 'button' : null;
    return [[...e.children].findIndex(child => child.contains(here)), kind, here.ariaValueNow !== here.ariaValueMax];
}"""


def walk(page, cell, explorer, controls: int) -> dict[int, float]:
    """From the cell on with Tab, through all controls: one step with each. Control -> seconds until the answer."""
    cell.focus()
    seconds = {}
    while len(seconds) < controls:
        page.keyboard.press("Tab")
        at, kind, right = explorer.evaluate(FOCUS)
        if at < 0 and seconds:
            break  # behind the last control
        if at < 0 or kind is None or at in seconds:
            continue
        key = {"slider": "ArrowRight" if right else "ArrowLeft", "checkbox": "Space", "button": "Enter"}[kind]
        explorer.evaluate(WATCH)
        page.keyboard.press(key)
        seconds[at] = page.evaluate("window.answered") / 1000
        if kind == "checkbox":  # back again: a tick may switch others off
            explorer.evaluate(WATCH)
            page.keyboard.press(key)
            page.evaluate("window.answered")
    return seconds


def slowed() -> float:
    """How many times longer than alone does a program run now, because of others?"""
    start, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.1:
        pass
    return max(1.0, (time.perf_counter() - start) / 0.1)


def test_the_explorers_are_found():
    assert set(BEFORE) == set(CELLS) - {"04"}  # lesson 04's needs nothing


@pytest.mark.parametrize("lesson", CELLS)
def test_by_keyboard_alone_each_control_changes_what_is_shown_within_half_a_second(explorers, lesson):
    cell = explorers.cell(cell_of(lesson))
    explorer = cell.locator(".widget-vbox")
    explorer.wait_for()
    controls = explorer.evaluate("e => e.children.length") - 2  # the view and the status stand below
    fastest = {}
    for _ in range(WALKS):
        load = slowed()
        seconds = walk(explorers.page, cell, explorer, controls)
        load = max(load, slowed())
        assert len(seconds) == controls
        fastest = {at: min(fastest.get(at, 1e9), second / load) for at, second in seconds.items()}
        if max(fastest.values()) < ANSWER:
            break
    print(
        f"lesson {lesson}: slowest answer {max(seconds.values()):.2f} s on a machine {load:.1f} times slower than alone"
    )
    status = explorer.locator("pre[role=status]").inner_text()
    assert status and "Error" not in status
    explorers.keep(f"explorer-{lesson}", cell.locator(".jp-Cell-outputWrapper"))
    assert max(fastest.values()) < ANSWER


def test_no_explorer_raised_an_error_or_complained(explorers):
    assert explorers.errors() == []
    assert explorers.complaints == []
