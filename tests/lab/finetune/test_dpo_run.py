"""Claims about a whole run of preference training: which reference, what is left, what the report says."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from finetune_lab.cli import main
from finetune_lab.errors import UserError
from finetune_lab.lab import models, tiers
from finetune_lab.lab.finetune import build, dpo, report, run, runs, score_pairs, talk
from finetune_lab.lab.finetune.dpo_recipe import DpoRecipe
from finetune_lab.lab.finetune.recipe import SftRecipe, load

LOG_2 = math.log(2)


def silent(text):
    pass


def letters(folder, **more):
    """A short supervised run on the shop's letters, as a start."""
    settings = {"task": "reply", "items": 32, "steps": 6, "batch_size": 4, "test_items": 0, "rank": 4, "save_every": 6}
    run.sft(SftRecipe(**(settings | {"out": str(folder)} | more)), say=silent)
    return str(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("start") / "letters")


@pytest.fixture
def train(start, tmp_path):
    def make(**settings):
        own = {} if "data" in settings else {"task": "reply", "items": 16}
        small = {
            "steps": 3,
            "batch_size": 4,
            "save_every": 3,
            "test_items": 0,
            "adapter": start,
            "out": str(tmp_path / "run"),
        }
        return dpo.dpo(DpoRecipe(**(small | own | settings)), say=silent)

    return make


@pytest.fixture(scope="module")
def done(start, tmp_path_factory):
    """A finished run that tests only look at."""
    folder, steps = tmp_path_factory.mktemp("done") / "run", []
    recipe = DpoRecipe(
        task="reply",
        items=16,
        steps=4,
        batch_size=4,
        save_every=2,
        test_items=4,
        adapter=start,
        out=str(folder),
        lr=1e-3,
    )
    made = dpo.dpo(recipe, say=silent, on_step=lambda step, loss: steps.append([step, loss]))
    return SimpleNamespace(folder=folder, report=made, steps=steps, recipe=recipe)


def test_a_run_leaves_one_adapter_on_the_same_base_and_no_copy_of_its_reference(done, start):
    left = {p.relative_to(done.folder).as_posix() for p in done.folder.rglob("*") if p.is_file()}
    assert left >= {"report.md", "report.json", "curve.png", "recipe.yaml", "adapter/adapter_model.safetensors"}
    assert not [name for name in left if "ref" in name or name.endswith((".bin", ".pt"))]
    assert talk.base_of(done.folder / "adapter") == "tiny"
    before, after = (load_file(f"{folder}/adapter/adapter_model.safetensors") for folder in (start, done.folder))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


def test_plain_peft_gives_the_answers_of_the_report(done):
    model, tokenizer = models.load("tiny")
    with build.quiet_peft():
        tuned = PeftModel.from_pretrained(model, done.folder / "adapter").eval()
    found = dpo.preflight_dpo.inspect(done.recipe)
    made = score_pairs.score(
        tuned, tokenizer, found.valid_rows, found.valid, task="reply", beta=0.1,
        before=runs.read(done.folder / "before.json"),
    )  # fmt: skip
    assert made["scores"] == pytest.approx(done.report["after"], abs=1e-4)


def test_the_reference_is_the_start_and_not_the_base(done):
    """Policy and reference are equal before the first step: log 2. Against the bare base it would be another number."""
    assert done.report["loss"][0][1] == pytest.approx(LOG_2, abs=1e-6)
    assert done.report["before"]["accuracy"] == 0.5 and done.report["before"]["margin"] == 0
    assert done.report["after"]["margin"] > 0


def test_the_report_says_what_a_reader_asks(done):
    made = done.report
    asked = {"good", "words", "accuracy", "likelier", "margin", "chosen_logp", "rejected_logp"}
    assert set(made["before"]) == set(made["after"]) == asked
    assert len(made["loss"]) == len(made["rewards"]) == 4 and made["loss"] == done.steps
    assert [step for step, _ in made["held_out_loss"]] == [2, 4]
    page = (done.folder / "report.md").read_text()
    for part in ("# dpo, lora on tiny: reply", "- Preference learned: ", "- Answers: ", "Start and reference: ", "| accuracy | 50.0 %", "- margin: mean reward", "steps of 4 pairs",
                 "sampled (temperature 1) answers", "curve.png", "loss: sigmoid", "generate --adapter"):  # fmt: skip
        assert part in page, part


