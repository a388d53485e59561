"""Pre-train the tiny model from nothing: world -> documents -> tokenizer -> a Llama of 2.5 million parameters.

    python -m finetune_lab.lab.pretrain --out DIR            # the shipped weights; resumes after a kill

One thread, bfloat16 autocast over fp32 weights (as large models are trained), AdamW, warm-up, linear decay to zero.
The recipe is the whole truth about the shipped weights; another CPU or thread count rounds differently, so its
weights differ in the last digits while the figures of `finetune-lab bench world` agree.
Left out: document masking inside a window (lesson 01 shows what that means), evaluation during training.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .documents import documents
from .tokenizer import CONTEXT, train_tokenizer

SEED, STEPS, BATCH, LEARNING_RATE, WARMUP = 0, 6000, 16, 3e-3, 200


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


def token_windows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> np.ndarray:
    """`(count, CONTEXT + 1)` token ids: documents, each as bos text eot, one after the other, cut into windows."""
    need, ids, batch = count * (CONTEXT + 1), [], []
    got = 0
    for text in documents(seed, 10**9):
        batch.append(text)
        if len(batch) == 2000:
            for row in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                ids.append(np.array([tokenizer.bos_token_id, *row, tokenizer.eos_token_id], dtype=np.int16))
                got += len(row) + 2
            batch = []
            if got >= need:
                break
    return np.concatenate(ids)[:need].reshape(count, CONTEXT + 1)


def learning_rate(step: int, steps: int) -> float:
    return LEARNING_RATE * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP), 1.0)


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def pretrain(out: Path, steps: int = STEPS, seed: int = SEED, every: int = 500) -> None:
    """Train and save model and tokenizer to `out`; a checkpoint every `every` steps lets a killed run go on."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents(seed=1, count=40_000))
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer, seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    parameters = decayed + plain
    checkpoint, log, start = out / "checkpoint.safetensors", out / "pretrain.jsonl", 0
    if checkpoint.exists():
        state = load_file(checkpoint)
        start = int(state["step"])
        for i, p in enumerate(parameters):
            p.data.copy_(state[f"p{i}"])
            moments = {k: state[f"{k}{i}"] for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(start)), **moments}
    windows = token_windows(tokenizer, steps * BATCH, seed)
    began = time.time()
    model.train()
    for step in tqdm(range(start, steps), initial=start, total=steps, mininterval=30, desc="pre-training"):
        rows = torch.from_numpy(windows[step * BATCH : (step + 1) * BATCH].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            line = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - began)}
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"step": torch.tensor(step + 1)}
            for i, p in enumerate(parameters):
                state |= {f"p{i}": p.data, **{f"{k}{i}": optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}}
            _save(state, checkpoint)
            model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of 4,096 tokens each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    pretrain(args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
