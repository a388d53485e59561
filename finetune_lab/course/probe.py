"""What `finetune-lab doctor` can only learn by trying: does torch start, is there a GPU, does the tiny model write?

Runs in a process of its own (`run()`), because a broken torch may end the process or hang. The process prints one
JSON object a line, so that what was learnt before a crash is not lost, and the last `"try"` names what crashed.
"""

import json
import subprocess
import sys
import time


def run(timeout: float = 180.0) -> dict:
    """Return everything that the probe learnt: keys `torch`, `gpu`, `models`, `tiny` as far as it came.

    When it did not come to its end, `failed` is the step ("torch", "models", "tiny") and `reason` its last words.
    """
    command = [sys.executable, "-c", "from finetune_lab.course.probe import main; main()"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
        output, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, errors, code = _text(late.stdout), f"no answer after {timeout:.0f} seconds", 1
    learnt, step = {}, "python"
    for line in output.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a library talks
        if isinstance(row, dict):
            step = row.pop("try", step)
            learnt.update(row)
    if code:
        last = [line.strip() for line in errors.splitlines() if line.strip()]
        reason = last[-1] if last else f"the process ended with code {code}"
        learnt |= {"failed": step, "reason": reason.removeprefix("finetune_lab.errors.UserError: ")}
    return learnt


def main() -> None:
    """The probe itself: say what is tried next, try it, print what came out."""
    say(**{"try": "torch"})
    import torch

    say(torch={"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()})
    say(gpu=gpu(torch))

    say(**{"try": "models"})
    from finetune_lab.lab import models

    say(models=[models.describe(name) for name in models.KNOWN], setting=setting(models))

    say(**{"try": "tiny"})
    started = time.perf_counter()
    model, tokenizer = models.load("tiny")
    loaded = time.perf_counter()
    encoded = tokenizer("the lamp", return_tensors="pt")
    model.generate(encoded["input_ids"], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    say(tiny={"load_s": loaded - started, "tokens_per_s": 8 / (time.perf_counter() - loaded), "peak_bytes": peak()})


def say(**row) -> None:
    print(json.dumps(row), flush=True)


def setting(models) -> dict:
    """The model that the lessons would load: `name`, and `problem`, one sentence, when they cannot. Asks no network."""
    from finetune_lab.errors import UserError
    from finetune_lab.lab import hub

    name = models.chosen()
    if name in models.KNOWN or (hub.looks_like_id(name) and hub.cached(name) is None and not hub.is_offline()):
        return {"name": name}
    try:
        models.check_folder(models.locate(name, progress=False), name)
    except UserError as error:
        return {"name": name, "problem": str(error)}
    return {"name": name}


def gpu(torch) -> dict | None:
    """The first GPU: name, memory in bytes, bf16 in hardware; None without one."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return {"name": card.name, "memory_bytes": card.total_memory, "bf16": bf16, "count": torch.cuda.device_count()}
    if torch.backends.mps.is_available():
        return {"name": "Apple GPU (mps)", "memory_bytes": None, "bf16": torch.backends.mps.is_macos_or_newer(14, 0)}
    return None


def peak() -> int | None:
    """The most memory that this process has held, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def _text(value) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value or ""