def test_likelihood_displacement_is_said_only_where_it_happened(done):
    for moved, says in ((-1.0, True), (1.0, False)):
        after = done.report["after"] | {"chosen_logp": done.report["before"]["chosen_logp"] + moved}
        page = report.page(done.report | {"after": after}, done.folder)
        assert ("The chosen answers became less likely" in page) == says


def test_its_own_recipe_is_the_same_run(done):
    said = []
    made = dpo.dpo(load(DpoRecipe, done.folder / "recipe.yaml"), say=said.append)
    assert made["loss"] == done.report["loss"] and "this run is finished" in said[0]


def test_another_start_under_the_same_name_is_another_run(done, start, tmp_path):
    other = letters(tmp_path / "letters", seed=1)
    with pytest.raises(UserError, match="holds another run: adapter was"):
        dpo.dpo(DpoRecipe(**(vars(done.recipe) | {"adapter": other})), say=silent)


def test_reference_at_each_step_and_computed_before_give_the_same_curve(train, tmp_path):
    curves = [train(reference=r, out=str(tmp_path / r))["loss"] for r in ("live", "precomputed")]
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "first"),
    [("ipo", 25.0), ("hinge", 1.0), ("robust", LOG_2), ("sigmoid_norm", LOG_2), ("kto", 0.5)],
)
def test_every_loss_begins_where_its_formula_says(train, loss, first):
    """With rewards of zero: ipo (1 / 2 tau)^2 at tau 0.1, hinge 1, kto 1 - sigmoid(0)."""
    smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
    made = train(loss=loss, steps=2, save_every=2, **smoothing)
    assert made["loss"][0][1] == pytest.approx(first, abs=1e-4)


def test_full_training_goes_on_from_a_model_and_leaves_one(tmp_path, train):
    model = letters(tmp_path / "letters", method="full", rank=16) + "/model"
    made = train(adapter=None, model=model, method="full")
    assert made["loss"][0][1] == pytest.approx(LOG_2, abs=1e-6)
    assert made["result"] == "model" and made["trained_parameters"] == made["parameters"]
    models.load(str(tmp_path / "run" / "model"))


def test_a_new_adapter_on_a_model_has_that_model_as_its_reference(train):
    made = train(adapter=None, rank=4)
    assert made["loss"][0][1] == pytest.approx(LOG_2, abs=1e-6) and made["result"] == "adapter"


def test_in_4_bits_policy_and_reference_have_the_same_precision(train, tmp_path):
    start = letters(tmp_path / "letters", method="qlora")
    made = train(adapter=start)
    assert made["recipe"]["method"] == "qlora"
    assert made["loss"][0][1] == pytest.approx(LOG_2, abs=1e-6)


def test_own_pairs_are_scored_before_and_after(train, jsonl):
    rows = [{"prompt": f"Is lamp {n} here?", "chosen": "It is here.", "rejected": "No."} for n in range(30)]
    made = train(data=jsonl("own.jsonl", *rows), hold_out=0.2, test_items=None, steps=12, lr=1e-3)
    assert made["scored_rows"] == 6 and "good" not in made["after"]
    assert made["after"]["accuracy"] == 1 and made["after"]["margin"] > 0
    assert made["samples"][0]["expected"] == "It is here."


def test_thumbs_are_scored_over_all_combinations(train, jsonl):
    rows = [
        {"prompt": f"Is lamp {n} here?", "completion": "It is here." if n % 2 else "No.", "label": bool(n % 2)}
        for n in range(30)
    ]
    made = train(data=jsonl("own.jsonl", *rows), hold_out=0.2, test_items=None, steps=12, lr=1e-3)
    assert made["recipe"]["loss"] == "kto" and made["after"]["accuracy"] == 1 and made["after"]["margin"] > 0


