import json
from types import SimpleNamespace

import pytest

from finetune_lab.lab.finetune.recipe import SftRecipe


def small(**settings):
    """The recipe of a run of seconds."""
    task = {} if "data" in settings else {"task": "extract", "items": 24, "test_items": 2}
    return SftRecipe(**({"steps": 4, "batch_size": 4, "save_every": 2} | task | settings))


@pytest.fixture
def recipe(tmp_path):
    """`recipe(method="full", ...)`: small, in a folder of this test."""
    return lambda **settings: small(**({"out": str(tmp_path / "run")} | settings))


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A finished run that tests only look at: `done.folder`, `.report`, `.steps` (told during training)."""
    from finetune_lab.lab.finetune import run

    folder, steps = tmp_path_factory.mktemp("done") / "run", []
    report = run.sft(
        small(seed=5, out=str(folder)), say=lambda text: None, on_step=lambda step, loss: steps.append([step, loss])
    )
    return SimpleNamespace(folder=folder, report=report, steps=steps)


@pytest.fixture
def jsonl(tmp_path):
    """`jsonl("name.jsonl", row, row, ...)` writes a file and returns its path."""

    def write(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
