"""`finetune-lab vram`: models by every name, figures that add up, one sentence for everything that makes no sense."""

import json
import re

import pytest

from finetune_lab import cli
from finetune_lab.course import vram_report
from finetune_lab.errors import UserError
from finetune_lab.lab.models import tiny_folder
from finetune_lab.methods.memory import Recipe, estimate, from_config
from finetune_lab.methods.memory.presets import GPUS, PRESETS


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Nobody is asked, and the reader's cache is not looked into."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def vram(capsys):
    """Run the command; give back (exit code, standard output, standard error)."""

    def run(*words):
        code = cli.main(["vram", *words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


# ---- models ----


@pytest.mark.parametrize("name", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "LLAMA-3.1-8B"])
def test_a_preset_is_known_by_several_names(vram, name):
    code, out, _ = vram(name, "--json")
    assert code == 0 and json.loads(out)["model"]["parameters"] == 8_030_261_248


@pytest.mark.parametrize("form", ["tiny", "folder", "file"])
def test_tiny_a_folder_and_a_config_file_are_the_same_model(vram, form):
    name = {"tiny": "tiny", "folder": str(tiny_folder()), "file": str(tiny_folder() / "config.json")}[form]
    code, out, _ = vram(name, "--json", "--dtype", "fp32")
    assert code == 0
    assert (
        json.loads(out)["model"]["parameters"]
        == from_config(json.loads((tiny_folder() / "config.json").read_text())).parameters()
    )


def test_a_hub_id_is_read_from_the_local_cache(vram, tmp_path):
    folder = tmp_path / "hub" / "models--owner--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(PRESETS["qwen3-4b"]))
    code, out, _ = vram("owner/mine", "--json")
    assert code == 0 and json.loads(out)["model"]["parameters"] == 4_022_468_096


# ---- figures ----


def test_the_json_is_the_estimate(vram):
    words = [
        "--method",
        "qlora",
        "--rank",
        "8",
        "--seq",
        "1024",
        "--batch",
        "2",
        "--checkpointing",
        "--targets",
        "q_proj,v_proj",
    ]
    _, out, _ = vram("llama-3.2-1b", "--json", *words)
    found = json.loads(out)
    recipe = Recipe(method="qlora", rank=8, seq=1024, batch=2, checkpointing=True, targets=("q_proj", "v_proj"))
    ledger = estimate(from_config(PRESETS["llama-3.2-1b"]), recipe)
    assert (found["peak_bytes"], found["peak_moment"]) == (ledger.peak, ledger.peak_moment)
    assert sum(found["categories_at_peak"].values()) == found["peak_bytes"]
    assert max(row["bytes"] for row in found["moments"]) == found["peak_bytes"]


def test_the_table_names_the_peak_its_moment_and_the_verdict(vram):
    code, out, _ = vram("llama-3.1-8b", "--method", "full", "--gpu", "rtx 4090")
    ledger = estimate(from_config(PRESETS["llama-3.1-8b"]), Recipe(method="full"))
    assert code == 0
    assert f"Peak {vram_report.both(ledger.peak)} at this moment: {ledger.peak_moment}." in out
    assert f"Does not fit into RTX-4090 ({vram_report.both(GPUS['RTX-4090'])})" in out
    assert "levers, each pulled alone" in out and "GB = 10^9 bytes" in out


def test_the_categories_of_the_table_add_up_to_the_peak(vram):
    _, out, _ = vram("smollm2-135m", "--method", "dora", "--seq", "256", "--all-lines")
    ledger = estimate(from_config(PRESETS["smollm2-135m"]), Recipe(method="dora", seq=256))
    for category, size in ledger.categories().items():
        row = next(line for line in out.splitlines() if line.startswith(category + " "))
        assert row.rstrip().endswith(vram_report.gb(size))


def test_it_fits_where_there_is_room(vram):
    _, out, _ = vram("smollm2-135m", "--gpu", "H200")
    assert "Fits into H200" in out and "levers" not in out


def test_fit_answers_with_batch_sequence_model_and_levers(vram):
    words = ["llama-3.1-8b", "--method", "qlora", "--checkpointing", "--fit", "24GB"]
    _, out, _ = vram(*words)
    assert all(
        words in out for words in ("largest batch", "longest sequence", "largest preset", "levers, each pulled alone")
    )
    _, out, _ = vram(*words, "--json")
    found = json.loads(out)["fit"]
    saved = [lever["saves"] for lever in found["levers"]]
    assert found["batch"] >= 1 and found["seq"] % 64 == 0 and saved == sorted(saved, reverse=True)


def test_fit_without_a_size_takes_the_card(vram):
    _, out, _ = vram("llama-3.2-1b", "--gpu", "T4", "--fit", "--json")
    assert json.loads(out)["budget"]["bytes"] == GPUS["T4"]


def test_dpo_takes_the_reference_that_costs_least_by_default(vram):
    for method, reference in (("full", "separate"), ("lora", "adapter-off")):
        _, out, _ = vram("llama-3.2-1b", "--method", method, "--objective", "dpo", "--json")
        assert json.loads(out)["recipe"]["reference"] == reference


def test_list_names_every_preset_and_card(vram):
    code, out, _ = vram("--list")
    assert code == 0 and all(name in out for name in (*PRESETS, *GPUS))
    assert json.loads(vram("--list", "--json")[1])["gpus"] == GPUS


def test_the_pictures_are_written(vram, tmp_path):
    bar, line = tmp_path / "bar.png", tmp_path / "line.png"
    code, out, _ = vram("llama-3.2-1b", "--plot", str(bar), "--timeline", str(line), "--gpu", "T4")
    assert code == 0 and out.count("written:") == 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (bar, line))


