"""Where people work and how they carry on: the files agree with each other, and name only what exists."""

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from finetune_lab import cli
from finetune_lab.course import versions

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/commands.md", "docs/instructor.md", "docs/places.md"]
FILES = [*PAGES, "CITATION.cff", "Dockerfile", ".dockerignore", ".devcontainer/devcontainer.json", "binder/postBuild",
         ".pre-commit-config.yaml", "environment.yml"]  # fmt: skip


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pythons():
    """place -> the version of Python that it asks for."""
    return {
        "conda": yaml.safe_load(read("environment.yml"))["dependencies"][0].removeprefix("python="),
        "docker": re.search(r"^FROM python:([\d.]+)-slim", read("Dockerfile"), re.MULTILINE)[1],
        "dev container": re.search(r'"image": "python:([\d.]+)-', read(".devcontainer/devcontainer.json"))[1],
        "binder": read("binder/runtime.txt").strip().removeprefix("python-"),
    }


def test_every_place_has_one_python_and_the_package_accepts_it():
    assert len(set(pythons().values())) == 1, pythons()
    assert pythons()["docker"] in SpecifierSet(PROJECT["requires-python"])


def test_every_place_installs_from_the_pins():
    assert "python tasks.py install" in read("Dockerfile")
    assert (
        json.loads(re.sub(r"(?m)^//.*", "", read(".devcontainer/devcontainer.json")))["postCreateCommand"]
        == "python tasks.py install"
    )
    assert '-c constraints.txt -e ".[dev]"' in read("binder/postBuild")
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK) or os.name == "nt"
    cells = re.findall(r"```python\n(.*?)```", read("docs/places.md"), re.DOTALL)
    assert "%pip install --quiet -c constraints.txt -e ." in cells[0] and "Restart session" in cells[0]


def test_the_image_leaves_out_what_git_leaves_out():
    """An environment or a learner's work must not be copied into an image."""
    left_out = {line.removeprefix("**/").rstrip("/") for line in read(".dockerignore").split("\n")}
    ignored = {line.strip("/") for line in read(".gitignore").split("\n") if line and not line.startswith("#")}
    assert ignored - left_out == {"memory.png"}
    assert ".git" in left_out


def test_the_places_page_names_the_pinned_torch():
    assert f"torch=={versions.pins(ROOT / 'constraints.txt')['torch']}`" in read("docs/places.md")


def test_every_place_says_what_was_run_and_what_was_not():
    rows = [
        line.strip("|").split("|")
        for line in read("docs/places.md").split("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    assert len(rows) > 10 and {len(row) for row in rows} == {4}
    assert all(cell.strip() for row in rows[2:] for cell in row[:3])


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text, folder = read(page), (ROOT / page).parent
    for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)\"]+)[)\"]", text):
        file, _, place = target.partition("#")
        assert not file or (folder / file).exists(), target
        headings = {
            re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert file or place in headings, target


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_a_page_names_exist(page):
    named = set(re.findall(r"finetune-lab ([a-z][a-z-]*)(?= |`|\n)", read(page)))
    assert named <= set(cli.COMMANDS)
    assert {name for name in re.findall(r"`(?:python )?tasks\.py ([a-z]+)", read(page))} <= {"install", "lab", "test"}


@pytest.mark.parametrize("name", FILES)
def test_no_file_sends_a_machine_to_an_address(name):
    """Which package index is asked is the reader's setting, not the course's."""
    assert not re.search(r"https?://", read(name))


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_licences_of_code_and_text_are_there():
    assert "Apache License" in read("LICENSE") and "CC BY 4.0" in read("LICENSE-TEXT")
    assert set(PROJECT["license-files"]) == {"LICENSE", "LICENSE-TEXT"}


def test_hooks_are_local_and_need_no_network():
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    assert {hook["entry"].split()[0] for hook in repo["hooks"]} == {"ruff", "finetune-lab"}
