"""One JupyterLab and one Chromium for all browser tests, on a copy of the learner's tree, cut off from the internet.

Without Chromium or playwright the tests here are skipped; with FINETUNE_LAB_BROWSER=required (.ci/run) they fail.
Screenshots are kept in FINETUNE_LAB_SCREENSHOTS, else in build/screenshots.
"""

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import explorer_cells
import pytest
from jupyterlab_page import Lab

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Every name but this machine's own leads nowhere, for pages, workers and sockets alike.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Browser tests last: playwright's event loop runs until the session ends, and would be found by asyncio.run."""
    items.sort(key=lambda item: "browser" in getattr(item, "fixturenames", ()))
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(900))  # with its fixtures, on a machine that has other work too


@pytest.fixture(scope="session")
def browser():
    """Chromium, or a skip with the reason; a failure where FINETUNE_LAB_BROWSER=required."""
    missing = []
    if importlib.util.find_spec("playwright") is None:
        missing.append("playwright is not installed (pip install -e .[dev])")
    if CHROMIUM is None:
        missing.append("no Chromium or Chrome on the PATH (Debian: sudo apt install chromium)")
    if missing:
        refuse = pytest.fail if os.environ.get("FINETUNE_LAB_BROWSER") == "required" else pytest.skip
        refuse("browser tests: " + "; ".join(missing))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of what the learner opens, with one more notebook that holds every explorer."""
    tree = tmp_path_factory.mktemp("jupyter") / "tree"
    for folder in ("notebooks", "solutions"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.mine-*", ".*", "*.py"))
    shutil.copy(ROOT / "tasks.py", tree)
    explorer_cells.write(tree / "explorers.ipynb")
    return tree


@pytest.fixture(scope="session")
def lab(browser, tree):
    """JupyterLab as `python tasks.py lab` starts it, and the browser on it."""
    home = tree.parent
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "tasks.py")
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    none = {
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}
    }  # else cells off the screen are missing
    for name, content in (tasks.JUPYTERLAB | none).items():
        file = home / "settings" / f"{name.replace(':', '/')}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "FINETUNE_LAB_HOME": str(home / "progress")}
    own |= {"JUPYTER_TOKEN": secrets.token_hex()}  # in the environment, so that no list of processes shows it
    # A server or a kernel that asks for anything outside asks a port where nobody listens.
    own |= {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")} | {"no_proxy": "127.0.0.1"}
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "FINETUNE_LAB_CHECK")} | own
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    with (home / "log").open("w") as log:
        command = [sys.executable, tree / "tasks.py", "--here", "lab", *options]
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_for(port, server, home / "log")
        yield Lab(browser, f"http://127.0.0.1:{port}", own["JUPYTER_TOKEN"], tree, env)
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def explorers(lab):
    """The notebook of all explorers after Run All."""
    notebook = lab.open("explorers.ipynb")
    notebook.run_all()
    assert notebook.errors() == []
    return notebook


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    """Return when the server answers; fail with its log when it ended or is silent for two minutes."""
    for _ in range(480):
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
