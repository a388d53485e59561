"""Every explorer of the course in JupyterLab and Chromium: each control changes what is shown, and nothing complains.

One notebook holds the explorer cells of all lessons, as they stand in `solutions/`. `BEFORE` gives the names that a cell
takes from earlier cells of its lesson, with a small stand-in for what the lesson trains.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[dev])")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")]

BEFORE = {
    "01": """
from finetune_lab.lab.models import load
from finetune_lab.methods import chat
_, tokenizer = load()
fmt, encode, render_chat = chat.chat_format(tokenizer), chat.text_encoder(tokenizer), chat.render_chat
messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
questions = [{"prompt": messages[:1], "completion": messages[1:]}] * 2
""",
    "02": """
from finetune_lab.methods.memory import from_config
from finetune_lab.methods.memory.presets import PRESETS
""",
    "03": """
import torch
paths, updates = ["a layer"], {"a layer": torch.randn(64, 48, generator=torch.Generator().manual_seed(0))}
""",
    "05": """
import math
from finetune_lab.course import plots
from finetune_lab.methods import schedules
from finetune_lab.methods.schedules import cosine
""",
    "06": """
from finetune_lab.course import bench
rows = {row["name"]: row["value"] for row in bench.recorded("dpo_effects")["rows"]}
BETAS, TOO_FAR = {beta: f"dpo beta={beta:g} lr=0.0001" for beta in (0.1, 1, 10)}, "dpo beta=0.1 lr=0.0003"
def found(setting, measure):
    return rows[f"{setting}: {measure}"], rows[f"{setting}: {measure}, standard deviation"]
""",
    "07": """
import torch
from finetune_lab.course import plots
from finetune_lab.lab import forced, tasks
from finetune_lab.lab.models import load
from finetune_lab.methods import merging
model, tokenizer = load()
base, SKILLS = forced.weights_of(model), ("extract", "answer", "math")
torch.manual_seed(0)
specialists = {skill: {n: w + 0.01 * w.std() * torch.randn_like(w) for n, w in base.items()} for skill in SKILLS}
some = {skill: tasks.load_task(skill, "validation", 4) for skill in SKILLS}
""",
}
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # else cells off the screen are not in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def explorer_cells() -> dict[str, str]:
    """Lesson number -> the code of its explorer cell."""
    cells = {}
    for path in sorted((ROOT / "solutions").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code" and "\nExplorer(" in cell.source:
                cells[path.name[:2]] = cell.source
    return cells


CELLS = explorer_cells()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook in JupyterLab after Run All. page.complaints: errors of the page and its console."""
    home = tmp_path_factory.mktemp("jupyter")
    code = [part for lesson, cell in CELLS.items() for part in (BEFORE.get(lesson, "pass"), cell)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in code])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    (home / "work").mkdir()
    nbformat.write(notebook, home / "work" / "explorers.ipynb")
    for name, content in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "IPYTHONDIR": str(home / "ipython")}
    own |= {"JUPYTER_TOKEN": secrets.token_hex()}  # in the environment, so that no list of processes shows it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--ServerApp.root_dir={home / 'work'}", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0"]  # fmt: skip
    with (home / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=os.environ | own, stderr=log)
    try:
        wait_for(port, server, home / "log")
        with sync_api.sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.set_default_timeout(120_000)  # a busy machine
            page.complaints = []
            page.on("pageerror", lambda error: page.complaints.append(str(error)))
            page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
            page.goto(f"http://127.0.0.1:{port}/lab/tree/explorers.ipynb?token={own['JUPYTER_TOKEN']}")
            page.wait_for_selector(".jp-Notebook")
            # before the kernel is idle, Run All is dropped without a word
            page.wait_for_function("document.body.innerText.includes('Python 3 (ipykernel) | Idle')")
            page.click("text=Run >> nth=0")
            page.click("text=Run All Cells >> nth=0")
            page.wait_for_function(
                f"[...document.querySelectorAll('.jp-InputPrompt')].some(e => e.innerText.includes('[{len(code)}]'))"
                " || document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
            )
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers; fail with its log when it ended or is silent for a minute."""
    for _ in range(240):
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def move(page, control) -> None:
    """One step of a slider or checkbox by keyboard, another choice of a menu."""
    if control.locator("select").count():
        menu = control.locator("select")
        menu.select_option(index=0 if menu.evaluate("e => e.selectedIndex") else 1)
    elif control.locator(".noUi-handle").count():
        control.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
    else:
        control.locator("input").focus()
        page.keyboard.press("Space")


def test_the_explorers_are_found():
    assert set(BEFORE) < set(CELLS)


@pytest.mark.parametrize("lesson", CELLS)
def test_each_control_changes_what_is_shown(page, lesson):
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.count() == 0, errors.first.inner_text()
    cell = page.locator(".jp-CodeCell").nth(2 * list(CELLS).index(lesson) + 1)
    explorer = cell.locator(".widget-vbox")
    explorer.wait_for()
    shown = "e => [...e.querySelectorAll('.widget-html-content')].map(part => part.innerHTML).join()"
    controls = explorer.locator(".widget-dropdown, .widget-slider, .widget-checkbox")
    assert controls.count() == explorer.evaluate("e => e.children.length") - 2  # the view and the status stand below
    for n in range(controls.count()):
        before = explorer.evaluate(shown)
        move(page, controls.nth(n))
        page.wait_for_function(f"([e, before]) => ({shown})(e) !== before", arg=[explorer.element_handle(), before],
                               timeout=20_000)  # fmt: skip
    status = explorer.locator("pre[role=status]").inner_text()
    assert status and "Error" not in status
    assert page.complaints == []
