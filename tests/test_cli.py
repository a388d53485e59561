"""The command line: fast help, every command reachable, one sentence for what goes wrong."""

import ast
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest

from finetune_lab import cli, environment
from finetune_lab.errors import UserError

PACKAGE = Path(cli.__file__).parent
HEAVY = {"torch", "transformers", "trl", "matplotlib", "numpy", "jupytext"}


def module_that(monkeypatch, act):
    """Put a command `try` into the table whose function is `act`."""
    module = types.ModuleType("finetune_lab_try")
    module.register = lambda subparsers: subparsers.add_parser("try").set_defaults(func=act)
    monkeypatch.setitem(sys.modules, "finetune_lab_try", module)
    monkeypatch.setitem(cli.COMMANDS, "try", ("finetune_lab_try", "only for a test"))


def raises(error):
    def act(args):
        raise error

    return act


@pytest.mark.parametrize("words", ["--help", "doctor --help", "--version"])
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
from finetune_lab.cli import main
try:
    main({words.split()!r})
except SystemExit as end:
    assert not end.code
sys.exit(",".join(sorted({HEAVY!r} & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "finetune-lab" in done.stdout


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown and line in shown for name, (_, line) in cli.COMMANDS.items())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"finetune-lab {command}" in capsys.readouterr().out.split("example", 1)[1]


def test_no_command_was_forgotten():
    """Every module that offers `register(subparsers)` is in the table."""
    offering = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name != "register":
                continue
            if [argument.arg for argument in node.args.args] == ["subparsers"]:
                parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
                offering.add(".".join(parts).removesuffix(".__init__"))
    assert offering == {module for module, _ in cli.COMMANDS.values()}


@pytest.mark.parametrize("words", [["nonsense"], ["doctor", "--nonsense"], ["--nonsense"]])
def test_bad_words_give_one_sentence_and_code_2(words, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "--help" in shown.err


@pytest.mark.parametrize(("word", "meant"), [("stats", "; did you mean status?"), ("xylophone", "")])
def test_an_unknown_command_names_the_nearest_and_not_all_of_them(word, meant, capsys):
    assert cli.main([word]) == 2
    said = f"finetune-lab: there is no command '{word}'{meant} (see `finetune-lab --help`)\n"
    assert capsys.readouterr().err == said


def test_an_unknown_flag_points_to_the_command_s_own_help(capsys):
    cli.main(["doctor", "--nonsense"])
    assert capsys.readouterr().err.endswith("--nonsense (see `finetune-lab doctor --help`)\n")


def test_a_user_error_is_one_sentence_and_code_2(monkeypatch, capsys):
    module_that(monkeypatch, raises(UserError("rank must be at least 1, not 0")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "finetune-lab: rank must be at least 1, not 0\n"


def test_a_missing_library_says_how_to_install_it(monkeypatch, capsys):
    module_that(monkeypatch, raises(ModuleNotFoundError("No module named 'trl'", name="trl")))
    assert cli.main(["try"]) == 2
    shown = capsys.readouterr().err
    assert "'trl'" in shown
    assert "make install" in shown


def test_a_missing_module_of_ours_is_not_hidden(monkeypatch):
    module_that(monkeypatch, raises(ModuleNotFoundError("No module named ...", name="finetune_lab.lab.gone")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["try"])


def test_a_bug_is_not_hidden(monkeypatch):
    module_that(monkeypatch, raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_the_exit_code_is_the_command_s(monkeypatch):
    module_that(monkeypatch, lambda args: 7)
    assert cli.main(["try"]) == 7
    module_that(monkeypatch, lambda args: None)
    assert cli.main(["try"]) == 0


def test_a_reader_may_close_the_pipe():
    code = "import sys; from finetune_lab.cli import main; sys.exit(main(['topics']))"
    shell = f'set -o pipefail; {sys.executable} -c "{code}" | head -n 1'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_noisy_logger_is_silent():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addHandler(handler)
    try:
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
        logger.error("something real")
    finally:
        logger.removeHandler(handler)
    assert [record.msg for record in records] == ["something real"]


def test_one_thread_for_the_tiny_model_and_all_for_a_real_one(monkeypatch):
    for name in ("OMP_NUM_THREADS", environment.OURS):
        monkeypatch.setenv(name, "")  # so that what prepare() sets is undone after this test
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 6)
    environment.prepare()
    assert environment.os.environ["OMP_NUM_THREADS"] == "1"
    assert environment.threads_for("tiny") == 1
    assert environment.threads_for("smollm2-135m") == 6


def test_the_reader_s_own_thread_count_wins(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv(environment.OURS, raising=False)
    environment.prepare()
    assert environment.os.environ["OMP_NUM_THREADS"] == "3"
    assert environment.threads_for("tiny") == environment.threads_for("smollm2-135m") == 3
