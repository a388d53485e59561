"""A run from its folder to its report, for any `transformers.Trainer`: what stands around the trainer, and no more.

    report = session(found, make_trainer, scorer)

The trainer's own command gives three things: a preflight, a function that makes the trainer of a model (its settings
begin with `common_arguments`), and one that scores a model. Make the settings before the session: under torchrun
they start the process group. Killed at any moment and called again a session goes on from the last complete
checkpoint and ends with the same weights, bit for bit on one machine: data order comes from the seed, and transformers
restores weights, optimizer, schedule and random state.
"""

import contextlib
import dataclasses
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PrinterCallback, ProgressCallback, Trainer

from finetune_lab.errors import UserError
from finetune_lab.lab.finetune import build, memory, preflight, report, runs, verdict, watch
from finetune_lab.lab.finetune.preflight import Preflight
from finetune_lab.lab.finetune.recipe import Recipe
from finetune_lab.provenance import git_state, provenance

REFERENCE = "ref"  # TRL's name for the frozen copy of an adapter that goes on training

MakeTrainer = Callable[..., Trainer]  # (model, tokenizer) -> a trainer that is also `resuming.Resuming`
# (model, tokenizer, what the scorer gave before training, or None) -> {"scores", "answers"} on the held-out rows, and
# whatever else it wants to see again after training; plain values, as they are kept in before.json
Scorer = Callable[..., dict]
Loader = Callable[[Recipe], tuple]  # -> model, tokenizer


def common_arguments(recipe: Recipe, *, score: bool) -> dict:
    """What every TRL trainer is told: steps, rates, precision, checkpoints, silence. score: there are held-out rows."""
    cpu = build.device_of(recipe.model) == "cpu"
    return {
        "output_dir": str(Path(recipe.out).expanduser() / "checkpoints"),
        "max_steps": recipe.steps or -1,
        "num_train_epochs": recipe.epochs or 1.0,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup if recipe.warmup < 1 else int(recipe.warmup),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "optim": recipe.optimizer,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": recipe.precision == "bf16",
        "fp16": recipe.precision == "fp16",
        "activation_checkpointing": recipe.checkpointing,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # by default a loss of nan is logged as the mean of the others
        "eval_strategy": "steps" if score else "no",
        "eval_steps": recipe.save_every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "save_total_limit": 2,  # the newest may be cut off while it is written: the one before must still be there
        "use_cpu": cpu,
        "ddp_backend": "gloo" if cpu and preflight.processes() > 1 else None,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 24 * 3600,  # the others wait while the first process scores
        "dataloader_pin_memory": not cpu,
        "report_to": [],
        "disable_tqdm": True,
    }


