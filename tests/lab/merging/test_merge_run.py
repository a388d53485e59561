"""What `finetune-lab merge` writes: a whole model or nothing, whatever the shards, dtypes, adapters or interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from finetune_lab.errors import UserError
from finetune_lab.lab import merging, models
from finetune_lab.lab.finetune.build import quiet_peft
from finetune_lab.lab.merging import checkpoint, write
from finetune_lab.methods.merging import merge_tensor

from merge_models import llama, save  # isort: skip


TYPES = ["full_attention", "sliding_attention", "chunked_attention", "linear_attention"]


def do(config, out, **settings):
    return merging.merge(config, out, progress=False, **settings)


def test_the_result_loads_and_computes_what_the_weights_say(recipe, tmp_path):
    do(recipe("linear", {"weight": 1}, {"weight": 3}), tmp_path / "out")
    model, tokenizer = models.load(str(tmp_path / "out"))
    a, b = (models.load(m["model"])[0] for m in recipe("linear", {}, {})["models"])
    for p, x, y in zip(model.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, 0.25 * x + 0.75 * y, atol=1e-6, rtol=0)
    assert tokenizer.chat_template and model.generation_config is not None


def test_any_shard_size_gives_the_same_tensors(recipe, tensors, tmp_path):
    config = recipe("ties", {"weight": 1}, {"weight": 1}, density=0.3)
    one = do(config, tmp_path / "one")
    many = do(config, tmp_path / "many", shard_bytes=50_000)
    assert one["files"] == ["model.safetensors"] and len(many["files"]) > 3
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    largest = max(t.nbytes for t in a.values())
    assert all((tmp_path / "many" / f).stat().st_size <= max(50_000, largest) + 4096 for f in many["files"])
    assert models.load(str(tmp_path / "many"))[0].num_parameters() == many["parameters"]


def test_dare_repeats_with_its_seed_and_changes_with_another(recipe, tensors, tmp_path):
    config = recipe("dare_linear", {"weight": 1}, density=0.5)
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        do(config, tmp_path / name, seed=seed, shard_bytes=50_000 if name == "y" else 10**9)
    x, y, z = (tensors(tmp_path / name) for name in "xyz")
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert not torch.equal(x["model.embed_tokens.weight"], z["model.embed_tokens.weight"])


def test_dare_keeps_entries_of_the_base_or_moves_them_by_the_rescaled_difference(recipe, family, tensors, tmp_path):
    do(recipe("dare_linear", {"weight": 1}, density=0.25), tmp_path / "out")
    base, a, out = (
        tensors(folder)["model.embed_tokens.weight"] for folder in (family.base, family.a, tmp_path / "out")
    )
    kept = out != base
    assert torch.allclose(out[kept], (base + (a - base) / 0.25)[kept], atol=1e-6)
    n = kept.numel()
    assert abs(kept.float().mean() - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5  # five standard deviations


def test_results_are_rounded_once_to_the_dtype_that_is_asked_for(recipe, family, tensors, tmp_path):
    config = recipe("linear", {"weight": 0.7}, {"weight": 0.3}, more={"dtype": "float32", "out_dtype": "bfloat16"})
    do(config, tmp_path / "out")
    a, b, out = (tensors(folder) for folder in (family.a, family.b, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in out:
        merged = merge_tensor("linear", None, [a[name], b[name]], {"weight": [0.7, 0.3]})
        assert out[name].dtype == torch.bfloat16 and torch.equal(out[name], merged.bfloat16())


def test_without_a_dtype_the_widest_of_the_models_is_kept(recipe, family, tensors, tmp_path):
    half = llama().to(torch.bfloat16)
    save(half, tmp_path / "half")
    config = {"merge_method": "linear", "parameters": {"weight": 1}}
    config["models"] = [{"model": str(tmp_path / "half")}, {"model": str(family.a)}]
    do(config, tmp_path / "out")
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float32}


def test_layers_are_stacked_renumbered_and_their_lists_in_the_config_follow(recipe, family, tensors, tmp_path):
    path = tmp_path / "listed"
    save(llama(), path)
    settings = json.loads((path / "config.json").read_text()) | {"layer_types": TYPES}
    (path / "config.json").write_text(json.dumps(settings))
    sources = [[{"model": str(path), "layer_range": r, "parameters": {"weight": 1}}] for r in ([0, 2], [3, 4], [1, 2])]
    do({"merge_method": "linear", "slices": [{"sources": s} for s in sources]}, tmp_path / "out")
    out, before = tensors(tmp_path / "out"), tensors(path)
    name = "model.layers.{}.self_attn.q_proj.weight"
    for i, layer in enumerate([0, 1, 3, 1]):
        assert torch.equal(out[name.format(i)], before[name.format(layer)])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 4 and written["layer_types"] == [TYPES[i] for i in (0, 1, 3, 1)]


def test_what_belongs_to_a_model_is_carried_and_pickles_are_not(recipe, family, tmp_path):
    base = tmp_path / "base"
    save(llama(), base)
    for name in ("generation_config.json", "special_tokens_map.json", "LICENSE", "training_args.bin", "modeling.py"):
        (base / name).write_text("{}")
    config = recipe("ties", {"weight": 1}) | {"base_model": str(base)}
    do(config, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "special_tokens_map.json", "LICENSE", "merge.yml", "README.md",
    }  # fmt: skip


def test_the_card_names_method_models_paper_and_recipe_and_the_recipe_makes_it_again(recipe, tensors, tmp_path):
    config = recipe("ties", {"weight": 1, "density": 0.3}, {"weight": 0.5})
    do(config, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    named = [m["model"] for m in config["models"]] + [config["base_model"]]
    assert all(part in text for part in [*named, "TIES", "2306.01708", "density: 0.3", "| base |"])
    do(tmp_path / "out" / "merge.yml", tmp_path / "again")
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def card(config, out, **settings):
    do(config, out, **settings)
    return (out / "README.md").read_text()


def test_the_card_counts_the_base_apart_where_it_is_only_subtracted(recipe, family, tmp_path):
    ties = card(recipe("ties", {"weight": 1}, {"weight": 1}), tmp_path / "ties")
    assert f"\n2 models merged onto the base {family.base} by TIES" in ties
    slerp = recipe("slerp", {}, t=0.5)
    slerp["models"] = [{"model": m["model"]} for m in slerp["models"]]
    assert "\n2 models merged by SLERP" in card(slerp, tmp_path / "slerp")


def test_the_cards_command_repeats_dares_seed(recipe, tmp_path):
    dare = card(recipe("dare_linear", {"weight": 1}, density=0.5), tmp_path / "dare", seed=7)
    assert "with seed 7." in dare and "merge.yml --out NEW --seed 7`" in dare
    assert "seed" not in card(recipe("linear", {"weight": 1}), tmp_path / "linear", seed=7)


def test_the_card_says_from_where_relative_paths_count(recipe, family, tmp_path, monkeypatch):
    monkeypatch.chdir(family.a.parent)
    config = recipe("linear", {"weight": 1})
    said = "in the folder where this merge was run"
    assert said not in card(config, tmp_path / "absolute")
    config["models"][0]["model"] = "a"
    assert f"Start it {said}: a counts from there." in card(config, tmp_path / "relative")


@pytest.mark.parametrize(("measure", "words"), [("exact_match", "exact match"), ("good", "good answers")])
def test_the_card_says_on_which_rows_a_run_was_scored(family, tmp_path, measure, words):
    shutil.copytree(family.a, tmp_path / "run" / "model")
    scores = {"before": {measure: 0.0}, "after": {measure: 0.5}, "date": "today"}
    scores["recipe"] = {"method": "full", "task": None, "data": "kept/mine.jsonl"}
    (tmp_path / "run" / "report.json").write_text(json.dumps(scores))
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / "run"), "parameters": {"weight": 1}}]}
    assert f"{words} on held-out rows of mine.jsonl 0% to 50%" in card(config, tmp_path / "out")


@pytest.fixture(params=["LoRA", "DoRA", "rsLoRA"])
def adapter(request, family, tmp_path):
    """(folder of a run with an adapter of the base, the base with the adapter merged by peft)."""
    model, _ = models.load(str(family.base))
    kind = {"use_dora": request.param == "DoRA", "use_rslora": request.param == "rsLoRA"}
    with quiet_peft():
        settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **kind)
        tuned = get_peft_model(model, settings)
    if request.param == "DoRA":
        for name, p in tuned.named_parameters():
            if "magnitude" in name:
                p.data *= 1.3
    tuned.peft_config["default"].base_model_name_or_path = str(family.base)
    tuned.save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run", tuned.merge_and_unload().state_dict()


def test_an_adapter_is_added_to_its_base_as_peft_does(adapter, family, tensors, tmp_path):
    run, merged = adapter
    for i, name in enumerate((str(run), str(run / "adapter"), f"{family.base}+{run}")):
        do({"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}}]}, tmp_path / f"out{i}")
        out = tensors(tmp_path / f"out{i}")
        assert all((out[key] - merged[key]).abs().max() <= 1e-6 for key in out)


def test_adapters_are_task_vectors_of_their_base(adapter, family, tensors, tmp_path):
    run, merged = adapter
    base = tensors(family.base)
    config = {"merge_method": "task_arithmetic", "base_model": str(family.base)}
    do(config | {"models": [{"model": str(run), "parameters": {"weight": -0.5}}]}, tmp_path / "out")
    out = tensors(tmp_path / "out")
    assert all((out[k] - (1.5 * base[k] - 0.5 * merged[k])).abs().max() <= 2e-6 for k in out)


def test_whole_numbers_are_copied_and_a_tied_head_is_not_written_twice(family, tensors, tmp_path):
    for name in ("a", "b"):
        weights = load_file(next(iter((family.a).glob("*.safetensors"))))
        weights |= {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "model.steps": torch.tensor([3])}
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4) * ord(name)
        save(llama(), tmp_path / name)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    listed = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("a", "b")]
    do({"merge_method": "linear", "models": listed}, tmp_path / "out")
    out = tensors(tmp_path / "out")
    assert out["model.steps"].tolist() == [3] and not {name for name in out if "lm_head" in name or "inv_freq" in name}


KILLED = """
import os, signal, sys
from finetune_lab.lab import merging
from finetune_lab.lab.merging import run
merged, count = run._merged, 0
def dying(*args):
    global count
    count += 1
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return merged(*args)
run._merged = dying
merging.merge(sys.argv[1], sys.argv[2], shard_bytes=60_000, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a kill that cannot be caught")
def test_a_killed_merge_leaves_no_model_and_the_next_one_starts_again(recipe, tensors, tmp_path):
    config, out = recipe("linear", {"weight": 1}, {"weight": 1}), tmp_path / "merged" / "out"
    file = tmp_path / "x.yml"
    file.write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    part = out.with_name(".out.part")
    assert not out.exists() and len(list(part.glob("*.safetensors"))) >= 2
    do(file, out)
    assert not part.exists() and len(tensors(out)) == 38


def test_a_failure_in_the_middle_leaves_nothing(recipe, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune_lab.lab.merging.write.write_text", full)
    with pytest.raises(UserError, match="the disk is full: make room"):
        do(recipe("linear", {"weight": 1}), tmp_path / "in" / "out")
    assert list((tmp_path / "in").iterdir()) == []


def test_a_result_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists, and a merge never overwrites"):
        do(recipe("linear", {"weight": 1}), tmp_path / "out")


def test_two_processes_do_not_write_the_same_result(recipe, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.lock"), pytest.raises(UserError, match="another process is merging"):
        do(recipe("linear", {"weight": 1}), tmp_path / "out")
    assert (tmp_path / ".out.lock").exists()  # it is the other one's


def test_a_lock_on_a_file_that_its_last_holder_removed_does_not_count(tmp_path, monkeypatch):
    lock, calls = tmp_path / ".out.lock", []

    class Late(write.FileLock):
        def acquire(self, *args, **settings):
            held = super().acquire(*args, **settings)
            if not calls:
                lock.unlink()  # as if the last holder had done it between opening and locking
            calls.append(self)
            return held

    monkeypatch.setattr(write, "FileLock", Late)
    with write._alone(lock):
        assert len(calls) == 2 and lock.exists()
        with pytest.raises(write.Timeout):
            Late(lock).acquire(timeout=0)
    assert not lock.exists()


def test_a_tensor_is_mapped_and_its_pages_go_with_it(tmp_path):
    value = torch.randn(4_000_000)
    save_file({"x": torch.zeros(3), "y": value}, tmp_path / "m.safetensors")
    stored = checkpoint.read_header(tmp_path / "m.safetensors")["y"]
    process = psutil.Process()
    before = process.memory_info().rss
    mapped = stored.map()
    assert process.memory_info().rss - before < 4_000_000  # nothing is read yet
    assert torch.equal(mapped, value)
    mapped += 1  # a private copy: the file does not change
    del mapped
    assert torch.equal(stored.map(), value)
    assert process.memory_info().rss - before < 20_000_000


def test_the_files_are_what_the_safetensors_library_reads_and_would_write(tmp_path, recipe, tensors):
    do(recipe("linear", {"weight": 1}), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert file.stat().st_size == (tmp_path / "again.safetensors").stat().st_size
    assert oct(os.stat(file).st_mode)[-3:] == oct(0o666 & ~_umask())[-3:]


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_what_the_command_writes_by_default_is_no_part_of_the_repository():
    assert "merged/" in (Path(__file__).parents[3] / ".gitignore").read_text().splitlines()


def test_the_recipes_in_the_repository_can_be_read():
    from finetune_lab.lab.merging import config

    files = sorted((Path(__file__).parents[3] / "recipes").glob("merge_*.yml"))
    assert len(files) >= 2 and all(config.load(file).models() for file in files)
