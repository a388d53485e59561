"""Claims about recipes: numbers are read from text, every bad value is one sentence, defaults follow the model."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune_lab.errors import UserError
from finetune_lab.lab.finetune.recipe import SftRecipe, load


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_a_rate_that_yaml_reads_as_text_is_a_number(written):
    path = written("task: extract\nlr: 1e-4\n")
    assert yaml.safe_load(path.read_text())["lr"] == "1e-4"
    assert load(SftRecipe, path).lr == 1e-4


def test_a_flag_wins_over_the_file(written):
    assert load(SftRecipe, written("task: extract\nlr: 1e-4\n"), {"lr": "3e-4", "rank": None}).lr == 3e-4


@pytest.mark.parametrize(
    ("flag", "gone"), [({"epochs": "2"}, "steps"), ({"data": "a.jsonl"}, "task"), ({"hold_out": "0.2"}, "valid")]
)
def test_a_flag_replaces_what_it_contradicts_in_the_file(written, flag, gone):
    text = "steps: 5\ntask: extract\n" if gone != "valid" else "data: a.jsonl\nvalid: b.jsonl\n"
    recipe = load(SftRecipe, written(text), flag)
    assert getattr(recipe, gone) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: extract\nlr: fast", "lr is 'fast': give a number such as 2e-4, above 0."),
        ("task: extract\nlr: -1", "lr is -1.0: give a number such as 2e-4, above 0."),
        ("task: extract\nlr: .nan", "lr is nan: give a number such as 2e-4, above 0."),
        ("task: extract\nrank: 1.5", "rank is 1.5: give a whole number, at least 1."),
        ("task: extract\nrank: true", "rank is True: give a whole number, at least 1."),
        ("task: extract\nrank:", "rank is empty: give a whole number, at least 1."),
        ("task: extract\npacking: 1", "packing is 1: give true or false."),
        ("task: extract\nmodel: 7", "model is 7: give text."),
        ("task: extract\ntargets: []", "targets is []: give a name or a list of names."),
        ("task: extract\nmethod: lorra", "method is 'lorra': choose one of lora, dora, qlora, full."),
        ("rank: 8", "there is nothing to train on"),
        ("task: extract\ndata: a.jsonl", "data and task are both given: keep one of them."),
        ("task: extract\nsteps: 5\nepochs: 2", "steps and epochs are both given"),
        ("task: extract\nhold_out: 0.1", "has its own held-out items"),
        ("task: extract\nmax_seq_length: 512", "Here it is called 'max_length'"),
        ("task: extract\nbatch_sise: 4", "Did you mean 'batch_size'?"),
        ("- task", "holds no settings"),
        ("", "holds nothing"),
        ("task: [", "is not YAML: line 1"),
    ],
)
def test_a_bad_value_is_one_sentence(written, text, message):
    with pytest.raises(UserError) as error:
        load(SftRecipe, written(text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load(SftRecipe, tmp_path / "none.yaml")


@pytest.mark.parametrize(("parameters", "lora", "full"), [(2.6e6, 2e-3, 5e-4), (135e6, 1e-3, 1e-4), (8e9, 2e-4, 1e-5)])
def test_the_rate_follows_method_and_size(parameters, lora, full):
    assert SftRecipe(task="extract").completed(parameters).lr == lora
    assert SftRecipe(task="extract", method="qlora").completed(parameters).lr == lora
    assert SftRecipe(task="extract", method="full").completed(parameters).lr == full


def test_what_was_given_is_never_filled():
    given_ = SftRecipe(task="extract", lr=1.0, alpha=3, batch_size=2, items=7, test_items=0, out="x", epochs=1)
    filled = given_.completed(2.6e6)
    assert (filled.lr, filled.alpha, filled.batch_size, filled.items, filled.test_items) == (1.0, 3.0, 2, 7, 0)
    assert filled.steps is None


def test_own_data_is_read_three_times_unless_told_otherwise():
    assert SftRecipe(data="a.jsonl").completed(8e9).epochs == 3


@given(
    lr=st.floats(1e-9, 1e3), rank=st.integers(1, 10**6), dropout=st.floats(0, 0.99),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1), packing=st.booleans(),
)  # fmt: skip
def test_a_recipe_survives_its_own_yaml(tmp_path_factory, lr, rank, dropout, targets, packing):
    recipe = SftRecipe(
        task="math", lr=lr, rank=rank, dropout=dropout, targets=tuple(targets), packing=packing
    ).completed(2.6e6)
    path = tmp_path_factory.getbasetemp() / "same.yaml"
    path.write_text(recipe.dump())
    assert load(SftRecipe, path) == recipe


def test_the_shipped_recipes_load():
    shipped = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))
    shipped = [path for path in shipped if not path.stem.endswith("dpo")]
    names = [load(SftRecipe, path).completed(1e9).name() for path in shipped]
    assert names == ["sft-extract-smollm2-135m-lora", "sft-extract-tiny-lora", "sft-my_data-qwen3-0.6b-qlora"]


def test_every_setting_has_a_sentence_for_help():
    assert all(each.metadata["help"] for each in dataclasses.fields(SftRecipe))
