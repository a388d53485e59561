"""Small random models on disk, for the tests of this folder."""

import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.lab import models

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def llama(**changes):
    """A small random Llama with tied embeddings; no two of its sizes are equal."""
    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1792, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def save(model, folder, shard="5GB"):
    model.save_pretrained(folder, max_shard_size=shard)
    for name in TOKENIZER:
        shutil.copy(models.tiny_folder() / name, folder)
    return folder
