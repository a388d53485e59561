"""Claims about recipes of preference training: an adapter that goes on brings its own settings, nothing is ignored."""

import dataclasses
from pathlib import Path

import pytest
import torch.distributed.run
from peft import LoraConfig, get_peft_model

from finetune_lab.errors import UserError
from finetune_lab.lab import models
from finetune_lab.lab.finetune import build, runs
from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe
from finetune_lab.lab.finetune.recipe import SftRecipe, load, read_yaml


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a run with an adapter of rank 4 on two layers."""
    folder = tmp_path_factory.mktemp("start")
    model, _ = models.load("tiny")
    with build.quiet_peft():
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["v_proj", "q_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = "tiny"
    tuned.save_pretrained(folder / "adapter")
    return folder


def test_an_adapter_that_goes_on_brings_its_own_settings(start):
    recipe = DpoRecipe(task="reply", adapter=str(start))
    assert (recipe.model, recipe.method, recipe.rank, recipe.alpha) == ("tiny", "lora", 4, 12.0)
    assert recipe.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize(("name", "value"), [("rank", 8), ("alpha", 8), ("method", "dora"), ("targets", "all-linear")])
def test_a_setting_that_the_adapter_does_not_have_is_refused(start, name, value):
    with pytest.raises(UserError, match=rf"{name} is .*leave {name} away"):
        DpoRecipe(task="reply", adapter=str(start), **{name: value})


def test_an_adapter_of_another_base_is_refused(start):
    with pytest.raises(UserError, match="was trained on tiny, not on smollm2-135m: leave model away"):
        DpoRecipe(task="reply", adapter=str(start), model="smollm2-135m")


def test_an_adapter_of_a_4_bit_run_goes_on_in_4_bits(start, tmp_path):
    (tmp_path / "adapter").symlink_to(start / "adapter")
    (tmp_path / "recipe.yaml").write_text("model: tiny\nmethod: qlora\nrank: 4\n")
    assert DpoRecipe(task="reply", adapter=str(tmp_path)).method == "qlora"


def test_a_run_that_trained_the_whole_model_is_no_adapter_to_start_from(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a fully fine-tuned model, not an adapter: use --model"):
        DpoRecipe(task="reply", adapter=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpo"}, "the loss of DPO is called sigmoid here"),
        ({"loss": "ppo"}, "loss is 'ppo': choose one of sigmoid, ipo, hinge, robust, sigmoid_norm, kto"),
        ({"loss": "robust"}, "robust without label_smoothing is plain DPO"),
        ({"loss": "sigmoid", "desirable_weight": 2}, "desirable_weight does nothing in loss sigmoid: use loss kto"),
        ({"loss": "ipo", "undesirable_weight": 2}, "undesirable_weight does nothing in loss ipo"),
        ({"beta": 0}, "beta is 0.0: give a number such as 0.1, above 0"),
        ({"epochs": 0}, "epochs is 0.0: give a number such as 1, above 0"),
        ({"label_smoothing": 0.1}, "label_smoothing does nothing in loss sigmoid"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing does nothing in loss ipo"),
        ({"method": "full", "reference": "live"}, "reference live needs an adapter"),
        ({"dropout": 0.1}, "dropout is for `sft`"),
        ({"adapter": "nowhere"}, "nowhere holds no adapter"),
        ({"task": "extract"}, "task is 'extract': choose one of reply"),
    ],
)
def test_what_would_be_ignored_or_is_wrong_is_one_sentence(settings, message):
    with pytest.raises(UserError, match=message) as error:
        DpoRecipe(**({"task": "reply"} | settings))
    assert "\n" not in str(error.value)


def test_label_smoothing_is_for_the_robust_loss():
    assert DpoRecipe(task="reply", loss="robust", label_smoothing=0.1).label_smoothing == 0.1


def test_full_training_has_a_precomputed_reference():
    assert DpoRecipe(task="reply", method="full").reference == "precomputed"


def test_an_adapter_that_has_learnt_already_takes_a_lower_rate_than_a_new_one(start):
    rates = [DpoRecipe(task="reply", adapter=s).completed(2.6e6).lr for s in (str(start), None)]
    assert rates[0] < rates[1]


def test_one_pass_over_the_data_is_the_default():
    assert DpoRecipe(data="a.jsonl").completed(8e9).epochs == 1.0


def test_a_recipe_survives_its_own_yaml(start, tmp_path):
    recipe = DpoRecipe(task="reply", adapter=str(start), loss="ipo").completed(2.6e6, max_length=64, precision="fp32")
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert load(DpoRecipe, tmp_path / "recipe.yaml") == recipe


def test_the_shipped_recipe_loads(start):
    path = Path(__file__).resolve().parents[3] / "recipes" / "reply_dpo.yaml"
    assert read_yaml(path)["adapter"] == "runs/letters"
    assert load(DpoRecipe, path, {"adapter": str(start)}).steps == 40


def test_an_adapter_that_is_no_lora_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q_proj"]}')
    with pytest.raises(UserError, match="describes no LoRA adapter"):
        runs.settings_of(tmp_path)


@pytest.mark.parametrize("kind", [SftRecipe, DpoRecipe])
def test_torchrun_leaves_our_flags_alone(kind):
    """Its parser reads the whole line, and stops at a word that begins like two of its own options (`--start`)."""
    theirs = torch.distributed.run.get_args_parser()
    flags = [f"--{each.name.replace('_', '-')}" for each in dataclasses.fields(kind)]
    read = theirs.parse_args(["-m", "finetune_lab", *flags])
    assert read.training_script_args == flags
