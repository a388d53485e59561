"""A pack holds what an install needs on its platform, says so in sums, and refuses what it is not for.

The whole thing, installed with the network off, is the last test: marked network, because it downloads half a gigabyte
first. `pytest -m network tests/course/test_pack.py`, about ten minutes and 4 GB of disk.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lesson_fixture as fixture
import pytest

from finetune_lab.cli import main
from finetune_lab.course import build, pack, pack_wheels
from finetune_lab.course.lessons import course_root, lessons
from finetune_lab.course.pack_wheels import Target
from finetune_lab.errors import UserError

LINUX, WINDOWS = Target("linux", "3.11"), Target("windows", "3.12")


def wheel(folder, name, version="1.0", needs=()):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = "".join(f"Requires-Dist: {one}\n" for one in needs)
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n{lines}\n")
    return path


@pytest.fixture
def index():
    """A stand-in for pip: `fetch` makes the wheels that this small world has, and keeps what it was asked for."""
    world = {
        "app": ("1.0", ["colorama; sys_platform == 'win32'", "engine[fast]>=2"]),
        "engine": ("2.1", ["turbo; extra == 'fast'", "brakes; extra == 'safe'"]),
        "turbo": ("3.0", ["app"]),
        "colorama": ("0.4", []),
        "torch": ("2.0", ["engine"]),
    }
    asked = []

    def fetch(requirements, folder, target, where):
        asked.append((requirements, where))
        for line in requirements:
            name = line.split("=")[0].split(">")[0]
            if name in world:
                wheel(folder, name, *world[name])

    fetch.asked = asked
    return fetch


def names(wheels):
    return [path.name.split("-")[0] for path in wheels]


@pytest.mark.parametrize("target, expected", [
    (LINUX, ["app", "engine", "turbo"]), (WINDOWS, ["app", "colorama", "engine", "turbo"]),
])  # fmt: skip
def test_conditions_are_read_on_the_target_and_extras_are_followed(target, expected, index, tmp_path):
    assert names(pack_wheels.collect(["app"], {"app": "1.0"}, tmp_path, target, fetch=index)) == expected
    assert index.asked[0] == (["app==1.0"], None)


def test_what_is_there_is_not_fetched_again_but_a_broken_or_other_version_is(index, tmp_path):
    pack_wheels.collect(["app"], {"engine": "2.1"}, tmp_path, LINUX, fetch=index)
    index.asked.clear()
    pack_wheels.collect(["app"], {"engine": "2.1"}, tmp_path, LINUX, fetch=index)
    assert index.asked == []
    (tmp_path / "turbo-3.0-py3-none-any.whl").write_bytes(b"half a downl")
    (tmp_path / "engine-2.1-py3-none-any.whl").rename(tmp_path / "engine-2.0-py3-none-any.whl")
    wheel(tmp_path, "leftover")
    assert names(pack_wheels.collect(["app"], {"engine": "2.1"}, tmp_path, LINUX, fetch=index)) == [
        "app", "engine", "turbo",
    ]  # fmt: skip
    assert [line for lines, _ in index.asked for line in lines] == ["engine==2.1", "turbo"]
    assert sorted(path.name[:8] for path in tmp_path.iterdir()) == ["app-1.0-", "engine-2", "turbo-3."]


def test_torch_alone_comes_from_its_own_index(index, tmp_path):
    pack_wheels.collect(["torch", "app"], {}, tmp_path, LINUX, "its-index", fetch=index)
    assert index.asked[:2] == [(["app"], None), (["torch"], "its-index")]


def test_a_package_without_a_wheel_is_named(index, tmp_path):
    with pytest.raises(UserError, match="no wheel for nowhere on linux"):
        pack_wheels.collect(["nowhere"], {}, tmp_path, LINUX, fetch=index)


def test_pips_reason_is_one_sentence_and_a_full_disk_is_called_so(tmp_path, monkeypatch):
    def answer(stderr):
        done = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(pack_wheels.subprocess, "run", lambda *a, **k: done)

    answer("noise\nERROR: No matching distribution found for x==1\n")
    with pytest.raises(UserError, match=r"pip stopped \(No matching distribution found for x==1\)"):
        pack_wheels.download(["x==1"], tmp_path, LINUX)
    answer("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    with pytest.raises(UserError, match="disk of .* is full"):
        pack_wheels.download(["x==1"], tmp_path, LINUX)


# ---- the folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A course folder with one lesson in which somebody worked, and what pack copies."""
    root = fixture.source_file(tmp_path / "course")
    lesson = lessons(root)[0]
    build.build(lesson)
    lesson.notebook.write_text("somebody's work")
    (root / "notebooks" / "99_masks.mine-20261123-100000.ipynb").write_text("older work")
    (root / "class-anna.json").write_text("private")
    (root / "finetune_lab" / "__pycache__").mkdir(parents=True)
    (root / "finetune_lab" / "__init__.py").write_text("")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\n[project]\ndependencies = ["app"]\n'
        '[project.optional-dependencies]\ndev = ["turbo"]\n'
    )
    (root / "constraints.txt").write_text("app==1.0\n")
    (root / "tasks.py").write_text("import sys\nprint('tasks', sys.argv[1])\n")
    return root


