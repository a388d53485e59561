import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from merge_models import llama, save  # isort: skip


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
