import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No test touches the progress of the person who runs it."""
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FINETUNE_LAB_CHECK", raising=False)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def no_figure_left():
    """A test that looks at a figure need not close it; the next test starts with none."""
    yield
    plt.close("all")


@pytest.fixture
def registry(monkeypatch):
    """The fixture lesson's exercises, by name, and nothing else."""
    import lesson_fixture

    from finetune_lab.course import checks

    monkeypatch.setattr(checks, "REGISTRY", {})
    lesson_fixture.define()
    return checks.REGISTRY
