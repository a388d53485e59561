"""`finetune-lab doctor` on machines that are whole and on machines that are broken: rows with fixes, no traceback."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from finetune_lab import cli
from finetune_lab.course import doctor, probe, versions

GOOD = {
    "torch": {"version": "2.13.0+cpu", "cuda": None, "threads": 1},
    "gpu": None,
    "models": [{"name": "tiny", "cached": True}, {"name": "smollm2-135m", "cached": False}],
    "tiny": {"load_s": 1.0, "tokens_per_s": 100.0, "peak_bytes": 400_000_000},
}


@pytest.fixture
def machine(monkeypatch, fake_home):
    """A whole machine whose probe answers at once; `machine.learnt` may be changed."""
    state = SimpleNamespace(learnt=dict(GOOD))
    monkeypatch.setattr(probe, "run", lambda: state.learnt)
    monkeypatch.setattr(doctor, "memory", lambda: (16_000_000_000, 8_000_000_000))
    monkeypatch.setattr(doctor, "cpu_flags", set)
    return state


def row(name):
    """The findings of that name; whatever is wrong must come with a fix."""
    report = doctor.examine()
    assert all(r["fix"] for r in report["rows"] if r["level"] in ("problem", "blocked"))
    found = [r for r in report["rows"] if r["name"] == name]
    assert len(found) == 1, [r["name"] for r in report["rows"]]
    return found[0] | {"ok": report["ok"]}


def test_a_whole_machine_is_ready(machine, capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Ready" in shown
    assert "[x]" not in shown
    assert "[!]" not in shown


def test_json_has_the_same_findings_and_every_version(machine, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["trl"] == versions.pins()["trl"]
    assert {"Python", "cores", "memory", "disk", "kernel", "GPU", "tiny model"} <= {r["name"] for r in report["rows"]}
    assert [tier["tier"] for tier in report["tiers"]] == ["tiny", "smollm2-135m", "hub models on a GPU"]


def without(monkeypatch, name, answer=None):
    real = versions.version_of
    monkeypatch.setattr(versions, "version_of", lambda asked: answer if asked == name else real(asked))


def test_a_missing_package_blocks(machine, monkeypatch, capsys):
    without(monkeypatch, "trl")
    assert row("trl")["level"] == "blocked"
    assert "make install" in row("trl")["fix"]
    assert cli.main(["doctor"]) == 1
    assert "Not ready" in capsys.readouterr().out


def test_a_missing_test_tool_does_not_block(machine, monkeypatch):
    without(monkeypatch, "nbval")
    assert (row("nbval")["level"], row("nbval")["ok"]) == ("note", True)


def test_a_version_outside_the_range_is_a_problem(machine, monkeypatch):
    without(monkeypatch, "trl", "0.9.6")
    assert row("trl")["level"] == "problem"
    assert "0.9.6" in row("trl")["value"]
    assert ">=1.16" in row("trl")["value"]


def test_another_version_inside_the_range_is_only_a_note(machine, monkeypatch):
    without(monkeypatch, "platformdirs", "4.0.0")
    found = row("platformdirs")
    assert (found["level"], found["ok"]) == ("note", True)
    assert versions.pins()["platformdirs"] in found["value"]


def test_a_course_that_is_not_installed_is_said(machine, monkeypatch):
    monkeypatch.setattr(versions, "requirements", list)
    assert any(r.level == "blocked" and "not installed" in r.value for r in doctor.check_packages()[0])


def test_without_the_repository_the_ranges_decide(machine, monkeypatch):
    monkeypatch.setattr(versions, "pins", dict)
    assert "in the range" in row("packages")["value"]


def test_little_memory_is_a_problem(machine, monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: (4_000_000_000, 900_000_000))
    assert row("memory")["level"] == "problem"
    real = doctor.examine()["tiers"][1]
    assert (real["runs"], real["why"]) == (False, "less than 3 GB memory free")


def test_unknown_memory_is_not_a_traceback(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert doctor.memory() == (None, None)


def test_a_full_disk_is_a_problem(machine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    assert row("disk")["level"] == "problem"


def test_a_home_that_cannot_be_written_is_a_problem(machine, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    assert row("progress")["level"] == "problem"
    assert "FINETUNE_LAB_HOME" in row("progress")["fix"]


def test_a_kernel_of_another_python_is_a_problem(machine, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    other = SimpleNamespace(argv=["/usr/bin/other-python"])
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: other)
    assert row("kernel")["level"] == "problem"
    assert "/usr/bin/other-python" in row("kernel")["value"]


def test_no_kernel_blocks(machine, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def none(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    assert row("kernel")["level"] == "blocked"


def test_no_jupyter_blocks(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "jupyter_client.kernelspec", None)
    assert row("kernel")["level"] == "blocked"


def test_a_gpu_is_named_with_memory_and_bf16(machine):
    machine.learnt |= {"gpu": {"name": "NVIDIA H200", "memory_bytes": 150_000_000_000, "bf16": True, "count": 1}}
    assert row("GPU")["value"] == "NVIDIA H200, 150.0 GB, bf16: yes"
    assert doctor.examine()["tiers"][2]["runs"] is True


def test_a_gpu_that_torch_cannot_use_comes_with_the_fix(machine, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    assert "CPU build" in row("GPU")["value"]
    assert "docs/places.md" in row("GPU")["fix"]


def test_the_bitsandbytes_message_is_explained_where_it_appears(machine, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx512_bf16"})
    assert "gemm_4bit_forward" in row("bitsandbytes")["value"]


def test_a_tiny_model_that_does_not_run_blocks(machine):
    machine.learnt.pop("tiny")
    machine.learnt |= {"failed": "tiny", "reason": "the files are missing"}
    found = row("tiny model")
    assert (found["level"], found["ok"]) == ("blocked", False)
    assert "the files are missing" in found["value"]


def test_a_model_setting_that_does_not_load_blocks_with_the_setting_named(machine):
    machine.learnt["setting"] = {"name": "foo", "problem": "There is no model 'foo'."}
    found = row("model setting")
    assert (found["level"], found["ok"]) == ("blocked", False)
    assert found["value"] == "FINETUNE_LAB_MODEL=foo: There is no model 'foo'."
    assert "unset it" in found["fix"] and "smollm2-135m" in found["fix"]


def test_the_probe_judges_the_model_setting_without_asking_the_hub(monkeypatch, tmp_path):
    from finetune_lab.lab import hub, models

    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("asked the network"))
    for name, problem in {"tiny": None, "foo": "no model 'foo'", str(tmp_path): "no config.json"}.items():
        monkeypatch.setenv("FINETUNE_LAB_MODEL", name)
        assert (problem or "") in probe.setting(models).get("problem", "" if problem is None else "nothing was said")
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setenv("FINETUNE_LAB_MODEL", "owner/name")
    assert probe.setting(models) == {"name": "owner/name"}


def test_times_come_only_from_recorded_runs(machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "EVIDENCE", tmp_path)
    assert doctor.recorded_run("tiny") is None
    cli.main(["doctor"])
    assert "no run of the lessons is recorded" in capsys.readouterr().out
    rows = [
        {"lesson": "01_loss_masking", "seconds": 90.0, "failures": 0},
        {"lesson": "02_broken", "seconds": 5.0, "failures": 1},
        {"lesson": "16_interview_drills", "seconds": 1.6, "failures": 0},
    ]
    run = {"model": "tiny", "rows": rows, "machine": {"cpu": "Zen", "cores": 2}}
    (tmp_path / "run_tiny.json").write_text(json.dumps(run))
    assert doctor.recorded_run("tiny") == {"cpu": "Zen", "cores": 2, "seconds": {"01": 90.0, "16": 1.6}}
    assert doctor.recorded_run("smollm2-135m") is None
    cli.main(["doctor"])
    assert "lessons took 2 s to 2 min (recorded on 2 cores, Zen)\n" in capsys.readouterr().out


def test_a_tier_is_told_in_a_line_that_fits_and_names_the_recording_machine_once(machine, capsys):
    cli.main(["doctor"])
    tiers = capsys.readouterr().out.split("run here on:")[1]
    assert max(map(len, tiers.splitlines())) <= 116
    assert " ".join(tiers.split()).count("(recorded on ") == 2  # tiny and smollm2-135m
    assert " 0.0 " not in tiers


# ---- the probe, in a process of its own, with a torch that is really broken ---------------------------------------


@pytest.fixture
def torch_is(tmp_path, monkeypatch):
    """Put a torch.py before the real one."""

    def write(text):
        (tmp_path / "torch.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def test_a_torch_that_does_not_load_is_named_with_its_reason(torch_is):
    torch_is("raise OSError('libcudart.so.13: cannot open shared object file')")
    learnt = probe.run()
    assert learnt["failed"] == "torch"
    assert "libcudart.so.13" in learnt["reason"]
    first = doctor.check_probe(learnt)[0]
    assert (first.name, first.level) == ("torch", "blocked")


def test_a_torch_that_kills_its_process_is_named(torch_is):
    torch_is("import os; os.abort()")
    learnt = probe.run()
    assert learnt["failed"] == "torch"
    assert "ended with code" in learnt["reason"]


def test_a_torch_that_hangs_is_named(torch_is):
    torch_is("import time; time.sleep(60)")
    learnt = probe.run(timeout=3)
    assert learnt["failed"] == "torch"
    assert "no answer after 3 seconds" in learnt["reason"]


def test_what_was_learnt_before_a_failure_is_kept(torch_is):
    torch_is("""
