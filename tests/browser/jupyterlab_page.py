"""A notebook in JupyterLab, as a person at the screen has it: open, run, type, look."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(os.environ.get("FINETUNE_LAB_SCREENSHOTS") or ROOT / "build" / "screenshots")
PATIENCE = 300_000  # milliseconds, for whatever only a busy machine makes slow
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'


class Lab:
    """A JupyterLab and a browser on it. `outside`: addresses beyond this machine that a page wanted."""

    def __init__(self, browser, url: str, token: str, tree: Path, environment: dict[str, str]):
        self.url, self.tree, self.environment, self.outside = url, tree, environment, []
        self.context = browser.new_context(viewport={"width": 1200, "height": 1300})
        self.context.set_default_timeout(PATIENCE)
        self.context.on("request", self._asked)
        self.context.request.get(f"{url}/api/status?token={token}")  # from here on a cookie will do

    def _asked(self, request) -> None:
        if not request.url.startswith((self.url, self.url.replace("http", "ws", 1), "data:", "blob:")):
            self.outside.append(request.url)

    def open(self, path: str = "") -> "Notebook":
        """A page of its own with a notebook of the tree, and a kernel that can be asked. Without path: what opens."""
        address = f"lab/workspaces/{Path(path).stem}/tree/{path}" if path else ""
        return Notebook(self.context.new_page(), f"{self.url}/{address}")


class Notebook:
    """One notebook. `complaints`: what its page or the console called an error."""

    def __init__(self, page, address: str):
        self.page, self.complaints = page, []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.wait_for_selector(".jp-Notebook")
        # before the kernel is idle, Run All is dropped without a word
        page.wait_for_function("document.body.innerText.includes('Python 3 (ipykernel) | Idle')")

    def run_all(self) -> None:
        """Run All Cells, and wait until the last one has run, or one has failed."""
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(
            "error => document.querySelector(error) ||"
            " [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(e => /\\d/.test(e.innerText))",
            arg=ERROR,
        )

    def menu(self, *path: str) -> None:
        """Choose from the menus at the top."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=path[0]).first.click()
        for name in path[1:]:
            self.page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()

    def cell(self, number: int):
        """A code cell, counted from 0; `cell(-1)` is the last."""
        return self.page.locator(".jp-CodeCell").nth(number)

    def errors(self) -> list[str]:
        return self.page.locator(ERROR).all_inner_texts()

    def keep(self, name: str, part=None) -> None:
        """A screenshot of the page, or of a part of it."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (part or self.page).screenshot(path=SCREENSHOTS / f"{name}.png")
