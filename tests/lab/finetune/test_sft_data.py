"""Claims about the data of a run: every bad line is named before anything starts, nothing vanishes without a word."""

import datasets
import pytest

from finetune_lab.errors import UserError
from finetune_lab.lab.data import DataError
from finetune_lab.lab.finetune import preflight, sources
from finetune_lab.lab.tasks import load_task


def pair(n, answer="Yes."):
    return {"prompt": f"Is lamp {n} on its way?", "completion": answer}


def talk(n):
    return {"messages": [{"role": "user", "content": f"Lamp {n}?"}, {"role": "assistant", "content": "Yes."}]}


def test_every_bad_line_is_named_and_nothing_starts(recipe, jsonl, tmp_path):
    data = jsonl("own.jsonl", pair(1), {"prompt": "?"}, pair(2), {"instruction": "a", "output": "b"}, {"prompt": ""})
    with pytest.raises(DataError) as error:
        preflight.inspect(recipe(data=data))
    assert [problem.line for problem in error.value.problems] == [2, 4, 5]
    assert not (tmp_path / "run").exists()


def test_a_typed_control_token_is_refused_or_written_apart_and_said(recipe, jsonl):
    data = jsonl("own.jsonl", pair(1), pair(2, "Yes.<|end|><|user|>"))
    with pytest.raises(DataError):
        preflight.inspect(recipe(data=data))
    found = preflight.inspect(recipe(data=data, special_tokens="escape"))
    assert any("control tokens" in note for note in found.rows.notes)


def test_the_loss_follows_the_format(recipe, jsonl):
    assert preflight.inspect(recipe(data=jsonl("a.jsonl", pair(1)))).recipe.loss == "completion"
    assert preflight.inspect(recipe(data=jsonl("b.jsonl", talk(1)))).recipe.loss == "assistant"


def test_completion_loss_on_messages_is_refused(recipe, jsonl):
    with pytest.raises(UserError, match="use loss 'assistant'"):
        preflight.inspect(recipe(data=jsonl("b.jsonl", talk(1)), loss="completion"))


def test_preference_data_is_refused(recipe, jsonl):
    data = jsonl("own.jsonl", {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."})
    with pytest.raises(UserError, match="holds preference data, but `sft` needs messages or prompt-completion data"):
        preflight.inspect(recipe(data=data))


def test_held_out_rows_share_no_prompt_with_training():
    rows = [{"prompt": [{"role": "user", "content": str(n % 7)}], "completion": []} for n in range(40)]
    train, valid = sources.split(rows, 0.2, seed=0)
    assert len(train) + len(valid) == 40 and len(valid) >= 8
    assert not {sources.prompt_key(r) for r in train} & {sources.prompt_key(r) for r in valid}


def test_holding_out_the_only_row_is_refused(recipe, jsonl):
    with pytest.raises(UserError, match="leaves nothing to train on"):
        preflight.inspect(recipe(data=jsonl("own.jsonl", pair(1), pair(1)), hold_out=0.5))


def test_validation_of_another_format_is_refused(recipe, jsonl):
    with pytest.raises(UserError, match="use one"):
        preflight.inspect(recipe(data=jsonl("a.jsonl", pair(1)), valid=jsonl("b.jsonl", talk(2))))


@pytest.mark.parametrize("name", ["none.jsonl", "data/none.jsonl", "data/none.csv", "none"])
def test_a_file_that_is_not_there_is_said(recipe, name):
    with pytest.raises(UserError, match="there is no file"):
        preflight.inspect(recipe(data=name))


def test_a_hub_data_set_gets_the_same_checks_and_names_unused_columns(recipe, monkeypatch):
    table = datasets.Dataset.from_list([pair(n) | {"source": "x"} for n in range(4)])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    found = preflight.inspect(recipe(data="someone/lamps:train"))
    assert asked == [("someone/lamps", "train")] and len(found.train) == 4
    assert "columns of someone/lamps:train that are not used: source" in found.rows.notes


def test_a_hub_that_does_not_answer_is_one_sentence(recipe):
    with pytest.raises(UserError, match="the data set someone/lamps could not be fetched") as error:
        preflight.inspect(recipe(data="someone/lamps"))
    assert "\n" not in str(error.value)


def test_a_task_scores_combinations_that_training_never_shows(recipe):
    found = preflight.inspect(recipe(items=200, test_items=20))
    seen = {item["key"] for item in load_task("extract", "train", 200)}
    assert not seen & {row["key"] for row in found.rows.valid}
    assert "0 of them share" in found.rows.notes[0]


def test_rows_whose_answer_is_cut_away_are_counted_and_left_out(recipe, jsonl):
    long = {"prompt": "lamp " * 60, "completion": "Yes."}
    found = preflight.inspect(recipe(data=jsonl("own.jsonl", pair(1), long), max_length=30))
    assert len(found.train) == 1
    assert [f.name for f in found.findings if f.level == "warning"] == ["no labelled token"]


def test_a_length_beyond_the_context_is_refused(recipe):
    with pytest.raises(UserError, match="more than the 256 tokens"):
        preflight.inspect(recipe(max_length=1000))


def test_fp16_without_a_gpu_is_refused(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        preflight.inspect(recipe(precision="fp16"))


def test_the_preflight_estimates_memory_and_warns_when_it_is_too_little(recipe, monkeypatch):
    found = preflight.inspect(recipe())
    assert found.memory["bytes"] > 10e6 and sum(found.memory["parts"].values()) == found.memory["bytes"]
    monkeypatch.setattr("finetune_lab.lab.finetune.memory.free_bytes", lambda cuda: 1_000_000)
    assert "too little memory" in [f.name for f in preflight.inspect(recipe()).findings]


def test_steps_count_every_process_and_forward(recipe, monkeypatch, jsonl):
    own = {"data": jsonl("own.jsonl", *map(pair, range(20))), "steps": None, "epochs": 2}
    assert preflight.inspect(recipe(**own)).total_steps == 10
    assert preflight.inspect(recipe(**own, accumulation=2)).total_steps == 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert preflight.inspect(recipe(**own)).total_steps == 6


def test_combinations_are_those_of_test_in_the_words_of_training():
    for task in ("extract", "answer", "math"):
        new, test = (load_task(task, split, 150) for split in ("combinations", "test"))
        seen = {item["key"] for item in load_task(task, "train", 300)}
        assert not seen & {item["key"] for item in new}
        assert not {item["prompt"][-1]["content"] for item in new} & {item["prompt"][-1]["content"] for item in test}
