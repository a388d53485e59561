"""Pre-train the tiny model from nothing: world -> documents -> tokenizer -> a Llama of 2.5 million parameters.

    python -m finetune_lab.lab.pretrain --out DIR            # the shipped weights; resumes after a kill

One thread, bfloat16 autocast over fp32 weights (as large models are trained), Muon for the matrices of the layers
(`torch.optim.Muon`) and AdamW for the rest, warm-up, linear decay to zero.
The recipe is the whole truth about the shipped weights; another CPU or thread count rounds differently, so its
weights differ in the last digits while the figures of `finetune-lab bench world` agree.
Left out: document masking inside a window (lesson 01 shows what that means), evaluation during training.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .documents import LATER_KINDS, documents
from .tokenizer import CONTEXT, train_tokenizer

SEED, STEPS, BATCH, WARMUP = 0, 4600, 16, 100
SECOND_PART = 1500  # the step from which the text has other weights
MATRIX_RATE, OTHER_RATE = 6e-3, 3e-3  # peak learning rates: Muon for the matrices of the layers, AdamW for the rest
TOKENS_A_DOCUMENT = 72  # about: the easy start takes the first quarter of the text


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """A random Llama. No weight is square and every input width is a multiple of 64 (NF4 blocks), see DESIGN."""
    torch.manual_seed(seed)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 32) * 32,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    model.generation_config.max_length = CONTEXT
    return model


def token_windows(tokenizer: PreTrainedTokenizerFast, count: int, texts: Iterator[str]) -> np.ndarray:
    """`(count, CONTEXT + 1)` token ids: documents, each as bos text eot, one after the other, cut into windows."""
    need, got, ids = count * (CONTEXT + 1), 0, [np.empty(0, dtype=np.int16)]
    while got < need:
        for row in tokenizer(list(itertools.islice(texts, 2000)), add_special_tokens=False)["input_ids"]:
            ids.append(np.array([tokenizer.bos_token_id, *row, tokenizer.eos_token_id], dtype=np.int16))
            got += len(row) + 2
    return np.concatenate(ids)[:need].reshape(count, CONTEXT + 1)


def all_windows(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> np.ndarray:
    """The whole text in order: an easy start in the first quarter, other weights of the kinds from SECOND_PART on."""
    ramp = steps * BATCH * (CONTEXT + 1) // (4 * TOKENS_A_DOCUMENT)
    early = min(steps, SECOND_PART)
    first = token_windows(tokenizer, early * BATCH, documents(seed, ramp))
    second = token_windows(tokenizer, (steps - early) * BATCH, documents(seed + 1_000, kinds=LATER_KINDS))
    return np.concatenate([first, second])


def rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP), 1.0)


def _write_record(out: Path, model: LlamaForCausalLM, steps: int, seed: int) -> None:
    record = {
        "command": f"python -m finetune_lab.lab.pretrain --out DIR --steps {steps} --seed {seed}",
        "steps": steps,
        "seed": seed,
        "tokens": steps * BATCH * CONTEXT,
        "parameters": model.num_parameters(),
        "dtype": "bfloat16 autocast over float32",
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
    }
    (out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")


def _checkpoint(step: int, matrices: list, others: list, muon, adam) -> dict[str, torch.Tensor]:
    state = {"step": torch.tensor(step)}
    for i, p in enumerate(matrices):
        state |= {f"matrix{i}": p.data, f"momentum{i}": muon.state[p]["momentum_buffer"]}
    for i, p in enumerate(others):
        state |= {f"other{i}": p.data, f"mean{i}": adam.state[p]["exp_avg"], f"square{i}": adam.state[p]["exp_avg_sq"]}
    return state


def _restore(state: dict[str, torch.Tensor], matrices: list, others: list, muon, adam) -> int:
    """Put a checkpoint back; returns the number of steps done."""
    step = int(state["step"])
    for i, p in enumerate(matrices):
        p.data.copy_(state[f"matrix{i}"])
        muon.state[p] = {"momentum_buffer": state[f"momentum{i}"]}
    for i, p in enumerate(others):
        p.data.copy_(state[f"other{i}"])
        adam.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"mean{i}"],
            "exp_avg_sq": state[f"square{i}"],
        }
    return step


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def pretrain(
    out: Path, steps: int = STEPS, seed: int = SEED, every: int = 500, on_save: Callable[[int], None] | None = None
) -> None:
    """Train and save model, tokenizer and the record of the run to `out`.

    A checkpoint every `every` steps (then on_save(step) is called) lets a killed run go on to the same weights.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(itertools.islice(documents(seed=1), 40_000))
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer, seed)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "layers" in n)]
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    checkpoint, log, start = out / "checkpoint.safetensors", out / "pretrain.jsonl", 0
    if checkpoint.exists():
        start = _restore(load_file(checkpoint), matrices, others, muon, adam)
    windows = all_windows(tokenizer, steps, seed)
    began = time.time()
    if start >= steps:
        model.save_pretrained(out)
    model.train()
    for step in tqdm(range(start, steps), initial=start, total=steps, mininterval=30, desc="pre-training"):
        rows = torch.from_numpy(windows[step * BATCH : (step + 1) * BATCH].astype(np.int64))
        for optimizer, peak in ((muon, MATRIX_RATE), (adam, OTHER_RATE)):
            optimizer.param_groups[0]["lr"] = peak * rate_share(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - began)}
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
        if (step + 1) % every == 0 or step + 1 == steps:
            _save(_checkpoint(step + 1, matrices, others, muon, adam), checkpoint)
            model.save_pretrained(out)
            if on_save:
                on_save(step + 1)
    _write_record(out, model, steps, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of 4,096 tokens each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    pretrain(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
