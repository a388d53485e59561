"""A notebook in JupyterLab, as a person at the screen has it: open, run, type, look."""

import os
from pathlib import Path

SCREENSHOTS = Path(
    os.environ.get("FINETUNE_LAB_SCREENSHOTS") or Path(__file__).resolve().parents[2] / "build/screenshots"
)
PATIENCE = 120_000  # milliseconds: a busy machine
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'


class Lab:
    """`complaints`: what the page or its console called an error. `outside`: addresses beyond this machine it wanted."""

    def __init__(self, browser, url: str, token: str, tree: Path, environment: dict[str, str]):
        self.url, self.tree, self.environment = url, tree, environment
        self.complaints, self.outside = [], []
        self.context = browser.new_context(viewport={"width": 1200, "height": 1300})
        self.context.set_default_timeout(PATIENCE)
        self.context.on("request", self._asked)
        self.page = self.new_page()
        self.page.goto(f"{url}/?token={token}")

    def new_page(self):
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        return page

    def _asked(self, request) -> None:
        if not request.url.startswith((self.url, self.url.replace("http", "ws", 1), "data:", "blob:", "file:")):
            self.outside.append(request.url)

    def open(self, path: str) -> None:
        """Open a notebook of the tree alone in the page, and wait until its kernel can be asked."""
        self.page.goto(f"{self.url}/lab/workspaces/{Path(path).stem}/tree/{path}")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector(".jp-Notebook")
        # before the kernel is idle, Run All is dropped without a word
        self.page.wait_for_function("document.body.innerText.includes('Python 3 (ipykernel) | Idle')")

    def run_all(self) -> None:
        """Run All Cells, and wait until the last one has run, or one has failed."""
        self.page.click("text=Run >> nth=0")
        self.page.click("text=Run All Cells >> nth=0")
        self.page.wait_for_function(
            "error => document.querySelector(error) ||"
            " [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(e => /\\d/.test(e.innerText))",
            arg=ERROR,
        )

    def errors(self) -> list[str]:
        return self.page.locator(ERROR).all_inner_texts()

    def keep(self, name: str, part=None) -> None:
        """A screenshot of the page, or of a part of it."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (part or self.page).screenshot(path=SCREENSHOTS / f"{name}.png")
