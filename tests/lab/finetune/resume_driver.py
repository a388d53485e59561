"""Runs `finetune-lab sft` and `dpo` again and again and kills them, each time in a process of its own that is forked after the
imports (they cost seconds, a run of the tiny model one). Prints JSON: weights and losses, whole and resumed.

    python resume_driver.py FOLDER SEED KIND...          (a kind: one of COMMANDS, and "inside")
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

from finetune_lab.cli import main
from finetune_lab.lab.finetune import dpo, report, run, runs, watch  # noqa: F401  (imported before the fork)
from finetune_lab.lab.models import tiny_folder

STEPS = 9
EVERY = f"--items 12 --batch-size 2 --steps {STEPS} --save-every 2 --test-items 0 --warmup 2 --schedule constant_with_warmup"
COMMANDS = {
    "lora": f"sft --task extract --dropout 0.1 --method lora {EVERY}",
    "qlora": f"sft --task extract --dropout 0.1 --method qlora {EVERY}",
    "dpo": f"dpo --task reply --adapter {{start}} {EVERY}",
    "kto, full": f"dpo --task reply --model {tiny_folder()} --loss kto --method full {EVERY}",
}
KILLS = {"lora": 3, "qlora": 1, "dpo": 2, "kto, full": 1}


def command(folder: Path, kind: str) -> list[str]:
    return [*COMMANDS[kind].format(start=folder.parent / "start").split(), "--out", str(folder)]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, when=lambda *args: True):
    """Kill the process when `owner.name` is called the first time that `when` holds."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        return die() if when(*args) else inner(*args, **kwargs)

    setattr(owner, name, outer)


def child(folder: Path, kind: str, prepare=lambda: None) -> int:
    """Fork, run the command to its end or its death, return the wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        prepare()
        os._exit(main(command(folder, kind)))
    return os.waitpid(pid, 0)[1]


def at_step(step: int):
    return lambda: before(watch.Bar, "on_log", lambda self, args, state, *_: state.global_step >= step)


def result(folder: Path) -> dict:
    (weights,) = (p for name in ("adapter", "model") for p in folder.glob(f"{name}/*.safetensors"))
    losses = json.loads((folder / "report.json").read_text())["loss"]
    return {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), "losses": losses}


def drive(base: Path, rng: random.Random, kind: str) -> dict:
    """A whole run beside one that is killed at random steps."""
    steps = sorted(rng.sample(range(1, STEPS + 1), KILLS[kind]))
    whole, killed = base / "whole", base / "killed"
    base.mkdir()
    if kind == "dpo":
        child(base / "start", "lora")
    out = {"whole_status": child(whole, kind), "steps": steps}
    out["killed"] = [child(killed, kind, at_step(step)) for step in steps]
    out["last"] = child(killed, kind)
    return out | {"whole": result(whole), "resumed": result(killed)}


def drive_inside(base: Path, kind: str) -> dict:
    """Killed before anything, inside a checkpoint: the optimizer is missing, then only the mark is; and when all but the report is done."""
    inside = base / "inside"
    statuses = [
        child(inside, kind, lambda: before(runs, "write", lambda path, _: path.name == "recipe.yaml")),
        child(inside, kind, lambda: before(run.ResumingSFTTrainer, "_save_optimizer_and_scheduler", second())),
        child(inside, kind, lambda: before(runs, "mark_complete", lambda path, **_: path.name == "checkpoint-6")),
        child(inside, kind, lambda: before(report, "write")),
        child(inside, kind),
    ]
    return {"statuses": statuses, "result": result(inside)}


def main_() -> None:
    base, rng, kinds = Path(sys.argv[1]), random.Random(int(sys.argv[2])), sys.argv[3:]
    out = {kind: drive(base / kind, rng, kind) for kind in kinds if kind in COMMANDS}
    if "inside" in kinds:
        out["inside"] = drive_inside(base / "lora", "lora")
    print(json.dumps(out))


def second():
    """True from the second call on."""
    calls = []
    return lambda *_: calls.append(1) or len(calls) > 1


if __name__ == "__main__":
    main_()
