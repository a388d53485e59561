"""Runs `finetune-lab sft` again and again and kills it, each time in a process of its own that is forked after the
imports (they cost seconds, a run of the tiny model one). Prints JSON: weights and losses, whole and resumed.

    python resume_driver.py FOLDER SEED
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

from finetune_lab.cli import main
from finetune_lab.lab.finetune import report, run, runs, watch

STEPS = 9


def command(folder: Path, method: str) -> list[str]:
    return (
        f"sft --task extract --items 12 --batch-size 2 --steps {STEPS} --save-every 2 --test-items 0 --dropout 0.1 "
        f"--warmup 2 --schedule constant_with_warmup --method {method} --out {folder}"
    ).split()


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, when=lambda *args: True):
    """Kill the process when `owner.name` is called the first time that `when` holds."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        return die() if when(*args) else inner(*args, **kwargs)

    setattr(owner, name, outer)


def child(folder: Path, method: str, prepare=lambda: None) -> int:
    """Fork, run the command to its end or its death, return the wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        prepare()
        os._exit(main(command(folder, method)))
    return os.waitpid(pid, 0)[1]


def at_step(step: int):
    return lambda: before(watch.Bar, "on_log", lambda self, args, state, *_: state.global_step >= step)


def result(folder: Path) -> dict:
    (weights,) = folder.glob("adapter/*.safetensors")
    losses = json.loads((folder / "report.json").read_text())["loss"]
    return {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), "losses": losses}


def drive(base: Path, rng: random.Random, method: str, kills: int) -> dict:
    """A whole run beside one that is killed at random steps."""
    steps = sorted(rng.sample(range(1, STEPS + 1), kills))
    whole, killed = base / "whole", base / "killed"
    base.mkdir()
    out = {"whole_status": child(whole, method), "steps": steps}
    out["killed"] = [child(killed, method, at_step(step)) for step in steps]
    out["last"] = child(killed, method)
    return out | {"whole": result(whole), "resumed": result(killed)}


def drive_inside(base: Path, method: str) -> dict:
    """Killed before anything, inside a checkpoint: the optimizer is missing, then only the mark is; and when all but the report is done."""
    inside = base / "inside"
    statuses = [
        child(inside, method, lambda: before(runs, "write", lambda path, _: path.name == "recipe.yaml")),
        child(inside, method, lambda: before(run.ResumingSFTTrainer, "_save_optimizer_and_scheduler", second())),
        child(inside, method, lambda: before(runs, "mark_complete", lambda path, **_: path.name == "checkpoint-6")),
        child(inside, method, lambda: before(report, "write")),
        child(inside, method),
    ]
    return {"statuses": statuses, "result": result(inside)}


def main_() -> None:
    base, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    out = {method: drive(base / method, rng, method, kills) for method, kills in (("lora", 3), ("qlora", 1))}
    print(json.dumps(out | {"inside": drive_inside(base / "lora", "lora")}))


def second():
    """True from the second call on."""
    calls = []
    return lambda *_: calls.append(1) or len(calls) > 1


if __name__ == "__main__":
    main_()
