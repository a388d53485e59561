import json

import pytest

from finetune_lab.lab.finetune.recipe import SftRecipe


@pytest.fixture
def recipe(tmp_path):
    """A run of seconds: `recipe(method="full", ...)`."""

    def make(**settings):
        small = {"task": "extract", "items": 24, "steps": 4, "batch_size": 4, "save_every": 2, "test_items": 2}
        if "data" in settings:
            small = {"steps": 4, "batch_size": 4, "save_every": 2}
        return SftRecipe(**({"out": str(tmp_path / "run")} | small | settings))

    return make


@pytest.fixture
def jsonl(tmp_path):
    """`jsonl("name.jsonl", row, row, ...)` writes a file and returns its path."""

    def write(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
