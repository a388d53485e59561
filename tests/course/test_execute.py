"""The builder and the runner with a real kernel: few tests, because a kernel costs seconds."""

import os
import shutil
import signal
import subprocess
import sys
import time

import lesson_fixture as fixture
import nbformat
import pytest

from finetune_lab.course import build
from finetune_lab.course.lessons import lessons
from finetune_lab.errors import UserError

EXTRA = """
# %%
import sys

print("careful", file=sys.stderr)
plots.show(plots.line([1, 2], [2.0, 1.0], title="Loss falls", x="step", y="loss (nats)"), alt="a falling line")
"""


def test_execution_keeps_clean_outputs_twice_the_same_and_a_failing_cell_is_named(tmp_path):
    lesson = lessons(fixture.source_file(tmp_path))[0]
    lesson.source.write_text(lesson.source.read_text() + EXTRA)
    build.build(lesson, run=True)
    first = lesson.solution.read_bytes()
    assert build.problems(lesson) == []
    outputs = [
        output for cell in nbformat.read(lesson.solution, as_version=4).cells for output in cell.get("outputs", [])
    ]
    assert "you said 4, it is 5: off by 1" in outputs[0].text
    assert outputs[-1].metadata["image/png"]["alt"] == "a falling line"
    assert set(outputs[-1].data) == {"image/png", "text/html", "text/plain"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    build.build(lesson, run=True)
    assert lesson.solution.read_bytes() == first

    lesson.source.write_text(lesson.source.read_text() + "\n# %%\nraise ValueError('no such mask')\n")
    try:
        build.build(lesson, run=True)
        raise AssertionError("built a lesson that fails")
    except UserError as error:
        assert "cell 99-007: ValueError: no such mask" in str(error)
    assert lesson.solution.read_bytes() == first


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to one process")
def test_ctrl_c_stops_a_run_with_one_line_and_no_kernel_left(tmp_path):
    lesson = lessons(fixture.source_file(tmp_path))[0]
    pid_file = tmp_path / "pid"
    slow = f"\n# %%\nimport os, pathlib, time\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(99)\n"
    lesson.source.write_text(lesson.source.read_text() + slow)
    build.build(lesson)
    command = [sys.executable, "-m", "finetune_lab", "run", "--root", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "finetune-lab: stopped." and "Traceback" not in error
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare (Linux)")
def test_a_kernel_that_cannot_be_reached_is_one_sentence(tmp_path):
    lesson = lessons(fixture.source_file(tmp_path))[0]
    build.build(lesson)
    code = (
        "from nbclient import NotebookClient; NotebookClient.startup_timeout = 3; "
        "from finetune_lab.cli import main; raise SystemExit(main())"
    )
    command = ["unshare", "--map-root-user", "--net", sys.executable, "-c", code, "run", "--root", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip("this system allows no network namespace")
    assert done.returncode == 2 and "did not answer in 3 seconds" in done.stderr and done.stderr.count("\n") == 1
