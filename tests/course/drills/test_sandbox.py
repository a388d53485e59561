"""Whatever a learner's code does, there is one sentence, nothing of it lives on, and only a verdict is a pass.

Each run starts a process that loads torch (two seconds), so there are few of them; what can be seen without a process
is tested on `child` directly.
"""

import os
import sys
import time
from pathlib import Path

import pytest

from finetune_lab.course.drills import child, exercises, sandbox
from finetune_lab.course.drills.sandbox import Limits

RIGHT = """
def positions_from_mask(attention_mask):
    print("here")
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
"""
posix = pytest.mark.skipif(os.name != "posix", reason="limits of the system")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; RLIMIT_DATA")


def run(source, **limits):
    job = {"kind": "code", "exercise": "positions_from_mask", "source": source, "seed": 3}
    return sandbox.run(job, Limits(**limits))


def answer(*lines):
    return (
        "import os, sys, time, torch\ndef positions_from_mask(mask):\n    "
        + "\n    ".join(lines)
        + "\n    return mask\n"
    )


def test_right_code_passes_its_prints_come_back_and_its_files_are_gone():
    where = "import os\nopen('x', 'w').close()\nprint(os.getcwd(), os.environ['FINETUNE_LAB_HOME'])\n"
    result = run(where + RIGHT)
    assert (result.status, result.text) == ("ok", "6/6 cases") and result.printed.endswith("\nhere\n")
    here, home = result.printed.split("\n")[0].split()
    assert here == home and not Path(here).exists()


def test_printing_a_pass_and_leaving_is_no_pass():
    fake = 'import os, sys\nsys.stdout.write(\'\\x1e{"status": "ok", "text": "6/6 cases"}\\n\' * 3)\nsys.stdout.flush()\nos._exit(0)\n'
    result = run(fake)
    assert result.status == "again" and "ended the program before the tests were done" in result.text


@posix
def test_an_endless_loop_is_ended_by_its_processor_time():
    begin = time.monotonic()
    result = run(answer("while True: pass"), cpu=1, wall=60)
    assert result.status == "again" and "processor time" in result.text and time.monotonic() - begin < 60


def test_sleeping_is_ended_by_wall_time():
    result = run(answer("time.sleep(600)"), wall=1)
    assert (result.status, result.text) == ("again", "your code did not end within 1 s: is there an endless loop?")


def test_a_flood_of_output_is_cut():
    result = run(answer("while True: print('x' * 1000)"))
    assert result.status == "again" and "printed more than 64 kB" in result.text and len(result.printed) < 3000


def test_starting_a_process_is_refused_even_when_the_error_is_swallowed():
    result = run(answer("try: os.fork()", "except Exception: pass"))
    assert result.status == "again" and "os.fork" in result.text


def test_waiting_for_the_keyboard_is_told():
    result = run(answer("input('? ')"))
    assert result.status == "again" and "keyboard" in result.text


@linux
def test_too_much_memory_is_told():
    result = run(answer("torch.zeros(2**30)"), memory=2**30)
    assert result.status == "again" and "memory" in result.text


@linux
def test_what_escapes_the_refusal_is_killed_with_the_group():
    result = run("import ctypes, os, time\nif ctypes.CDLL(None).fork() == 0:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
                 "time.sleep(0.5)\n" + RIGHT)  # fmt: skip
    assert result.status == "ok"
    stat = Path(f"/proc/{int(result.printed.split()[0])}/stat")
    end = time.monotonic() + 5
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not stat.exists() or " Z " in stat.read_text()


def test_a_start_that_fails_is_not_blamed_on_the_learner():
    result = sandbox.run({"kind": "bug", "snippet": "x = 1", "detector": "no_such_detector"})
    assert result.status == "again" and "could not be started" in result.text and "no_such_detector" in result.text


@pytest.mark.parametrize(
    ("source", "status", "says"),
    [
        ("def f(:\n", "again", "line 1: Python cannot read this"),
        ("a\x00b", "again", "Python cannot read this"),
        ("x = 1\nimport nosuchmodule\n", "again", "line 2: there is no module 'nosuchmodule' here"),
        (answer("import nosuchmodule"), "again", "there is no module 'nosuchmodule' here"),
        ("import sys\nsys.exit()\n", "again", "sys.exit()"),
        (answer("sys.exit()"), "wrong", "sys.exit()"),
        ("\n\ntorch.zeros(3)\n", "again", "line 3 raised NameError"),
        ("x = 1\n", "again", "does not define positions_from_mask"),
        ("positions_from_mask = 3\n", "wrong", "expected a function"),
        (answer("raise NotImplementedError"), "not attempted", "starter"),
        (answer("return positions_from_mask(mask)"), "wrong", "calls itself without end"),
        (answer("return mask.long().cumsum(1)"), "wrong", "position 0, not 1"),
        (answer("raise KeyError('a')"), "wrong", "raised KeyError"),
    ],
)
def test_each_way_to_fail_has_a_sentence(source, status, says):
    found = child.code(exercises.get("positions_from_mask"), source, 3)
    assert found[0] == status and says in found[1] and "check." not in found[1], found


def test_a_repair_that_does_not_run_is_told():
    assert child.bug("def run(:", lambda ns: None)[0] == "again"
    status, text = child.bug("def run(): return x", lambda namespace: namespace["run"]())
    assert status == "wrong" and "NameError" in text