@pytest.fixture
def packed(root, tmp_path, monkeypatch):
    def collect(first, pins, folder, target, index):
        assert first == ["app", "turbo", "setuptools"] and pins == {"app": "1.0"}
        folder.mkdir()
        return [wheel(folder, "app")]

    monkeypatch.setattr(pack_wheels, "collect", collect)
    folder = tmp_path / "my stick"
    pack.pack(root, folder, pack_wheels.here(), with_model=False)
    return folder


def install(folder, *words):
    command = [sys.executable, str(folder / "install.py"), *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_course_is_packed_with_fresh_notebooks_and_nobodys_work(packed):
    kept = sorted(path.relative_to(packed / "course").as_posix() for path in (packed / "course").rglob("*.*"))
    assert kept == [
        "constraints.txt", "finetune_lab/__init__.py", "notebooks/99_masks.ipynb", "pyproject.toml",
        "solutions/99_masks.ipynb", "solutions/99_masks.py", "tasks.py",
    ]  # fmt: skip
    assert "YOUR CODE HERE" in (packed / "course" / "notebooks" / "99_masks.ipynb").read_text()


def test_install_checks_copies_and_calls_the_courses_own_tasks(packed, tmp_path):
    target = tmp_path / "to here"
    done = install(packed, target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tasks install") == done.stdout.count("tasks doctor") == 1
    assert f'cd "{target}"' in done.stdout


def test_a_second_install_leaves_the_learners_notebook_alone(packed, tmp_path):
    target = tmp_path / "here"
    install(packed, target)
    (target / "notebooks" / "99_masks.ipynb").write_text("mine")
    (target / "constraints.txt").write_text("old")
    assert install(packed, target).returncode == 0
    assert (target / "notebooks" / "99_masks.ipynb").read_text() == "mine"
    assert (target / "constraints.txt").read_text() == "app==1.0\n"


def test_a_damaged_and_a_missing_file_are_found(packed):
    assert install(packed, "--check").returncode == 0
    (packed / "course" / "tasks.py").write_text("other")
    next((packed / "wheels").glob("*.whl")).unlink()
    done = install(packed, "--check")
    assert done.returncode == 2 and "course/tasks.py is damaged; wheels/app-1.0" in done.stderr
    assert done.stderr.count("\n") == 1


def change(packed, **values):
    about = json.loads((packed / "pack.json").read_text()) | values
    (packed / "pack.json").write_text(json.dumps(about))


def test_another_system_another_python_and_somebodys_folder_are_refused(packed, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    done = install(packed, tmp_path / "full")
    assert done.returncode == 2 and "is not the course" in done.stderr
    change(packed, python="3.99")
    done = install(packed)
    assert done.returncode == 2 and "start it with python3.99" in done.stderr
    change(packed, system=["Plan9", "mips"])
    done = install(packed)
    assert done.returncode == 2 and "this pack is for Plan9 mips" in done.stderr and done.stderr.count("\n") == 1


def test_a_pack_that_was_broken_off_cannot_be_installed(packed):
    (packed / "SHA256SUMS").unlink()
    done = install(packed)
    assert done.returncode == 2 and "not complete" in done.stderr


@pytest.mark.parametrize("words, says", [
    (["full"], "is not empty and not a pack"), (["file"], "is a file"), (["new", "--platform", "beos"], "one of linux"),
    (["new", "--python", "2.7"], "3.11, 3.12 and 3.13"), (["old", "--platform", "windows"], "is a pack for linux"),
])  # fmt: skip
def test_bad_input_ends_with_2_and_one_sentence(words, says, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/letter.txt").touch()
    Path("file").touch()
    Path("old").mkdir()
    Path("old/pack.json").write_text('{"platform": "linux", "python": "3.11"}')
    assert main(["pack", *words, "--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_too_little_disk_is_said_before_anything_is_fetched(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "NEEDED", 10**18)
    with pytest.raises(UserError, match="of free disk; a pack needs"):
        pack.pack(root, tmp_path / "new", LINUX, with_model=False)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("ip")), reason="needs unshare and ip (Linux)")
def test_a_pack_installs_and_runs_lesson_00_without_a_network(tmp_path):
    folder, target = tmp_path / "my stick", tmp_path / "a class"
    pack.pack(course_root(), folder, pack_wheels.here())
    program = target / ".venv" / "bin" / "finetune-lab"
    script = f"""set -e
        ip link set lo up
        ! ip route | grep default
        "{sys._base_executable}" "{folder}/install.py" "{target}"
        cd "{target}"
        "{program}" run 00 --tree solutions
        "{program}" models list
    """
    env = os.environ | {"HOME": str(tmp_path / "home"), "FINETUNE_LAB_HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    command = ["unshare", "--map-root-user", "--net", "bash", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 lessons, 0 failed" in done.stdout and "smollm2-135m: cached" in done.stdout