@pytest.mark.parametrize(("ending", "start"), [(".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_is_what_its_ending_says(vram, tmp_path, ending, start):
    path = tmp_path / f"bar{ending}"
    assert vram("llama-3.2-1b", "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(start)


def test_a_folder_is_not_overwritten_by_a_picture(vram, tmp_path):
    (tmp_path / "x.png").mkdir()
    code, _, error = vram("llama-3.2-1b", "--plot", str(tmp_path / "x.png"))
    assert code == 2 and "cannot be written" in error


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_the_why_column_names_the_unit_of_what_it_multiplies(vram, method):
    rows = vram("llama-3.1-8b", "--method", method, "--all-lines")[1].splitlines()
    assert not [row for row in rows if re.search(r"\d x \d+:", row)]
    assert "32 x 234,881,028 bytes: adamw" in "\n".join(rows) or method != "full"


def test_a_category_of_small_lines_shows_its_largest(vram):
    rows = vram("llama-3.1-8b", "--method", "lora")[1].splitlines()
    start = next(n for n, row in enumerate(rows) if row.startswith("adapters "))
    shown = rows[start + 1 : start + 5]
    assert "in small lines" not in "\n".join(rows)
    assert all("lora" in row and " bytes" in row for row in shown[:3]) and "smaller lines" in shown[3]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        cli.main(["vram", "--help"])
    assert "finetune-lab vram llama-3.1-8b --method qlora" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--zero 3 --ranks 2",
        "--sharding none",
        "--labelled 0.2 --logits labelled",
        "--labelled 0.2 --logits chunked",
        "--objective grpo --generations 4 --completion 64",
        "--method full --master-weights",
        "--method full --master-weights --offload all",
        "--adapter-dtype bf16 --master-weights",
    ],
)
def test_a_flag_that_counts_is_taken(vram, words):
    code, _, error = vram("llama-3.2-1b", *words.split())
    assert (code, error) == (0, "")


@pytest.mark.parametrize(("seq", "noted"), [("131072", False), ("200000", True)])
def test_a_sequence_beyond_the_models_positions_gets_a_note(vram, seq, noted):
    said = "200,000 tokens are more than the 131,072 positions of llama-3.1-8b"
    assert (f"Note: {said}" in vram("llama-3.1-8b", "--seq", seq)[1]) is noted
    found = json.loads(vram("llama-3.1-8b", "--seq", seq, "--json")[1])["notes"]
    assert any(said in note for note in found) is noted


# ---- bad input: one sentence, exit code 2 ----

LLAMA = dict(PRESETS["llama-3.2-1b"])
BAD_CONFIGS = {
    "heads": (LLAMA | {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7}, "not a multiple of 7"),
    "missing": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "no 'hidden_size'"),
    "family": (LLAMA | {"model_type": "bert"}, "model_type 'bert'"),
    "list": ([], "holds no configuration"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_bad_config_gets_one_sentence(vram, tmp_path, kind):
    config, words = BAD_CONFIGS[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    one_sentence(vram(str(path)), words)


def one_sentence(result, words):
    code, out, error = result
    assert (code, out) == (2, "")
    assert words in error and error.startswith("finetune-lab: ")
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error


WITHOUT_EFFECT = {
    "--zero 3": "--zero 3 shards over ranks: give --ranks N of at least 2",
    "--zero 1 --ranks 1": "--zero 1 shards over ranks",
    "--sharding fsdp": "--sharding fsdp shards over ranks",
    "--sharding ddp": "--sharding ddp copies over ranks",
    "--labelled 0.2": "give --logits labelled too",
    "--labelled 0.2 --logits full": "give --logits labelled too",
    "--labelled 0.2 --logits labelled --objective reward": "has no logits of words",
    "--method full --rank 64": "--rank describes an adapter",
    "--method full --dropout 0": "--dropout describes an adapter",
    "--method full --targets q_proj": "--targets describes an adapter",
    "--method full --adapter-dtype bf16": "--adapter-dtype describes an adapter",
    "--generations 4": "--generations belongs to --objective grpo",
    "--completion 64 --objective dpo": "--completion belongs to --objective ppo and grpo",
    "--master-weights": "fp32 already",
    "--master-weights --method full --dtype fp32": "fp32 already",
}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody"], "no model 'nobody'"),
        (["owner/unknown"], "owner/unknown is not on this machine, and this command asks no network"),
        ([], "which model?"),
        (["llama-3.2-1b", "--rank", "-4"], "rank is -4"),
        (["llama-3.2-1b", "--rank", "many"], "--rank"),
        (["llama-3.2-1b", "--batch", "0"], "batch is 0"),
        (["llama-3.2-1b", "--optimizer", "adamv"], "optimizer 'adamv' is not known"),
        (["llama-3.2-1b", "--method", "lorra"], "method 'lorra' is not known"),
        (["llama-3.2-1b", "--objective", "grpp", "--generations", "4"], "objective 'grpp' is not known"),
        (["llama-3.2-1b", "--method", "dpo"], "--objective dpo"),
        (["llama-3.2-1b", "--fit", "24XB"], "'24XB' is not a size"),
        (["llama-3.2-1b", "--fit", "0GB"], "no memory at all"),
        (["llama-3.2-1b", "--fit"], "--fit needs a size"),
        (["llama-3.2-1b", "--gpu", "RTX-9999"], "no card 'RTX-9999'"),
        (["llama-3.2-1b", "--targets", "x_proj"], "target 'x_proj'"),
        (["mixtral-8x7b"], "mixture of experts"),
        (["llama-3.2-1b", "--zero", "2", "--sharding", "fsdp"], "contradict"),
        (["llama-3.2-1b", "--ranks", "4"], "4 ranks without sharding"),
        *((["llama-3.2-1b", *words.split()], said) for words, said in WITHOUT_EFFECT.items()),
        (["llama-3.2-1b", "--plot", "no-such-folder/x.png"], "there is no folder no-such-folder"),
        (["llama-3.2-1b", "--timeline", "no-such-folder/x.png"], "there is no folder no-such-folder"),
        (["llama-3.2-1b", "--plot", "x.txt"], "ends in .png, .svg, .pdf"),
        (["llama-3.2-1b", "--timeline", "picture"], "ends in .png, .svg, .pdf"),
        (["llama-3.2-1b", "--plot", ""], "ends in .png, .svg, .pdf"),
        (["llama-3.2-1b", "--fit", "-5GB"], "-5GB (see `finetune-lab vram --help`)"),
        (["llama-3.2-1b", "stray"], "stray (see `finetune-lab vram --help`)"),
        (["llama-3.2-1b", "--gpu", "4090"], "in the list: RTX-4090? "),
        (["llama-3.2-1b", "--gpu", "RTX-490"], "in the list: RTX-4090? "),
        (["llama-3.2-1b", "--gpu", "A100"], "A100-40?, A100-80? "),
        (["llama-3.2-1b", "--gpu", "abacus"], "in the list. `finetune-lab vram --list`"),
    ],
)
def test_bad_input_gets_one_sentence(vram, words, said):
    one_sentence(vram(*words), said)


@pytest.mark.parametrize("text", ["not json", ""])
def test_a_broken_file_gets_one_sentence(vram, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    one_sentence(vram(str(tmp_path)), "could not be read as JSON")


def test_an_adapter_is_not_taken_for_a_model(vram, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    one_sentence(vram(str(tmp_path)), "is an adapter")


# ---- sizes ----


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24 gib", 24 * 2**30), ("24", 24e9), ("0.5TB", 5e11), ("512 MB", 512e6)]
)
def test_a_size_is_read_with_its_unit(text, size):
    assert vram_report.parse_size(text) == size


@pytest.mark.parametrize("text", ["24XB", "GB", "-3GB", "0", "1e9", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError):
        vram_report.parse_size(text)
