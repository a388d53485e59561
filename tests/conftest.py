"""What every test stands on: offline, one thread, no screen, and never the progress of the person who runs them."""

import os
import tempfile

import pytest

# Before torch, matplotlib or a hub library is imported anywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ.pop("FINETUNE_LAB_MODEL", None)
_home = tempfile.TemporaryDirectory(prefix="finetune-lab-tests-")
os.environ["FINETUNE_LAB_HOME"] = _home.name


@pytest.fixture
def fake_home(tmp_path, monkeypatch):
    """An empty folder for this test's progress and models."""
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pytest_unconfigure():
    _home.cleanup()
