import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
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


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Folders `base`, `a` and `b`: a base in one file and two noisy copies of it, one of them in several shards."""
    place, model = tmp_path_factory.mktemp("family"), llama()
    folders = {"base": save(model, place / "base")}
    for seed, (name, shard) in enumerate([("a", "5GB"), ("b", "60KB")]):
        noisy, noise = llama(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in noisy.parameters():
                p.add_(0.005 * torch.randn(p.shape, generator=noise))
        folders[name] = save(noisy, place / name, shard)
    return SimpleNamespace(**folders)


@pytest.fixture
def recipe(family):
    """`recipe("ties", a={...}, b={...}, **parameters)`: the content of a config that merges a and b on the base."""

    def make(method, a=None, b=None, *, more=None, **parameters):
        value = {"merge_method": method, "parameters": parameters, "dtype": "float32"}
        value["models"] = [
            {"model": str(folder), "parameters": own}
            for folder, own in ((family.a, a), (family.b, b))
            if own is not None
        ]
        if method != "linear":
            value["base_model"] = str(family.base)
        return value | (more or {})

    return make


@pytest.fixture(scope="session")
def tensors():
    """`tensors(folder)`: every tensor of a model folder; its index names just these."""

    def read(folder):
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            assert set(json.loads(index.read_text())["weight_map"]) == set(found)
        return found

    return read
