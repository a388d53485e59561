"""Claims about the commands `sft` and `generate`: one sentence on bad input, JSON for programs, three voices."""

import io
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune_lab.cli import main
from finetune_lab.lab import models
from finetune_lab.lab.finetune import build, talk
from finetune_lab.lab.finetune.encode import turn_end


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the tiny model that is not zero: its answers differ from the base's."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model, tokenizer = models.load("tiny")
    with build.quiet_peft():
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = "tiny"
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sft", "there is nothing to train on"),
        ("sft --task extract --lr high", "lr is 'high': give a number such as 2e-4"),
        ("sft --task sums", "task is 'sums': choose one of extract, answer, math, reply."),
        ("sft none.yaml", "none.yaml cannot be read"),
        ("sft --data none.jsonl", "there is no file none.jsonl"),
        ("sft --task extract --model nowhere", "There is no model 'nowhere'"),
        ("sft --task extract --frobnicate", "unrecognized arguments: --frobnicate"),
        ("generate", "give one of these: a PROMPT, --prompts FILE or --chat."),
        ("generate hello --chat", "give one of these"),
        ("generate hello --show loud", "name one or more of base, start, adapter, merged"),
        ("generate hello --show merged", "merged needs an adapter"),
        ("generate hello --show start", "start needs an adapter"),
        ("generate hello --adapter nowhere", "nowhere holds no adapter"),
        ("generate hello --max-new-tokens 0", "--max-new-tokens is 0"),
        ("generate --prompts none.txt", "none.txt cannot be read"),
        ("generate --chat --show base,adapter --adapter x", "--chat talks to one model"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"finetune-lab {command}" in capsys.readouterr().out


def test_check_shows_the_mask_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("sft --task extract --items 8 --lr 0.5 --check".split()) == 0
    said = capsys.readouterr().out
    assert said.count('[[{"order": ') == 3 and "warning: the learning rate 0.5 is high" in said
    assert "memory: about" in said and not (tmp_path / "runs").exists()


def test_check_as_json_is_the_same_for_programs(capsys):
    assert main("sft --task extract --items 8 --check --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["data"]["rows"] == 8 and len(found["previews"]) == 3


def test_check_of_useless_data_is_exit_code_1(capsys, jsonl):
    data = jsonl("own.jsonl", {"prompt": "lamp " * 60, "completion": "Yes."})
    assert main(f"sft --data {data} --max-length 20 --check".split()) == 1
    assert "error: 1 of 1 rows have no token" in capsys.readouterr().out


def test_bad_lines_as_json(capsys, jsonl):
    data = jsonl("own.jsonl", {"prompt": "a"}, {"prompt": "a", "completion": ""})
    assert main(f"sft --data {data} --json".split()) == 2
    assert [p["line"] for p in json.loads(capsys.readouterr().out)["problems"]] == [1, 2]


def test_json_prints_the_report_and_nothing_else(capsys, tmp_path, jsonl):
    config = tmp_path / "recipe.yaml"
    config.write_text(f"task: extract\nitems: 8\nlr: 1e-3\nbatch_size: 2\ntest_items: 0\nout: {tmp_path / 'run'}\n")
    assert main(f"sft {config} --steps 2 --json".split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recipe"]["lr"] == 1e-3 and report["recipe"]["steps"] == 2 and len(report["loss"]) == 2


def test_the_three_voices_stand_side_by_side(capsys, adapter):
    assert main(["generate", "2 + 3", "--adapter", str(adapter.parent), "--show", "base,adapter,merged", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    assert row["merged"] == row["adapter"] != row["base"]
    assert main(["generate", "2 + 3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["base"] == row["base"]


@pytest.fixture
def preferred(adapter, tmp_path):
    """The folder of a `dpo` run whose start is `adapter`; its own adapter is half as strong."""
    shutil.copytree(adapter, tmp_path / "dpo" / "adapter")
    place = tmp_path / "dpo" / "adapter" / "adapter_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 2}))
    (tmp_path / "dpo" / "recipe.yaml").write_text(f"task: reply\nadapter: {adapter.parent}\n")
    return tmp_path / "dpo"


def answer(capsys, *line):
    assert main(["generate", "2 + 3", "--json", *line]) == 0
    return json.loads(capsys.readouterr().out)["answers"][0]


def test_a_run_of_preferences_is_shown_beside_its_start(capsys, adapter, preferred):
    row = answer(capsys, "--adapter", str(preferred))
    assert list(row) == ["prompt", "start", "adapter"]
    assert row["start"] == answer(capsys, "--adapter", str(adapter))["adapter"] != row["adapter"]
    every = answer(capsys, "--adapter", str(preferred), "--show", "start,base,merged,adapter")
    assert every["merged"] == every["adapter"] == row["adapter"] and every["start"] == row["start"]


def test_without_its_start_a_run_of_preferences_is_shown_beside_the_base(capsys, preferred):
    (preferred / "recipe.yaml").write_text("task: reply\nadapter: gone\n")
    assert list(answer(capsys, "--adapter", str(preferred))) == ["prompt", "base", "adapter"]


def test_a_run_of_sft_has_no_start(capsys, adapter):
    assert main(["generate", "hello", "--adapter", str(adapter), "--show", "start"]) == 2
    assert "did not begin with an adapter" in capsys.readouterr().err


def test_a_model_alone_is_called_model_and_may_be_the_folder_of_a_run(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(models.tiny_folder())
    row = answer(capsys, "--model", str(tmp_path / "run"))
    assert list(row) == ["prompt", "model"] and row["model"] == answer(capsys)["base"]


def test_an_adapter_given_as_a_model_is_one_hint(capsys, adapter):
    assert main(["generate", "hello", "--model", str(adapter.parent)]) == 2
    assert f"use --adapter {adapter.parent}" in capsys.readouterr().err


def test_merging_leaves_the_adapter_as_it_was(adapter):
    voices = talk.load_voices(None, str(adapter), ("merged", "adapter", "base"))
    apart = talk.load_voices(None, str(adapter), ("adapter",))
    assert voices["adapter"](["2 + 3"]) == apart["adapter"](["2 + 3"])


def test_prompts_come_from_jsonl_in_every_format_and_from_text(capsys, adapter, jsonl, tmp_path):
    turns = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "It is 5."}]
    text = tmp_path / "prompts.txt"
    text.write_text("2 + 3\n\n2 + 3\n")
    files = [jsonl("p.jsonl", {"prompt": "2 + 3"}, {"prompt": "2 + 3", "completion": "x"}, {"messages": turns}), text]
    for file, count in zip(files, (3, 2), strict=True):
        assert main(["generate", "--prompts", str(file), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["answers"]
        assert len(rows) == count and len({row["base"] for row in rows}) == 1


def test_every_bad_prompt_line_is_named(capsys, jsonl):
    file = jsonl("p.jsonl", {"prompt": "a"}, {"text": "a"}, {"prompt": ""})
    assert main(["generate", "--prompts", file]) == 2
    said = capsys.readouterr().err
    assert "p.jsonl:2: there is no prompt" in said and "p.jsonl:3: " in said


def test_a_chat_keeps_the_turns(capsys, monkeypatch, adapter):
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 3\n2 + 3\n\n"))
    heard = []
    monkeypatch.setattr(talk, "answers", lambda model, tokenizer, chats, **_: heard.append(len(chats[0])) or ["5"])
    assert main(["generate", "--chat"]) == 0
    assert heard == [1, 3] and capsys.readouterr().out == "model: 5\nmodel: 5\n"


def test_an_adapter_on_another_base_is_refused(capsys, adapter):
    assert main(["generate", "hello", "--adapter", str(adapter), "--model", "smollm2-135m"]) == 2
    assert "trained on tiny, not on smollm2-135m" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_one_sentence(capsys, adapter, tmp_path):
    other = tmp_path / "adapter"
    model, _ = models.load("tiny")
    with build.quiet_peft():
        tuned = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    tuned.save_pretrained(other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 4, "base_model_name_or_path": "tiny"}))
    assert main(["generate", "hello", "--adapter", str(other)]) == 2
    said = capsys.readouterr().err
    assert "does not fit the model" in said and said.count("\n") == 1


def test_a_template_that_our_renderer_cannot_express_is_still_answered():
    """Turns that end differently for each role, as in Mistral's template, and no system turn."""
    model, tokenizer = models.load("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }} [A]{% elif m.role == 'assistant' %}"
        "{{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
    )
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    assert len(talk.answers(model, tokenizer, ["2 + 3"], max_new_tokens=3)) == 1


def test_weights_in_bf16_take_half_the_bytes(adapter):
    with torch.no_grad():
        voices = talk.load_voices("tiny", None, ("base",), torch.bfloat16)
    assert len(voices["base"](["2 + 3"], max_new_tokens=2)) == 1
