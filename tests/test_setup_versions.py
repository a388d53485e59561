"""One place decides the versions: pyproject.toml, constraints.txt, environment.yml and the lessons agree."""

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import finetune_lab
from finetune_lab.course import doctor, versions

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
PINS = versions.pins(ROOT / "constraints.txt")
LESSONS = sorted((ROOT / "solutions").glob("*.py"))
NAMED = re.compile(
    r"\b(torch|trl|peft|transformers|bitsandbytes|datasets|accelerate)[`*]*\s+(?:version\s+)?v?(\d+\.\d+(?:\.\d+)?)",
    re.IGNORECASE,
)


def wrong_versions(text: str) -> list[str]:
    """Versions of our libraries that a text names and that are not the pinned ones."""
    return [
        f"{name} {version}"
        for name, version in NAMED.findall(text)
        if not (PINS[name.lower()] + ".").startswith(version + ".")
    ]


@pytest.mark.parametrize("line", DIRECT)
def test_every_direct_dependency_is_pinned_inside_its_range(line):
    need = Requirement(line)
    assert PINS[versions.normal(need.name)] in need.specifier


@pytest.mark.parametrize("line", DIRECT)
def test_every_range_is_bounded_on_both_sides(line):
    signs = {part.operator for part in Requirement(line).specifier}
    assert ">=" in signs
    assert "<" in signs


def test_every_pin_is_exact_and_stands_once():
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*( ; .+)?", pin) for pin in pins)
    assert len(PINS) == len(pins)


def test_what_is_installed_is_what_is_pinned():
    have = {name: versions.version_of(name) for name in PINS}
    different = {name: (version, PINS[name]) for name, version in have.items() if version not in (None, PINS[name])}
    assert not different, "run `make install`"


def test_the_lock_is_complete():
    """Everything that an install brings in is pinned, so two installs on two days are the same."""
    seen, todo = set(), [Requirement(line) for line in DIRECT]
    while todo:
        need = todo.pop()
        name = versions.normal(need.name)
        if (name, frozenset(need.extras)) in seen:
            continue
        seen.add((name, frozenset(need.extras)))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # the test above speaks about missing packages
        for line in lines:
            further = Requirement(line)
            extras = need.extras or {""}
            if not further.marker or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(further)
    missing = {name for name, _ in seen} - set(PINS) - {"setuptools"}
    assert not missing, "copy their versions from `pip freeze` to constraints.txt"


def test_conda_adds_nothing_of_its_own():
    file = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert file["channels"] == ["conda-forge", "nodefaults"]
    python, pip, rest = file["dependencies"]
    assert pip == "pip"
    assert rest == {"pip": ["-c constraints.txt", "-e .[dev]"]}
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])


def test_the_oldest_python_is_the_same_everywhere():
    oldest = ast.literal_eval(re.search(r"^OLDEST = (.+)$", (ROOT / "tasks.py").read_text(), re.MULTILINE)[1])
    assert oldest == doctor.OLDEST
    assert PROJECT["requires-python"] == f">={'.'.join(map(str, oldest))}"


def test_the_package_says_its_own_version():
    assert finetune_lab.__version__ == PROJECT["version"]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_the_versions_that_a_lesson_names_are_the_pinned_ones(lesson):
    assert not wrong_versions(lesson.read_text(encoding="utf-8"))


def test_a_wrong_version_in_a_lesson_is_seen():
    major, minor = PINS["trl"].split(".")[:2]
    assert wrong_versions(f"TRL {major}.{minor}, `trl` {PINS['trl']}") == []
    assert wrong_versions("In TRL 0.9 and `torch` v1.13.1") == ["TRL 0.9", "torch 1.13.1"]
    assert wrong_versions(f"trl {major}.{minor}9") == [f"trl {major}.{minor}9"]


number = st.integers(0, 12)
release = st.lists(number, min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))


@given(release, st.lists(st.tuples(st.sampled_from([">=", "<=", "==", "<", ">"]), release), min_size=1, max_size=2))
def test_doctor_reads_ranges_as_pip_does(version, wanted):
    text = ",".join(sign + bound for sign, bound in wanted)
    assert versions.in_range(version, text) == (version in SpecifierSet(text))


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("trl>=1.16,<1.17", ("trl", ">=1.16,<1.17", False)),
        ('pytest<10,>=9; extra == "dev"', ("pytest", "<10,>=9", True)),
    ],
)
def test_requirement_lines_are_read(line, parsed):
    assert versions.parse(line) == parsed


def test_the_readme_names_the_pinned_torch():
    assert f"torch=={PINS['torch']}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_pinned_package_accepts_the_oldest_python():
    """Debian 12 has Python 3.11.2: a package that asks for 3.11.5 cannot be installed there."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    asked = {d.name: d.metadata.get("Requires-Python") or "" for d in metadata.distributions()}
    too_new = {name: asks for name, asks in asked.items() if oldest not in SpecifierSet(asks)}
    assert not {name for name in too_new if versions.normal(name) in PINS}, too_new
