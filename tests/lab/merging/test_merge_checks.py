"""What cannot be merged is refused before a byte is written, in one sentence; what is seldom wanted is a warning."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_lab.cli import main
from finetune_lab.errors import UserError
from finetune_lab.lab import merge_cli, merging

from merge_models import llama, save  # isort: skip


def settings(**changes):
    """Change config.json."""

    def act(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return act


def weights(change):
    """Change the tensors of a model in one file."""

    def act(folder):
        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return act


def swap_two_tokens(folder):
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    a, b = list(vocabulary)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(value))


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json")


NORM = "model.norm.weight"
REFUSED = {
    "only pickle weights (*.bin)": only_a_pickle,
    "is cut off or broken at": cut_off,
    "broken safetensors header": garbage,
    "different architectures (num_attention_heads is 4 and 8)": settings(num_attention_heads=8, head_dim=4),
    "different architectures (hidden_act is 'silu' and 'gelu')": settings(hidden_act="gelu"),
    "different architectures (tie_word_embeddings": settings(tie_word_embeddings=False),
    "is stored quantised": settings(quantization_config={"quant_method": "gptq"}),
    "could not be read": settings(layer_types=["no such kind"] * 4),
    "have different vocabularies (id": swap_two_tokens,
    "base has a tensor model.norm.weight and": weights(lambda w: w.pop(NORM)),
    "has a tensor model.extra and": weights(lambda w: w.update({"model.extra": torch.ones(3)})),
    "model.norm.weight is (31,) in": weights(lambda w: w.update({NORM: torch.ones(31)})),
    "their vocabularies differ in size": weights(
        lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:1790].clone()})
    ),
    "stores a head that differs": weights(lambda w: w.update({"lm_head.weight": torch.ones(1792, 32)})),
    "holds values that are no numbers": weights(lambda w: w["model.embed_tokens.weight"].fill_(float("nan"))),
    "has dtype F8_E4M3": weights(lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})),
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_model_that_does_not_fit_is_refused_in_one_sentence(says, family, recipe, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(family.a, folder)
    REFUSED[says](folder)
    config = recipe("ties", more={"models": [{"model": str(folder), "parameters": {"weight": 1}}]})
    with pytest.raises(UserError) as error:
        merging.merge(config, tmp_path / "out", progress=False)
    said = str(error.value).replace(str(family.base), "base")
    assert says in said and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_model": "nowhere"}, "There is no model 'nowhere'"),
        ({"base_model": "runs/unknown"}, "There is no folder runs/unknown; paths count from the folder you are in"),
        ({"base_model": "./unknown"}, "There is no folder ./unknown; paths"),
        ({"base_model": "tiny+runs/unknown"}, "There is no folder runs/unknown; paths"),
        ({"tokenizer_source": "nowhere"}, "tokenizer_source is 'nowhere': choose base, or one of"),
        ({"merge_method": "linear", "parameters": {"weight": 0}}, "add up to 0, so they cannot be normalised"),
    ],
)
def test_a_recipe_that_does_not_fit_the_models_is_refused(change, says, recipe, tmp_path):
    with pytest.raises(UserError, match=says):
        merging.merge(recipe("ties", {}, {}, weight=1) | change, tmp_path / "out")


def test_layers_that_are_not_there_are_refused(family):
    sources = [{"model": str(family.a), "layer_range": [2, 5], "parameters": {"weight": 1}}]
    with pytest.raises(UserError, match="layer_range ends at 5, but .* has 4 layers"):
        merging.plan({"merge_method": "linear", "slices": [{"sources": sources}]})


def test_models_of_other_depth_need_slices(family, tmp_path):
    save(llama(num_hidden_layers=3), tmp_path / "short")
    listed = [{"model": str(m), "parameters": {"weight": 1}} for m in (family.a, tmp_path / "short")]
    with pytest.raises(UserError, match="different numbers of layers"):
        merging.plan({"merge_method": "linear", "models": listed})


def test_a_full_disk_is_seen_before_writing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="needs 0.05 GB and the disk has 0.00 GB free"):
        merging.merge(recipe("linear", {"weight": 1}), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_fine_tunes_of_one_base_give_no_warning(recipe):
    assert merging.plan(recipe("ties", {"weight": 1}, {"weight": 1})).warnings == []


def test_a_stranger_is_seen_by_its_distance(recipe, tmp_path):
    torch.manual_seed(1)
    stranger = llama()
    with torch.no_grad():
        for p in stranger.parameters():
            p.copy_(0.02 * torch.randn(p.shape))
    save(stranger, tmp_path / "stranger")
    config = recipe("ties", more={"models": [{"model": str(tmp_path / "stranger"), "parameters": {"weight": 1}}]})
    (warning,) = merging.plan(config).warnings
    assert "1.4" in warning and "seem to share no base" in warning


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (settings(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters is"),
        (settings(rms_norm_eps=1e-3), "rms_norm_eps is"),
    ],
)
def test_settings_that_change_what_weights_mean_are_a_warning(change, says, family, recipe, tmp_path):
    shutil.copytree(family.a, tmp_path / "odd")
    change(tmp_path / "odd")
    config = recipe("ties", more={"models": [{"model": str(tmp_path / "odd"), "parameters": {"weight": 1}}]})
    (warning,) = merging.plan(config).warnings
    assert says in warning


@pytest.mark.parametrize("folder", ["runs", "models"])
def test_a_mistyped_run_is_answered_with_the_one_beside_it(recipe, tmp_path, monkeypatch, folder):
    (tmp_path / folder / "extract").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"There is no folder {folder}/exract; did you mean {folder}/extract\?"):
        merging.plan(recipe("ties", {"weight": 1}) | {"base_model": f"{folder}/exract"})


def sliced(family, *ranges):
    sources = [[{"model": str(family.a), "layer_range": r, "parameters": {"weight": 1}}] for r in ranges]
    return {"merge_method": "linear", "slices": [{"sources": s} for s in sources]}


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ([[0, 3]], ["layer 3 of 4 (counted from 0) is left out: no slice lists it."]),
        ([[1, 2], [1, 3]], ["layers 0, 3 of 4 (counted from 0) are left out: no slice lists them."]),
        ([[0, 3], [1, 4]], []),
    ],
)
def test_layers_that_no_slice_lists_are_a_warning(ranges, says, family):
    assert merging.plan(sliced(family, *ranges)).warnings == says


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"int8_mask": True}, ["int8_mask is ignored"]),
        ({"int8_mask": False, "density": [0.1, 0.2, 0.3, 0.4]}, []),
        ({"density": [0.1, 0.2, 0.3, 0.4, 0.5]}, ["density lists 5 values for 4 layers"]),
        ({"lambda": [{"filter": "mlp", "value": [1] * 9}, {"value": 1}]}, ["lambda lists 9 values for 4 layers"]),
    ],
)
def test_what_a_recipe_says_without_effect_is_a_warning(own, says, recipe):
    found = merging.plan(recipe("ties", {"weight": 1}, **own)).warnings
    assert len(found) == len(says) and all(text.startswith(part) for text, part in zip(found, says, strict=True))


def test_a_models_own_gradient_that_is_too_long_is_named_with_its_model(family, recipe):
    (warning,) = merging.plan(recipe("ties", {"weight": [1] * 7})).warnings
    assert warning.startswith(f"weight of {family.a} lists 7 values for 4 layers")


@pytest.fixture
def file(recipe, tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(json.dumps(recipe("ties", {"weight": 1}, {"weight": 1}, density=0.4)))
    return path


def test_check_shows_the_plan_and_writes_nothing(file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(file), "--check"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ties: 38 tensors of 4 layers, ") and said.endswith("nothing was written.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yml"]


def test_the_command_writes_beside_and_says_where(file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(file)]) == 0
    said = capsys.readouterr()
    assert "merged/mine: model.safetensors" in said.out and "--model merged/mine" in said.out
    assert "merging: 100%" in said.err
    assert (tmp_path / "merged" / "mine" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]
    assert main(["merge", str(file)]) == 2
    assert "a merge never overwrites" in capsys.readouterr().err


def test_json_is_all_of_standard_output(file, capsys, tmp_path):
    assert main(["merge", str(file), "--out", str(tmp_path / "x"), "--json", "--shard-size", "60KB"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_read"] == 3 * report["bytes_written"] == 3 * 4 * report["parameters"]
    assert len(report["files"]) > 2 and report["models"][0]["base"] is True


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.yml"], "none.yml cannot be read"),
        (["x.yml", "--shard-size", "many"], "give a size such as 500MB"),
        ([], "CONFIG"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_sizes_are_decimal():
    assert [merge_cli.read_size(text) for text in ("5GB", "500mb", "0.5 K")] == [5 * 10**9, 5 * 10**8, 500]
