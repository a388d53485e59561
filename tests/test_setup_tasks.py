"""tasks.py: an install is done once, done again when it was broken off, and never hides a failure."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """tasks.py on an empty repository, with a pip that only notes what it was asked (`tasks.asked`)."""
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_text("one")
    monkeypatch.setenv("FINETUNE_LAB_VENV", str(tmp_path / ".venv"))
    monkeypatch.delenv("FINETUNE_LAB_TORCH_INDEX", raising=False)
    spec = importlib.util.spec_from_file_location("tasks_under_test", ROOT / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = tmp_path
    module.asked, module.answer = [], 0

    def create():
        module.VENV.mkdir(parents=True, exist_ok=True)
        module.BUSY.touch()
        (module.VENV / "pyvenv.cfg").touch()
        module.asked.append("create")

    def run(*command, env=None):
        module.asked.append(" ".join(map(str, command[1:])))
        return module.answer

    module.really_create, module.create, module.run = module.create, create, run
    module.usable = lambda: (module.VENV / "pyvenv.cfg").exists()
    return module


PIP = re.compile(r"-m pip install .*-c constraints.txt -e \.\[dev\]")


def installs(tasks):
    return sum(bool(PIP.match(words)) for words in tasks.asked)


def test_the_first_install_makes_an_environment_and_uses_the_pins(tasks):
    tasks.install()
    assert tasks.asked[0] == "create"
    assert installs(tasks) == 1


def test_a_second_install_does_nothing(tasks):
    tasks.install()
    tasks.asked.clear()
    tasks.install()
    assert tasks.asked == []


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_a_changed_pin_installs_into_the_same_environment(tasks, name):
    tasks.install()
    tasks.asked.clear()
    (tasks.ROOT / name).write_text("two")
    tasks.install()
    assert "create" not in tasks.asked
    assert installs(tasks) == 1


def test_a_failed_install_stops_and_is_done_again_from_the_start(tasks):
    tasks.answer = 1
    with pytest.raises(SystemExit, match="failed"):
        tasks.install()
    (tasks.VENV / "half a package").touch()
    tasks.answer = 0
    tasks.asked.clear()
    tasks.install()
    assert tasks.asked[0] == "create"
    assert not (tasks.VENV / "half a package").exists()
    tasks.asked.clear()
    tasks.install()
    assert tasks.asked == []


def test_an_install_that_was_killed_is_done_again(tasks):
    def killed(*command, env=None):
        raise KeyboardInterrupt

    run, tasks.run = tasks.run, killed
    with pytest.raises(KeyboardInterrupt):
        tasks.install()
    tasks.run = run
    tasks.asked.clear()
    tasks.install()
    assert tasks.asked[0] == "create"
    assert installs(tasks) == 1


def test_a_folder_that_is_no_environment_is_left_alone(tasks):
    tasks.VENV.mkdir()
    (tasks.VENV / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not a virtual environment"):
        tasks.install()
    assert (tasks.VENV / "thesis.txt").read_text() == "mine"


def test_torch_comes_first_from_the_reader_s_index(tasks, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAB_TORCH_INDEX", "file:///wheels")
    tasks.install()
    assert tasks.asked[1].endswith("-c constraints.txt --index-url file:///wheels torch")
    assert PIP.match(tasks.asked[2])


def test_a_reader_without_a_gpu_is_told_before_the_download(tasks, monkeypatch, capsys):
    monkeypatch.setattr(tasks.platform, "system", lambda: "Linux")
    monkeypatch.setattr(tasks.shutil, "which", lambda name: None)
    tasks.install()
    shown = capsys.readouterr().out
    assert "FINETUNE_LAB_TORCH_INDEX" in shown.split("installing the pinned packages")[0]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_a_killed_install_takes_pip_along(tmp_path):
    """Else an orphaned pip would write into the environment that the next install makes."""
    shutil.copy(ROOT / "tasks.py", tmp_path)
    for name in ("constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/pyvenv.cfg").touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho $$ > pip.pid\nexec sleep 60\n')
    python.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "FINETUNE_LAB_VENV"}
    started = subprocess.Popen([sys.executable, "tasks.py", "install"], cwd=tmp_path, env=env)
    note = tmp_path / "pip.pid"
    while not (note.exists() and note.read_text().strip()):
        time.sleep(0.05)
        assert started.poll() is None
    started.terminate()
    assert started.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_debian_without_venv_is_told_what_to_install(tasks, monkeypatch):
    class Builder:
        def __init__(self, **options):
            pass

        def create(self, folder):
            raise subprocess.CalledProcessError(1, ["python", "-m", "ensurepip"])

    monkeypatch.setattr(tasks.venv, "EnvBuilder", Builder)
    tasks.create = tasks.really_create
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        tasks.install()


def test_an_old_python_gets_one_sentence(tasks, monkeypatch):
    monkeypatch.setattr(tasks.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match="needs 3.11"):
        tasks.install()


def test_tasks_starts_on_old_pythons_and_needs_only_the_standard_library():
    tree = ast.parse((ROOT / "tasks.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names <= sys.stdlib_module_names


@pytest.mark.skipif(os.name == "nt", reason="Windows starts JupyterLab as a child")
def test_lab_asks_doctor_then_opens_the_first_lesson(tasks, monkeypatch):
    started = []
    monkeypatch.setattr(tasks.os, "execve", lambda program, words, env: started.extend(words))
    monkeypatch.chdir(tasks.ROOT)
    tasks.FIRST = tasks.ROOT / "notebooks" / "00_start_here.ipynb"
    tasks.FIRST.parent.mkdir()
    tasks.FIRST.touch()
    tasks.lab(["--no-browser"], ours=True)
    assert tasks.asked == ["-m finetune_lab doctor"]
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in started
    assert started[-1] == "--no-browser"
    settings = json.loads((tasks.VENV / "share/jupyter/lab/settings/overrides.json").read_text())
    assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"


def test_lab_says_where_the_commands_are(tasks, monkeypatch, capsys):
    """In the terminal where `make lab` was typed, `finetune-lab` is not found."""
    monkeypatch.setattr(tasks.os, "execve", lambda *_: None)
    monkeypatch.chdir(tasks.ROOT)
    tasks.FIRST = tasks.ROOT / "00.ipynb"
    tasks.lab([], ours=True)
    folder = Path(tasks.PYTHON).parent.relative_to(tasks.ROOT).as_posix()
    wanted = f"or in yours after . {folder}/activate" if os.name != "nt" else "activate"
    assert wanted in capsys.readouterr().out


def test_lab_stops_where_doctor_finds_a_block(tasks):
    tasks.answer = 1
    with pytest.raises(SystemExit, match="must be fixed"):
        tasks.lab([], ours=True)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def small_stages(tasks, **codes):
    tasks.PYTHON = sys.executable
    tasks.stages = lambda: {name: [sys.executable, "-c", code] for name, code in codes.items()}


def test_every_stage_runs_and_one_failure_fails_the_whole(tasks, capsys, monkeypatch):
    small_stages(tasks, lint="import sys; sys.exit(1)", tests="open('ran', 'w')")
    monkeypatch.chdir(tasks.ROOT)
    assert tasks.test([], 0.0) == 1
    assert (tasks.ROOT / "ran").exists()
    shown = capsys.readouterr().out
    assert re.search(r"lint +0\.0 min   FAILED", shown)
    assert re.search(r"tests +0\.\d min   ok", shown)
    assert re.search(r"total +0\.\d min   FAILED", shown)


def test_no_failure_is_code_0(tasks):
    small_stages(tasks, lint="pass")
    assert tasks.test([], 0.0) == 0


def test_only_the_chosen_stages_run(tasks, capsys):
    small_stages(tasks, lint="print('one')", tests="print('two')")
    assert tasks.test(["tests"], 0.0) == 0
    shown = capsys.readouterr().out
    assert "tests     | two" in shown
    assert "one" not in shown


def test_two_stages_run_at_a_time(tasks, monkeypatch):
    monkeypatch.setattr(tasks.os, "cpu_count", lambda: 2)
    wait = "import pathlib, time\nopen({!r}, 'w')\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    a, b = str(tasks.ROOT / "a"), str(tasks.ROOT / "b")
    small_stages(tasks, tests=wait.format(a, b), solutions=wait.format(b, a), notebooks="pass")
    assert tasks.test([], 0.0) == 0, "each waits for the other to have started"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_killed_tests_leave_no_stage_behind(tmp_path):
    (tmp_path / "stages.py").write_text(
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport tasks, signal, pathlib\n"
        "tasks.ROOT, tasks.PYTHON = pathlib.Path(), sys.executable\n"
        'sleeps = \'import os, time; open(str(os.getpid()) + ".pid", "w"); time.sleep(60)\'\n'
        "tasks.stages = lambda: {name: [sys.executable, '-c', sleeps] for name in 'abc'}\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\ntasks.test([], 0.0)\n"
    )
    process = subprocess.Popen([sys.executable, "stages.py", str(ROOT)], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("*.pid"))) < min(2, os.cpu_count()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 143
    assert not any(alive(int(path.stem)) for path in tmp_path.glob("*.pid"))


def test_the_notebooks_run_in_the_right_mode_away_from_the_reader_s_progress(tasks, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAB_HOME", "the reader's")
    look = "import os; open({!r}, 'w').write(os.environ['FINETUNE_LAB_CHECK'] + ' ' + os.environ['FINETUNE_LAB_HOME'])"
    files = {name: str(tasks.ROOT / name) for name in ("solutions", "notebooks")}
    small_stages(tasks, **{name: look.format(path) for name, path in files.items()})
    tasks.test([], 0.0)
    modes = {name: Path(path).read_text().split(" ", 1) for name, path in files.items()}
    assert modes["solutions"][0] == "solved"
    assert modes["notebooks"][0] == "unsolved"
    assert all("reader" not in home for _, home in modes.values())


def test_test_runs_what_ci_promises(tasks):
    words = {name: " ".join(map(str, command)) for name, command in tasks.stages().items()}
    assert list(words) == ["lint", "format", "build", "tests", "solutions", "notebooks"]
    assert "build --check" in words["build"]
    for name in ("solutions", "notebooks"):
        assert f"--nbval-lax --nbval-current-env --nbval-cell-timeout=120 {name}" in words[name]


def test_clean_leaves_the_reader_s_work(tasks):
    for name in ("notebooks/01.ipynb", "notebooks/01.mine-1.ipynb", "finetune_lab/a.py"):
        (tasks.ROOT / name).parent.mkdir(exist_ok=True)
        (tasks.ROOT / name).touch()
    for name in ("finetune_lab/__pycache__", "notebooks/.ipynb_checkpoints", ".ruff_cache", ".venv"):
        (tasks.ROOT / name).mkdir()
    tasks.clean(everything=False)
    left = {str(p.relative_to(tasks.ROOT)) for p in tasks.ROOT.rglob("*")}
    assert {"notebooks/01.ipynb", "notebooks/01.mine-1.ipynb", "finetune_lab/a.py", ".venv"} <= left
    assert not any("cache" in name or "checkpoints" in name for name in left)


def test_make_only_calls_tasks():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    rules = dict(re.fullmatch(r"(\w+): +; @(.+)", line).groups() for line in lines if re.match(r"\w+: ", line))
    assert {"help", "lab", "test", "install"} <= set(rules)
    for name, command in rules.items():
        wanted = "--help" if name == "help" else f"{name} $(ARGS)"
        assert command == f"$(PYTHON) tasks.py {wanted}"


def ci(tmp_path, *there, code=0):
    """.ci/run with a python that ends with `code`, on a system that has only these programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dirname", "mktemp", "rm"):
        (programs / name).symlink_to(shutil.which(name))
    for name in ("python", *there):
        (programs / name).write_text(f'#!/bin/sh\necho "$* $FINETUNE_LAB_BROWSER $FINETUNE_LAB_VENV"\nexit {code}\n')
        (programs / name).chmod(0o755)
    env = {"PATH": str(programs), "PYTHON": "python", "TMPDIR": str(tmp_path)}
    command = [shutil.which("bash"), ROOT / ".ci/run"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not shutil.which("bash"), reason="CI runs on a system with bash")
@pytest.mark.parametrize("code", [0, 3])
def test_ci_ends_as_the_tests_end(tmp_path, code):
    done = ci(tmp_path, "chromium", code=code)
    assert done.returncode == code
    assert done.stdout.startswith("tasks.py test required ")
    venv = Path(done.stdout.split()[-1])
    assert venv.is_relative_to(tmp_path), "CI must not use the developer's environment"
    assert not venv.parent.exists(), "CI must clean up"


@pytest.mark.skipif(not shutil.which("bash"), reason="CI runs on a system with bash")
def test_ci_without_a_browser_is_a_failure_with_one_sentence(tmp_path):
    done = ci(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "need Chromium" in done.stderr and done.stderr.count("\n") == 1


def test_every_data_file_of_the_package_is_packed():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = config["tool"]["setuptools"]["package-data"]["finetune_lab"]
    package = ROOT / "finetune_lab"
    files = [p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".py"]
    files = [name for name in files if "__pycache__" not in name and "/." not in f"/{name}"]
    assert files
    unpacked = [name for name in files if not any(fnmatch(name, pattern.replace("**/", "")) for pattern in patterns)]
    assert not unpacked