@pytest.mark.parametrize(
    ("good", "bad", "paired", "expected"),
    [
        ([1, 1], [0, 2], True, 0.5),
        ([1, 1], [1, 1], True, 0.5),
        ([1, 3], [0, 2], False, 0.75),
        ([2], [0, 1, 2], False, 5 / 6),
    ],
)
def test_accuracy_counts_pairs_or_combinations_and_a_tie_is_half(good, bad, paired, expected):
    good, bad = (torch.tensor(values, dtype=torch.float64) for values in (good, bad))
    assert score_pairs.share(good, bad, paired) == pytest.approx(expected)


def test_useless_pairs_train_nothing(train, jsonl, tmp_path):
    data = jsonl("own.jsonl", {"prompt": "Lamp?", "chosen": "lamp " * 20 + "a", "rejected": "lamp " * 20 + "b"})
    with pytest.raises(UserError, match="1 of 1 pairs are the same tokens"):
        train(data=data, max_length=24)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("dpo", "there is nothing to train on"),
        ("dpo --task extract", "task is 'extract': choose one of reply."),
        ("dpo --task reply --adapter nowhere", "nowhere holds no adapter"),
        ("dpo --task reply --loss ppo", "loss is 'ppo': choose one of sigmoid"),
        ("dpo --task reply --method full", "run `finetune-lab sft --task reply --method full` first"),
        ("dpo none.yaml", "none.yaml cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--help"])
    assert "finetune-lab dpo --task reply" in capsys.readouterr().out


def test_check_shows_three_pairs_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("dpo --task reply --items 12 --check".split()) == 0
    said = capsys.readouterr().out
    assert said.count("  chosen:   [[") == said.count("  rejected: [[") == 3
    assert not list(tmp_path.iterdir())


def test_check_describes_both_stages_that_would_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("dpo --task reply --out runs/mine --check".split()) == 0
    said = capsys.readouterr().out
    assert said.index("stage 1, in runs/mine-start") < said.index("stage 2, in runs/mine:")
    assert "lr 0.004, 60 steps of 8" in said and "lr 0.0001, 40 steps of 8" in said
    assert "bare base" not in said and "learning rate" not in said and not list(tmp_path.iterdir())
    assert main("dpo --task reply --out runs/mine --check --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["start"]["recipe"]["out"], found["recipe"]["lr"]) == ("runs/mine-start", 1e-4)


def test_check_after_the_first_stage_is_of_the_run_that_goes_on(capsys, start, tmp_path):
    (tmp_path / "run-start").symlink_to(start)
    assert main(f"dpo --task reply --rank 4 --out {tmp_path / 'run'} --check --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["adapter"] == str(tmp_path / "run-start") and "start" not in found


def test_without_a_start_the_tiny_model_learns_to_write_letters_first(capsys, tmp_path, monkeypatch):
    short = dataclasses.replace(tiers.TINY.recipes["reply"], steps=2, batch_size=2, items=4)
    monkeypatch.setitem(tiers.TINY.recipes, "reply", short)
    line = (
        f"dpo --task reply --items 8 --steps 2 --batch-size 2 --test-items 0 --rank 2 --out {tmp_path / 'run'} --json"
    )
    assert main(line.split()) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recipe"]["adapter"] == str(tmp_path / "run-start") and made["recipe"]["rank"] == 2
    assert runs.read(tmp_path / "run-start" / "run.json")["finished"]


def test_check_imports_nothing_that_trains():
    """TRL, peft and bitsandbytes take seconds of CPU to import, and a look at the data needs none of them."""
    code = (
        "import sys; from finetune_lab.cli import main\n"
        "for command in ('sft', 'dpo'):\n"
        "    assert main([command, '--task', 'reply', '--items', '4', '--check']) == 0\n"
        "print(sorted({'trl', 'peft', 'bitsandbytes', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
