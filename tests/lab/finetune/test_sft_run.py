"""Claims about a whole run: what it leaves behind, what it never writes over, every method and option trains."""

import dataclasses
import json
import shutil

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from finetune_lab.errors import UserError
from finetune_lab.lab import models
from finetune_lab.lab.finetune import build, report, run, runs, talk, watch
from finetune_lab.lab.finetune.recipe import SftRecipe, load


@pytest.fixture
def train(recipe):
    def make(**settings):
        more = {k: settings.pop(k) for k in ("fresh", "on_step", "say") if k in settings}
        return run.sft(recipe(**settings), **({"say": lambda text: None} | more))

    return make


def test_a_run_leaves_a_report_a_curve_a_recipe_and_safetensors_only(done):
    left = {p.relative_to(done.folder).as_posix() for p in done.folder.rglob("*") if p.is_file()}
    assert left >= {"report.md", "report.json", "curve.png", "recipe.yaml", "adapter/adapter_model.safetensors"}
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pth"))]
    assert json.loads((done.folder / "report.json").read_text())["after"] == done.report["after"]


def test_the_report_says_what_a_reader_asks(done):
    made = done.report
    assert {"exact_match", "field_f1", "loss"} <= set(made["before"]) == set(made["after"])
    assert made["after"]["loss"] < made["before"]["loss"]
    assert len(made["loss"]) == 4 and [step for step, _ in made["held_out_loss"]] == [2, 4]
    assert made["seconds"] > 0 and made["peak_bytes"] > 1e8 and made["seed"] == 5
    assert made["versions"]["trl"] and "git" in made and made["trained_parameters"] == 291_840
    page = (done.folder / "report.md").read_text()
    for part in ("| exact match |", "curve.png", "## Samples", "## The bill", "lr: 0.002", "generate --adapter"):
        assert part in page


def test_the_adapter_names_its_base_as_people_do(done):
    assert talk.base_of(done.folder / "adapter") == "tiny"


def test_each_step_is_told_to_the_caller(done):
    assert done.steps == done.report["loss"]


def test_its_own_recipe_is_the_same_run(done):
    said = []
    made = run.sft(load(SftRecipe, done.folder / "recipe.yaml"), say=said.append)
    assert made["loss"] == done.report["loss"] and "this run is finished" in said[0]


def test_a_finished_run_is_not_written_over_by_another_recipe(done):
    weights = (done.folder / "adapter/adapter_model.safetensors").read_bytes()
    other = dataclasses.replace(load(SftRecipe, done.folder / "recipe.yaml"), lr=0.001)
    with pytest.raises(UserError, match=r"lr was 0.002 and is now 0.001"):
        run.sft(other, say=lambda text: None)
    assert (done.folder / "adapter/adapter_model.safetensors").read_bytes() == weights


def test_fresh_puts_the_older_run_aside_and_says_where(done, train, tmp_path):
    shutil.copytree(done.folder, tmp_path / "run")
    said = []
    train(lr=0.001, fresh=True, say=said.append)
    assert "is now in" in said[0] and (tmp_path / "run.1" / "report.md").exists()
    assert json.loads((tmp_path / "run/report.json").read_text())["recipe"]["lr"] == 0.001


@pytest.mark.parametrize("method", ["dora", "qlora", "full"])
def test_every_method_learns(train, method):
    made = train(method=method, lr=3e-3 if method != "full" else 1e-3, warmup=0, steps=6)
    assert made["after"]["loss"] < made["before"]["loss"] - 0.1


def test_full_fine_tuning_leaves_a_model_that_loads_and_trains_again(train, tmp_path):
    train(method="full")
    model, _ = models.load(str(tmp_path / "run" / "model"))
    assert sum(p.numel() for p in model.parameters()) == 2_558_016
    made = train(model=str(tmp_path / "run" / "model"), out=str(tmp_path / "second"))
    assert made["parameters"] == 2_558_016 and made["recipe"]["lr"] == 2e-3


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
    made = train(data=jsonl("own.jsonl", *rows), hold_out=0.2, steps=20, epochs=None)
    assert made["before"]["exact_match"] == 0 and made["after"]["exact_match"] == 1
    assert made["scored_rows"] == 6


def test_messages_train_on_the_assistant_only(train, jsonl):
    turns = [{"role": "user", "content": "Is it here?"}, {"role": "assistant", "content": "Yes."}]
    made = train(data=jsonl("own.jsonl", *[{"messages": turns * 2}] * 8))
    assert made["recipe"]["loss"] == "assistant" and made["previews"][0].count("[[Yes.<|end|>]]") == 2
    assert made["after"] == {} and any(f["name"] == "nothing held out" for f in made["findings"])


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
    """The reason for the first repair in `resuming.Resuming`: fails when peft no longer does it, and the repair can go."""
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


def test_what_is_still_wrong_stands_first_in_the_samples():
    rows = [{"prompt": [{"content": str(n)}], "completion": [{"content": "yes"}]} for n in range(9)]
    shown = report.samples(rows, ["no"] * 9, ["yes"] * 6 + ["no"] * 3)
    assert [s["prompt"] for s in shown] == ["6", "7", "0", "1"]


@pytest.mark.parametrize("text", ["```\nplain", "a | b\n```````", ""])
def test_no_text_of_the_data_breaks_the_page(done, text):
    sample = dict.fromkeys(report.ASPECTS, text)
    page = report.page(done.report | {"samples": [sample], "previews": [text]}, done.folder)
    html = MarkdownIt().enable("table").render(page)
    assert [h for h in ("Samples", "The bill", "Data", "Use it", "Recipe") if f"<h2>{h}</h2>" not in html] == []


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
