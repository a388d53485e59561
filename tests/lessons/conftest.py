"""What the tests of one lesson share: its executed solution, found by the name of the test file."""

from pathlib import Path

import nbformat
import pytest

SOLUTIONS = Path(__file__).resolve().parents[2] / "solutions"


@pytest.fixture(scope="module")
def notebook(request):
    """`test_02_vram_accounting.py` reads `solutions/02_vram_accounting.ipynb`."""
    return nbformat.read(SOLUTIONS / f"{request.path.stem.removeprefix('test_')}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def printed(notebook):
    """Everything that its cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")