def session(
    found: Preflight,
    make_trainer: MakeTrainer,
    scorer: Scorer | None,
    *,
    load: Loader = build.load,
    fresh: bool = False,
    on_step: watch.OnStep | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Train, or go on, and return the report. scorer: None when nothing is held out. load: gives the untrained model.

    fresh: put an older run in the same folder aside. on_step(step, loss): for live curves, instead of the bar. say: gets each line of text.
    Raises UserError for another run in the folder, a loss that is no number, a full GPU.
    """
    folder, first = Path(found.recipe.out).expanduser(), rank() == 0
    with runs.locked(folder) if first else contextlib.nullcontext():
        if first:
            if fresh and (old := runs.put_aside(folder)):
                say(f"the run that was in {folder} is now in {old}")
            if runs.state_of(folder, identity(found)) == "new":  # run.json first: without it the folder is no run
                runs.write(folder / "run.json", {"command": found.recipe.trainer(), "identity": identity(found)})
            if not (folder / "recipe.yaml").exists():
                runs.write(folder / "recipe.yaml", found.recipe.dump())
        _wait()
        if (runs.read(folder / "run.json") or {}).get("finished"):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            say(f"this run is finished; --fresh trains it again. Its report: {folder / 'report.md'}")
            return runs.read(folder / "report.json")
        try:
            return _train(found, make_trainer, scorer, load, folder, on_step, say)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of the GPU is full ({str(error).splitlines()[0][:120]}). Make batch_size smaller and "
                "accumulation larger, shorten max_length, switch checkpointing on, or use qlora."
            ) from error


def identity(found: Preflight) -> dict:
    """Everything that must be equal for two runs to end with the same weights."""
    values = dataclasses.asdict(found.recipe) | {"data": found.recipe.data and Path(found.recipe.data).name}
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k != "out"}
    if adapter := values.get("adapter"):
        values["adapter"] = runs.fingerprint(runs.find_adapter(adapter))
    return values | {"rows": found.rows.fingerprint(), "processes": preflight.processes()}


def _train(found: Preflight, make_trainer: MakeTrainer, scorer, load: Loader, folder: Path, on_step, say) -> dict:
    recipe, first = found.recipe, rank() == 0
    checkpoint = runs.last_checkpoint(folder / "checkpoints") if first else None  # deletes what was cut off
    checkpoint = _shared(str(checkpoint) if checkpoint else None)
    model, tokenizer = load(recipe)
    before = _before(scorer, folder, model, tokenizer, found, say) if first else None
    _wait()
    with build.quiet_peft():
        trainer = make_trainer(model, tokenizer)
    past = runs.read(Path(checkpoint) / runs.MARK) if checkpoint else {}
    clock = watch.Complete(past.get("seconds", 0.0))
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    for callback in (watch.Finite(), clock, watch.Steps(on_step) if on_step else watch.Bar()):
        trainer.add_callback(callback)
    if first and checkpoint:
        say(f"going on from step {past['step']} of {found.total_steps}")
    with build.quiet_peft():
        trainer.train(resume_from_checkpoint=checkpoint)
    bill = {
        "seconds": clock.seconds(),
        "peak_bytes": memory.peak_bytes(build.device_of(recipe.model) != "cpu"),
        "trained_parameters": build.trained_parameters(trainer.model),
        "processes": preflight.processes(),
    }
    place = save(trainer, folder, recipe)  # by all: weights that lie on several processes are gathered
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        scorer = None  # one process alone cannot ask a model that is cut into shards
        say(
            "not scored after training, as every process holds a part of the model: ask it with `finetune-lab generate`"
        )
    result = _finish(found, folder, place, trainer, tokenizer, scorer, before, bill, say) if first else {}
    _wait()
    return result


def _before(scorer, folder: Path, model, tokenizer, found: Preflight, say) -> dict:
    """Scores and answers of the untrained model, kept in the folder so that a resumed run need not repeat them."""
    kept = runs.read(folder / "before.json")
    if kept is None:
        kept = {"scores": {}, "answers": []}
        if scorer:
            say(f"scoring {len(found.valid_rows)} held-out rows before training")
            kept = scorer(model, tokenizer, None)
        runs.write(folder / "before.json", kept)
    if kept["scores"]:
        say("before: " + report.figures(kept["scores"]))
    return kept


def _finish(
    found, folder: Path, place: Path, trainer: Trainer, tokenizer, scorer, before: dict, bill: dict, say
) -> dict:
    """Score the result, write the report, and only then call the run finished."""
    after = scorer(trainer.model, tokenizer, before) if scorer else {"scores": {}, "answers": []}
    if after["scores"]:
        say("after:  " + report.figures(after["scores"]))
    made = {**provenance(), "seed": found.recipe.seed, "git": git_state()}
    result = report.build(
        found, before["scores"], after["scores"],
        report.samples(found.valid_rows, before["answers"], after["answers"]) if after["answers"] else [],
        trainer.state.log_history, bill, made, place.name, _unchanged(before["answers"], after["answers"]),
    )  # fmt: skip
    report.write(result, folder)
    for line in verdict.lines(result):
        say(line)
    runs.write(folder / "run.json", runs.read(folder / "run.json") | {"finished": time.time()})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"report: {folder / 'report.md'}")
    return result


def _unchanged(before: list[str], after: list[str]) -> float | None:
    """Share of answers that are the same before and after training; None where nothing was asked."""
    return sum(map(str.__eq__, before, after)) / len(after) if after and len(before) == len(after) else None


def save(trainer: Trainer, folder: Path, recipe: Recipe) -> Path:
    """The adapter (or the whole model) and its tokenizer as safetensors in `folder/adapter` (`folder/model`).

    Called by every process; the first one writes. The folder appears whole, by rename.
    """
    place = folder / ("model" if recipe.method == "full" else "adapter")
    part = folder / f".{place.name}.part"
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    if recipe.method != "full":
        # the name that people give, not this machine's path: `generate` and others look the base up by it
        trainer.model.peft_config["default"].base_model_name_or_path = recipe.model
        if REFERENCE in trainer.model.peft_config:  # the frozen copy that TRL makes: not a result
            trainer.model.delete_adapter(REFERENCE)
    _wait()
    with warnings.catch_warnings(action="ignore"):  # peft looks for the base's config on the hub, which may be away
        trainer.save_model(str(part))
    if rank() == 0:
        for name in ("README.md", "training_args.bin"):  # peft's empty form; a pickle that nothing reads
            (part / name).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
    return place


def rank() -> int:
    """The number of this process among those that train together; 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def _wait() -> None:
    """All processes meet here."""
    if dist.is_initialized():
        dist.barrier()


def _shared(value):
    """The first process's value, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
