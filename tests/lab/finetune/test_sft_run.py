"""Claims about a whole run: what it leaves behind, what it never writes over, every method and option trains."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetune_lab.errors import UserError
from finetune_lab.lab import models
from finetune_lab.lab.finetune import build, run, runs, talk, watch
from finetune_lab.lab.finetune.recipe import SftRecipe, load


@pytest.fixture
def train(recipe):
    def make(**settings):
        more = {k: settings.pop(k) for k in ("fresh", "on_step", "say") if k in settings}
        return run.sft(recipe(**settings), **({"say": lambda text: None} | more))

    return make


def test_a_run_leaves_a_report_a_curve_a_recipe_and_safetensors_only(train, tmp_path):
    report = train()
    folder = tmp_path / "run"
    left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert left >= {"report.md", "report.json", "curve.png", "recipe.yaml", "adapter/adapter_model.safetensors"}
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pth"))]
    assert json.loads((folder / "report.json").read_text())["after"] == report["after"]


def test_the_report_says_what_a_reader_asks(train, tmp_path):
    report = train(seed=5)
    assert {"exact_match", "field_f1", "loss"} <= set(report["before"]) == set(report["after"])
    assert report["after"]["loss"] < report["before"]["loss"]
    assert len(report["loss"]) == 4 and [step for step, _ in report["held_out_loss"]] == [2, 4]
    assert report["seconds"] > 0 and report["peak_bytes"] > 1e8 and report["seed"] == 5
    assert report["versions"]["trl"] and report["git"]["commit"] and report["trained_parameters"] == 291_840
    page = (tmp_path / "run" / "report.md").read_text()
    for part in (
        "| exact match |",
        "curve.png",
        "## Samples",
        "## The bill",
        "lr: 0.002",
        "finetune-lab generate --adapter",
    ):
        assert part in page


def test_its_own_recipe_is_the_same_run(train, tmp_path):
    train()
    again = load(SftRecipe, tmp_path / "run" / "recipe.yaml")
    said = []
    report = run.sft(again, say=said.append)
    assert report["result"] == "adapter" and "this run is finished" in said[0]


def test_a_finished_run_is_not_written_over_by_another_recipe(train, tmp_path):
    train()
    weights = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"lr was 0.002 and is now 0.001"):
        train(lr=0.001)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == weights


def test_fresh_puts_the_older_run_aside_and_says_where(train, tmp_path):
    train()
    said = []
    train(lr=0.001, fresh=True, say=said.append)
    assert "is now in" in said[0] and (tmp_path / "run.1" / "report.md").exists()
    assert json.loads((tmp_path / "run/report.json").read_text())["recipe"]["lr"] == 0.001


def test_the_adapter_names_its_base_as_people_do(train, tmp_path):
    train()
    assert talk.base_of(tmp_path / "run" / "adapter") == "tiny"


def test_each_step_is_told_to_the_caller(train):
    seen = []
    report = train(on_step=lambda step, loss: seen.append([step, loss]))
    assert seen == report["loss"]


@pytest.mark.parametrize("method", ["dora", "qlora", "full"])
def test_every_method_learns(train, method):
    report = train(method=method, lr=3e-3 if method != "full" else 1e-3, warmup=0, steps=6)
    assert report["after"]["loss"] < report["before"]["loss"] - 0.1


def test_full_fine_tuning_leaves_a_model_that_loads_and_trains_again(train, tmp_path):
    train(method="full")
    model, _ = models.load(str(tmp_path / "run" / "model"))
    assert sum(p.numel() for p in model.parameters()) == 2_558_016
    report = train(model=str(tmp_path / "run" / "model"), out=str(tmp_path / "second"))
    assert report["parameters"] == 2_558_016 and report["recipe"]["lr"] == 2e-3


def test_qlora_switches_off_the_path_that_cuts_gradients_and_keeps_its_adapter_in_bf16(recipe, tmp_path):
    model, _ = build.load(recipe(method="qlora").completed(2.6e6, precision="fp32"))
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 35 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    run.sft(recipe(method="qlora"), say=lambda text: None)
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "neftune": 5},
        {"checkpointing": True, "accumulation": 2, "precision": "bf16"},
        {
            "schedule": "cosine",
            "warmup": 0.1,
            "clip": 0,
            "weight_decay": 0.1,
            "loss": "all",
            "targets": "q_proj,v_proj",
        },
        {"optimizer": "adamw_8bit", "dropout": 0.1},
        {"optimizer": "adafactor", "schedule": "constant_with_warmup"},
    ],
    ids=",".join,
)
def test_every_option_trains(train, options):
    losses = [loss for _, loss in train(**options, test_items=0)["loss"]]
    assert len(losses) == 4 and losses[-1] < losses[0] + 0.3


def test_own_data_is_scored_before_and_after(train, jsonl):
    rows = [{"prompt": f"Is lamp {n} here?", "completion": "It is here."} for n in range(30)]
    report = train(data=jsonl("own.jsonl", *rows), hold_out=0.2, steps=20, epochs=None)
    assert report["before"]["exact_match"] == 0 and report["after"]["exact_match"] == 1
    assert report["scored_rows"] == 6


def test_messages_train_on_the_assistant_only(train, jsonl):
    turns = [{"role": "user", "content": "Is it here?"}, {"role": "assistant", "content": "Yes."}]
    report = train(data=jsonl("own.jsonl", *[{"messages": turns * 2}] * 8))
    assert report["recipe"]["loss"] == "assistant" and report["previews"][0].count("[[Yes.<|end|>]]") == 2
    assert report["after"] == {} and any(f["name"] == "nothing held out" for f in report["findings"])


def test_a_layer_that_does_not_exist_is_named(train):
    with pytest.raises(
        UserError, match=r"no linear layer 'query_key_value' to adapt; choose among down_proj, gate_proj"
    ):
        train(targets="query_key_value")


def test_data_without_a_token_that_counts_trains_nothing(train, jsonl, tmp_path):
    data = jsonl("own.jsonl", {"prompt": "lamp " * 60, "completion": "Yes."})
    with pytest.raises(UserError, match="1 of 1 rows have no token that counts"):
        train(data=data, max_length=20)
    assert not (tmp_path / "run").exists()


def test_a_broken_loss_stops_the_run(train):
    with pytest.raises(UserError, match="the loss is nan at step"):
        train(method="full", lr=1e30, clip=0, warmup=0, steps=8, items=32)


def test_peft_changes_a_bf16_adapter_to_fp32_when_a_checkpoint_is_loaded(recipe, tmp_path):
    """The reason for the first repair in `session.Resuming`: fails when peft no longer does it, and the repair can go."""
    from peft import PeftModel, get_peft_model

    model, _ = models.load("tiny")
    settings = recipe().completed(2.6e6)
    with build.quiet_peft():
        tuned: PeftModel = get_peft_model(model, build.adapter_config(settings, model))
    for p in tuned.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.bfloat16)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


def test_a_bar_starts_where_the_run_goes_on(capsys):
    class State:
        is_world_process_zero, max_steps, global_step = True, 10, 4

    bar = watch.Bar()
    bar.on_train_begin(None, State, None)
    assert bar.bar.n == 4
    bar.on_train_end(None, State, None)


def test_a_run_that_another_process_holds_is_left_alone(train, tmp_path):
    with runs.locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        train()