from types import SimpleNamespace as N
print("a library talks")
__version__, version = "2.13.0", N(cuda=None)
get_num_threads = lambda: 1
cuda, backends = N(is_available=lambda: False), N(mps=N(is_available=lambda: False))
""")
    learnt = probe.run()
    assert learnt["torch"]["version"] == "2.13.0"
    assert learnt["failed"] == "models"


def test_doctor_starts_with_the_standard_library_alone():
    """Site packages off: whatever is broken in there, doctor still tells."""
    code = """
import sys
sys.path.insert(0, ".")
from finetune_lab.course import doctor, probe
probe.run = lambda: {"failed": "torch", "reason": "No module named 'torch'"}
levels = {row["name"]: row["level"] for row in doctor.examine()["rows"]}
assert levels["torch"] == levels["kernel"] == "blocked", levels
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=versions.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def torch_with(cuda=False, mps=False):
    """As much of torch as probe.gpu asks."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000)
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: cuda,
            get_device_properties=lambda index: card,
            is_bf16_supported=lambda including_emulation: not including_emulation,
            device_count=lambda: 2,
        ),
        backends=SimpleNamespace(
            mps=SimpleNamespace(is_available=lambda: mps, is_macos_or_newer=lambda major, minor: False)
        ),
    )


def test_the_probe_tells_the_gpus_apart():
    assert probe.gpu(torch_with()) is None
    nvidia = {"name": "NVIDIA H200", "memory_bytes": 150_000_000_000, "bf16": True, "count": 2}
    assert probe.gpu(torch_with(cuda=True)) == nvidia
    assert probe.gpu(torch_with(mps=True))["memory_bytes"] is None


@pytest.mark.slow
def test_the_shipped_model_runs_here():
    learnt = probe.run()
    assert "failed" not in learnt, learnt["reason"]
    assert learnt["tiny"]["tokens_per_s"] > 0
    assert {model["name"] for model in learnt["models"]} >= {"tiny", "smollm2-135m"}
