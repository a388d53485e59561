"""One training loop, three ways to share it between processes: DDP, ZeRO-1, FSDP2. On the CPU, to see what they do.

    python -m finetune_lab.lab.distributed
    torchrun --nproc-per-node 2 -m finetune_lab.lab.distributed --mode fsdp2 --steps 20

    one    one process                                       weights, gradients, moments: all here
    ddp    a copy each, gradients averaged                   all of it in every process
    zero1  as ddp, each process keeps the moments of a part  moments / N   (arXiv 1910.02054, stage 1)
    fsdp2  each process keeps 1/N of every tensor            everything / N (arXiv 2304.11277; ZeRO stage 3)

All four take the same global batch and learn the same curve: the processes average gradients, so each divides its summed
loss by (labelled tokens of the whole batch / N), never by its own count. Needs PyTorch's gloo only.
Leaves out: GPUs, mixed precision, saving, LoRA, starting from a model too large for one process (every process loads
all of it first). Production: `accelerate launch` with the files in `lab/assets/accelerate`, on GPUs.
"""

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from finetune_lab.errors import UserError
from finetune_lab.lab import models, tasks
from finetune_lab.lab.train import batches, collate, encode

MODES = ("one", "ddp", "zero1", "fsdp2")


def share(model: torch.nn.Module, mode: str, lr: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model that is called in the loop, and its AdamW, for this process."""
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:  # one gather a layer: only one layer is whole at a time
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mode != "one":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)  # else gradients are held twice
    settings = {"lr": lr, "weight_decay": 0.0}
    if mode == "zero1":
        return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **settings)
    return model, torch.optim.AdamW(model.parameters(), **settings)


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and moments that this process keeps between two steps; call it before zero_grad."""

    def local(tensors) -> int:
        mine = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
        return sum(t.numel() * t.element_size() for t in mine)

    kept = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    states = [t for state in kept.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    parameters = list(model.parameters())
    return {"weights": local(parameters), "gradients": local(p.grad for p in parameters), "moments": local(states)}


def total(value: float) -> float:
    """The sum of a number over the processes."""
    if not dist.is_initialized():
        return value
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number)
    return number.item()


def train(
    mode: str, *, steps: int = 20, batch_size: int = 8, lr: float = 1e-3, seed: int = 0, warmup: int = 10
) -> dict:
    """Fully fine-tune the tiny model on `extract`; the result of every process is the same.

    batch_size is the global one. Returns mode, processes, loss (a number a step, mean over the global batch's labelled
    tokens) and bytes (for each process: weights, gradients, moments). Same data order, schedule and clipping as
    `lab.train.sft`. Raises UserError when mode and number of processes do not fit.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    if (mode == "one") != (world == 1):
        raise UserError(
            f"mode {mode!r} with {world} process(es): use mode 'one' alone, the others under `torchrun --nproc-per-node 2`"
        )
    if batch_size < world:
        raise UserError(f"a global batch of {batch_size} for {world} processes: each needs at least one example")
    model, tokenizer = models.load("tiny", seed=seed)
    rows = encode(tokenizer, tasks.load_task("extract", "train", 64))
    model, optimizer = share(model.train(), mode, lr)
    losses, held = [], {}
    for step, chosen in enumerate(batches(len(rows), batch_size, steps, seed)):
        batch = collate([rows[i] for i in chosen[rank::world]], tokenizer.pad_token_id or 0)
        labelled = total(float((batch["labels"] != -100).sum()))  # of the whole batch; no first label is counted
        loss = model(**batch, use_cache=False, num_items_in_batch=labelled / world).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1), 1.0)
        optimizer.step()
        held = held_bytes(model, optimizer)
        optimizer.zero_grad()
        losses.append(total(loss.item()) / world)
    everyone = [held]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, held)
    return {"mode": mode, "processes": world, "loss": losses, "bytes": everyone}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m finetune_lab.lab.distributed",
        description="Train the tiny model in one process or in several (CPU, gloo); print losses and bytes per process.",
        epilog="example: torchrun --nproc-per-node 2 -m finetune_lab.lab.distributed --mode fsdp2 --steps 20",
    )
    parser.add_argument("--mode", choices=MODES, default=["one"], nargs="+", help="one after the other, each afresh")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="global: of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group("gloo")
    try:
        results = [train(mode, steps=args.steps, batch_size=args.batch_size, lr=args.lr) for mode in args.mode]
        if not several or dist.get_rank() == 0:  # one process speaks
            print(json.dumps(results) if args.json else "\n".join(map(_text, results)))
    except UserError as error:
        print(f"finetune_lab.lab.distributed: {error}", file=sys.stderr)
        return 2
    finally:
        if several:
            dist.destroy_process_group()
    return 0


def _text(result: dict) -> str:
    lines = [f"{result['mode']}, {result['processes']} process(es)"]
    lines += [f"step {step:3}  loss {loss:.6f}" for step, loss in enumerate(result["loss"])]
    for rank, held in enumerate(result["bytes"]):
        lines.append(f"process {rank}: " + ", ".join(f"{name} {size:,} bytes" for name, size in held.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
